"""Requests, and what of them runs in the next step."""

from __future__ import annotations

from array import array
from bisect import insort
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from pronghorn.engine.pace import Pace
from pronghorn.engine.pages import ROOT, PagePool
from pronghorn.engine.sampling import SamplingParams, fresh_seed
from pronghorn.errors import PromptError, PronghornError
from pronghorn.ops import PAGE

if TYPE_CHECKING:
    from pronghorn import _native
    from pronghorn.engine.grammar import Grammar
    from pronghorn.engine.speculate import Odds

LOGITS_ROWS = 64
"""Rows of logits that a chunk of a prompt takes at most, where its log-probabilities are wanted."""


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

    `eos_ids` are the tokens that end a sequence, unless `params.ignore_eos`. Of those that wait, the lowest `priority`
    runs first, and of equals the first that came. `deadline`: seconds on the engine's clock, at which it ends.
    `grammar`: what allows the tokens; the request's own. `first`: the first of parallel samples of one prompt, whose
    pages this one, the `index`-th, shares. `streamed`: its tokens are read as they come, so prompts of others leave it
    its pace; who waits for the whole is better off when these are done soon.

    `token_ids` begins with the prompt and grows; `finish_reason` is None while it runs, then "stop" (an
    end-of-sequence or stop token, a grammar that is complete, or whoever reads the text found a stop string),
    "length" (max_tokens or the context), "timeout" (the deadline), "cancelled", or "error" (`error` says what).
    """

    __slots__ = (
        "chain", "deadline", "error", "finish_reason", "first", "grammar", "index", "limit", "logprobs", "n_accepted",
        "n_cached", "n_chained", "n_computed", "n_drafted", "n_in_draft", "n_prompt", "number", "odds", "pages",
        "params", "priority", "prompt_logprobs", "sampler", "seed", "stop_ids", "streamed", "token_ids",
    )  # fmt: skip

    def __init__(
        self,
        token_ids: Sequence[int],
        params: SamplingParams,
        eos_ids: Iterable[int] = (),
        *,
        priority: int = 0,
        deadline: float | None = None,
        grammar: Grammar | None = None,
        first: Request | None = None,
        index: int = 0,
        streamed: bool = False,
    ) -> None:
        self.token_ids = token_array(token_ids)  # prompt, then output
        self.n_prompt = len(self.token_ids)
        self.params = params
        self.stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else frozenset(eos_ids))
        self.priority = priority
        self.deadline = deadline
        self.grammar = grammar
        self.first = first
        self.index = index
        self.streamed = streamed
        seed = fresh_seed() if params.seed is None else params.seed
        self.seed: int = (first.seed + index) % 2**64 if first else seed
        self.n_drafted = self.n_accepted = 0  # tokens that a draft proposed, and of these the right ones
        self.logprobs: list[Logprob] = []  # of the output, where they are wanted, or samples are to be compared
        # Of the prompt's tokens from the second on, where they are wanted; one list for all samples.
        self.prompt_logprobs: list[Logprob] = first.prompt_logprobs if first else []
        self.finish_reason: str | None = None
        self.error: PronghornError | None = None
        # The engine's own:
        self.sampler: _native.Sampler
        self.number = 0  # of its coming
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

    @property
    def wants_prompt(self) -> bool:
        """Whether there are tokens of the prompt whose log-probabilities are still to be computed, here."""
        wanted = self.params.prompt_logprobs is not None and self.first is None
        return wanted and len(self.prompt_logprobs) < self.n_prompt - 1


def turn(request: Request) -> tuple[int, int]:
    """By what requests are ordered."""
    return request.priority, request.number


class Scheduler:
    """By priority, then first come, first served, under a budget of tokens for each step.

    Tokens to decode go first, then prompts, in chunks that leave those who are read along their pace. A request is let
    in once there are pages for all of its tokens; if decoding runs out of pages, the last in order gives up its own,
    and is computed again later; so does one that runs while another of a better priority waits.

    `copy_page(source, target)`: how a page is copied before it is written, if others hold it too; None: no page is
    ever shared but through the prefix cache.
    """

    def __init__(
        self,
        pool: PagePool,
        *,
        max_tokens: int,
        max_sequences: int,
        pace: Pace | None = None,
        copy_page: Callable[[int, int], None] | None = None,
    ) -> None:
        self.pool = pool
        self.max_tokens = max_tokens
        self.max_sequences = max_sequences
        self.pace = pace or Pace(max_tokens)
        self.copy_page = copy_page
        self.waiting: list[Request] = []  # in order: see turn()
        self.running: list[Request] = []  # in order
        self.n_preempted = self.n_prompt = self.n_cached = 0  # so far: requests, and tokens of prompts
        self._n_came = 0

    def add(self, request: Request) -> None:
        """A request that waits from now on."""
        self._n_came += 1
        request.number = self._n_came
        insort(self.waiting, request, key=turn)

    def schedule(self) -> list[tuple[Request, int]]:
        """Who runs in this step, and how many of his tokens."""
        n_ready = 0
        while n_ready < len(self.running):
            if self._has_pages(self.running[n_ready]):
                n_ready += 1
            else:  # the last gives way, be it the one that asks
                self._preempt(self.running[-1])
        self._give_way()
        work: list[tuple[Request, int]] = []
        # Tokens to decode first; the sort is stable.
        n_decoding = sum(request.n_left == 1 for request in self.running)
        read_along = any(request.streamed and request.n_left == 1 for request in self.running)
        budget = min(self.max_tokens, n_decoding + self.pace.budget(n_decoding if read_along else 0))
        for request in sorted(self.running, key=lambda request: request.n_left > 1):
            if budget:
                work.append((request, self._chunk(request, budget)))
                budget -= work[-1][1]
        at = 0
        while budget and at < len(self.waiting) and len(self.running) < self.max_sequences:
            request = self.waiting[at]
            if self._waits_for_first(request):
                at += 1
                continue
            if not self._admit(request):
                break
            del self.waiting[at]
            insort(self.running, request, key=turn)
            work.append((request, self._chunk(request, budget)))
            budget -= work[-1][1]
        return work

    def remove(self, request: Request) -> None:
        """Takes a request out, wherever it is, and frees its pages."""
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        self._release(request)

    def _waits_for_first(self, request: Request) -> bool:
        """Whether the pages that a request would share are still to be computed."""
        first = request.first
        if not first or not self.copy_page:
            return False
        return first.finish_reason is None and first.n_computed < request.n_prompt

    def _chunk(self, request: Request, budget: int) -> int:
        return min(request.n_left, budget, LOGITS_ROWS if request.wants_prompt else budget)

    def _give_way(self) -> None:
        """Makes room for the request that waits first, by those that run with a worse priority."""
        head = next((request for request in self.waiting if not self._waits_for_first(request)), None)
        if head is None:
            return
        needed = -(-len(head.token_ids) // PAGE)
        while self.running and self.running[-1].priority > head.priority:
            if len(self.running) < self.max_sequences and needed <= self.pool.n_free:
                return
            self._preempt(self.running[-1])

    def _preempt(self, request: Request) -> None:
        self.n_preempted += 1
        self.running.remove(request)
        self._release(request)
        insort(self.waiting, request, key=turn)

    def _has_pages(self, request: Request) -> bool:
        """Sees to it that a request has pages for all of its tokens, and for itself those that it will write."""
        pages, at = request.pages, request.n_computed // PAGE
        missing = max(-(-len(request.token_ids) // PAGE) - len(pages), 0)  # drafts may have taken one more
        shared = at < len(pages) and self.pool.is_shared(pages[at])
        if missing + shared > 0:
            taken = self.pool.take(missing + shared)
            if taken is None:
                return False
            if shared:
                assert self.copy_page is not None
                self.copy_page(pages[at], taken[0])
                self.pool.release([pages[at]])
                pages[at] = taken.pop(0)
            pages += taken
        return True

    def _admit(self, request: Request) -> bool:
        if not request.wants_prompt:
            request.pages, request.chain = self.pool.match(request.token_ids)
        request.n_chained = len(request.pages)
        request.n_computed = request.n_chained * PAGE
        first, n_shared = request.first, request.n_prompt - 1
        if self.copy_page and first and n_shared <= first.n_computed and n_shared > request.n_computed:
            pages = first.pages[len(request.pages) : -(-n_shared // PAGE)]
            self.pool.hold(pages)
            request.pages += pages
            request.n_computed = n_shared
        if self._has_pages(request):
            if request.n_cached is None:
                request.n_cached = request.n_computed
                self.n_prompt += request.n_prompt
                self.n_cached += request.n_cached
            return True
        self._release(request)
        return False

    def _release(self, request: Request) -> None:
        self.pool.release(request.pages)
        request.pages = []
        request.n_computed = request.n_chained = request.n_in_draft = 0
        request.chain = ROOT
