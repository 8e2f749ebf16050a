"""`pronghorn quantize`: a model's matrices in 8 or 4 bits, in one safetensors file that is mapped and run as it is.

Without a text, each weight is rounded to the nearest (weights.gptq.nearest). With one, the model runs over windows of
it, all at once. First as it is, if channels are to be scaled by what is seen of them (pronghorn.scaling). Then, when a
linear layer's turn comes, its inputs have passed the quantized layers before it, rounded to 8 bits as the kernels
will, and GPTQ rounds its weights for these inputs. A head that is the embedding is quantized for the inputs that it has
without quantization. At last, if asked for, what rounding leaves free is trained (pronghorn.tuning, with PyTorch).

Without that, memory is bounded by one layer, and by the activations: some 16 bytes for each token and each value of the
widest.
"""

# NumPy's stubs type most arithmetic as Any.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pronghorn.convert import FOLDER, Arranged, arrange, flat, full_name, open_for, save_folder
from pronghorn.errors import CheckpointError, ParameterError, PromptError
from pronghorn.mixing import LADDER, Meter, costs_of, mix, units_of
from pronghorn.models import Model, model_of
from pronghorn.ops import Attention
from pronghorn.ops.reference import ReferenceOps, activate, rotate, to_int8
from pronghorn.scaling import Scaling
from pronghorn.text import open_tokenizer
from pronghorn.weights import open_checkpoint, open_source
from pronghorn.weights.files import fail, shown
from pronghorn.weights.gptq import Options, gptq, nearest
from pronghorn.weights.packing import Array, Codes, Floats, pack
from pronghorn.weights.quantize import prepare
from pronghorn.weights.types import DENSE, FORMATS, Module, Target, packed_bytes
from pronghorn.weights.writing import Part, safetensors_file

if TYPE_CHECKING:
    import argparse

METHODS = ("gptq", "scale", "scale+gptq", "gptq+tune", "scale+gptq+tune")
"""What is done with a text: scales of channels (pronghorn.scaling), GPTQ (weights.gptq), and training of what is left
free (pronghorn.tuning), one after the other."""
MEASURED = 2  # windows that a budget is measured on
PASSES = 4  # of tuning, over all windows
TRIES = 3  # at a budget of KL
ROWS = 4096  # of activations that are taken at a time


