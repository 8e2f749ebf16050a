"""Rounding a matrix to few bits so that its outputs, more than its weights, stay near: pure mathematics, in NumPy.

`nearest` rounds each weight to the nearest, with scales and minima that minimise the weighted squared error. `gptq`
(Frantar et al. 2022, arXiv:2210.17323) rounds one input's weights after another and lets those that follow make up for
the error so far; here in the equivalent form of LDLQ (Chee et al. 2023, arXiv:2307.13304, theorem 6), which inverts
nothing. Then each weight is rounded again, in turns, given all others (QuantEase: Behdin et al. 2023,
arXiv:2309.01885). Rows are independent of each other, and shared out among threads.
"""

# NumPy's stubs type most arithmetic as Any.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from pronghorn.machine import usable_processors
from pronghorn.weights.packing import Array, Codes, Floats, has_minimum, limits
from pronghorn.weights.types import Target

ROWS = 1024  # that GPTQ rounds at a time
FEW = 64  # rows, where each weight is by itself: what is worked on stays in the caches
SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)
"""Parts of a group's range that are tried: what lies beyond is cut off, and all else is rounded the finer."""


class Options(NamedTuple):
    """`damp`: added to the Hessian's diagonal, in parts of its mean. `block`: inputs whose error is passed on at once.

    `act_order`: the inputs with the largest activations go first. `sweeps`: over all inputs, after GPTQ.
    """

    damp: float = 0.01
    block: int = 128
    act_order: bool = False
    sweeps: int = 3


def nearest(w: Floats, target: Target, importance: Floats | None = None) -> Codes:
    """`w [n_out, n_in]` rounded to the nearest. importance [n_in] weighs the squares of errors.

    ValueError for values that are not finite, or too large for f16 scales.
    """
    importance = np.ones(w.shape[1], np.float32) if importance is None else importance
    group = target.group or w.shape[1]

    def rows(w: Floats) -> Codes:
        scale, minimum = fit(grouped(w, group), target, grouped(importance[None], group)[0])
        q = codes_of(grouped(w, group), scale[..., None], minimum[..., None], target)
        return Codes(q.reshape(len(w), -1)[:, : w.shape[1]].astype(np.int8), scale, minimum)

    return by_rows(w, rows, FEW)


