"""The engine on a runner that remembers tokens instead of computing: what is read from a wrong page shows."""

from __future__ import annotations

import itertools
import random
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pronghorn import ParameterError, PromptError, PronghornError, QueueFull, SamplingParams, _native
from pronghorn.engine.engine import Engine
from pronghorn.engine.pace import Pace
from pronghorn.engine.pages import ROOT, PagePool
from pronghorn.engine.scheduler import Request, turn
from pronghorn.ops import PAGE, Batch, Choice, Chosen

VOCABULARY = 101


class FakeRunner:
    """Its KV cache holds the tokens themselves; logits are a hash of all that a row may see."""

    def __init__(self, n_pages: int, max_tokens: int = 512) -> None:
        self.pages = [[-1] * PAGE for _ in range(n_pages)]
        self.max_tokens = max_tokens
        self.batches: list[Batch] = []
        self.fault: Callable[[Batch], None] = lambda batch: None

    def run(self, batch: Batch) -> memoryview:
        """See ops.Runner."""
        self.fault(batch)
        assert 0 < len(batch.token_ids) <= self.max_tokens
        assert len(batch.token_ids) == len(batch.positions) == len(batch.sequence)
        assert list(batch.logits_rows) == sorted(set(batch.logits_rows))
        self.batches.append(batch)
        tables = [
            list(batch.page_table[row * batch.table_width : (row + 1) * batch.table_width])
            for row in range(len(batch.page_table) // batch.table_width)
        ]
        for token_id, position, row in zip(batch.token_ids, batch.positions, batch.sequence, strict=True):
            self.pages[tables[row][position // PAGE]][position % PAGE] = token_id
        rows = []
        for i in batch.logits_rows:
            table = tables[batch.sequence[i]]
            seen = [self.pages[table[p // PAGE]][p % PAGE] for p in range(batch.positions[i] + 1)]
            rows.append(fake_logits(seen))
        return memoryview(np.array(rows, np.float32).reshape(len(rows), VOCABULARY))

    def copy_page(self, source: int, target: int) -> None:
        """See ops.Runner."""
        self.pages[target] = list(self.pages[source])

    def choose(self, logits: memoryview, choices: Sequence[Choice]) -> list[Chosen]:
        """See ops.Runner."""
        return _native.choose_rows(logits, VOCABULARY, choices)


def fake_logits(token_ids: list[int]) -> np.ndarray:
    assert min(token_ids) >= 0, "a slot is read that was never written"
    return np.random.default_rng(token_ids).standard_normal(VOCABULARY).astype(np.float32)


def engine_of(n_pages: int = 64, context: int = 1000, max_tokens: int = 512, **options: Any) -> Engine:
    runner = FakeRunner(n_pages, max_tokens)
    options = {"context": context, "vocabulary": VOCABULARY, "max_tokens": max_tokens, "clock": lambda: 0.0, **options}
    return Engine(runner, n_pages=n_pages, **options)


def run(engine: Engine, requests: list[Request], arrivals: list[int] | None = None) -> None:
    """Steps until all are done; requests come at the steps that `arrivals` names."""
    for step in itertools.count():
        for request, arrival in zip(requests, arrivals or [0] * len(requests), strict=True):
            if arrival == step:
                engine.add(request)
        engine.step()
        if all(request.finish_reason for request in requests):
            return
        assert step < 20_000, "no end"


def prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(VOCABULARY), k=length)


def greedy(token_ids: list[int], n: int) -> list[int]:
    """What must come out, from the definition."""
    ids = list(token_ids)
    for _ in range(n):
        ids.append(int(np.argmax(fake_logits(ids))))
    return ids[len(token_ids) :]


def output(request: Request) -> array[int]:
    return request.token_ids[request.n_prompt :]


def all_free(engine: Engine) -> bool:
    return engine.pool.n_free == engine.pool.n_pages and not [*engine.scheduler.running, *engine.scheduler.waiting]


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 64, 65, 200])
@pytest.mark.parametrize("max_tokens", [1, 7, 512])
def test_one_request(length: int, max_tokens: int) -> None:
    engine = engine_of(max_tokens=max_tokens)
    request = Request(prompt(length), SamplingParams(max_tokens=40))
    run(engine, [request])
    assert output(request).tolist() == greedy(prompt(length), 40)
    assert request.finish_reason == "length"
    assert all_free(engine)


def settings_of(i: int) -> SamplingParams:
    return SamplingParams(max_tokens=20 + 7 * i, temperature=0.0 if i % 2 else 1.0, seed=i, top_k=i, logprobs=i % 3)


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(
    ("n_pages", "max_tokens", "max_sequences"), [(200, 512, 64), (12, 512, 64), (9, 16, 3), (8, 5, 8), (200, 3, 1)]
)
def test_company_changes_nothing(
    n_pages: int, max_tokens: int, max_sequences: int, use_cache: bool, prefix_cache: bool
) -> None:
    """Alone = in any batch, however chunked, preempted, and cached."""
    if not use_cache:
        n_pages = max(n_pages, 40)
    shared = prompt(70, 99)
    prompts = [shared[: 35 * (i % 3)] + prompt(1 + 11 * i, i) for i in range(8)]
    alone = []
    for i, ids in enumerate(prompts):
        request = Request(ids, settings_of(i))
        run(engine_of(), [request])
        alone.append((output(request), request.logprobs, request.finish_reason))
    engine = engine_of(
        n_pages, 256, max_tokens, max_sequences=max_sequences, use_cache=use_cache, prefix_cache=prefix_cache
    )
    requests = [Request(ids, settings_of(i)) for i, ids in enumerate(prompts)]
    run(engine, requests, [3 * i for i in range(8)])
    assert [(output(request), request.logprobs, request.finish_reason) for request in requests] == alone
    assert all_free(engine)


def test_decoding_goes_before_prompts() -> None:
    engine = engine_of(max_tokens=16)
    first = Request(prompt(5), SamplingParams(max_tokens=50))
    engine.add(first)
    engine.step()
    engine.add(Request(prompt(100, 1), SamplingParams(max_tokens=1)))
    for _ in range(5):
        assert first in engine.step()
    assert [len(batch.token_ids) for batch in engine.runner.batches] == [5, 16, 16, 16, 16, 16]  # type: ignore[attr-defined]


def test_the_latest_gives_way() -> None:
    """Four pages, two requests that need three each: the first is never disturbed."""
    engine = engine_of(n_pages=4, prefix_cache=False)
    requests = [Request(prompt(40, i), SamplingParams(max_tokens=50)) for i in range(2)]
    for request in requests:
        engine.add(request)
    steps = 0
    while not requests[0].finish_reason:
        assert requests[0] in engine.step()
        steps += 1
    assert steps == 50
    assert requests[1].finish_reason is None
    run(engine, [])
    while not requests[1].finish_reason:
        engine.step()
    for i, request in enumerate(requests):
        assert output(request).tolist() == greedy(prompt(40, i), 50)


def test_first_come_first_served() -> None:
    """A short prompt does not pass a long one that waits for pages."""
    engine = engine_of(n_pages=4)
    holder, long, short = (Request(prompt(n, n), SamplingParams(max_tokens=20)) for n in (60, 90, 3))
    for request in (holder, long, short):
        engine.add(request)
    while not holder.finish_reason:
        engine.step()
        assert not long.pages
        assert not short.pages
    engine.step()
    assert long.pages


def test_prefix_cache_reads_what_another_computed() -> None:
    engine = engine_of()
    first = Request(prompt(100), SamplingParams(max_tokens=30))
    run(engine, [first])
    follow_up = first.token_ids.tolist() + prompt(10, 5)
    second = Request(follow_up, SamplingParams(max_tokens=30))
    run(engine, [second])
    assert second.n_cached == 128  # four full pages of the 130 tokens, of which the last was never computed
    assert output(second).tolist() == greedy(follow_up, 30)
    third = Request(prompt(96), SamplingParams(max_tokens=1))
    run(engine, [third])
    assert third.n_cached == 64  # its last token must be computed
    other = Request([1, *prompt(99)], SamplingParams(max_tokens=1))
    run(engine, [other])
    assert other.n_cached == 0


def test_what_a_request_computed_itself_is_not_cached() -> None:
    """It gives way to another, and finds its own pages again."""
    engine = engine_of(n_pages=4)
    first, second = (Request(prompt(40, i), SamplingParams(max_tokens=50)) for i in range(2))
    run(engine, [first, second])
    assert first.n_cached == second.n_cached == 0
    assert len(engine.runner.batches) > 51  # type: ignore[attr-defined]


def test_finish_reasons() -> None:
    ids = prompt(30)
    expected = greedy(ids, 40)
    stop = expected[10]
    n = expected.index(stop) + 1
    for eos_ids, params in (
        ([stop], SamplingParams()),
        ([], SamplingParams(stop_token_ids=[stop])),
        ([stop], SamplingParams(stop_token_ids=[stop], ignore_eos=True)),
    ):
        request = Request(ids, params, eos_ids)
        run(engine_of(), [request])
        assert (output(request).tolist(), request.finish_reason) == (expected[:n], "stop")
    request = Request(ids, SamplingParams(max_tokens=40, ignore_eos=True), [stop])
    run(engine_of(), [request])
    assert (output(request).tolist(), request.finish_reason) == (expected, "length")
    request = Request(ids, SamplingParams(max_tokens=None))
    run(engine_of(context=45), [request])
    assert (output(request).tolist(), request.finish_reason) == (expected[:15], "length")
    request = Request(ids, SamplingParams(max_tokens=None, min_tokens=20, stop_token_ids=[stop]))
    run(engine_of(context=60), [request])
    assert stop not in output(request)[:20].tolist()


def test_an_end_outside_of_the_vocabulary_never_comes() -> None:
    """generation_config.json may name one; to withhold it is no error."""
    ids = prompt(5)
    request = Request(ids, SamplingParams(max_tokens=4, min_tokens=2), [9999])
    run(engine_of(), [request])
    assert output(request).tolist() == greedy(ids, 4)


def test_what_cannot_run_is_refused() -> None:
    engine = engine_of(n_pages=3, context=500)
    assert engine.context == 96
    for token_ids, message in (
        ([], "empty"),
        (prompt(96), r"96 tokens, but the context holds 96 \(kv_memory; the model's is 500\), with at least one"),
        (prompt(200), "200 tokens, but the context holds 96"),
        ([5, VOCABULARY], f"token 1 of the prompt is {VOCABULARY}.*0 to {VOCABULARY - 1}"),
        ([-1], "token 0 of the prompt is -1"),
    ):
        with pytest.raises(PromptError, match=message):
            engine.add(Request(token_ids, SamplingParams()))
    for bad in (["a"], [1.5], [2**40], [None], "12", b"1234", bytearray(4), 5, None, [[1]], np.ones(3)):
        with pytest.raises(PromptError, match="no list of token ids"):
            Request(bad, SamplingParams())  # type: ignore[arg-type]
    with pytest.raises(ParameterError, match="logit_bias: token id 101"):
        engine.add(Request([1], SamplingParams(logit_bias={VOCABULARY: 1})))
    with pytest.raises(ParameterError, match="stop_token_ids: token id 101"):
        engine.add(Request([1], SamplingParams(stop_token_ids=[VOCABULARY])))
    assert all_free(engine)
    request = Request(prompt(95), SamplingParams())
    run(engine, [request])
    assert len(output(request)) == 1


def test_cancelling_frees_pages() -> None:
    engine = engine_of(n_pages=4)
    running, waiting = (Request(prompt(90, i), SamplingParams()) for i in range(2))
    engine.add(running)
    engine.add(waiting)
    engine.step()
    for request in (waiting, running):
        engine.finish(request, "cancelled")
        engine.finish(request, "length")
        assert request.finish_reason == "cancelled"
    assert all_free(engine)
    assert engine.step() == []


def test_an_expiry_is_told_before_a_step_fails() -> None:
    now = [0.0]
    engine = engine_of(clock=lambda: now[0])
    late, other = Request(prompt(5), SamplingParams(), deadline=1.0), Request(prompt(5, 1), SamplingParams())
    engine.add(late), engine.add(other)
    now[0] = 2.0

    def fail(batch: Batch) -> None:
        raise MemoryError

    engine.runner.fault = fail  # type: ignore[attr-defined]
    assert engine.step() == [late]
    with pytest.raises(MemoryError):
        engine.step()


def test_a_fault_in_a_step_leaves_the_engine_whole() -> None:
    """Ctrl-C, or an error of the runner: the step can be taken again."""
    engine = engine_of()
    request = Request(prompt(50), SamplingParams(max_tokens=20))
    engine.add(request)

    def interrupt(batch: Batch) -> None:
        raise KeyboardInterrupt

    for _ in range(3):
        engine.runner.fault = interrupt  # type: ignore[attr-defined]
        with pytest.raises(KeyboardInterrupt):
            engine.step()
        engine.runner.fault = lambda batch: None  # type: ignore[attr-defined]
        engine.step()
    run(engine, [])
    while not request.finish_reason:
        engine.step()
    assert output(request).tolist() == greedy(prompt(50), 20)


def test_bad_logits_fail_one_request_alone() -> None:
    engine = engine_of()
    good, bad = (Request(prompt(20, i), SamplingParams(max_tokens=10)) for i in range(2))
    original = engine.runner.run

    def run_with_nan(batch: Batch) -> memoryview:
        logits = np.array(original(batch))
        for i, row in enumerate(batch.logits_rows):
            if batch.sequence[row] == 1:
                logits[i] = np.nan
        return memoryview(logits)

    engine.runner.run = run_with_nan  # type: ignore[method-assign]
    run(engine, [good, bad])
    assert output(good).tolist() == greedy(prompt(20), 10)
    assert bad.finish_reason == "error"
    assert isinstance(bad.error, PronghornError)
    assert "token 20: the model's logits are not finite" in str(bad.error)
    assert all_free(engine)


def test_logits() -> None:
    engine = engine_of(n_pages=8, context=200)
    for length, n_rows in ((1, 64), (70, 64), (199, 10), (200, 1000), (0, 5)):
        ids = prompt(length)
        chunks = [np.array(chunk).reshape(-1, VOCABULARY) for chunk in engine.logits(array("i", ids), n_rows=n_rows)]
        rows = np.concatenate(chunks) if chunks else np.empty((0, VOCABULARY))
        np.testing.assert_array_equal(rows, [fake_logits(ids[: i + 1]) for i in range(length)] or rows)
    assert all_free(engine)
    with pytest.raises(PromptError, match="201 tokens, but the context holds 200"):
        next(engine.logits(array("i", prompt(201))))
    engine.add(Request(prompt(190), SamplingParams()))
    engine.step()
    with pytest.raises(QueueFull, match="other requests hold"):
        next(engine.logits(array("i", prompt(100))))


def test_a_step_without_pages_is_no_hang() -> None:
    engine = engine_of(n_pages=4)
    chunks = engine.logits(array("i", prompt(100)), n_rows=10)
    next(chunks)
    engine.add(Request(prompt(50), SamplingParams()))
    with pytest.raises(PronghornError, match="pages"):
        engine.step()
    chunks.close()
    assert len(engine.step()) == 1


def test_pool_forgets_the_least_recently_used() -> None:
    pool = PagePool(4)

    def fill(ids: list[int]) -> list[int]:
        pages = pool.take(len(ids) // PAGE)
        assert pages is not None
        chain = ROOT
        for i, page in enumerate(pages):
            chain = pool.learn(page, chain, array("i", ids[i * PAGE : (i + 1) * PAGE]))
        return pages

    a, b = prompt(2 * PAGE, 1), prompt(2 * PAGE, 2)
    pool.release(fill(a))
    pool.release(fill(b))
    assert pool.n_free == 4
    held, _ = pool.match(array("i", [*a, 0]))  # used again: now b is older
    assert len(held) == 2
    assert pool.take(3) is None
    taken = pool.take(1)
    assert taken is not None
    assert len(pool.match(array("i", [*b, 0]))[0]) == 1  # its last page went first
    pool.release(held)
    assert len(pool.match(array("i", [*a, 0]))[0]) == 2


def test_pool_under_random_use() -> None:
    """A model of the pool: the sum of holders, and what each page was said to hold."""
    rng = random.Random(7)
    pool = PagePool(6)
    contents: dict[int, tuple[int, ...]] = {}
    sequences: list[tuple[list[int], list[int]]] = []
    alphabet = [prompt(PAGE, seed) for seed in range(3)]
    for _ in range(3000):
        if sequences and rng.random() < 0.5:
            pool.release(sequences.pop(rng.randrange(len(sequences)))[1])
        else:
            ids = [token for _ in range(rng.randint(1, 4)) for token in rng.choice(alphabet)]
            pages, chain = pool.match(array("i", [*ids, 0]))
            for i, page in enumerate(pages):
                assert contents[page] == tuple(ids[: (i + 1) * PAGE])
            new = pool.take(len(ids) // PAGE - len(pages))
            if new is None:
                pool.release(pages)
                continue
            for page in new:
                start = len(pages) * PAGE
                pages.append(page)
                chain = pool.learn(page, chain, array("i", ids[start : start + PAGE]))
                contents[page] = tuple(ids[: start + PAGE])
            sequences.append((ids, pages))
        held = {page for _, pages in sequences for page in pages}
        assert pool.n_free == 6 - len(held)


# ---- samples of one prompt, log-probabilities of the prompt, deadlines, priorities ---------------------------------


def samples_of(ids: list[int], n: int, **values: Any) -> list[Request]:
    params = SamplingParams(**{"temperature": 1.0, "seed": 5, "max_tokens": 20, "n": n, **values})
    first = Request(ids, params)
    return [first, *(Request(ids, params, first=first, index=i) for i in range(1, n))]


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 64, 65, 100])
@pytest.mark.parametrize("options", [{}, {"prefix_cache": False}, {"use_cache": False}, {"n_pages": 11}])
def test_samples_share_the_prompt(length: int, options: dict[str, Any]) -> None:
    """Each is what its seed gives alone; the prompt is computed once, and its pages are held once."""
    ids = prompt(length)
    alone = []
    for i in range(5):
        request = Request(ids, SamplingParams(temperature=1.0, seed=5 + i, max_tokens=20))
        run(engine_of(), [request])
        alone.append(output(request))
    engine = engine_of(**{"n_pages": 64, "context": 130, **options})
    requests = samples_of(ids, 5)
    for request in requests:
        engine.add(request)
    most = 0
    while not all(request.finish_reason for request in requests):
        engine.step()
        most = max(most, engine.stats().held_pages)
    assert [output(request) for request in requests] == alone
    assert [request.seed for request in requests] == [5, 6, 7, 8, 9]
    assert all_free(engine)
    if "use_cache" not in options and "n_pages" not in options:
        computed = sum(len(batch.token_ids) for batch in engine.runner.batches)  # type: ignore[attr-defined]
        assert computed == length + 4 * (length > 1) + 4 * (length == 1) + 5 * 19
        assert most <= (length - 1) // PAGE + 5 * 2


def test_samples_whose_first_is_gone() -> None:
    """It is cancelled amid its prompt, and the others make do."""
    engine = engine_of(max_tokens=16)
    requests = samples_of(prompt(100), 3)
    for request in requests:
        engine.add(request)
    engine.step()
    engine.finish(requests[0], "cancelled")
    run(engine, [])
    while not all(request.finish_reason for request in requests):
        engine.step()
    alone = Request(prompt(100), SamplingParams(temperature=1.0, seed=7, max_tokens=20))
    run(engine_of(), [alone])
    assert output(requests[2]) == output(alone)
    assert all_free(engine)


def exact_logprobs(ids: list[int]) -> list[float]:
    found = []
    for i in range(1, len(ids)):
        row = fake_logits(ids[:i]).astype(np.float64)
        found.append(float(row[ids[i]] - np.log(np.exp(row).sum())))
    return found


@pytest.mark.parametrize("length", [1, 2, 33, 64, 150])
@pytest.mark.parametrize("options", [{}, {"max_tokens": 7}, {"n_pages": 8}, {"use_cache": False, "max_tokens": 50}])
def test_log_probabilities_of_the_prompt(length: int, options: dict[str, Any]) -> None:
    """In chunks, in company, after a preemption, and though the prefix cache has it all."""
    engine = engine_of(**{"context": 200, **options})
    ids = prompt(length)
    run(engine, [Request(ids, SamplingParams(max_tokens=1))])
    wanted = Request(ids, SamplingParams(max_tokens=30, prompt_logprobs=2, logprobs=0))
    other = Request(prompt(60, 3), SamplingParams(max_tokens=60))
    run(engine, [other, wanted], [0, 1])
    assert [entry.token_id for entry in wanted.prompt_logprobs] == ids[1:]
    assert [entry.logprob for entry in wanted.prompt_logprobs] == pytest.approx(exact_logprobs(ids), abs=1e-5)
    assert all(len(entry.top) == 2 for entry in wanted.prompt_logprobs)
    assert output(wanted).tolist() == greedy(ids, 30)
    assert all_free(engine)


def test_prompt_logprobs_that_are_not_finite_fail_one_request_alone() -> None:
    engine = engine_of()
    good, bad = (Request(prompt(20, i), SamplingParams(max_tokens=10, prompt_logprobs=i)) for i in range(2))
    original = engine.runner.run

    def run_with_nan(batch: Batch) -> memoryview:
        logits = np.array(original(batch))
        for i, row in enumerate(batch.logits_rows):
            if batch.sequence[row] == 1 and batch.positions[row] == 5:
                logits[i] = np.nan
        return memoryview(logits)

    engine.runner.run = run_with_nan  # type: ignore[method-assign]
    run(engine, [good, bad])
    assert output(good).tolist() == greedy(prompt(20), 10)
    assert (bad.finish_reason, str(bad.error)) == ("error", "token 5 of the prompt: the model's logits are not finite")
    assert all_free(engine)


def test_deadlines() -> None:
    """No step begins after it; what there is by then is kept; who waits ends too."""
    now = [0.0]
    engine = engine_of(n_pages=4, clock=lambda: now[0])
    running = Request(prompt(90), SamplingParams(), deadline=10.5)
    waiting = Request(prompt(90, 1), SamplingParams(), deadline=4.0)
    free = Request(prompt(5, 2), SamplingParams(max_tokens=3))
    for request in (running, waiting, free):
        engine.add(request)
    ended: dict[Request, float] = {}
    while not (free.finish_reason and running.finish_reason):
        for request in engine.step():
            if request.finish_reason:
                ended.setdefault(request, now[0])
        now[0] += 1
    assert (running.finish_reason, waiting.finish_reason) == ("timeout", "timeout")
    assert ended[waiting] == 4
    assert ended[running] == 11
    assert output(running).tolist() == greedy(prompt(90), 10)  # steps at 0 to 10; that at 4 tells of `waiting`
    assert not output(waiting)
    assert all_free(engine)


def test_priorities() -> None:
    """The lowest number first; it takes pages and places from others, who lose nothing by it."""
    engine = engine_of(n_pages=4, max_sequences=2)
    low = [Request(prompt(40, i), SamplingParams(max_tokens=20), priority=5) for i in range(3)]
    high = Request(prompt(60, 9), SamplingParams(max_tokens=30), priority=-1)
    for request in low:
        engine.add(request)
    engine.step()
    assert low[0] in engine.scheduler.running
    engine.add(high)
    while not high.finish_reason:
        assert high in engine.step()
    assert engine.stats().preemptions > 0
    run(engine, [])
    while not all(request.finish_reason for request in low):
        engine.step()
    assert [output(request).tolist() for request in low] == [greedy(prompt(40, i), 20) for i in range(3)]
    assert output(high).tolist() == greedy(prompt(60, 9), 30)
    assert all_free(engine)


def test_stats() -> None:
    engine = engine_of()
    run(engine, [Request(prompt(100), SamplingParams(max_tokens=10))])
    run(engine, [Request(prompt(100), SamplingParams(max_tokens=10))])
    engine.add(Request(prompt(40, 1), SamplingParams()))
    engine.step()
    engine.add(Request(prompt(40, 2), SamplingParams()))
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.pages, stats.held_pages) == (1, 1, 64, 2)
    assert (stats.prompt_tokens, stats.cached_tokens, stats.generated_tokens, stats.preemptions) == (240, 96, 21, 0)
    assert stats.steps == 21


# ---- the pace -------------------------------------------------------------------------------------------------------


class CostlyRunner(FakeRunner):
    """A runner whose steps take simulated seconds: a fixed cost, more for each token, and more where rows are many."""

    def __init__(self, n_pages: int, base: float, token: float) -> None:
        super().__init__(n_pages)
        self.base, self.token = base, token
        self.now = 0.0
        self.noise = random.Random(1)

    def run(self, batch: Batch) -> memoryview:
        """See ops.Runner."""
        n = len(batch.token_ids)
        attended = sum(batch.positions) * self.token / 2000
        self.now += (self.base + self.token * max(n - 8, 0) + attended) * self.noise.uniform(0.97, 1.03)
        return super().run(batch)


@pytest.mark.parametrize(
    ("base", "token"), [(0.003, 0.0004), (0.0005, 0.00001), (0.02, 0.001), (0.1, 0.004), (0.3, 0.0001)]
)
def test_prompts_leave_others_their_pace(base: float, token: float) -> None:
    """Steps beside a long prompt stay under the larger of 30 ms and twice the usual, and are not much shorter."""
    runner = CostlyRunner(200, base, token)
    engine = Engine(
        runner, n_pages=200, context=4000, vocabulary=VOCABULARY, prefix_cache=False, clock=lambda: runner.now
    )
    readers = [Request(prompt(10, i), SamplingParams(max_tokens=None), streamed=True) for i in range(3)]
    for reader in readers:
        engine.add(reader)
    alone = []
    for _ in range(20):
        before = runner.now
        engine.step()
        alone.append(runner.now - before)
    limit = max(0.030, 2 * sorted(alone[1:])[10])
    taken, chunks = [], []
    for i in range(3):
        long = Request(prompt(1500, 50 + i), SamplingParams(max_tokens=1))
        engine.add(long)
        while not long.finish_reason:
            before = runner.now
            assert set(readers) <= set(engine.step())
            taken.append(runner.now - before)
            chunks.append(0 if long.finish_reason else len(runner.batches[-1].token_ids))  # the last is what is left
    assert max(taken) <= 1.1 * limit  # a tenth, before it has learned
    assert sorted(taken)[int(0.99 * len(taken))] <= limit
    settled = [seconds for seconds, n in zip(taken[10:], chunks[10:], strict=True) if 0 < n < 500]
    assert len(settled) < 20 or sorted(settled)[len(settled) // 2] >= 0.6 * limit


def test_a_prompt_alone_takes_all() -> None:
    runner = CostlyRunner(200, 0.1, 0.1)
    engine = Engine(runner, n_pages=200, context=4000, vocabulary=VOCABULARY, clock=lambda: runner.now)
    run(engine, [Request(prompt(1300), SamplingParams(max_tokens=1))])
    assert [len(batch.token_ids) for batch in runner.batches] == [512, 512, 276]


def test_only_who_is_read_along_holds_prompts_back() -> None:
    """A batch whose answers are waited for as a whole takes all prompts at once, however dear they are."""

    def rows(streamed: bool) -> int:
        """Of the step in which eight prompts come beside a reader."""
        runner = CostlyRunner(200, 0.02, 0.01)
        engine = Engine(runner, n_pages=200, context=4000, vocabulary=VOCABULARY, clock=lambda: runner.now)
        engine.add(Request(prompt(10), SamplingParams(max_tokens=30), streamed=streamed))
        for _ in range(5):
            engine.step()
        others = [Request(prompt(20, i), SamplingParams(max_tokens=5)) for i in range(1, 9)]
        for other in others:
            engine.add(other)
        engine.step()
        found = len(runner.batches[-1].token_ids)
        run(engine, [])
        return found

    assert rows(streamed=False) == 1 + 8 * 20
    assert rows(streamed=True) < 40


# ---- any schedule ---------------------------------------------------------------------------------------------------


class Anything(Pace):
    """A pace that is drawn: chunks of any size."""

    def __init__(self, max_tokens: int, draw: random.Random) -> None:
        super().__init__(max_tokens)
        self.draw = draw

    def budget(self, n_decoding: int) -> int:
        """See Pace."""
        return self.draw.choice([1, 2, 5, 31, 32, 33, 100, self.max_tokens])


def check_pool(engine: Engine) -> None:
    """Each page's holders are those that name it; none is both free and held; only equal contents are shared."""
    pool, requests = engine.pool, [*engine.scheduler.running, *engine.scheduler.waiting]
    holders = [0] * pool.n_pages
    contents: dict[int, list[int]] = {}
    for request in requests:
        assert len(set(request.pages)) == len(request.pages)
        assert len(request.pages) <= -(-len(request.token_ids) // PAGE)
        for index, page in enumerate(request.pages):
            holders[page] += 1
            part = request.token_ids[: min((index + 1) * PAGE, request.n_computed)].tolist()
            other = contents.setdefault(page, part)
            n = min(len(part), len(other))
            assert part[:n] == other[:n], "a page is shared by different texts"
    assert holders == pool._holders
    assert sorted([*pool._blank, *pool._idle]) == [page for page in range(pool.n_pages) if not holders[page]]
    assert set(pool._key_of) <= set(range(pool.n_pages)) - set(pool._blank)
    assert {page: key for key, (page, _) in pool._page_of.items()} == pool._key_of
    assert len(engine.scheduler.running) <= engine.scheduler.max_sequences
    assert engine.scheduler.running == sorted(engine.scheduler.running, key=turn)
    assert engine.scheduler.waiting == sorted(engine.scheduler.waiting, key=turn)


@settings(max_examples=40, deadline=None)
@example(seed=171, prefix_cache=True, n_pages=9, max_sequences=3)  # a page known by two chains
@given(st.integers(0, 2**32), st.booleans(), st.sampled_from([5, 9, 40]), st.sampled_from([1, 3, 64]))
def test_any_schedule(seed: int, prefix_cache: bool, n_pages: int, max_sequences: int) -> None:
    """Arrivals, cancellations, deadlines, priorities, samples, preemptions, chunks: the pages are in order throughout,

    nobody starves, and what comes out is what the definition says.
    """
    draw = random.Random(seed)
    now = [0.0]
    engine = engine_of(n_pages, 160, 64, max_sequences=max_sequences, prefix_cache=prefix_cache, clock=lambda: now[0])
    engine.scheduler.pace = Anything(64, draw)
    shared = prompt(70, seed)
    made: list[Request] = []
    coming: list[list[Request]] = []
    for i in range(draw.randint(3, 14)):
        ids = shared[: draw.choice([0, 31, 32, 64, 70])] + prompt(draw.choice([1, 2, 30, 33]), i)
        values = {"max_tokens": draw.choice([1, 5, 40]), "temperature": draw.choice([0.0, 1.0]), "seed": i}
        params = SamplingParams(**values, n=draw.choice([1, 1, 1, 3]), prompt_logprobs=draw.choice([None, None, 0]))
        options = {"priority": draw.choice([0, 0, 1]), "deadline": draw.choice([None, None, None, 30.0])}
        first = Request(ids, params, **options)
        group = [first, *(Request(ids, params, **options, first=first, index=k) for k in range(1, params.n))]
        coming.append(group)
        made += group
    for step in itertools.count():
        now[0] += 1
        while coming and draw.random() < 0.4:
            for request in coming.pop():
                engine.add(request)
        if draw.random() < 0.05 and (there := [request for request in made if request.number]):
            engine.finish(draw.choice(there), "cancelled")
        if draw.random() < 0.1 and engine.scheduler.running:
            engine.scheduler._preempt(draw.choice(engine.scheduler.running))
        engine.step()
        check_pool(engine)
        if not coming and all(request.finish_reason for request in made):
            break
        assert step < 5000, "somebody starves"
    assert all_free(engine)
    for request in made:
        ids, got = request.token_ids[: request.n_prompt].tolist(), output(request)
        alone = Request(ids, request.params.replace(seed=request.seed, n=1))
        run(engine_of(), [alone])
        assert got == output(alone)[: len(got)]
        if request.finish_reason == "length":
            assert got == output(alone)
            if not request.first:  # which computes them for all
                assert len(request.prompt_logprobs) == (len(ids) - 1 if request.params.prompt_logprobs == 0 else 0)