def quantize(
    source: str | Path,
    destination: str | Path,
    format: str | None = None,
    *,
    target_bpw: float | None = None,
    max_kl: float | None = None,
    keep: Sequence[tuple[str, str]] = (),
    calibration: Sequence[int] | None = None,
    method: str | None = None,
    windows: int = 64,
    window: int = 512,
    passes: int | None = None,
    options: Options | None = None,
    force: bool = False,
) -> list[str]:
    """Writes the model, its matrices in `format`, into a folder in Hugging Face's layout -> remarks, a line each.

    `format` is one of weights.types.FORMATS (default: int4-g64); `keep` names what has another, (which, format), the
    later the stronger (see `choose`). `calibration`: token ids, of which `windows` windows are used, by one of METHODS
    (default: scale+gptq for int8, gptq for int4, which scales make worse); None rounds to the nearest. `passes` over
    them (default: PASSES) are made by methods that tune. What was done stands in config.json, as "_quantized".
    Instead of a format, `target_bpw` (bits a weight at most, of all matrices) or `max_kl` (KL divergence from the
    source at most, in nats) has it chosen for each part of a block, as pronghorn.mixing says; the first MEASURED
    windows are for that alone.
    Raises ParameterError for options that do not fit, CheckpointError for what is wrong in the source.
    """
    path, options = Path(destination), options or Options()
    budget = target_bpw if max_kl is None else max_kl
    if [format, target_bpw, max_kl].count(None) < 2:
        raise ParameterError("format, target_bpw and max_kl exclude each other: give one")
    if budget is not None and not 0 < budget < math.inf:
        raise ParameterError(f"{'target_bpw' if max_kl is None else 'max_kl'} is {budget:g}: expected a number above 0")
    if budget is not None and calibration is None:
        raise ParameterError("target_bpw and max_kl are reached by measuring on a text: give one to calibrate with")
    format = format or "int4-g64"
    method = method or ("scale+gptq" if format.startswith("int8") else "gptq")
    check(options, format, keep, windows, window, method)
    if "tune" in method:
        passes = PASSES if passes is None else passes
        if passes < 1:
            raise ParameterError(f"passes is {passes}: expected at least 1")
        import_module("pronghorn.tuning")  # which says so if there is no PyTorch: before the hours, not after
    elif passes is not None:
        raise ParameterError(f"passes is for methods that tune, and this is {method}")
    checkpoint = open_for(source, path, folder=True, force=force)
    old, tensors = model_of(checkpoint)
    formats = choose(old, format, keep)
    tokens = None
    if calibration is not None:
        tokens = cut(calibration, windows + (MEASURED if budget else 0), window, old, 1 + (MEASURED if budget else 0))
    budgeted = None
    if budget is not None and tokens is not None:
        budgeted = Budget(Meter(checkpoint, old, tensors, tokens[:MEASURED]), keep, target_bpw, max_kl)
        tokens = tokens[MEASURED:]
    arranged = arrange(old, tensors, FOLDER, "f32", "auto")
    how = "rounded to the nearest (no text to calibrate with)"
    if tokens is not None:
        how = f"by {method}, for {len(tokens)} windows of {tokens.shape[1]} tokens"
        how += f", tuned in {passes} passes" if passes else ""
    checkpoint = checkpoint._replace(config=checkpoint.config | {"_quantized": how})
    remarks: list[str] = []

    def write_once(file: Path, model: Model, formats: Mapping[str, str]) -> None:
        work = Work(model, arranged, formats, options)
        with safetensors_file(file, list(work.parts.values())) as work.put:
            if tokens is None:
                work.nearest()
            else:
                work.calibrated(tokens, method, passes)
        remarks[:] = [f"{work.bits():.3f} bits a weight, {how}"]

    def write(file: Path, model: Model) -> None:
        if budgeted is None:
            return write_once(file, model, formats)
        tried: list[dict[str, str]] = []
        while len(tried) < TRIES and (mixed := budgeted.formats()) not in tried:
            tried.append(mixed)
            write_once(file, model, mixed)
            if budgeted.met(file, model):
                remarks.append(
                    f"KL {budgeted.kl:.5f} from the source, on {MEASURED} windows that were not calibrated with"
                )
                return None
        raise ParameterError(
            f"max_kl is {max_kl:g}: with the kept matrices, {budgeted.least:.5f} is the least that was reached"
        )

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        others = {kept for kept in formats.values() if kept in DENSE}
        return save_folder(checkpoint, old, path, others.pop() if len(others) == 1 else "f32", write) + remarks
    except OSError as error:
        fail(error.filename or path, error.strerror or str(error))


class Budget:
    """What mix of formats a budget allows, by measured costs."""

    def __init__(
        self, meter: Meter, keep: Sequence[tuple[str, str]], target_bpw: float | None, max_kl: float | None
    ) -> None:
        from tqdm import tqdm

        self.meter, self.max_kl, self.kl, self.least = meter, max_kl, math.inf, math.inf
        self.chosen = choose(meter.model, "", keep)  # "" is for the budget to say
        self.units = units_of([name for name, format in self.chosen.items() if not format])
        shapes = {name: meter.parameters[name] for name in self.chosen}
        self.sizes = {
            unit: {format: sum(packed_bytes(shapes[name], FORMATS[format]) for name in members) for format in LADDER}
            for unit, members in self.units.items()
        }
        self.most, self.room = max_kl or 0.0, math.inf
        if target_bpw is not None:
            kept = {name: FORMATS.get(format) or Target(format) for name, format in self.chosen.items() if format}
            taken = sum(packed_bytes(shapes[name], target) for name, target in kept.items())
            least = taken + sum(min(row.values()) for row in self.sizes.values())
            n = sum(math.prod(parameter.shape) for parameter in shapes.values())
            if 8 * least > target_bpw * n:
                raise ParameterError(f"target_bpw is {target_bpw:g}: {8 * least / n:.3f} is the least that there is")
            self.room = target_bpw * n / 8 - taken
        with tqdm(total=len(self.units) * len(LADDER), desc="measuring", disable=None) as bar:
            self.costs = costs_of(meter, [name for members in self.units.values() for name in members], bar)

    def formats(self) -> dict[str, str]:
        """The format of each matrix."""
        mixed = mix(self.costs, self.sizes, self.room, self.most)
        return self.chosen | {name: mixed[unit] for unit, members in self.units.items() for name in members}

    def met(self, file: Path, model: Model) -> bool:
        """Measures what was written; if it is too far from the source, the next mix has more bits."""
        checkpoint = open_checkpoint(file.parent)
        weights = prepare(checkpoint, model.parameters(), model.resolve(checkpoint.tensors), "auto")
        self.kl = self.meter.kl(model, weights)
        self.least = min(self.least, self.kl)
        if self.max_kl is None or self.kl <= self.max_kl:
            return True
        self.most *= 0.9 * self.max_kl / self.kl
        return False


