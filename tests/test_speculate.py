"""Speculation: the same tokens as without, whatever the draft says; and drafts that are used, kept in step, and left.

The engine runs on a runner that remembers tokens (see test_engine). A draft that shares its pages leaves marks there,
which the model must never read.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import random
from array import array
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pronghorn import LLM, ParameterError, SamplingParams
from pronghorn.engine.engine import Engine
from pronghorn.engine.scheduler import Request
from pronghorn.engine.speculate import LONGEST, Costs, ModelDraft, NgramDraft, Odds, Proposal, Speculator
from pronghorn.ops import PAGE, Batch
from test_engine import VOCABULARY, FakeRunner, all_free, fake_logits, greedy, output, prompt, run
from tiny import STORY, save_tiny

MARK = 1000  # added to what a draft writes


def draft_logits(seen: list[int]) -> np.ndarray:
    """The model's, or their opposite: right in about two of three cases."""
    return fake_logits(seen) * (-1 if sum(seen) % 3 == 0 else 1)


class DraftRunner(FakeRunner):
    """Computes what a draft would; `shares` is the model's runner, with whose pages it works."""

    def __init__(self, n_pages: int, max_tokens: int, shares: FakeRunner | None, right: bool) -> None:
        super().__init__(n_pages, max_tokens)
        self.shared = shares is not None
        self.pages = shares.pages if shares else self.pages
        self.logits_of = fake_logits if right else draft_logits

    def run(self, batch: Batch) -> memoryview:
        """See ops.Runner."""
        assert 0 < len(batch.token_ids) <= self.max_tokens
        self.batches.append(batch)
        rows = []
        width = batch.table_width
        for i, (token_id, position, row) in enumerate(
            zip(batch.token_ids, batch.positions, batch.sequence, strict=True)
        ):
            table = batch.page_table[row * width : (row + 1) * width]
            self.pages[table[position // PAGE]][position % PAGE] = token_id + MARK * self.shared
            if i in batch.logits_rows:
                seen = [self.pages[table[p // PAGE]][p % PAGE] % MARK for p in range(position + 1)]
                assert MARK - 1 not in seen, "a slot is read that was never written"
                rows.append(self.logits_of(seen))
        return memoryview(np.array(rows, np.float32).reshape(len(rows), VOCABULARY))


class TargetRunner(FakeRunner):
    """The model: must never read what a draft wrote."""

    def run(self, batch: Batch) -> memoryview:
        """See ops.Runner."""
        result = super().run(batch)
        width = batch.table_width
        for position, row in zip(batch.positions, batch.sequence, strict=True):
            page = self.pages[batch.page_table[row * width + position // PAGE]]
            assert max(page[: position % PAGE + 1]) < MARK
        return result


def engine_with(
    kind: str, lengths: int | None, *, n_pages: int = 64, context: int = 1000, max_tokens: int = 512,
    right: bool = False, draft_context: int = 1000, **options: Any,
) -> Engine:  # fmt: skip
    runner = TargetRunner(n_pages, max_tokens)
    engine = Engine(runner, n_pages=n_pages, context=context, vocabulary=VOCABULARY, max_tokens=max_tokens, **options)
    if kind == "ngram":
        engine.speculate(NgramDraft(), lengths=lengths)
    elif kind != "none":
        drafting = DraftRunner(n_pages, max_tokens, runner if kind == "shared" else None, right)
        model = ModelDraft(
            drafting, engine.pool, shared=kind == "shared", context=draft_context,
            max_tokens=max_tokens,
        )  # fmt: skip
        engine.speculate(model, lengths=lengths)
    return engine


def speculator_of(engine: Engine) -> Speculator:
    assert engine.speculator
    return engine.speculator


def text_like(length: int, seed: int) -> list[int]:
    """Tokens of which runs come again."""
    rng = random.Random(seed)
    ids = rng.choices(range(VOCABULARY), k=max(length, 8))
    while len(ids) < length + 20:
        at = rng.randrange(len(ids) - 4)
        ids += ids[at : at + rng.randrange(2, 20)] + rng.choices(range(VOCABULARY), k=rng.randrange(3))
    return ids[-length:]


PARAMS = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 60),
    temperature=st.sampled_from([0.0, 0.0, 0.3, 1.0]),
    top_k=st.sampled_from([0, 3]),
    top_p=st.sampled_from([1.0, 0.7]),
    repetition_penalty=st.sampled_from([1.0, 1.5]),
    frequency_penalty=st.sampled_from([0.0, 0.8]),
    logit_bias=st.sampled_from([{}, {5: 2.0, 7: -math.inf}]),
    stop_token_ids=st.lists(st.integers(0, VOCABULARY - 1), max_size=12),
    min_tokens=st.just(0) | st.just(1),
    seed=st.integers(0, 3),
    logprobs=st.sampled_from([None, 0, 2]),
)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["ngram", "shared", "own"]),
    lengths=st.none() | st.integers(1, LONGEST),
    asked=st.lists(st.tuples(st.integers(1, 100), PARAMS, st.integers(0, 12)), min_size=1, max_size=6),
    n_pages=st.integers(6, 40),
    max_tokens=st.sampled_from([2, 7, 40, 512]),
    prefix_cache=st.booleans(),
    draft_context=st.sampled_from([40, 1000]),
    right=st.booleans(),
)
def test_drafts_change_nothing(
    kind: str, lengths: int | None, asked: list[tuple[int, SamplingParams, int]], n_pages: int, max_tokens: int,
    prefix_cache: bool, draft_context: int, right: bool,
) -> None:  # fmt: skip
    """In any company, with too few pages, in chunks, with and without the prefix cache."""
    prompts = [text_like(length, length % 7) for length, _, _ in asked]
    alone = []
    for ids, (_, params, _) in zip(prompts, asked, strict=True):
        request = Request(ids, params)
        run(engine_with("none", None, context=n_pages * PAGE), [request])
        alone.append((output(request), request.logprobs, request.finish_reason))
    engine = engine_with(
        kind, lengths, n_pages=n_pages, max_tokens=max_tokens, right=right, prefix_cache=prefix_cache,
        draft_context=draft_context,
    )  # fmt: skip
    requests = [Request(ids, params) for ids, (_, params, _) in zip(prompts, asked, strict=True)]
    run(engine, requests, [arrival for _, _, arrival in asked])
    assert [(output(request), request.logprobs, request.finish_reason) for request in requests] == alone
    assert all_free(engine)
    assert sum(request.n_accepted for request in requests) == speculator_of(engine).n_accepted
    assert speculator_of(engine).n_accepted <= speculator_of(engine).n_drafted
    stats = engine.stats()
    assert stats.drafted_tokens == sum(request.n_drafted for request in requests)
    assert stats.accepted_tokens == speculator_of(engine).n_accepted


@pytest.mark.parametrize("kind", ["shared", "own"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("lengths", [1, 4, LONGEST])
def test_a_right_draft_is_right_always(kind: str, temperature: float, lengths: int) -> None:
    """With the model's own logits: so many tokens a step, and none wrong, in company and after preemption."""
    engine = engine_with(kind, lengths, right=True)
    request = Request(prompt(45), SamplingParams(max_tokens=61, temperature=temperature, seed=1))
    run(engine, [request])
    assert len(engine.runner.batches) == 1 + -(-60 // (lengths + 1))  # type: ignore[attr-defined]
    assert request.n_accepted == request.n_drafted == 61 - len(engine.runner.batches)  # type: ignore[attr-defined]

    engine = engine_with(kind, lengths, right=True, n_pages=7, max_tokens=50)
    shared = prompt(40, 9)
    requests = [
        Request(shared + prompt(5 + 9 * i, i), SamplingParams(max_tokens=60, temperature=temperature, seed=i))
        for i in range(4)
    ]
    run(engine, requests)
    speculator = speculator_of(engine)
    assert speculator.n_accepted == speculator.n_drafted > 60


@pytest.mark.parametrize("kind", ["shared", "own"])
@pytest.mark.parametrize("lengths", [1, 3, 8])
def test_a_draft_goes_on_from_what_was_committed(kind: str, lengths: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """After right and wrong drafts, preemption, hits of the prefix cache: each first draft is of the very tokens."""
    engine = engine_with(kind, lengths, n_pages=8, max_tokens=60)
    first: list[tuple[int, list[int]]] = []
    propose = Speculator.propose

    def spy(self: Speculator, work: list[tuple[Request, int]]) -> dict[Request, Proposal]:
        found = propose(self, work)
        first.extend((p.token_ids[0], request.token_ids.tolist()) for request, p in found.items())
        return found

    monkeypatch.setattr(Speculator, "propose", spy)
    shared = prompt(70, 9)
    requests = [Request(shared + prompt(5 + 9 * i, i), SamplingParams(max_tokens=50)) for i in range(4)]
    run(engine, requests, [0, 5, 10, 40])
    assert len(first) > 50
    assert all(token_id == int(np.argmax(draft_logits(ids))) for token_id, ids in first)
    wrong = sum(request.n_drafted - request.n_accepted for request in requests)
    assert wrong
    assert sum(request.n_accepted for request in requests)


def test_a_draft_finds_pages_that_it_has_filled() -> None:
    """A conversation's second turn: what the draft has read of it is not read again."""
    engine = engine_with("own", 3, right=True)
    draft = speculator_of(engine).draft
    assert isinstance(draft, ModelDraft)
    request = Request(prompt(200), SamplingParams(max_tokens=10))
    run(engine, [request])
    before = len(draft.runner.batches)  # type: ignore[attr-defined]
    run(engine, [Request(prompt(200) + prompt(9, 4), SamplingParams(max_tokens=10))])
    positions = [min(batch.positions) for batch in draft.runner.batches[before:]]  # type: ignore[attr-defined]
    assert min(positions) == 200 // PAGE * PAGE


def test_a_repetition_is_found_and_right() -> None:
    """A model that repeats what stands before: many tokens a step, by prompt lookup."""
    engine = engine_with("ngram", LONGEST)
    text = prompt(60)

    def repeat(batch: Batch) -> memoryview:
        logits = np.zeros((len(batch.logits_rows), VOCABULARY), np.float32)
        for row, i in enumerate(batch.logits_rows):
            logits[row, text[(batch.positions[i] + 1) % 60]] = 9
        return memoryview(logits)

    engine.runner.run = repeat  # type: ignore[method-assign]
    request = Request(text, SamplingParams(max_tokens=100))
    steps = 0
    engine.add(request)
    while not request.finish_reason:
        engine.step()
        steps += 1
    assert output(request).tolist() == [text[i % 60] for i in range(100)]
    assert steps <= 3 + 100 // (LONGEST + 1)
    assert request.n_accepted == request.n_drafted == 100 - steps


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 2) | st.sampled_from([256, 65536, 2**24]), max_size=60))
def test_lookup(ids: list[int]) -> None:
    """Against the definition; token ids whose bytes shift into one another among them."""
    draft = NgramDraft()
    n = len(ids)
    match, following = draft.lookup(array("i", ids))
    ends = [end for end in range(2, n) if ids[end - 2 : end] == ids[-2:]]
    if not ends:
        assert (match, len(following)) == (0, 0)
        return

    def common(end: int) -> int:
        return next((i for i in range(end) if ids[end - 1 - i] != ids[n - 1 - i]), end)

    longest = max(min(common(end), 16) for end in ends)
    starts = [length for length in (16, 8, 4, 2) if length <= longest]
    assert following.tolist() in [ids[end : end + LONGEST] for end in ends if common(end) >= starts[0]]
    assert starts[0] <= match <= longest
    if starts[0] == longest:
        assert following.tolist() == ids[max(e for e in ends if common(e) >= longest) :][:LONGEST]


def fixed_costs(monkeypatch: pytest.MonkeyPatch, model: float, draft: float, row: float = 0.0) -> None:
    """Passes that take so long, whatever the clock says."""
    monkeypatch.setattr(Costs, "note", lambda self, rows, seconds: self.known.setdefault(rows, 1.0))

    def of(self: Costs, rows: int) -> float:
        return (draft if getattr(self, "drafts", False) else model) * (1 + row * (rows - 1))

    monkeypatch.setattr(Costs, "of", of)


def drafted_by(engine: Engine, n_tokens: int = 300, n_requests: int = 1) -> Speculator:
    speculator = speculator_of(engine)
    if isinstance(speculator.draft, ModelDraft):
        speculator.draft.costs.drafts = True  # type: ignore[attr-defined]
    run(engine, [Request(prompt(20 + i, i), SamplingParams(max_tokens=n_tokens)) for i in range(n_requests)])
    return speculator


def test_a_cheap_and_right_draft_runs_far_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    fixed_costs(monkeypatch, model=1.0, draft=0.01)
    engine = engine_with("shared", None, right=True)
    assert drafted_by(engine).n_accepted > 0.85 * 300
    assert len(engine.runner.batches) < 40  # type: ignore[attr-defined]


@pytest.mark.parametrize(("draft", "row", "right"), [(1.2, 0.0, True), (0.01, 1.0, True), (0.6, 0.05, False)])
def test_a_draft_that_does_not_pay_is_tried_now_and_then(
    draft: float, row: float, right: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is as slow as the model; or rows are dear; or it is wrong too often: a few of 900 tokens, and never none."""
    fixed_costs(monkeypatch, 1.0, draft, row)
    engine = engine_with("shared", None, right=right)
    speculator = drafted_by(engine, 900)
    assert 4 <= speculator.n_drafted < 60
    assert speculator.wait > 100


def test_company_ends_drafting_where_rows_are_dear(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass takes the same time up to 8 rows, and then longer with each."""
    fixed_costs(monkeypatch, 1.0, 0.05)
    monkeypatch.setattr(Costs, "of", lambda self, rows: 0.05 if hasattr(self, "drafts") else max(1.0, rows / 8))
    engine = engine_with("shared", None, right=True, n_pages=200)
    alone = drafted_by(engine)
    assert alone.n_accepted > 200
    speculator = drafted_by(engine_with("shared", None, right=True, n_pages=200), 100, n_requests=12)
    assert speculator.n_drafted < 0.1 * 12 * 100


def test_what_costs_and_odds_learn() -> None:
    costs = Costs()
    assert costs.of(1) == 0
    costs.note(1, 1.0)
    assert 1 < costs.of(5) < 1.2
    costs.note(9, 3.0)
    assert costs.of(5) == pytest.approx(2.0)
    for _ in range(50):
        costs.note(1, 2.0)
        costs.note(9, 4.0)
    assert costs.of(1) == pytest.approx(2.0, rel=0.1)
    assert costs.of(9) == pytest.approx(4.0, rel=0.1)
    odds = Odds([0.5, 0.5])
    for _ in range(100):
        odds.note(0, True)
        odds.note(1, False)
    assert odds.rate(0) > 0.95
    assert odds.rate(1) < 0.05
    assert odds.child().rate(0) == pytest.approx(odds.rate(0))


@pytest.mark.parametrize("kind", ["ngram", "shared", "own"])
def test_a_fault_in_a_step_leaves_the_engine_whole(kind: str) -> None:
    """Ctrl-C after the draft has run, or within it."""
    engine = engine_with(kind, 4, right=True)
    request = Request(text_like(50, 1), SamplingParams(max_tokens=40))
    engine.add(request)
    runners = [engine.runner]
    if kind != "ngram":
        runners.append(speculator_of(engine).draft.runner)  # type: ignore[attr-defined]
    for count in itertools.count():
        runner = runners[count % len(runners)]
        original = runner.run

        def interrupt(batch: Batch) -> memoryview:
            raise KeyboardInterrupt

        runner.run = interrupt  # type: ignore[method-assign]
        with contextlib.suppress(KeyboardInterrupt):
            engine.step()
        runner.run = original  # type: ignore[method-assign]
        engine.step()
        if request.finish_reason:
            break
    assert output(request).tolist() == greedy(text_like(50, 1), 40)
    if kind != "ngram":
        assert request.n_accepted == request.n_drafted > 0


def test_a_draft_without_finite_logits_is_none() -> None:
    engine = engine_with("shared", 3)
    runner = speculator_of(engine).draft.runner  # type: ignore[attr-defined]
    original = runner.run
    runner.run = lambda batch: memoryview(np.full_like(np.array(original(batch)), np.nan))
    request = Request(prompt(20), SamplingParams(max_tokens=20))
    run(engine, [request])
    assert output(request).tolist() == greedy(prompt(20), 20)
    assert request.n_drafted == 0


def test_drafts_disturb_nobody() -> None:
    """They take no page that another needs: as many preemptions as without."""

    def batches(kind: str) -> list[int]:
        engine = engine_with(kind, 1, n_pages=4, prefix_cache=False)
        requests = [Request(prompt(30, i), SamplingParams(max_tokens=34)) for i in range(2)]
        run(engine, requests)
        return [len(batch.token_ids) for batch in engine.runner.batches if len(batch.token_ids) > 8]  # type: ignore[attr-defined]

    assert batches("shared") == batches("none")


def test_the_distribution_is_the_models() -> None:
    """Pairs of sampled tokens, mostly drafted, against their probabilities: chi-square at 1 in 100,000."""
    n, k = 4000, 3
    ids = prompt(5)
    engine = engine_with("shared", 2, n_pages=n, max_tokens=8 * n, max_sequences=n, prefix_cache=False)
    params = SamplingParams(max_tokens=3, temperature=1.0, top_k=k)
    requests = [Request(ids, params.replace(seed=seed)) for seed in range(n)]
    run(engine, requests)
    assert sum(request.n_accepted for request in requests) > n / 2
    counts = Counter(tuple(output(request)[:2]) for request in requests)

    def likeliest(seen: list[int]) -> dict[int, float]:
        logits = fake_logits(seen).astype(float)
        best = np.argsort(-logits)[:k]
        weights = np.exp(logits[best])
        return dict(zip(best.tolist(), (weights / weights.sum()).tolist(), strict=True))

    expected = {(a, b): p * q * n for a, p in likeliest(ids).items() for b, q in likeliest([*ids, a]).items()}
    assert set(counts) <= set(expected)
    chi_square = sum((counts[pair] - mean) ** 2 / mean for pair, mean in expected.items())
    assert chi_square < 37.3  # 8 degrees of freedom


# ---- the whole stack -------------------------------------------------------------------------------------------------

PROMPTS = ["Once upon a time", "One day, a boy named Tim went to the park. One day, a boy named Tim", STORY]


def outputs(llm: LLM, together: bool, **params: Any) -> list[tuple[list[int], str, str, Any]]:
    asked = [
        SamplingParams(**{"max_tokens": 50, "temperature": t, "seed": i, "logprobs": 1, **params})
        for i, t in enumerate((0.0, 0.9, 0.0))
    ]
    if together:
        found = llm.generate(PROMPTS, asked)
    else:
        found = [llm.generate(p, a) for p, a in zip(PROMPTS, asked, strict=True)]
    return [(out.token_ids, out.text, out.finish_reason, out.logprobs) for out in found]


def fix_lengths(llm: LLM, lengths: int | None) -> Speculator:
    engine = llm._engine
    assert engine
    assert engine.speculator
    engine.speculator.lengths = lengths
    return engine.speculator


def check_drafts(path: Path, dtype: str, drafts: list[str], least: float, max_tokens: int = 50) -> None:
    """All drafts against none; of what the model's own copies draft, at least such a share is right."""
    with LLM(path, dtype=dtype, threads=2) as llm:
        expected = outputs(llm, together=True, max_tokens=max_tokens)
        stops = outputs(llm, together=True, max_tokens=max_tokens, stop=["the", "a "])
    for draft in drafts:
        with LLM(path, dtype=dtype, threads=1 if draft == "ngram" else 2, draft=draft) as llm:
            for lengths, together in ((4, False), (None, True), (LONGEST, True)):
                speculator = fix_lengths(llm, lengths)
                assert outputs(llm, together, max_tokens=max_tokens) == expected, (draft, lengths)
            assert outputs(llm, together=True, max_tokens=max_tokens, stop=["the", "a "]) == stops
            assert speculator.n_drafted > 10
            if draft != "ngram":
                assert speculator.n_accepted > least * speculator.n_drafted, draft


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "int8", "int4"])
def test_a_tiny_model(dtype: str, tmp_path: Path) -> None:
    path = save_tiny(tmp_path / "model")
    check_drafts(path, dtype, ["ngram", "self-int4", "self-int8", str(path)], 0.02)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "int8", "int4"])
def test_a_trained_model(dtype: str, test_data: Path) -> None:
    path = test_data / "models/stories260K"
    check_drafts(path, dtype, ["ngram", "self-int4", "self-int8", str(path)], 0.3)


def test_the_default_model(default_model: Path) -> None:
    check_drafts(default_model, "auto", ["self-int4", "ngram"], 0.2, max_tokens=24)


def test_a_right_model_in_the_whole_stack(tmp_path: Path) -> None:
    """The model drafts for itself: all is right, whatever it costs."""
    path = save_tiny(tmp_path / "model")
    for device in ("cpu", "reference"):
        with LLM(path, draft=str(path), device=device) as llm:
            fix_lengths(llm, 4)
            out = llm.generate(STORY, SamplingParams(max_tokens=21, temperature=1, seed=3, ignore_eos=True))
            assert out.timings.drafted_tokens == out.timings.accepted_tokens == 16


def test_streams(tmp_path: Path) -> None:
    """Several tokens in a chunk; the same in sum, with logprobs, and cut at a stop string."""
    path = save_tiny(tmp_path / "model")
    with LLM(path) as plain, LLM(path, draft=str(path)) as llm:
        text = plain.generate(STORY, SamplingParams(max_tokens=30, ignore_eos=True)).text
        fix_lengths(llm, 5)
        for n in (1, 2, 7, 30):
            params = SamplingParams(max_tokens=30, ignore_eos=True, logprobs=2, stop=text[n : n + 2] or ())
            whole = plain.generate(STORY, params)
            chunks = list(llm.stream(STORY, params))
            assert "".join(chunk.text for chunk in chunks) == whole.text
            assert [i for chunk in chunks for i in chunk.token_ids] == whole.token_ids
            assert [entry for chunk in chunks for entry in chunk.logprobs or []] == whole.logprobs
            assert chunks[-1].finish_reason == whole.finish_reason


def test_what_cannot_draft_is_refused(tmp_path: Path) -> None:
    path = save_tiny(tmp_path / "model")
    other = save_tiny(tmp_path / "other", vocab_size=300)
    with pytest.raises(ParameterError, match=r"draft is '.*other': its vocabulary has 300 tokens, and the model's 258"):
        LLM(path, draft=str(other))
    renamed = save_tiny(tmp_path / "renamed")
    file = renamed / "tokenizer.json"
    text = file.read_text()
    assert '"</s>"' in text
    file.write_text(text.replace('"</s>"', '"<end>"'))
    with pytest.raises(ParameterError, match=r"draft is .*: its token 257 is '<end>', and the model's '</s>'"):
        LLM(path, draft=str(renamed))
    with pytest.raises(ParameterError, match="drafts need the cache"):
        LLM(path, draft="ngram", use_cache=False)
    for bad in ("", 5, b"ngram"):
        with pytest.raises(ParameterError, match="expected self-int4, self-int8, ngram, or another model"):
            LLM(path, draft=bad)  # type: ignore[arg-type]


def test_the_budget_counts_the_drafts_keys_and_values(tmp_path: Path) -> None:
    """A copy shares the model's; another model of the same size halves what there is room for."""
    path = save_tiny(tmp_path / "model")
    pages = {}
    for draft in (None, "self-int4", str(path)):
        with LLM(path, draft=draft, kv_memory=1 << 20) as llm:
            assert llm._engine
            pages[draft] = llm._engine.pool.n_pages
    assert pages["self-int4"] == pages[None] == 2 * pages[str(path)]


@pytest.mark.parametrize("draft", ["ngram", "self-int8", "model"])
def test_samples_and_prompts_logprobs(draft: str, tmp_path: Path) -> None:
    """Samples that share pages, one of them half full; the prompt's own log-probabilities."""
    path = save_tiny(tmp_path / "model")
    params = SamplingParams(
        max_tokens=30, temperature=1.0, seed=1, n=3, best_of=5, prompt_logprobs=1, logprobs=1, ignore_eos=True
    )
    prompts = [STORY, STORY + STORY[:9], "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"]
    with LLM(path) as plain, LLM(path, draft=str(path) if draft == "model" else draft) as llm:
        fix_lengths(llm, 4)
        found = [
            [
                (out.token_ids, out.logprobs, out.prompt_logprobs, out.finish_reason)
                for out in one.generate(prompts, params)
            ]
            for one in (plain, llm)
        ]
        assert found[0] == found[1]
        assert speculator_of(llm._engine).n_drafted  # type: ignore[arg-type]


def test_a_grammar(tmp_path: Path) -> None:
    """Each token of a verified run has the mask that it would have had alone."""
    pytest.importorskip("llguidance")
    path = save_tiny(tmp_path / "model")
    params = SamplingParams(max_tokens=40, temperature=1.0, seed=2, regex="(ab|cd){3,12}x")
    with LLM(path) as plain:
        expected = plain.generate(STORY, params)
    for draft in ("ngram", "self-int8"):
        with LLM(path, draft=draft) as llm:
            fix_lengths(llm, 3)
            out = llm.generate(STORY, params)
            assert (out.token_ids, out.finish_reason) == (expected.token_ids, expected.finish_reason)
            assert out.timings.drafted_tokens
