"""The engine: token ids in, token ids out, many requests side by side."""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterator, Mapping

from pronghorn import _native
from pronghorn.engine.pages import PagePool
from pronghorn.engine.sampling import sampler
from pronghorn.engine.scheduler import Logprob, Request, Scheduler
from pronghorn.engine.speculate import Draft, Proposal, Speculator
from pronghorn.errors import ParameterError, PromptError, PronghornError
from pronghorn.ops import PAGE, Batch, Runner


class Engine:
    """Runs requests on a runner with `n_pages` pages of KV cache.

    `context`: tokens that a sequence may have, prompt and output; fewer pages make it shorter. `vocabulary`: logits
    in a row. `max_tokens`: tokens that a step may compute, as the runner was built for. `prefix_cache=False` never
    reads a page that another request has computed; `use_cache=False` computes every sequence from its beginning for
    each of its tokens. Neither changes a token.
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
    ) -> None:
        self.runner = runner
        self.context = min(context, n_pages * PAGE)
        shorter = f" (kv_memory; the model's is {context})" if self.context < context else ""
        self.holds = f"the context holds {self.context}{shorter}"  # for messages
        self.vocabulary = vocabulary
        self.use_cache = use_cache
        self.pool = PagePool(n_pages, prefix_cache=prefix_cache and use_cache)
        self.scheduler = Scheduler(self.pool, max_tokens=max_tokens, max_sequences=max_sequences)
        self.speculator: Speculator | None = None

    def speculate(self, draft: Draft, *, lengths: int | None = None) -> None:
        """Has tokens drafted, which changes none of them; `lengths` fixes how many, else what pays is found out."""
        self.speculator = Speculator(draft, self.pool, max_tokens=self.scheduler.max_tokens, lengths=lengths)

    def check(self, request: Request) -> None:
        """Raises PromptError or ParameterError for a request that cannot run here."""
        if not request.n_prompt:
            raise PromptError("the prompt is empty: it needs at least one token")
        self._check_ids(request.token_ids)
        if request.n_prompt >= self.context:
            raise PromptError(
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
        request.sampler = sampler(params, request.seed, request.stop_ids)
        n_new = self.context if params.max_tokens is None else params.max_tokens
        request.limit = min(self.context, request.n_prompt + n_new)
        self.scheduler.waiting.append(request)

    def step(self) -> list[Request]:
        """Schedules, runs, samples, commits -> the requests that have one more token (or failed)."""
        work = self.scheduler.schedule()
        if not work:
            if self.scheduler.waiting:
                raise PronghornError("the KV cache's pages are all held by others: nothing can run")
            return []
        drafts = self.speculator.propose(work) if self.speculator else {}
        logits = self._run(work, drafts)
        advanced: list[Request] = []
        row = 0
        for request, n_tokens in work:
            self._commit(request, n_tokens)
            if request.n_computed == len(request.token_ids):
                self._sample(request, logits, row)
                row += 1
                if proposal := drafts.get(request):
                    self._verify(proposal, logits, row)
                    row += len(proposal.token_ids)
                advanced.append(request)
        return advanced

    def finish(self, request: Request, reason: str) -> None:
        """Ends a request, in whatever state it is, and frees its pages; no effect on one that has ended."""
        if request.finish_reason is None:
            request.finish_reason = reason
            self.scheduler.remove(request)

    def logits(self, ids: array[int], *, n_rows: int = 64) -> Iterator[memoryview]:
        """The logits after each of the tokens, in chunks: float32 [at most n_rows, vocabulary] each.

        A chunk is valid until the next one. Nothing is read from the prefix cache.
        """
        self._check_ids(ids)
        if len(ids) > self.context:
            raise PromptError(f"there are {len(ids)} tokens, but {self.holds}")
        pages = self.pool.take(-(-len(ids) // PAGE))
        if pages is None:
            raise PromptError(f"there are {len(ids)} tokens, but other requests hold the KV cache's pages")
        step = min(n_rows, self.scheduler.max_tokens)
        try:
            for start in range(0, len(ids), step):
                chunk = ids[start : start + step]
                rows = array("i", range(len(chunk)))
                positions = array("i", range(start, start + len(chunk)))
                zeros = array("i", bytes(4 * len(chunk)))
                yield self.runner.run(Batch(chunk, positions, zeros, array("i", pages), len(pages), rows))
        finally:
            self.pool.release(pages)

    def _run(self, work: list[tuple[Request, int]], drafts: Mapping[Request, Proposal]) -> memoryview:
        """The step's logits: after each request's last token, and after each that is drafted for it."""
        batch = self._batch(work, drafts)
        if not self.speculator or len(batch.logits_rows) < len(batch.token_ids):
            return self.runner.run(batch)
        started = time.perf_counter()
        logits = self.runner.run(batch)
        self.speculator.ran(len(batch.token_ids), time.perf_counter() - started)
        return logits

    def _batch(self, work: list[tuple[Request, int]], drafts: Mapping[Request, Proposal]) -> Batch:
        batch = Batch(table_width=max(len(request.pages) for request, _ in work))
        for row, (request, n_tokens) in enumerate(work):
            start, end = request.n_computed, request.n_computed + n_tokens
            batch.token_ids.extend(request.token_ids[start:end])
            batch.positions.extend(range(start, end))
            batch.sequence.extend([row] * n_tokens)
            batch.page_table.extend(request.pages)
            batch.page_table.extend([0] * (batch.table_width - len(request.pages)))
            if end == len(request.token_ids):
                batch.logits_rows.append(len(batch.token_ids) - 1)
            for token_id in drafts[request].token_ids if request in drafts else ():
                batch.logits_rows.append(len(batch.token_ids))
                batch.token_ids.append(token_id)
                batch.positions.append(batch.positions[-1] + 1)
                batch.sequence.append(row)
        return batch

    def _verify(self, proposal: Proposal, logits: memoryview, row: int) -> None:
        """Commits drafts as long as they are what was chosen anyway, each with the choice that follows it."""
        request, n_right = proposal.request, 0
        for token_id in proposal.token_ids:
            if request.finish_reason or request.token_ids[-1] != token_id:
                break
            self._commit(request, 1)
            self._sample(request, logits, row + n_right)
            n_right += 1
        assert self.speculator
        self.speculator.verified(proposal, n_right)

    def _sample(self, request: Request, logits: memoryview, row: int) -> None:
        params, ids = request.params, request.token_ids
        try:
            token_id = request.sampler.choose(logits, row, self.vocabulary, ids, request.n_prompt)
            if params.logprobs is not None:
                found = _native.log_probabilities(logits, row, self.vocabulary, token_id, params.logprobs)
                request.logprobs.append(Logprob(token_id, found[0][1], found[1:]))
        except ValueError as error:  # logits that are not finite: this request fails, and no other
            request.error = PronghornError(f"token {len(ids)}: {error}")
            return self.finish(request, "error")
        ids.append(token_id)
        if not self.use_cache:
            request.n_computed = 0
        if token_id in request.stop_ids:
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
