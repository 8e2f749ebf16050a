"""What a request may ask of its tokens: parameters checked at the door, and the native sampler made of them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from operator import index
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, SupportsIndex, cast

from pronghorn.errors import ParameterError

if TYPE_CHECKING:
    from pronghorn import _native

INF, NAN = float("inf"), float("nan")
MOST_SAMPLES = 128  # of one prompt
FORMS = ("json_schema", "regex", "grammar", "choice")
"""The parameters that ask for a form; a request has one of them at most."""


class SamplingParams:
    """How tokens are chosen, and when to stop. Immutable; the defaults are the command line's.

    A token is a pure function of its logits, these parameters, the seed, its position in the sequence and the
    tokens before it: the arg max of the filtered, scaled logits plus Gumbel noise from a counter-based generator
    (Philox4x32-10; Salmon et al. 2011). Nothing else, such as other requests, can change it. In this order:

    - `logit_bias`: {token id: number in -100..100, or -inf for never} is added.
    - `repetition_penalty` (above 0, 1 is none): logits of tokens in prompt or output are divided by it if
      positive, multiplied by it if not (Keskar et al. 2019, as in transformers).
    - `frequency_penalty` times a token's count in the output, and `presence_penalty` once if it is there, are
      subtracted (-2..2, as in OpenAI's API).
    - `min_tokens`: before so many tokens are generated, end-of-sequence and `stop_token_ids` are never chosen.
    - `temperature` divides; 0 is greedy: the largest logit, of equals the lowest id, and all that follows is idle.
    - `top_k`: exactly k tokens remain, of equal logits those of the lowest ids; 0 is all.
    - `top_p`: the smallest set of likeliest of these with a probability of at least p remains; 1 is all.
    - `min_p`: tokens of at least min_p times the likeliest's probability remain; 0 is all.

    `seed` None takes a fresh one, which the output names. `max_tokens` None runs to the end of the context.
    `stop` ends generation at any of these strings, which are not shown; `stop_token_ids` end it like
    end-of-sequence, which `ignore_eos` disregards. `logprobs` n gives the logarithms of the probabilities (before
    any of the above) of the chosen token and of the n likeliest; `prompt_logprobs` n of each token of the prompt.

    `n` samples are made of one prompt, which is computed once: sample i has the seed plus i, so the first is the one
    that would be made alone. With `best_of`, so many are made, and the n with the highest mean logarithm of their
    tokens' probabilities are given, best first.

    One of these gives the output a form (the extra `structured`; the end-of-sequence token comes where it may end):
    `json_schema` (a dict, or its text), `regex` (Rust's: the whole text matches it), `grammar` (in Lark's language, as
    llguidance reads it), `choice` (one of these strings).

    >>> SamplingParams(max_tokens=20, temperature=0.8, top_p=0.95, seed=1)
    SamplingParams(max_tokens=20, temperature=0.8, top_p=0.95, seed=1)
    >>> SamplingParams(top_p=1.5)
    Traceback (most recent call last):
        ...
    pronghorn.errors.ParameterError: top_p is 1.5: expected a number above 0, at most 1
    """

    __slots__ = (
        "best_of", "choice", "frequency_penalty", "grammar", "ignore_eos", "json_schema", "logit_bias", "logprobs",
        "max_tokens", "min_p", "min_tokens", "n", "presence_penalty", "prompt_logprobs", "regex",
        "repetition_penalty", "seed", "stop", "stop_token_ids", "temperature", "top_k", "top_p",
    )  # fmt: skip

    max_tokens: int | None
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    seed: int | None
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool
    min_tokens: int
    logprobs: int | None
    prompt_logprobs: int | None
    n: int
    best_of: int | None
    json_schema: str | None
    regex: str | None
    grammar: str | None
    choice: tuple[str, ...] | None

    def __init__(
        self,
        *,
        max_tokens: int | None = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | None = None,
        seed: int | None = None,
        stop: str | Iterable[str] = (),
        stop_token_ids: Iterable[int] = (),
        ignore_eos: bool = False,
        min_tokens: int = 0,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        n: int = 1,
        best_of: int | None = None,
        json_schema: Mapping[str, Any] | str | None = None,
        regex: str | None = None,
        grammar: str | None = None,
        choice: Iterable[str] | None = None,
    ) -> None:
        put = object.__setattr__
        max_tokens = None if max_tokens is None else whole("max_tokens", max_tokens, 1)
        put(self, "max_tokens", max_tokens)
        temperature = number("temperature", temperature, 0, 100)
        if 0 < temperature < 1e-6:
            raise ParameterError(f"temperature is {temperature}: expected 0, or 0.000001 to 100")
        put(self, "temperature", temperature)
        put(self, "top_k", whole("top_k", top_k, 0))
        put(self, "top_p", number("top_p", top_p, 0, 1, above=True))
        put(self, "min_p", number("min_p", min_p, 0, 1))
        put(self, "repetition_penalty", number("repetition_penalty", repetition_penalty, 0, 100, above=True))
        put(self, "presence_penalty", number("presence_penalty", presence_penalty, -2, 2))
        put(self, "frequency_penalty", number("frequency_penalty", frequency_penalty, -2, 2))
        put(self, "logit_bias", biases({} if logit_bias is None else logit_bias))
        put(self, "seed", None if seed is None else whole("seed", seed, 0, 2**64 - 1))
        put(self, "stop", strings(stop))
        put(self, "stop_token_ids", ids("stop_token_ids", stop_token_ids))
        if not isinstance(ignore_eos, bool):
            raise ParameterError(f"ignore_eos is {ignore_eos!r}: expected True or False")
        put(self, "ignore_eos", ignore_eos)
        put(self, "min_tokens", whole("min_tokens", min_tokens, 0))
        if max_tokens is not None and min_tokens > max_tokens:
            raise ParameterError(f"min_tokens is {min_tokens}: more than max_tokens, which is {max_tokens}")
        put(self, "logprobs", None if logprobs is None else whole("logprobs", logprobs, 0, 100))
        n_top = None if prompt_logprobs is None else whole("prompt_logprobs", prompt_logprobs, 0, 100)
        put(self, "prompt_logprobs", n_top)
        put(self, "n", whole("n", n, 1, MOST_SAMPLES))
        put(self, "best_of", None if best_of is None else whole("best_of", best_of, self.n, MOST_SAMPLES))
        put(self, "json_schema", None if json_schema is None else schema(json_schema))
        put(self, "regex", None if regex is None else source("regex", regex))
        put(self, "grammar", None if grammar is None else source("grammar", grammar))
        put(self, "choice", None if choice is None else choices(choice))
        if forms := [name for name in FORMS if getattr(self, name) is not None]:
            if len(forms) > 1:
                raise ParameterError(f"{forms[1]} is given beside {forms[0]}: the output has one form")
            if self.ignore_eos or self.min_tokens:
                name = "ignore_eos" if self.ignore_eos else "min_tokens"
                raise ParameterError(f"{name} is given beside {forms[0]}, which says where the output ends")

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"SamplingParams are immutable: use replace({name}=...)")

    def __delattr__(self, name: str) -> None:
        raise AttributeError("SamplingParams are immutable")

    def as_dict(self) -> dict[str, Any]:
        """The parameters that differ from their defaults, by name."""
        values = {name: getattr(self, name) for name in NAMES} | {"logit_bias": dict(self.logit_bias)}
        return {name: value for name, value in values.items() if value != getattr(DEFAULTS, name)}

    def replace(self, **changes: Any) -> SamplingParams:
        """A copy with some parameters changed."""
        return SamplingParams(**{**self.as_dict(), **changes})

    def __reduce__(self) -> tuple[Any, ...]:
        return restore, (self.as_dict(),)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SamplingParams) and self.as_dict() == other.as_dict()

    def __hash__(self) -> int:
        return hash(tuple((name, value) for name, value in self.as_dict().items() if name != "logit_bias"))

    def __repr__(self) -> str:
        return f"SamplingParams({', '.join(f'{name}={value!r}' for name, value in self.as_dict().items())})"


def restore(values: dict[str, Any]) -> SamplingParams:
    """The parameters of `as_dict`: what pickle calls."""
    return SamplingParams(**values)


def sampler(params: SamplingParams, seed: int, ends: Iterable[int]) -> _native.Sampler:
    """The native sampler of a request; `ends` are the tokens withheld until `min_tokens` are generated."""
    from pronghorn import _native

    return _native.Sampler(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        seed=seed,
        logit_bias=list(params.logit_bias.items()),
        withheld=list(ends) if params.min_tokens else [],
        min_tokens=params.min_tokens,
    )


def fresh_seed() -> int:
    """A seed that nobody else has, small enough for a JSON number."""
    return int.from_bytes(os.urandom(6), "little")


def real(value: Any) -> float:
    """The value of what is one number, of whatever library; NaN for all else, such as texts, flags and arrays."""
    if isinstance(value, bool) or hasattr(value, "__len__") or not hasattr(value, "__float__"):
        return NAN
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return NAN


def number(name: str, value: object, low: float, high: float, *, above: bool = False) -> float:
    """The value as a float; `above` leaves the lower bound itself out."""
    found = real(value)
    if low <= found <= high and not (above and found == low):
        return found
    span = f"above {low}, at most {high}" if above else f"from {low} to {high}"
    raise ParameterError(f"{name} is {value!r}: expected a number {span}")


def whole(name: str, value: object, low: int, high: int = 2**31 - 1) -> int:
    """The value as an int."""
    try:
        found = low - 1 if isinstance(value, bool) else index(cast("SupportsIndex", value))
    except TypeError:
        found = low - 1
    if low <= found <= high:
        return found
    span = f"of at least {low}" if high == 2**31 - 1 else f"from {low} to {high}"
    raise ParameterError(f"{name} is {value!r}: expected a whole number {span}")


def ids(name: str, values: object) -> tuple[int, ...]:
    """The values as token ids."""
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise ParameterError(f"{name} is {values!r}: expected a list of token ids")
    return tuple(whole(f"{name}[{i}]", value, 0) for i, value in enumerate(values))


def strings(values: object) -> tuple[str, ...]:
    """The values as stop strings."""
    values = (values,) if isinstance(values, str) else values
    result = tuple(values) if isinstance(values, Iterable) else (None,)
    if not all(isinstance(value, str) and value for value in result):
        raise ParameterError(f"stop is {values!r}: expected a string or a list of strings, none of them empty")
    return result


def schema(value: object) -> str:
    """A JSON schema as text; whether it is a good one is seen where it is used."""
    import json

    try:
        found = json.loads(value) if isinstance(value, (str, bytes)) else value
        text = json.dumps(dict(found) if isinstance(found, Mapping) else found, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ParameterError(f"json_schema is no JSON: {error}") from None
    if not isinstance(found, (Mapping, bool)):
        raise ParameterError(f"json_schema is {text[:40]}: expected an object")
    return text


def source(name: str, value: object) -> str:
    """The value as a text that is not empty."""
    if not isinstance(value, str) or not value:
        raise ParameterError(f"{name} is {value!r}: expected a string that is not empty")
    return value


def choices(values: object) -> tuple[str, ...]:
    """The values as texts to choose from."""
    result = () if isinstance(values, (str, bytes)) or not isinstance(values, Iterable) else tuple(values)
    if not result or not all(isinstance(value, str) and value for value in result):
        raise ParameterError(f"choice is {values!r}: expected a list of strings, none of them empty")
    return result


def biases(values: object) -> Mapping[int, float]:
    """The values as biases by token id."""
    if not isinstance(values, Mapping):
        raise ParameterError(f"logit_bias is {values!r}: expected a mapping of token ids to numbers")
    found = {
        whole("logit_bias: token id", token_id, 0): -INF
        if real(bias) == -INF
        else number(f"logit_bias[{token_id}]", bias, -100, 100)
        for token_id, bias in values.items()
    }
    return MappingProxyType(found)


NAMES = tuple(SamplingParams.__init__.__kwdefaults__ or ())
DEFAULTS = SamplingParams()
