"""The engine on a runner that remembers tokens instead of computing: what is read from a wrong page shows."""

from __future__ import annotations

import itertools
import random
from array import array
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pronghorn import ParameterError, PromptError, PronghornError, SamplingParams
from pronghorn.engine.engine import Engine
from pronghorn.engine.pages import ROOT, PagePool
from pronghorn.engine.scheduler import Request
from pronghorn.ops import PAGE, Batch

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
    with pytest.raises(PromptError, match="other requests hold"):
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