def check(
    options: Options, format: str, keep: Sequence[tuple[str, str]], windows: int, window: int, method: str
) -> None:
    """Raises ParameterError for what is wrong in itself."""
    if method not in METHODS:
        raise ParameterError(f"the method is {shown(method)}: expected one of {', '.join(METHODS)}")
    for name in (format, *(kept for _, kept in keep)):
        if name not in FORMATS and name not in DENSE:
            raise ParameterError(f"the format is {shown(name)}: expected one of {', '.join((*FORMATS, *DENSE))}")
    for what, value, least in (
        ("windows", windows, 1), ("window", window, 2), ("block", options.block, 1), ("sweeps", options.sweeps, 0),
    ):  # fmt: skip
        if value < least:
            raise ParameterError(f"{what} is {value}: expected at least {least}")
    if not 0 < options.damp <= 1:
        raise ParameterError(f"damp is {options.damp:g}: expected a number above 0, at most 1")


def choose(model: Model, format: str, keep: Sequence[tuple[str, str]]) -> dict[str, str]:
    """The format of each matrix. `keep` is (which, format): "head", "embeddings", "first" or "last" (block), or names.

    Names are patterns as of a shell: `*.v_proj.weight`.
    """
    names = matrices(model)
    blocks = [name for name in names if name.split(".")[1].isdecimal()]
    sets = {
        "head": [model.EMBEDDING if model.config.tied else "lm_head.weight"],
        "embeddings": [model.EMBEDDING],
        "first": [name for name in blocks if name.split(".")[1] == "0"],
        "last": [name for name in blocks if name.split(".")[1] == str(model.config.n_layers - 1)],
    }
    chosen = dict.fromkeys(names, format)
    for which, kept in keep:
        found = sets.get(which) or fnmatch.filter(names, which)
        if not found:
            raise ParameterError(f"keep: {shown(which)} is none of {', '.join(sets)}, nor the name of a matrix")
        chosen |= dict.fromkeys(found, kept)
    return chosen


def matrices(model: Model) -> list[str]:
    """The names of what is quantized, in the order of use."""
    return [name for name, parameter in model.parameters().items() if parameter.kind == "matrix"]


