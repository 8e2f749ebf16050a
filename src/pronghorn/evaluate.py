"""`pronghorn eval`: how well a model predicts a text, and what formats change against a reference.

The protocol. The text is encoded once, as a whole, without BOS or other special tokens, and cut into windows of
`window` tokens that begin `stride` tokens apart (by default they do not overlap); the last may be shorter. Each window
is run by itself, from position 0, and every token of it is scored, given those before it, but its first one and those
that the window before has scored. With stride = window the figures are higher than those of overlapping windows, and
compare with figures of the same text, window and stride only.

The protocol "llama.cpp" is that of its tool llama-perplexity: the text begins with BOS where the model's tokenizer adds
it, which also takes the place of each window's first token; windows are full and do not overlap; and only the tokens
after the middle of each are scored (of 512, the last 255).

- perplexity: exp of the mean over all scored tokens of -log p(token); its rise is relative to the reference's.
- kl: the mean over the same places of KL(P || Q) = sum over the vocabulary of P log(P / Q), in nats, where P are the
  probabilities of the reference, which is the first model in f32 unless another is named, with keys and values in f32,
  and Q those of the format.
- top1: the share of places where P and Q have the same likeliest token (of equals, the lowest id).
- top5: of the five likeliest tokens of P, the mean share that is among the five likeliest of Q.
- match (where asked for): from the first half of each window, so many tokens are generated greedily; the mean number
  that is the reference's before the first that is not.
- bits_per_weight: of all weights as they are read, scales and vectors included.

Softmax and sums are in float64. Memory: 12 bytes for each token of a window and each of the vocabulary, whatever the
length of the text.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pronghorn.engine.sampling import SamplingParams, whole
from pronghorn.errors import ParameterError, PromptError, PronghornError
from pronghorn.llm import LLM, check_vocabulary
from pronghorn.loading import DTYPES, check_options, load_tokenizer, open_model
from pronghorn.weights.files import read_text

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ROWS = 4  # of logits that are widened to float64 at a time: they stay in the cache
TOP = 5
PROTOCOLS = ("pronghorn", "llama.cpp")
AT_MOST = ("perplexity", "perplexity_rise", "kl")
AT_LEAST = ("top1", "top5", "match")

Name = str | Path | None


class Window(NamedTuple):
    """Tokens that are run together, and the index of the first that is scored."""

    token_ids: Sequence[int]
    first: int


class Reference:
    """A window in the reference: the probabilities before each scored token, and the likeliest tokens."""

    def __init__(self, logits: NDArray[np.float32], following: NDArray[np.int64]) -> None:
        import numpy as np

        self.following = following  # [n]
        self.p = np.empty(logits.shape)  # [n, vocabulary]
        self.negentropy = np.empty(len(logits))  # sum of P log P
        for part in parts(len(logits)):
            log_p = log_softmax(logits[part])
            np.exp(log_p, out=self.p[part])
            self.negentropy[part] = np.einsum("nv,nv->n", self.p[part], log_p)
        self.top1 = logits.argmax(1)
        n_top = min(TOP, logits.shape[1])
        self.top = np.argpartition(logits, -n_top, axis=1)[:, -n_top:]  # [n, n_top], in no order


class Score:
    """What the windows so far say of one format; sums over places."""

    def __init__(self) -> None:
        self.n = 0
        self.loss = self.kl = self.top1 = self.top5 = 0.0

    def add(self, reference: Reference, logits: NDArray[np.float32]) -> None:
        """One window: the logits before each scored token, [n, vocabulary]."""
        import numpy as np

        n_common = 0
        for part in parts(len(logits)):
            log_q, tokens, likeliest = log_softmax(logits[part]), reference.following[part], reference.top[part]
            self.n += len(tokens)
            self.loss -= float(log_q[np.arange(len(tokens)), tokens].sum())
            self.kl += float((reference.negentropy[part] - np.einsum("nv,nv->n", reference.p[part], log_q)).sum())
            for column in likeliest.T:  # is it among the likeliest of Q: how many are likelier?
                own = logits[part][np.arange(len(tokens)), column]
                n_likelier = np.count_nonzero(logits[part] > own[:, None], axis=1)
                n_common += int(np.count_nonzero(n_likelier < TOP))
        self.top1 += int((reference.top1 == logits.argmax(1)).sum())
        self.top5 += n_common / reference.top.shape[1]

    def result(self) -> dict[str, float | int]:
        """The means."""
        mean = {name: max(getattr(self, name), 0.0) / self.n for name in ("kl", "top1", "top5")}
        return {"perplexity": math.exp(self.loss / self.n), **mean, "scored_tokens": self.n}


def parts(n: int) -> Iterator[slice]:
    """Few rows at a time."""
    return (slice(start, start + ROWS) for start in range(0, n, ROWS))


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Logarithms of probabilities, in float64, row by row."""
    import numpy as np

    values = logits.astype(np.float64)
    values -= values.max(1, keepdims=True)
    values -= np.log(np.exp(values).sum(1, keepdims=True))
    return values


