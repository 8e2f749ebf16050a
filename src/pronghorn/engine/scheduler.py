"""Requests, and what of them runs in the next step."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from pronghorn.engine.pages import ROOT, PagePool
from pronghorn.engine.sampling import SamplingParams, fresh_seed
from pronghorn.errors import PromptError, PronghornError
from pronghorn.ops import PAGE

if TYPE_CHECKING:
    from pronghorn import _native
    from pronghorn.engine.speculate import Odds


class Logprob(NamedTuple):
    """A chosen token, the natural logarithm of its probability, and (token id, logarithm) of the likeliest."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


def token_array(token_ids: Sequence[int]) -> array[int]:
    """Token ids as 32-bit integers; PromptError for what is none. Whether a vocabulary has them is not looked at."""
    try:
        if isinstance(token_ids, (str, bytes, bytearray)):  # array() takes bytes for raw memory
            raise TypeError(f"it is {type(token_ids).__name__}")
        return array("i", token_ids)
    except (TypeError, ValueError, OverflowError) as error:
        raise PromptError(f"the prompt is no list of token ids: {error}") from None


class Request:
    """A prompt and what has come of it so far: token ids in, token ids out.

    `eos_ids` are the tokens that end a sequence, unless `params.ignore_eos`.
    `token_ids` begins with the prompt and grows; `finish_reason` is None while it runs, then "stop" (an
    end-of-sequence or stop token, or whoever reads the text found a stop string), "length" (max_tokens or the
    context), "cancelled", or "error" (`error` says what).
    """

    __slots__ = (
        "chain", "error", "finish_reason", "limit", "logprobs", "n_accepted", "n_cached", "n_chained", "n_computed",
        "n_drafted", "n_in_draft", "n_prompt", "odds", "pages", "params", "sampler", "seed", "stop_ids", "token_ids",
    )  # fmt: skip

    def __init__(self, token_ids: Sequence[int], params: SamplingParams, eos_ids: Iterable[int] = ()) -> None:
        self.token_ids = token_array(token_ids)  # prompt, then output
        self.n_prompt = len(self.token_ids)
        self.params = params
        self.stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else frozenset(eos_ids))
        self.seed = fresh_seed() if params.seed is None else params.seed
        self.logprobs: list[Logprob] = []
        self.n_drafted = self.n_accepted = 0  # tokens that a draft proposed, and of these the right ones
        self.finish_reason: str | None = None
        self.error: PronghornError | None = None
        # The engine's own:
        self.sampler: _native.Sampler
        self.limit = 0  # tokens at which it ends
        self.pages: list[int] = []
        self.n_computed = 0  # tokens whose keys and values stand in the pages
        self.n_cached: int | None = None  # of which the prefix cache gave so many when it first was let in
        self.chain = ROOT  # of the first n_chained pages
        self.n_chained = 0
        self.n_in_draft = 0  # tokens whose keys and values the draft model has, where it has its own
        self.odds: Odds | None = None  # of its drafts

    @property
    def n_left(self) -> int:
        """Tokens to compute before the next one can be chosen; 1 while decoding."""
        return len(self.token_ids) - self.n_computed


class Scheduler:
    """First come, first served, under a budget of tokens for each step.

    Tokens to decode go first, then prompts, in chunks. A request is let in once there are pages for all of its
    tokens; if decoding runs out of pages, the latest request gives up its own, and is computed again later.
    """

    def __init__(self, pool: PagePool, *, max_tokens: int, max_sequences: int) -> None:
        self.pool = pool
        self.max_tokens = max_tokens
        self.max_sequences = max_sequences
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in the order of their coming

    def schedule(self) -> list[tuple[Request, int]]:
        """Who runs in this step, and how many of his tokens."""
        work: list[tuple[Request, int]] = []
        budget = self.max_tokens
        n_ready = 0
        while n_ready < len(self.running):
            if self._has_pages(self.running[n_ready]):
                n_ready += 1
            else:  # the latest gives way, be it the one that asks
                self._release(self.running[-1])
                self.waiting.appendleft(self.running.pop())
        # Tokens to decode first; the sort is stable.
        for request in sorted(self.running, key=lambda request: request.n_left > 1):
            if budget:
                work.append((request, min(request.n_left, budget)))
                budget -= work[-1][1]
        while self.waiting and budget and len(self.running) < self.max_sequences and self._admit(self.waiting[0]):
            request = self.waiting.popleft()
            self.running.append(request)
            work.append((request, min(request.n_left, budget)))
            budget -= work[-1][1]
        return work

    def remove(self, request: Request) -> None:
        """Takes a request out, wherever it is, and frees its pages."""
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        self._release(request)

    def _has_pages(self, request: Request) -> bool:
        """Sees to it that a request has pages for all of its tokens."""
        missing = -(-len(request.token_ids) // PAGE) - len(request.pages)
        if missing > 0:
            pages = self.pool.take(missing)
            if pages is None:
                return False
            request.pages += pages
        return True

    def _admit(self, request: Request) -> bool:
        request.pages, request.chain = self.pool.match(request.token_ids)
        request.n_chained = len(request.pages)
        request.n_computed = request.n_chained * PAGE
        if self._has_pages(request):
            if request.n_cached is None:
                request.n_cached = request.n_computed
            return True
        self._release(request)
        return False

    def _release(self, request: Request) -> None:
        self.pool.release(request.pages)
        request.pages = []
        request.n_computed = request.n_chained = request.n_in_draft = 0
        request.chain = ROOT
