"""Choosing tokens on a PyTorch device, as native/sampling.cpp does: the same filters, noise and errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional

from pronghorn.ops import Choice, Chosen

if TYPE_CHECKING:
    from pronghorn import _native

# What kernels.race gives in place of a token -> why, as native/sampling.cpp says it.
REASONS = {-1: "the model's logits are not finite", -2: "no token is left to choose from"}


def choose(
    logits: torch.Tensor,
    choices: Sequence[Choice],
    kernels: Any,
    meanwhile: Callable[[torch.Tensor], None] | None = None,
) -> list[Chosen]:
    """A token for each row of logits: of choices without history, biases and the likeliest tokens' probabilities.

    `meanwhile` is given the tokens on the device, before they are waited for; it may begin what writes over the logits.
    """
    left, samplers = logits, [c.sampler for c in choices]
    limited = [(i, s) for i, s in enumerate(samplers) if s.temperature and (s.top_k or s.top_p < 1 or s.min_p)]
    masked = [(i, bytes(c.allowed)) for i, c in enumerate(choices) if c.allowed is not None]
    if masked or limited:
        left = logits.clone()
    for i, mask in masked:
        keep_only(left[i], allowed(mask, left[i]))
    for i, sampler in limited:
        keep_only(left[i], likely(left[i], sampler))
    drawn = kernels.race(
        left,
        [1 / s.temperature if s.temperature else 0.0 for s in samplers],
        [s.seed - (s.seed >> 63 << 64) for s in samplers],
        [len(c.history) for c in choices],
    )
    told = any(c.n_top is not None for c in choices)
    asked = [drawn]
    if told:
        wide = logits.double()
        asked.append(wide.gather(1, drawn.long().clamp(min=0)[:, None])[:, 0] - wide.logsumexp(1))
    came = fetch(asked)
    if meanwhile:
        meanwhile(drawn)
    ids, *more = came()
    chances = more[0] if told else []
    return [
        REASONS.get(token) or (token, [] if c.n_top is None else [(token, chances[i])])
        for i, (c, token) in enumerate(zip(choices, ids, strict=True))
    ]


def fetch(tensors: Sequence[torch.Tensor]) -> Callable[[], list[list[Any]]]:
    """Has tensors copied to the host -> what waits for that, and for nothing that is begun later, and gives them."""
    if not tensors[0].is_cuda:
        return lambda: [t.tolist() for t in tensors]
    there = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors]
    for target, source in zip(there, tensors, strict=True):
        target.copy_(source, non_blocking=True)
    done = torch.cuda.Event()
    done.record()

    def wait() -> list[list[Any]]:
        done.synchronize()
        return [t.tolist() for t in there]

    return wait


def keep_only(row: torch.Tensor, wanted: torch.Tensor) -> None:
    """Takes all others out of the race, but for what is NaN or +inf: that has to come out."""
    row.masked_fill_(~wanted & (row < torch.inf), -torch.inf)


def allowed(mask: bytes, logits: torch.Tensor) -> torch.Tensor:
    """A mask of engine.grammar as booleans, one a token; tokens past its end are not allowed."""
    bits = torch.from_numpy(np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little").astype(bool))[: len(logits)]
    return functional.pad(bits, (0, len(logits) - len(bits))).to(logits.device)


def likely(logits: torch.Tensor, sampler: _native.Sampler) -> torch.Tensor:
    """Which tokens of a row top_k, top_p and min_p leave, as native/sampling.cpp has it."""
    found, ids = torch.sort(logits, descending=True, stable=True)
    shares = ((found.double() - found[0].double()) / sampler.temperature).exp()
    keep = torch.ones_like(ids, dtype=torch.bool)
    if sampler.top_k:
        shares[sampler.top_k :] = 0
        keep[sampler.top_k :] = False
    if sampler.top_p < 1:
        keep &= shares.cumsum(0) - shares < sampler.top_p * shares.sum()
    if sampler.min_p:
        least = (found[0].double() + sampler.temperature * math.log(sampler.min_p)).float()
        keep &= found >= torch.minimum(found[0], least)
    return torch.empty_like(keep).scatter_(0, ids, keep)