def windows_of(
    token_ids: Sequence[int], window: int, limit: int | None = None, stride: int | None = None
) -> list[Window]:
    """The windows of our own protocol; a rest of a single token has nothing to score, and is left out."""
    stride = stride or window
    found: list[Window] = []
    end = 1  # of what has been scored
    for start in range(0, len(token_ids) - 1, stride):
        if limit is not None and len(found) == limit:
            break
        ids = token_ids[start : start + window]
        if start + len(ids) > end:
            found.append(Window(ids, max(1, end - start)))
        end = start + len(ids)
    return found


def windows_of_llama_cpp(
    token_ids: Sequence[int], window: int, limit: int | None = None, bos_id: int | None = None
) -> list[Window]:
    """The windows of llama-perplexity; `bos_id` where the tokenizer adds it, and `token_ids` begin with it."""
    starts = range(0, len(token_ids) - window + 1, window)
    first = [] if bos_id is None else [bos_id]
    return [
        Window([*first, *token_ids[start + len(first) : start + window]], window // 2 + 1) for start in starts[:limit]
    ]


def evaluate(
    models: Name | Sequence[Name],
    windows: Sequence[Window],
    dtypes: Sequence[str] = ("auto",),
    kv_dtypes: Sequence[str] = ("auto",),
    *,
    reference: str | Path = "f32",
    match: int = 0,
    threads: int | None = None,
) -> dict[str, Any]:
    """Measures each model in each dtype and KV dtype -> what `pronghorn eval --json` prints; first the reference.

    `reference`: a dtype of the first model, or another model, which runs in f32. All models are loaded at once, and
    must have the same vocabulary. `match`: tokens to generate from each window.
    """
    import numpy as np

    listed = [models] if models is None or isinstance(models, (str, Path)) else list(models)
    whole("match", match, 0)
    if not windows:
        raise PromptError("the text is too short: there is no token to score")
    other = reference not in DTYPES
    with ExitStack() as stack:

        def load(model: Name, dtype: str, kv_dtype: str) -> LLM:
            return stack.enter_context(LLM(model, dtype=dtype, kv_dtype=kv_dtype, threads=threads))

        exact = load(reference, "f32", "f32") if other else load(listed[0], str(reference), "f32")
        check_context(exact, windows, match)
        formats = [exact]
        for model in listed:
            for number, (dtype, kv_dtype) in enumerate((d, k) for d in dtypes for k in kv_dtypes):
                llm = load(model, dtype, kv_dtype)
                if number == 0 and (other or model is not listed[0]):
                    check_vocabulary(str(model), llm._checkpoint, llm.model, exact, "model")
                    check_context(llm, windows, match)
                formats.append(llm)
        scores = [Score() for _ in formats]
        for number, (ids, first) in enumerate(windows):
            known: Reference | None = None
            for llm, score in zip(formats, scores, strict=True):
                logits = llm.logits(ids)[first - 1 : -1]
                if not np.isfinite(logits).all():
                    raise PronghornError(f"window {number}: the logits in {llm.dtype} are not finite")
                known = known or Reference(logits, np.array(ids[first:], np.int64))
                score.add(known, logits)
        results = [described(llm) | score.result() for llm, score in zip(formats, scores, strict=True)]
        for row in results:
            row["perplexity_rise"] = row["perplexity"] / results[0]["perplexity"] - 1
        if match:
            for row, mean in zip(results, matches(formats, windows, match), strict=True):
                row["match"] = mean
        return {"windows": len(windows), **({"match": match} if match else {}), "results": results}


def check_context(llm: LLM, windows: Sequence[Window], match: int) -> None:
    """ParameterError for windows, or what is generated from them, that the context does not hold."""
    longest = max(len(window.token_ids) for window in windows)
    if longest > llm.context:
        raise ParameterError(f"window is {longest}: the model's context holds {llm.context} tokens")
    if match and -(-longest // 2) + match > llm.context:
        raise ParameterError(f"match is {match}: the context of {llm.context} tokens has no room after half a window")


def described(llm: LLM) -> dict[str, Any]:
    """What a format is."""
    info = llm.info()
    bits = 8 * info["weight_bytes"] / info["parameters"]
    return {"model": str(llm.path), "dtype": llm.dtype, "kv_dtype": llm.kv_dtype, "bits_per_weight": bits}


def matches(formats: Sequence[LLM], windows: Sequence[Window], n: int) -> list[float]:
    """Of each format, the mean length of what it generates as the first one does."""
    prompts = [ids[: -(-len(ids) // 2)] for ids, _ in windows]
    params = SamplingParams(max_tokens=n, ignore_eos=True)
    written = [[out.token_ids for out in llm.generate(prompts, params)] for llm in formats]
    return [
        sum(same_length(a, b) for a, b in zip(written[0], tokens, strict=True)) / len(prompts) for tokens in written
    ]


def same_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens before the first that differs."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def cut(
    model: Name,
    text: str,
    window: int = 512,
    limit: int | None = None,
    stride: int | None = None,
    protocol: str = "pronghorn",
) -> list[Window]:
    """The windows of a text, in a model's tokens, by one of PROTOCOLS."""
    if protocol not in PROTOCOLS:
        raise ParameterError(f"protocol is {protocol!r}: expected one of {', '.join(PROTOCOLS)}")
    theirs = protocol == "llama.cpp"
    whole("window", window, 4 if theirs else 2)
    if limit is not None:
        whole("limit", limit, 1)
    tokenizer = load_tokenizer(open_model(model).tokenizer)
    if theirs:
        if stride is not None:
            raise ParameterError("stride is for our own protocol: llama.cpp's windows do not overlap")
        ids = tokenizer.encode(text)
        begins = tokenizer.bos_id if tokenizer.bos_id is not None and ids[:1] == [tokenizer.bos_id] else None
        found = windows_of_llama_cpp(ids, window, limit, begins)
    else:
        if stride is not None and not 1 <= whole("stride", stride, 1) <= window:
            raise ParameterError(f"stride is {stride}: expected at most the window, {window}")
        ids = tokenizer.encode(text, add_special=False)
        found = windows_of(ids, window, limit, stride)
    if not found:
        least = f"a window of {window}" if theirs else "at least two"
        raise PromptError(f"the text has {len(ids)} tokens: {least} is needed")
    return found


# Thresholds ---------------------------------------------------------------------------------------------------


def read_thresholds(file: str, names: Iterable[str]) -> dict[str, dict[str, float]]:
    """Limits by format ("" for all): of AT_MOST the largest that passes, of AT_LEAST the smallest.

    The file is TOML: `kl = 0.01` is for all formats; a table `[int8]`, or `["int8/bf16"]` where the KV dtype is asked
    for by name, takes its place for these. ParameterError for a key that is not known, and for a format not in `names`.
    """
    try:
        toml = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    except ImportError:
        raise PronghornError(
            "--check needs tomli, which the extra `eval` brings: pip install 'pronghorn[eval]'"
        ) from None
    try:
        found: dict[str, Any] = toml.loads(read_text(file))
    except toml.TOMLDecodeError as error:
        raise ParameterError(f"{file}: {error}") from None
    limits = {"": {key: value for key, value in found.items() if not isinstance(value, dict)}}
    limits |= {key: value for key, value in found.items() if isinstance(value, dict)}
    for name, table in limits.items():
        where = f"{file}: [{name}]" if name else f"{file}:"
        if name and name not in names:
            raise ParameterError(f"{where} is none of what is measured: {', '.join(names)}")
        for key, value in table.items():
            if key not in AT_MOST + AT_LEAST:
                raise ParameterError(f"{where} {key}: expected one of {', '.join(AT_MOST + AT_LEAST)}")
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ParameterError(f"{where} {key} is {value!r}: expected a number")
    if not any(limits.values()):
        raise ParameterError(f"{file}: there are no thresholds in it")
    return limits


def breaches(found: Mapping[str, Any], limits: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    """A line for each figure that is beyond its limit."""
    for row in found["results"][1:]:
        name, form = row["dtype"], f"{row['dtype']}/{row['kv_dtype']}"
        for key, limit in {**limits[""], **limits.get(name, {}), **limits.get(form, {})}.items():
            value = row[key]
            if not (value <= limit if key in AT_MOST else value >= limit):
                word = "most" if key in AT_MOST else "least"
                yield f"{Path(row['model']).name} {form}: {key} is {value:.6g}, expected at {word} {limit:g}"


# Output -------------------------------------------------------------------------------------------------------


def table(found: Mapping[str, Any]) -> Iterator[str]:
    """The lines of the table."""
    first = found["results"][0]
    against = f"{Path(first['model']).name} in {first['dtype']}"
    yield f"{found['windows']} windows, {first['scored_tokens']} tokens scored; all but perplexity is against {against}"
    match = f"  match of {found['match']}" if "match" in found else ""
    yield f"{'dtype':6} {'KV':5} {'bits':>6} {'perplexity':>11} {'rise':>8} {'KL':>9} {'top 1':>8} {'top 5':>8}{match}"
    named = len({row["model"] for row in found["results"]}) > 1
    for row in found["results"]:
        yield (
            f"{row['dtype']:6} {row['kv_dtype']:5} {row['bits_per_weight']:6.2f} {row['perplexity']:11.4f} "
            f"{row['perplexity_rise']:8.2%} {row['kl']:9.5f} {row['top1']:8.2%} {row['top5']:8.2%}"
            + (f"{row['match']:{len(match)}.1f}" if match else "")
            + (f"  {Path(row['model']).name}" if named else "")
        )


def draw(figure: Any, found: Mapping[str, Any]) -> None:
    """Quality against bits a weight: a point a format; to the left KL, to the right the rise of perplexity."""
    rows = found["results"][1:]
    names = {row["model"]: "" for row in rows}
    if len(names) > 1:
        names = {name: f" {Path(name).name}" for name in names}
    figure.set_size_inches(10, 4.2)
    figure.set_facecolor("white")
    first = found["results"][0]
    figure.suptitle(f"{Path(first['model']).name}: formats against {first['dtype']}", fontsize=11)
    for axes, key, factor, label, log in zip(
        figure.subplots(1, 2), ("kl", "perplexity_rise"), (1, 100), ("KL, nats", "rise of perplexity, %"),
        (True, False), strict=True,
    ):  # fmt: skip
        for row in rows:
            if log and not row[key]:
                continue  # the same numbers: it has no place on this scale
            point = row["bits_per_weight"], factor * row[key]
            axes.plot(*point, "o", color="#0969da")
            kv = "" if row["kv_dtype"] in ("f32", "bf16") else f", KV {row['kv_dtype']}"
            text = f"{row['dtype']}{kv}{names[row['model']]}"
            axes.annotate(text, point, xytext=(5, 4), textcoords="offset points", fontsize=9)
        axes.set(xlabel="bits a weight", ylabel=label, xscale="log", yscale="log" if log else "linear")
        axes.set_xticks([4, 8, 16, 32], ["4", "8", "16", "32"])
        axes.xaxis.set_minor_formatter("")
        axes.set_xlim(3.2, 80)
        axes.grid(visible=True, linewidth=0.4, color="#d0d7de")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)


def run(args: argparse.Namespace) -> None:
    """`pronghorn eval`."""
    from pronghorn.bench import names_of

    models: list[Name] = args.model or [None]
    dtypes, kv_dtypes = names_of(args.dtype), names_of(args.kv_dtype)
    for dtype in dtypes:
        for kv_dtype in kv_dtypes:
            check_options(dtype, threads=args.threads, kv_dtype=kv_dtype)
    if (args.file is None) == (args.harness is None):
        raise ParameterError("give either a FILE or --harness TASKS")
    if args.harness is not None:
        from pronghorn.harness import run as run_harness

        return run_harness(args, models, dtypes, kv_dtypes)
    for name in ("tasks", "fewshot"):
        if getattr(args, name) is not None:
            raise ParameterError(f"--{name} is for --harness")
    figure, limits = None, None
    if args.plot:
        from pronghorn.bench import figure_for

        figure = figure_for(args.plot)
    if args.check:
        names = [*dtypes, *(f"{dtype}/{kv_dtype}" for dtype in dtypes for kv_dtype in kv_dtypes if kv_dtype != "auto")]
        limits = read_thresholds(args.check, names)
        if not args.match and any("match" in part for part in limits.values()):
            raise ParameterError(f"{args.check}: match needs --match N")
    how = {
        "window": 512 if args.window is None else args.window,
        "stride": args.stride,
        "protocol": PROTOCOLS[0] if args.protocol is None else args.protocol,
    }
    windows = cut(models[0], read_text(args.file), limit=args.limit, **how)
    reference, match = "f32" if args.reference is None else args.reference, args.match or 0
    found = evaluate(models, windows, dtypes, kv_dtypes, reference=reference, match=match, threads=args.threads)
    found = {"file": args.file, **how, **found}
    for line in table(found):
        print(line)
    if figure:
        draw(figure, found)
        figure.savefig(args.plot)
    if args.json:
        print(json.dumps(found, ensure_ascii=False))
    if limits and (lines := list(breaches(found, limits))):
        print(*lines, sep="\n", file=sys.stderr)
        raise SystemExit(1)