def cut(token_ids: Sequence[int], windows: int, window: int, model: Model, least: int = 1) -> NDArray[np.int64]:
    """Windows of tokens, [windows, window], from the beginning; a rest is left out."""
    if window > model.config.context:
        raise ParameterError(f"window is {window}: the model's context holds {model.config.context} tokens")
    n = min(windows, len(token_ids) // window)
    if n < least:
        needed = f"{least} windows have {least * window}" if least > 1 else f"a window has {window}"
        raise PromptError(f"the text to calibrate with has {len(token_ids)} tokens: {needed}")
    used = token_ids[: n * window]
    for token_id in (min(used), max(used)):
        if not 0 <= token_id < model.config.vocab_size:
            raise PromptError(f"token id {token_id} is outside of the vocabulary (0 to {model.config.vocab_size - 1})")
    return np.array(used, np.int64).reshape(n, window)


class Work:
    """The quantization of a model into a file; `put` takes what is ready."""

    put: Callable[[Part, memoryview], None]

    def __init__(
        self, model: Model, arranged: Mapping[str, Arranged], formats: Mapping[str, str], options: Options
    ) -> None:
        self.model, self.arranged, self.formats, self.options = model, arranged, formats, options
        self.scaling: Scaling | None = None
        self.codes: dict[str, Codes] | None = None  # of what has been rounded, if it is needed again
        self.parameters = model.parameters()
        self.parts: dict[str, Part] = {}
        for name, item in arranged.items():
            dtype, packed = formats.get(name, item.dtype), 0
            if dtype in FORMATS:
                packed = packed_bytes(self.parameters[name], FORMATS[dtype])
            made = item if name not in formats or packed else item._replace(dtype=dtype)
            self.parts[name] = Part(full_name(model, name), dtype, item.shape, made.make, packed)
        self.packed = [name for name in matrices(model) if self.parts[name].packed]

    def bits(self) -> float:
        """Bits a weight, of all matrices."""
        sizes = [(self.parts[name].nbytes, math.prod(self.parts[name].shape)) for name in self.formats]
        return 8 * sum(size for size, _ in sizes) / sum(n for _, n in sizes)

    def nearest(self) -> None:
        """Writes all, rounded to the nearest where it is quantized."""
        with self.bar(1) as bar:
            self.plainly(bar)

    def calibrated(self, tokens: NDArray[np.int64], method: str, passes: int | None = None) -> None:
        """The same, for the inputs that tokens [windows, window] give, by one of METHODS."""
        handles = Module.of({name: name for name in self.parameters})
        tied = self.model.config.tied and self.model.EMBEDDING in self.packed and "gptq" in method
        scaling = Scaling(self.model, self.formats, self.load) if "scale" in method else None
        first = tied or scaling is not None or passes is not None
        with self.bar(1 + first) as bar:
            head, taught = None, None
            if first:
                exact = Calibration(self, tokens, bar, quantizes=False, scaling=scaling)
                x = self.model.forward(exact, handles)
                head = exact.inputs(x, self.formats[self.model.EMBEDDING])[1] if tied else None
                if passes is not None:
                    taught = x, self.load(self.model.EMBEDDING if self.model.config.tied else "lm_head.weight")
                    self.codes = {}
                self.scaling = scaling
            if "gptq" in method:
                self.dense()
                self.model.forward(Calibration(self, tokens, bar, quantizes=True, head=head), handles)
            else:
                self.plainly(bar)
        if taught and passes:
            self.tune(tokens, *taught, passes)

    def tune(self, tokens: NDArray[np.int64], hidden: Floats, head: Floats, passes: int) -> None:
        """Trains what has been written (see Student.learn), and writes it again."""
        from pronghorn.tuning import Student

        targets = {name: FORMATS[self.formats[name]] for name in self.packed}
        student = Student(self.model, self.codes or {}, targets, self.load)
        self.codes = None
        student.learn(tokens, hidden, head, passes)
        for name, codes in student.codes().items():
            self.put(self.parts[name], pack(codes, targets[name]))
        for name, values in student.vectors().items():
            self.put(self.parts[name], self.cast(name, values))

    def dense(self) -> None:
        """Writes what is not quantized."""
        for name, part in self.parts.items():
            if name not in self.packed:
                self.put(part, part.make() if self.scaling is None else self.scaled(name, part.dtype))

    def scaled(self, name: str, dtype: str) -> memoryview:
        """The bytes of a weight that is not quantized, with its scales."""
        return self.cast(name, self.load(name).T if self.parameters[name].transposed else self.load(name), dtype)

    def cast(self, name: str, values: Floats, dtype: str | None = None) -> memoryview:
        """The bytes of numbers in a weight's dtype, or another."""
        dtype = dtype or self.parts[name].dtype
        return flat(values) if dtype == "f32" else self.arranged[name].cast(flat(values), "f32", dtype)

    def plainly(self, bar: Any) -> None:
        """Writes all, each weight rounded by itself."""
        self.dense()
        for name in self.packed:
            self.settle(name, self.load(name), bar)

    def load(self, name: str) -> Floats:
        """A weight as it was, but for its scales: a matrix [n_out, n_in]."""
        item, parameter = self.arranged[name], self.parameters[name]
        values = np.frombuffer(item._replace(dtype="f32").make(), np.float32).reshape(item.shape)
        w = np.ascontiguousarray(values.T if parameter.transposed else values)
        return w if self.scaling is None else self.scaling.apply(name, w)

    def settle(self, name: str, w: Floats, bar: Any, hessian: Array | None = None) -> Floats:
        """Rounds a weight, with its inputs' Hessian if there is one, and writes it -> its numbers from now on."""
        if name not in self.packed:
            bar.update(w.size)
            return w
        target = FORMATS[self.formats[name]]
        try:
            if hessian is not None:
                codes = gptq(w, hessian, target, self.options)
            else:
                codes = nearest(w, target, self.scaling.squares.get(name) if self.scaling else None)
        except ValueError as error:
            tensor = self.arranged[name].tensor
            raise CheckpointError(f"tensor {tensor.name} ({tensor.dtype}) {error}") from None
        self.put(self.parts[name], pack(codes, target))
        if self.codes is not None:
            self.codes[name] = codes
        bar.update(w.size)
        return codes.values(target)

    def bar(self, passes: int) -> Any:
        """A progress bar on a terminal's standard error, over the weights in each pass."""
        from tqdm import tqdm

        total = passes * sum(math.prod(self.parts[name].shape) for name in self.formats)
        return tqdm(total=total, desc="quantizing", unit="w", unit_scale=True, disable=None)


class Calibration(ReferenceOps):
    """The operations in float32, for windows of the same length; nothing is read from a cache. Weights are their names.

    Activations are [windows * window, width]. With `quantizes`, a matrix is rounded when its turn comes, and its inputs
    are rounded to 8 bits, as the kernels do; `head` is the Hessian of a head that is the embedding.
    """

    def __init__(
        self,
        work: Work,
        tokens: NDArray[np.int64],
        bar: Any,
        *,
        quantizes: bool,
        head: Array | None = None,
        scaling: Scaling | None = None,
    ) -> None:
        self.work, self.tokens, self.bar, self.quantizes, self.head = work, tokens, bar, quantizes, head
        self.scaling = scaling
        self.at = np.tile(np.arange(tokens.shape[1]), len(tokens))
        self.runner: Any = self
        self.last: tuple[Any, dict[int | None, tuple[Floats, Array]]] = (None, {})

    def array(self, name: Any) -> Any:
        """What ReferenceOps asks its runner for."""
        return self.work.load(name)

    def embed(self, table: Any) -> Any:
        w = self.work.load(table)
        if self.quantizes:
            w = self.work.settle(table, w, self.bar, self.head)
        else:
            self.bar.update(w.size)
        return w[self.tokens.reshape(-1)]

    def linear(self, x: Any, module: Module, activation: str | None = None, residual: Any = None) -> Any:
        name = module.weight
        w = self.work.load(name)
        if self.quantizes:
            hessian = None
            if name in self.work.packed:
                x, hessian = self.inputs(x, self.work.formats[name])
            w = self.work.settle(name, w, self.bar, hessian)
        else:
            if self.scaling:
                self.scaling.see(name, x)
            self.bar.update(w.size)
        y: Any = x @ w.T
        if module.get("bias") is not None:
            y += self.work.load(module.bias)
        if activation is not None:
            y = activate(y, activation)
        return y if residual is None else np.add(y, residual, out=y)

    def inputs(self, x: Any, format: str) -> tuple[Floats, Array]:
        """X as weights of this format see it, and its Hessian X^T X; once for several layers that read the same."""
        group = FORMATS[format].group
        if self.last[0] is not x:
            self.last = (x, {})
        if group not in self.last[1]:
            seen, hessian = x if group is None else np.empty_like(x), np.zeros((x.shape[1],) * 2)
            for rows in (slice(start, start + ROWS) for start in range(0, len(x), ROWS)):
                if group is not None:
                    seen[rows] = to_int8(x[rows], group)
                hessian += seen[rows].T @ seen[rows]
            self.last[1][group] = seen, hessian
        return self.last[1][group]

    def attention(self, q: Any, k: Any, v: Any, spec: Attention) -> Any:
        window, n = self.tokens.shape[1], len(q)
        q, k, v = (part.reshape(n, -1, spec.head_dim) for part in (q, k, v))
        if spec.rope is not None:
            q, k = rotate(q, self.at, spec.rope), rotate(k, self.at, spec.rope)
        ahead = np.arange(window)[:, None] - np.arange(window)  # how far each query is behind each key
        hidden = (ahead < 0) | (ahead >= (spec.window or window))
        y = np.empty_like(q)
        shared = (spec.n_kv_heads, -1, spec.head_dim)  # query heads that share a key head are rows of one matrix
        for rows in (slice(start, start + window) for start in range(0, n, window)):
            queries, keys, values = (part[rows].transpose(1, 0, 2) for part in (q, k, v))  # [heads, window, dim]
            scores = (queries.reshape(shared) @ keys.transpose(0, 2, 1)).reshape(-1, window, window)
            scores *= np.float32(spec.scale)
            scores[:, hidden] = -np.inf
            scores -= scores.max(2, keepdims=True)
            np.exp(scores, out=scores)
            scores /= scores.sum(2, keepdims=True)
            found = scores.reshape(spec.n_kv_heads, -1, window) @ values
            y[rows] = found.reshape(-1, window, spec.head_dim).transpose(1, 0, 2)
        return y.reshape(n, -1)

    def logits(self, x: Any, module: Module) -> Any:
        """The head's inputs: its outputs are of no use here. One that is the embedding has been settled before."""
        if self.scaling:
            self.scaling.see(module.weight, x)
        if self.quantizes and not self.work.model.config.tied:
            name = module.weight
            hessian = self.inputs(x, self.work.formats[name])[1] if name in self.work.packed else None
            self.work.settle(name, self.work.load(name), self.bar, hessian)
        return x


def run(args: argparse.Namespace) -> list[str]:
    """`pronghorn quantize` -> lines for the user."""
    keep = []
    for entry in args.keep:
        which, equals, format = entry.partition("=")
        if not equals:
            raise ParameterError(f"--keep {shown(entry)}: expected WHICH=FORMAT, such as head=int8-g64")
        keep.append((which, format))
    token_ids = None if args.calibrate is None else tokens_of(args.source, args.calibrate)
    given = {name: getattr(args, name) for name in ("method", "windows", "window", "passes", *Options._fields)}
    given = {name: value for name, value in given.items() if value is not None and value is not False}
    if given and token_ids is None:
        raise ParameterError(f"--{next(iter(given)).replace('_', '-')} is for --calibrate")
    how = {name: given.pop(name) for name in ("method", "windows", "window", "passes") if name in given}
    return quantize(
        args.source, args.destination, args.format, target_bpw=args.target_bpw, max_kl=args.max_kl, keep=keep,
        calibration=token_ids, options=Options(**given), force=args.force, **how,
    )  # fmt: skip


def tokens_of(source: str, file: str) -> list[int]:
    """The token ids of a text (without special ones), or those of a .npy file."""
    try:
        if file.endswith(".npy"):
            ids = np.load(file, allow_pickle=False)
            if not isinstance(ids, np.ndarray) or ids.ndim != 1 or ids.dtype.kind not in "iu":
                raise PromptError(f"{file}: holds no list of token ids, which is an array of integers [n]")
            return [int(index) for index in ids]
        text = Path(file).read_bytes().decode()
    except OSError as error:
        raise PromptError(f"{file}: {error.strerror}") from None
    except (ValueError, EOFError) as error:  # no text, or no array
        raise PromptError(f"{file}: {error}") from None
    return open_tokenizer(open_source(source).tokenizer).encode(text, add_special=False)
