"""The engine: token ids in, token ids out, many requests side by side."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

from pronghorn import _native
from pronghorn.engine.pages import PagePool
from pronghorn.engine.sampling import sampler
from pronghorn.engine.scheduler import Logprob, Request, Scheduler
from pronghorn.errors import ParameterError, PromptError, PromptTooLong, PronghornError, QueueFull
from pronghorn.ops import PAGE, Batch, Choice, Chosen, Runner

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

    from pronghorn.engine.grammar import Mask
    from pronghorn.engine.speculate import Draft, Proposal, Speculator


class Stats(NamedTuple):
    """Where an engine stands; what is counted is counted from its beginning."""

    running: int  # requests that hold pages
    waiting: int
    pages: int  # of the KV cache
    held_pages: int  # that requests hold; others may keep contents for the prefix cache
    steps: int
    prompt_tokens: int  # of the requests that were let in
    cached_tokens: int  # of these, not computed, as the prefix cache or another sample had them
    generated_tokens: int
    preemptions: int
    drafted_tokens: int  # proposed by a draft
    accepted_tokens: int  # of these, those that were right


class NoPages(PronghornError):
    """A step that cannot begin anything while somebody reads `logits`."""


class Engine:
    """Runs requests on a runner with `n_pages` pages of KV cache.

    `context`: tokens that a sequence may have, prompt and output; fewer pages make it shorter. `vocabulary`: logits
    in a row. `max_tokens`: tokens that a step may compute, as the runner was built for. `prefix_cache=False` never
    reads a page that another request has computed; `use_cache=False` computes every sequence from its beginning for
    each of its tokens. Neither changes a token. `clock` gives seconds, for deadlines and for the pace of prompts.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        n_pages: int,
        context: int,
        vocabulary: int,
        max_tokens: int = 512,
        max_sequences: int = 64,
        prefix_cache: bool = True,
        use_cache: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.runner = runner
        self.clock = clock
        self.context = min(context, n_pages * PAGE)
        shorter = f" (kv_memory; the model's is {context})" if self.context < context else ""
        self.holds = f"the context holds {self.context}{shorter}"  # for messages
        self.vocabulary = vocabulary
        self.use_cache = use_cache
        self.pool = PagePool(n_pages, prefix_cache=prefix_cache and use_cache)
        self.scheduler = Scheduler(
            self.pool,
            max_tokens=max_tokens,
            max_sequences=max_sequences,
            copy_page=runner.copy_page if use_cache else None,
        )
        self.speculator: Speculator | None = None
        self._ahead: ThreadPoolExecutor | None = None  # who computes masks while the model runs (both without the lock)
        self._timed: dict[Request, float] = {}  # the deadlines of those that have one
        self._n_steps = self._n_generated = 0

    def speculate(self, draft: Draft, *, lengths: int | None = None) -> None:
        """Has tokens drafted, which changes none of them; `lengths` fixes how many, else what pays is found out."""
        from pronghorn.engine.speculate import Speculator

        self.speculator = Speculator(draft, self.pool, max_tokens=self.scheduler.max_tokens, lengths=lengths)

    def check(self, request: Request) -> None:
        """Raises PromptError or ParameterError for a request that cannot run here."""
        if not request.n_prompt:
            raise PromptError("the prompt is empty: it needs at least one token")
        self._check_ids(request.token_ids)
        if request.n_prompt >= self.context:
            raise PromptTooLong(
                f"the prompt has {request.n_prompt} tokens, but {self.holds}, with at least one to generate"
            )
        for name in ("logit_bias", "stop_token_ids"):
            for token_id in getattr(request.params, name):
                if token_id >= self.vocabulary:
                    raise ParameterError(
                        f"{name}: token id {token_id} is outside of the vocabulary (0 to {self.vocabulary - 1})"
                    )

    def add(self, request: Request) -> None:
        """Queues a request, once checked; `step` brings it forward, until `request.finish_reason` says why it ended."""
        self.check(request)
        params = request.params
        ends = [index for index in request.stop_ids if index < self.vocabulary]  # configurations name others, too
        request.sampler = sampler(params, request.seed, ends)
        n_new = self.context if params.max_tokens is None else params.max_tokens
        request.limit = min(self.context, request.n_prompt + n_new)
        self.scheduler.add(request)
        if request.deadline is not None:
            self._timed[request] = request.deadline

    def step(self) -> list[Request]:
        """Schedules, runs, samples, commits -> the requests that have one more token, or have ended.

        Where a deadline has passed, it is told at once, and the others' turn comes with the next call.
        """
        started = self.clock()
        if expired := self._expire(started):  # a step that fails must not swallow them
            return expired
        work = self.scheduler.schedule()
        if not work:
            if self.scheduler.waiting:
                raise NoPages("the KV cache's pages are all held by others: nothing can run")
            return []
        n_decoding = sum(request.n_left == 1 for request, _ in work)
        drafts = self.speculator.propose(work) if self.speculator else {}
        batch = self._batch(work, drafts)
        masks = self._masks(work)
        try:
            logits = self._run(batch)
        finally:  # they were computed meanwhile
            allowed = masks()
        row, choices, rows = 0, list[Choice](), dict[Request, int]()
        for request, n_tokens in work:
            row = self._prompt_logprobs(request, n_tokens, logits, row)
            self._commit(request, n_tokens)
            if request.n_computed == len(request.token_ids):
                drafted = drafts[request].token_ids if request in drafts else array("i")
                rows[request] = row
                choices += self._choices(request, row, drafted, allowed.get(request))
                row += 1 + len(drafted)
        chosen = iter(self.runner.choose(logits, choices) if choices else ())
        for request, row in rows.items():
            self._take(request, next(chosen))
            if proposal := drafts.get(request):
                self._verify(proposal, logits, row + 1, chosen)
        self._n_steps += 1
        if not drafts:
            self.scheduler.pace.note(n_decoding, len(batch.token_ids) - n_decoding, self.clock() - started)
        return list(rows)

    def stats(self) -> Stats:
        """See Stats. Any thread may ask, at any time."""
        scheduler, pool = self.scheduler, self.pool
        return Stats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            pages=pool.n_pages,
            held_pages=pool.n_pages - pool.n_free,
            steps=self._n_steps,
            prompt_tokens=scheduler.n_prompt,
            cached_tokens=scheduler.n_cached,
            generated_tokens=self._n_generated,
            preemptions=scheduler.n_preempted,
            drafted_tokens=self.speculator.n_drafted if self.speculator else 0,
            accepted_tokens=self.speculator.n_accepted if self.speculator else 0,
        )

    def finish(self, request: Request, reason: str) -> None:
        """Ends a request, in whatever state it is, and frees its pages; no effect on one that has ended."""
        if request.finish_reason is None:
            request.finish_reason = reason
            self._timed.pop(request, None)
            self.scheduler.remove(request)

    def logits(
        self, ids: array[int], runner: Runner | None = None, *, n_rows: int = 64
    ) -> Generator[memoryview, None, None]:
        """The logits after each of the tokens, in chunks: float32 [at most n_rows, vocabulary] each.

        A chunk is valid until the next one. Nothing is read from the prefix cache. `runner`: another on the same pages.
        """
        self._check_ids(ids)
        if len(ids) > self.context:
            raise PromptTooLong(f"there are {len(ids)} tokens, but {self.holds}")
        pages = self.pool.take(-(-len(ids) // PAGE))
        if pages is None:
            raise QueueFull(f"there are {len(ids)} tokens, but other requests hold the KV cache's pages")
        step = min(n_rows, self.scheduler.max_tokens)
        try:
            for start in range(0, len(ids), step):
                chunk = ids[start : start + step]
                rows = array("i", range(len(chunk)))
                positions = array("i", range(start, start + len(chunk)))
                zeros = array("i", bytes(4 * len(chunk)))
                yield (runner or self.runner).run(Batch(chunk, positions, zeros, array("i", pages), len(pages), rows))
        finally:
            self.pool.release(pages)

    def _run(self, batch: Batch) -> memoryview:
        """The batch's logits; what decoding takes, the speculator learns."""
        if not self.speculator or len(batch.logits_rows) < len(batch.token_ids):
            return self.runner.run(batch)
        started = time.perf_counter()
        logits = self.runner.run(batch)
        self.speculator.ran(len(batch.token_ids), time.perf_counter() - started)
        return logits

    def _batch(self, work: list[tuple[Request, int]], drafts: Mapping[Request, Proposal]) -> Batch:
        batch = Batch(table_width=max(len(request.pages) for request, _ in work))
        batch.logits_here = any(request.wants_prompt for request, _ in work)
        for row, (request, n_tokens) in enumerate(work):
            start, end, at = request.n_computed, request.n_computed + n_tokens, len(batch.token_ids)
            batch.token_ids.extend(request.token_ids[start:end])
            batch.positions.extend(range(start, end))
            batch.sequence.extend([row] * n_tokens)
            batch.page_table.extend(request.pages)
            batch.page_table.extend([0] * (batch.table_width - len(request.pages)))
            if request.wants_prompt:
                wanted = prompt_rows(request, start, end)
                batch.logits_rows.extend(range(wanted.start + at, wanted.stop + at))
            if end == len(request.token_ids):
                batch.logits_rows.append(len(batch.token_ids) - 1)
            for token_id in drafts[request].token_ids if request in drafts else ():
                batch.logits_rows.append(len(batch.token_ids))
                batch.token_ids.append(token_id)
                batch.positions.append(batch.positions[-1] + 1)
                batch.sequence.append(row)
        return batch

    def _verify(self, proposal: Proposal, logits: memoryview, row: int, chosen: Iterator[Chosen]) -> None:
        """Commits drafts as long as they are what was chosen anyway, each with the choice that follows it."""
        request, n_right = proposal.request, 0
        following = [] if request.grammar else [next(chosen) for _ in proposal.token_ids]
        for i, token_id in enumerate(proposal.token_ids):
            if request.finish_reason or request.token_ids[-1] != token_id:
                break
            self._commit(request, 1)
            if request.grammar:
                following += self.runner.choose(logits, self._choices(request, row + i))
            self._take(request, following[i])
            n_right += 1
        assert self.speculator
        self.speculator.verified(proposal, n_right)

    def _masks(self, work: list[tuple[Request, int]]) -> Callable[[], dict[Request, Mask | PronghornError]]:
        """Begins the masks of those that have a grammar and get a token -> what waits for them."""
        grammars = {request: request.grammar for request, n in work if request.grammar and n == request.n_left}
        if not grammars:
            return dict
        from pronghorn.engine.grammar import masks

        if self._ahead is None:
            from concurrent.futures import ThreadPoolExecutor

            self._ahead = ThreadPoolExecutor(1, "pronghorn-masks")
        return self._ahead.submit(masks, grammars).result

    def _expire(self, now: float) -> list[Request]:
        """Ends what has passed its deadline -> these requests. What they have by now they keep."""
        expired = [request for request, deadline in self._timed.items() if deadline <= now]
        for request in expired:
            self.finish(request, "timeout")
        return expired

    def _prompt_logprobs(self, request: Request, n_tokens: int, logits: memoryview, row: int) -> int:
        """Notes what a chunk says of the prompt's own tokens -> the row after it."""
        if request.wants_prompt:
            n_top = request.params.prompt_logprobs or 0
            start = request.n_computed
            for index in prompt_rows(request, start, start + n_tokens):
                token_id = request.token_ids[start + index + 1]
                try:
                    found = _native.log_probabilities(logits, row, self.vocabulary, token_id, n_top)
                except ValueError as error:  # it fails where it would be sampled
                    request.error = PronghornError(f"token {start + index} of the prompt: {error}")
                else:
                    request.prompt_logprobs.append(Logprob(token_id, found[0][1], found[1:]))
                row += 1
        return row

    def _choices(
        self,
        request: Request,
        row: int,
        drafted: array[int] | None = None,
        allowed: Mask | PronghornError | None = None,
    ) -> list[Choice]:
        """What is to be chosen after a request's tokens, and after each of its drafts, as if these were right.

        Not so with a grammar, which must see a token to say what may follow it.
        """
        params, ids = request.params, request.token_ids
        n_top = params.logprobs if params.best_of is None else params.logprobs or 0
        try:
            if isinstance(allowed, PronghornError):
                raise allowed
            if request.grammar and allowed is None:
                allowed = request.grammar.mask()
        except PronghornError as error:
            request.error, allowed = request.error or error, None
        choices = [Choice(request.sampler, row, ids, request.n_prompt, allowed, n_top)]
        if drafted and not request.grammar:
            ahead = ids + drafted
            choices += [
                Choice(request.sampler, row + i, ahead[: len(ids) + i], request.n_prompt, None, n_top)
                for i in range(1, 1 + len(drafted))
            ]
        return choices

    def _take(self, request: Request, chosen: Chosen) -> None:
        """Appends the token that was chosen, or ends the request, which no other minds."""
        ids = request.token_ids
        try:
            if request.error:
                raise request.error
            if isinstance(chosen, str):  # such as: the logits are not finite
                raise PronghornError(chosen)
            token_id, found = chosen
            if found:
                request.logprobs.append(Logprob(token_id, found[0][1], found[1:]))
            if request.grammar and token_id not in request.stop_ids:
                request.grammar.advance(token_id)
        except PronghornError as error:
            request.error = request.error or PronghornError(f"token {len(ids)}: {error}")
            return self.finish(request, "error")
        ids.append(token_id)
        self._n_generated += 1
        if not self.use_cache:
            request.n_computed = 0
        if token_id in request.stop_ids or (request.grammar and request.grammar.complete):
            self.finish(request, "stop")
        elif len(ids) >= request.limit:
            self.finish(request, "length")

    def _commit(self, request: Request, n_tokens: int) -> None:
        """Notes that tokens are computed, and makes full pages known to the prefix cache."""
        request.n_computed += n_tokens
        if self.pool.prefix_cache:
            for index in range(request.n_chained, request.n_computed // PAGE):
                tokens = request.token_ids[index * PAGE : (index + 1) * PAGE]
                request.chain = self.pool.learn(request.pages[index], request.chain, tokens)
                request.n_chained += 1

    def _check_ids(self, token_ids: array[int]) -> None:
        if min(token_ids, default=0) < 0 or max(token_ids, default=0) >= self.vocabulary:
            index = next(i for i, token_id in enumerate(token_ids) if not 0 <= token_id < self.vocabulary)
            raise PromptError(
                f"token {index} of the prompt is {token_ids[index]}: outside of the vocabulary "
                f"(0 to {self.vocabulary - 1})"
            )


def prompt_rows(request: Request, start: int, end: int) -> range:
    """The tokens of a chunk whose logits tell the log-probabilities of the prompt's tokens, counted from its start."""
    return range(max(start, len(request.prompt_logprobs)) - start, max(min(end, request.n_prompt - 1) - start, 0))