def gptq(w: Floats, hessian: Array, target: Target, options: Options | None = None) -> Codes:
    """`w [n_out, n_in]` rounded so that the sum of e @ hessian @ e over the rows e of the error is small.

    hessian [n_in, n_in]: X^T X of the inputs. ValueError as of `nearest`.
    """
    options = options or Options()
    n_in, group = w.shape[1], target.group or w.shape[1]
    h = damped(hessian, options.damp)
    order = np.argsort(-np.diagonal(h), kind="stable") if options.act_order else np.arange(n_in)
    # H = F D F^T with F unit upper triangular: column k says how the errors before k are made up for by k.
    factor = np.linalg.cholesky(h[np.ix_(order, order)][::-1, ::-1])[::-1, ::-1]
    feed = np.ascontiguousarray(factor / np.diagonal(factor), np.float32)
    del factor
    importance = grouped(np.diagonal(h).astype(np.float32)[None], group)[0]
    # A group's scale follows from its weights as they are when their turn comes, if they come together.
    whole = options.act_order or not target.group
    block = max(options.block // group, 1) * group if not whole else options.block
    # What a group's weights would be now, if none were rounded any more: its scales are fitted to these.
    starts = [] if whole else range(0, n_in, group)
    settled = [np.linalg.inv(feed[k : k + group, k : k + group].T) for k in starts]
    h32 = h.astype(np.float32) if options.sweeps else None

    def rows(w: Floats) -> Codes:
        turned = np.ascontiguousarray(w.T)  # [n_in, rows]: an input's weights lie together
        scale, minimum = fit(grouped(w, group), target, importance)
        q, error = np.empty_like(turned), np.empty_like(turned)  # error: of those done, in their order

        def settle(k: int, wanted: Floats, g: int) -> Floats:
            q[k] = codes_of(wanted, scale[:, g], minimum[:, g], target)
            return turned[k] - (q[k] * scale[:, g] + minimum[:, g])

        for start in range(0, n_in, block):
            end = min(start + block, n_in)
            wanted = turned[order[start:end]] + feed[:start, start:end].T @ error[:start]
            for i in range(end - start):
                k = int(order[start + i])
                g = k // group
                if not whole and k % group == 0:
                    now = turned[k : k + group] + settled[g] @ (wanted[i : i + group] - turned[k : k + group])
                    fitted = fit(grouped(np.ascontiguousarray(now.T), group), target, importance[g : g + 1])
                    scale[:, g], minimum[:, g] = (part[:, 0] for part in fitted)
                error[start + i] = settle(k, wanted[i], g)
                wanted[i + 1 :] += feed[start + i, start + i + 1 : end, None] * error[start + i]
        error[order] = error.copy()
        for _ in range(options.sweeps):
            assert h32 is not None
            for start in range(0, n_in, block):
                end = min(start + block, n_in)
                pull = h32[start:end] @ error  # how much each of these inputs could mend
                for k in range(start, end):
                    new = settle(k, turned[k] - error[k] + pull[k - start] / h32[k, k], k // group)
                    pull += h32[start:end, k, None] * (new - error[k])
                    error[k] = new
        return Codes(np.ascontiguousarray(q.T).astype(np.int8), scale, minimum)

    return by_rows(w, rows, ROWS)


def damped(hessian: Array, damp: float) -> Array:
    """With a larger diagonal, so that it can be factored, and that no weight is free."""
    h = hessian.copy()
    diagonal = np.einsum("ii->i", h)
    diagonal += damp * (diagonal.mean() or 1.0)
    return h


@np.errstate(over="ignore", invalid="ignore")
def fit(w: Floats, target: Target, importance: Floats) -> tuple[Floats, Floats]:
    """Scales and minima of `w [rows, groups, inputs]`, each [rows, groups], as they are stored.

    They minimise the sum of importance [groups, inputs] * (w - rounded w)^2, as far as a search finds: parts of the
    range, each followed by least squares for the codes that it gives.
    """
    whole, base = span(w, target)
    total = importance.sum(1) + np.float32(1e-30)
    mean = np.einsum("gi,rgi->rg", importance, w) / total
    least = np.full(base.shape, np.inf, np.float32)
    best = np.zeros((2, *base.shape), np.float32)

    def consider(scale: Floats, base: Floats) -> Floats:
        pair = [part.astype(np.float16).astype(np.float32) if target.group else part for part in (scale, base)]
        q = codes_of(w, pair[0][..., None], pair[1][..., None], target)
        error = q * pair[0][..., None]
        error += pair[1][..., None]
        error -= w
        error = np.einsum("rgi,rgi->rg", importance * error, error)
        better = error < least
        np.copyto(least, error, where=better)
        for kept, part in zip(best, pair, strict=True):
            np.copyto(kept, part, where=better)
        return q

    for shrink in SHRINK:
        q = consider(whole * np.float32(shrink), base * np.float32(shrink))
        weighed = importance * q
        squares, product = np.einsum("rgi,rgi->rg", weighed, q) / total, np.einsum("rgi,rgi->rg", weighed, w) / total
        centre = weighed.sum(2) / total if has_minimum(target) else np.zeros_like(base)
        spread = squares - centre * centre
        scale = np.divide(product - centre * mean, spread, out=whole.copy(), where=spread > 1e-6)
        consider(scale, mean - scale * centre if has_minimum(target) else base)
    if not np.isfinite(least).all():
        raise ValueError("holds values that are not finite, or too large for f16 scales: it cannot be quantized")
    return best[0], best[1]


def span(w: Floats, target: Target) -> tuple[Floats, Floats]:
    """Scales and minima by which the codes cover the range of `w [rows, groups, inputs]`, each [rows, groups]."""
    low, high = np.minimum(w.min(2), 0), np.maximum(w.max(2), 0)
    if has_minimum(target):
        return (high - low) / 15, low
    scale = np.maximum(-low, high) / 127 if target.format == "int8" else np.where(-low > high, low, high) / -8
    return scale, np.zeros_like(low)


def codes_of(w: Floats, scale: Floats, minimum: Floats, target: Target) -> Floats:
    """The nearest codes."""
    q = w - minimum
    q *= np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
    return np.clip(np.rint(q, out=q), *limits(target), out=q)


def grouped(w: Floats, group: int) -> Floats:
    """[rows, n_in] -> [rows, groups, inputs]; a short last group is filled with zeros."""
    return np.pad(w, ((0, 0), (0, -w.shape[1] % group))).reshape(len(w), -1, group)


def by_rows(w: Floats, rows: Callable[[Floats], Codes], size: int) -> Codes:
    """`size` rows at a time, on all threads."""
    with ThreadPoolExecutor(usable_processors()) as pool:
        parts = list(pool.map(rows, (w[i : i + size] for i in range(0, len(w), size))))
    return Codes(*(np.concatenate(part) for part in zip(*parts, strict=True)))
