"""How positions enter: rotary frequencies (rope_scaling, or transformers 5's rope_parameters), and windows.

The formulas are Hugging Face transformers' (modeling_rope_utils), which are those of the models' authors.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from pronghorn.errors import ConfigError
from pronghorn.models.config import Fields
from pronghorn.ops import Rope

Frequencies = list[float]

CHANGING = "its frequencies change with the length of the text, so that one prompt has more than one answer"
REFUSED = {"dynamic": CHANGING, "longrope": CHANGING, "su": CHANGING}


def rope_of(fields: Fields, head_dim: int, context: int) -> Rope:
    """Reads every rotary key of `fields` (rope_theta, rope_scaling, rope_parameters, rope_factors, ...)."""
    if head_dim % 2:
        raise ConfigError(f"{fields.what}: head_dim is {head_dim}: a rotary embedding needs an even one")
    scaling, parameters = fields.fields("rope_scaling"), fields.fields("rope_parameters")
    if scaling.left and parameters.left:
        raise ConfigError(f"{fields.what}: rope_scaling and rope_parameters are both given")
    given = scaling if scaling.left else parameters
    theta = fields.number("rope_theta", 10000.0, low=1.0)
    theta = given.number("rope_theta", theta, low=1.0)
    for place in (fields, given):
        if (share := place.number("partial_rotary_factor", 1.0)) != 1.0:
            raise place.fault("partial_rotary_factor", share, "1, the only one implemented")

    kind = given.take("type", "default")  # the older name
    kind = given.take("rope_type", kind)
    plain = [theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    if not isinstance(kind, str) or kind not in SCALINGS:
        reason = f" ({REFUSED[kind]})" if isinstance(kind, str) and kind in REFUSED else ""
        raise given.fault("rope_type", kind, f"one of {', '.join(SCALINGS)}{reason}")
    frequencies, magnitude = SCALINGS[kind](given, plain, theta, context)
    given.finish()

    factors = fields.take("rope_factors", [])  # what GGUF files of Llama 3.1 have in rope_scaling's place
    if factors:
        numbers = isinstance(factors, list) and all(type(f) is float and 0 < f < 1e15 for f in factors)
        if not numbers or len(factors) != len(plain) or kind != "default":
            raise fields.fault("rope_factors", factors, f"{len(plain)} numbers above 0, no other scaling")
        frequencies = [f / by for f, by in zip(frequencies, factors, strict=True)]
    return Rope(tuple(frequencies), fields.flag("rope_interleaved", False), magnitude)


def default(given: Fields, plain: Frequencies, theta: float, context: int) -> tuple[Frequencies, float]:
    """theta^(-2i/d): Su et al. 2021, arXiv:2104.09864."""
    return plain, 1.0


def linear(given: Fields, plain: Frequencies, theta: float, context: int) -> tuple[Frequencies, float]:
    """Position interpolation: Chen et al. 2023, arXiv:2306.15595."""
    factor = given.number("factor")
    return [f / factor for f in plain], 1.0


def llama3(given: Fields, plain: Frequencies, theta: float, context: int) -> tuple[Frequencies, float]:
    """Llama 3.1: long waves are slowed by `factor`, short ones kept, those between are blended."""
    factor, low, high = (given.number(k) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    original = given.integer("original_max_position_embeddings", context, high=1 << 30)
    if low >= high:
        raise given.fault("low_freq_factor", low, f"less than high_freq_factor, {high:g}")

    def slowed(f: float) -> float:
        turns = original * f / (2 * math.pi)  # over the original context
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        return (1 - smooth) * f / factor + smooth * f

    return [slowed(f) for f in plain], 1.0


def yarn(given: Fields, plain: Frequencies, theta: float, context: int) -> tuple[Frequencies, float]:
    """YaRN: Peng et al. 2023, arXiv:2309.00071; `mscale` as DeepSeek-V2 has it."""
    original = given.integer("original_max_position_embeddings", context, high=1 << 30)
    factor = given.number("factor", context / original)
    fast, slow = given.number("beta_fast", 32.0), given.number("beta_slow", 1.0)
    mscale, all_dim = (given.number(k, 0.0, low=-1.0) for k in ("mscale", "mscale_all_dim"))
    given.left.pop("finetuned", None)  # YaRN's own configs say so; it changes nothing

    def scale(m: float) -> float:
        return 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0

    computed = scale(mscale) / scale(all_dim) if mscale and all_dim else scale(1.0)
    magnitude = given.number("attention_factor", computed)

    dim = 2 * len(plain)
    low, high = (dim * math.log(original / (b * 2 * math.pi)) / (2 * math.log(theta)) for b in (fast, slow))
    if given.flag("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low or 0.001
    ramp = [min(max((i - low) / width, 0.0), 1.0) for i in range(len(plain))]  # 0 keeps, 1 interpolates
    return [f * (1 - r) + f / factor * r for f, r in zip(plain, ramp, strict=True)], magnitude


SCALINGS: dict[str, Callable[[Fields, Frequencies, float, int], tuple[Frequencies, float]]] = {
    "default": default,
    "linear": linear,
    "llama3": llama3,
    "yarn": yarn,
}


def windows_of(fields: Fields, of: str, n_layers: int, context: int) -> list[int | None]:
    """How many tokens each layer's queries see (None: all), as the variant reads sliding_window.

    `of` is "" (the keys are not part of the variant), "all" (every layer), or "layers" (Qwen's keys).
    """
    if not of:
        return [None] * n_layers
    window = fields.optional("sliding_window", 4096, high=1 << 30)
    sliding = [True] * n_layers
    if of == "layers":
        if not fields.flag("use_sliding_window", False):
            window = None
        first = fields.integer("max_window_layers", 28, low=0)
        types = fields.take("layer_types", None)
        if types is None:
            sliding = [window is not None and i >= first for i in range(n_layers)]
        else:
            known = {"full_attention": False, "sliding_attention": True}
            if not isinstance(types, list) or len(types) != n_layers or not all(t in [*known] for t in types):
                raise fields.fault("layer_types", types, f"{n_layers} of {', '.join(known)}")
            sliding = [known[t] for t in types]
            if any(sliding) and window is None:
                raise fields.fault("layer_types", types, "no sliding_attention, as there is no window in use")
    window = None if window is None or window >= context else window
    return [window if s else None for s in sliding]
