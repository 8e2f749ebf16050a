"""`pronghorn eval`: how well a model predicts a text, and what a dtype changes against f32.

The protocol. The text is encoded once, as a whole, without BOS or other special tokens, and cut into windows of
`window` tokens that do not overlap (stride = window); the last may be shorter. Each window is run by itself, from
position 0, and every token of it but the first is scored given those before it. So the figures are higher than those of
protocols with overlapping windows, and compare with figures of the same text and window only.

- perplexity: exp of the mean over all scored tokens of -log p(token).
- kl: the mean over the same places of KL(P || Q) = sum over the vocabulary of P log(P / Q), in nats, where P are the
  probabilities of the same model with its weights in f32 (and keys and values in f32), Q those of the dtype.
- top1: the share of places where P and Q have the same likeliest token (of equals, the lowest id).
- top5: of the five likeliest tokens of P, the mean share that is among the five likeliest of Q.

Softmax and sums are in float64. Memory: 12 bytes for each token of a window and each of the vocabulary, whatever the
length of the text.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pronghorn.errors import ParameterError, PromptError, PronghornError
from pronghorn.llm import LLM, check_options

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ROWS = 32  # of logits that are widened to float64 at a time
TOP = 5


class Reference:
    """A window in f32: the logarithms of probabilities before each scored token, and the likeliest tokens."""

    def __init__(self, logits: NDArray[np.float32], following: NDArray[np.int64]) -> None:
        import numpy as np

        self.following = following  # [n]
        self.log_p = np.empty(logits.shape)  # [n, vocabulary]
        for part in parts(len(logits)):
            self.log_p[part] = log_softmax(logits[part])
        self.top = top(logits)  # [n, TOP]


class Score:
    """What the windows so far say of one dtype; sums over places."""

    def __init__(self) -> None:
        self.n = 0
        self.loss = self.kl = self.top1 = self.top5 = 0.0

    def add(self, reference: Reference, logits: NDArray[np.float32]) -> None:
        """One window: the logits before each scored token, [n, vocabulary]."""
        import numpy as np

        for part in parts(len(logits)):
            p, q, tokens = reference.log_p[part], log_softmax(logits[part]), reference.following[part]
            self.n += len(tokens)
            self.loss -= float(q[np.arange(len(tokens)), tokens].sum())
            self.kl += float((np.exp(p) * (p - q)).sum())
            self.top1 += int((p.argmax(1) == q.argmax(1)).sum())
            both = reference.top[part][:, :, None] == top(logits[part])[:, None, :]
            self.top5 += float(both.any(2).mean(1).sum())

    def result(self) -> dict[str, float | int]:
        """The means."""
        mean = {name: getattr(self, name) / self.n for name in ("kl", "top1", "top5")}
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


def top(logits: NDArray[np.float32]) -> NDArray[np.int64]:
    """The ids of each row's likeliest tokens, in no order."""
    import numpy as np

    n = min(TOP, logits.shape[1])
    return np.argpartition(logits, -n, axis=1)[:, -n:]


def windows_of(token_ids: Sequence[int], window: int, limit: int | None = None) -> list[Sequence[int]]:
    """The windows; a rest of a single token has nothing to score, and is left out."""
    starts = range(0, len(token_ids) - 1, window)
    return [token_ids[start : start + window] for start in starts[:limit]]


def evaluate(
    model: str | Path | None,
    token_ids: Sequence[int],
    dtypes: Sequence[str] = ("auto",),
    *,
    window: int = 512,
    limit: int | None = None,
    kv_dtype: str = "auto",
    threads: int | None = None,
) -> dict[str, Any]:
    """Runs the protocol above -> what `pronghorn eval --json` prints; the first result is the reference, f32."""
    import numpy as np

    if window < 2 or (limit is not None and limit < 1):
        what, least = ("window", 2) if window < 2 else ("limit", 1)
        raise ParameterError(f"{what} is {window if window < 2 else limit}: expected at least {least}")
    windows = windows_of(token_ids, window, limit)
    if not windows:
        raise PromptError(f"the text has {len(token_ids)} tokens: at least two are needed")
    models = [LLM(model, dtype="f32", kv_dtype="f32", threads=threads)]
    try:
        longest = max(len(ids) for ids in windows)
        if longest > models[0].context:
            raise ParameterError(f"window is {window}: the model's context holds {models[0].context} tokens")
        models += [LLM(model, dtype=dtype, kv_dtype=kv_dtype, threads=threads) for dtype in dtypes]
        scores = [Score() for _ in models]
        for number, ids in enumerate(windows):
            following = np.array(ids[1:], np.int64)
            reference: Reference | None = None
            for llm, score in zip(models, scores, strict=True):
                logits = llm.logits(ids)[:-1]
                if not np.isfinite(logits).all():
                    raise PronghornError(f"window {number}: the logits in {llm.dtype} are not finite")
                reference = reference or Reference(logits, following)
                score.add(reference, logits)
        results = [
            {"dtype": llm.dtype, "kv_dtype": llm.kv_dtype, **score.result()}
            for llm, score in zip(models, scores, strict=True)
        ]
        return {"model": str(models[0].path), "window": window, "windows": len(windows), "results": results}
    finally:
        for llm in models:
            llm.close()


def tokens_of(model: str | Path | None, file: str) -> list[int]:
    """The text of a file as the model's token ids, without special ones."""
    from pronghorn.llm import load_tokenizer, open_model

    try:
        text = Path(file).read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"{file}: {error.strerror if isinstance(error, OSError) else error}") from None
    return load_tokenizer(open_model(model).tokenizer).encode(text, add_special=False)


def table(found: Mapping[str, Any]) -> Iterator[str]:
    """The lines of the table."""
    n = found["results"][0]["scored_tokens"]
    windows = f"{found['windows']} windows of {found['window']} tokens"
    yield f"{Path(found['model']).name}, {windows}, {n} scored; KL, top 1 and top 5 are against f32"
    yield f"{'dtype':6} {'KV':5} {'perplexity':>11} {'KL':>9} {'top 1':>8} {'top 5':>8}"
    for row in found["results"]:
        yield (
            f"{row['dtype']:6} {row['kv_dtype']:5} {row['perplexity']:11.4f} {row['kl']:9.5f} "
            f"{row['top1']:8.2%} {row['top5']:8.2%}"
        )


def run(args: argparse.Namespace) -> None:
    """`pronghorn eval`."""
    dtypes = list(dict.fromkeys(part.strip() for part in args.dtype.split(",")))
    for dtype in dtypes:
        check_options(dtype, threads=args.threads, kv_dtype=args.kv_dtype)
    token_ids = tokens_of(args.model, args.file)
    found = evaluate(
        args.model, token_ids, dtypes, window=args.window, limit=args.limit, kv_dtype=args.kv_dtype,
        threads=args.threads,
    )  # fmt: skip
    for line in table(found):
        print(line)
    if args.json:
        print(json.dumps({"file": args.file, **found}, ensure_ascii=False))
