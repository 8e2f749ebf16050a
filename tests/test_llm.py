"""LLM: the whole stack, on a tiny random model and on a real one."""

from __future__ import annotations

import doctest
import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pronghorn
from pronghorn import (
    LLM,
    CheckpointError,
    ConfigError,
    ParameterError,
    PromptError,
    PronghornError,
    QueueFull,
    SamplingParams,
)
from pronghorn.engine import sampling
from pronghorn.generation import TextStream
from pronghorn.loading import describe, pages_for
from tiny import BOS, EOS, STORY, save_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def llm(tiny: Path) -> Iterator[LLM]:
    with LLM(tiny, threads=1) as llm:
        yield llm


@pytest.fixture(scope="module")
def stories(test_data: Path) -> Path:
    return test_data / "models" / "stories260K"


def some_prompts() -> list[Any]:
    rng = random.Random(3)
    shared = [rng.randrange(256) for _ in range(80)]
    return [
        "hello", "", [BOS], shared, [*shared[:70], 5, 6], shared * 3, "héllo 🙂" * 4,
        [rng.randrange(256) for _ in range(33)],
    ]  # fmt: skip


def some_params() -> list[SamplingParams]:
    return [
        SamplingParams(
            max_tokens=10 + 9 * i,
            temperature=(0.0, 0.8, 1.0)[i % 3],
            seed=i,
            top_p=0.9,
            logprobs=3,
            repetition_penalty=1.1 if i % 4 == 0 else 1.0,
            stop="a" if i % 2 else (),
        )
        for i in range(8)
    ]


def answers(llm: LLM, **options: Any) -> list[Any]:
    """What is told of each prompt, run alone."""
    outs = [llm.generate(prompt, params) for prompt, params in zip(some_prompts(), some_params(), strict=True)]
    return [out._replace(timings=None) for out in outs]  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def alone(llm: LLM) -> list[Any]:
    return answers(llm)


def test_examples(stories: Path) -> None:
    """The docstrings' examples."""
    for module in (pronghorn, pronghorn.llm, sampling):  # type: ignore[attr-defined]
        result = doctest.testmod(module, extraglobs={"path": stories})
        assert result.attempted
        assert not result.failed


def test_company_changes_nothing(llm: LLM, alone: list[Any]) -> None:
    together = llm.generate(some_prompts(), some_params())
    assert [out._replace(timings=None) for out in together] == alone  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options", [{"threads": 2}, {"prefix_cache": False}, {"use_cache": False}, {"kv_memory": 2**20}]
)
def test_options_change_nothing(tiny: Path, alone: list[Any], options: dict[str, Any]) -> None:
    with LLM(tiny, **options) as other:
        assert answers(other) == alone
        assert [
            out._replace(timings=None)  # type: ignore[arg-type]
            for out in other.generate(some_prompts(), some_params())
        ] == alone


def test_stream_equals_whole(llm: LLM, alone: list[Any]) -> None:
    """One after the other, and then all at once, a chunk of each in turn."""
    pairs = list(zip(some_prompts(), some_params(), strict=True))
    whole = [list(llm.stream(prompt, params)) for prompt, params in pairs]
    streams = [llm.stream(prompt, params) for prompt, params in pairs]
    mixed: list[list[Any]] = [[] for _ in streams]
    pending = list(range(len(streams)))
    while pending:
        for i in list(pending):
            chunk = next(streams[i], None)
            if chunk is None:
                pending.remove(i)
            else:
                mixed[i].append(chunk)
    for chunks, out in [*zip(whole, alone, strict=True), *zip(mixed, alone, strict=True)]:
        assert "".join(chunk.text for chunk in chunks) == out.text
        assert [token for chunk in chunks for token in chunk.token_ids] == out.token_ids
        assert [entry for chunk in chunks for entry in chunk.logprobs] == out.logprobs
        assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + [out.finish_reason]
    assert [stream.output()._replace(timings=None) for stream in streams] == alone  # type: ignore[arg-type]


def test_threads_may_share_it(llm: LLM, alone: list[Any]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(4) as pool:
        jobs = [
            pool.submit(llm.generate, prompt, params)
            for prompt, params in zip(some_prompts(), some_params(), strict=True)
        ]
        assert [job.result()._replace(timings=None) for job in jobs] == alone  # type: ignore[arg-type]


def test_closing_a_stream_frees_its_pages(llm: LLM) -> None:
    engine = llm._engine
    assert engine
    stream = llm.stream([1, 2, 3], SamplingParams(max_tokens=None, ignore_eos=True))
    next(stream)
    assert engine.scheduler.running
    with pytest.raises(PronghornError, match="not ended"):
        stream.output()
    stream.close()
    assert list(stream) == []
    unused = llm.stream([1, 2, 3])
    del unused
    assert not engine.scheduler.running
    assert not engine.scheduler.waiting
    assert engine.pool.n_free == engine.pool.n_pages


def test_stops(llm: LLM) -> None:
    """A stop string is cut exactly; the token that ends is told, not shown."""
    free = SamplingParams(max_tokens=60, ignore_eos=True, temperature=1.0, seed=5, logit_bias={EOS: -100, BOS: -100})
    whole = llm.generate("abc", free)
    text = whole.text
    for start, length in ((0, 1), (3, 1), (5, 4), (20, 7)):
        stop = text[start : start + length]
        out = llm.generate("abc", free.replace(stop=["never there", stop]))
        assert out.text == text[: text.index(stop)]
        assert out.finish_reason == "stop"
        assert out.token_ids == whole.token_ids[: len(out.token_ids)]
    token = whole.token_ids[9]
    out = llm.generate("abc", free.replace(stop_token_ids=[token]))
    assert out.token_ids == whole.token_ids[: whole.token_ids.index(token) + 1]
    assert out.finish_reason == "stop"
    assert out.text == llm.tokenizer.decode(out.token_ids[:-1])


def test_text_goes_on_from_the_prompt(llm: LLM) -> None:
    """Half a character at the prompt's end is made whole by the first token."""
    first, *rest = llm.tokenizer.encode("é", add_special=False)
    params = SamplingParams(max_tokens=1, logit_bias={rest[0]: 100})
    assert llm.generate([first], params).text == "é"


def test_the_prompt_is_not_in_the_output(stories: Path) -> None:
    """Also where it ends with a run of byte tokens, as an emoji is for most of Llama's tokenizers."""
    with LLM(stories) as llm:
        params = SamplingParams(max_tokens=5)
        for prompt in ("hello 😀", "日本語"):
            out = llm.generate(prompt, params)
            assert out.text.strip() == llm.tokenizer.decode(out.token_ids).strip()
            assert llm.generate(prompt, params.replace(stop=prompt[-1])).finish_reason == "length"


def test_eos(llm: LLM) -> None:
    """As the tokenizer's files say."""
    sure = SamplingParams(logit_bias={EOS: 100}, max_tokens=5)
    assert llm.generate("a", sure).token_ids == [EOS]
    assert llm.generate("a", sure).text == ""
    assert llm.generate("a", sure).finish_reason == "stop"
    assert llm.generate("a", sure.replace(ignore_eos=True)).token_ids == [EOS] * 5
    late = llm.generate("a", sure.replace(min_tokens=3)).token_ids
    assert EOS not in late[:3]
    assert late[3:] == [EOS]


def test_text_streams_cut_at_the_first_complete_stop_string() -> None:
    """Whatever the borders between tokens, and with as little held back as can be."""

    class Pieces:
        def __init__(self, pieces: list[str]) -> None:
            self.pieces = pieces

        def push(self, index: int) -> str:
            return self.pieces[index]

        def finish(self) -> str:
            return ""

    rng = random.Random(0)
    for _ in range(2000):
        text = "".join(rng.choices("ab", k=rng.randint(0, 12)))
        stop = ["".join(rng.choices("ab", k=rng.randint(1, 5))) for _ in range(rng.randint(0, 3))]
        ends = [(text.index(s) + len(s), text.index(s)) for s in stop if s in text]
        expected = text[: min(ends)[1]] if ends else text
        cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randint(0, 5)))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        stream = TextStream(Pieces(pieces), stop)  # type: ignore[arg-type]
        shown = seen = ""
        for i, piece in enumerate(pieces):
            shown += stream.push(i)
            seen += piece
            if stream.stopped:
                break
            assert seen.startswith(shown)
            held = seen[len(shown) :]
            assert not held or any(s.startswith(held) for s in stop)
        assert stream.stopped == bool(ends)
        assert shown + stream.finish() == expected


def test_prompts(llm: LLM) -> None:
    one = SamplingParams(max_tokens=1)
    assert llm.generate("hi", one).prompt_token_ids == [BOS, *llm.tokenizer.encode("hi", add_special=False)]
    assert llm.generate("", one).prompt_token_ids == [BOS]
    assert llm.generate([[]], one)[0].prompt_token_ids == [BOS]
    assert llm.generate([], one) == []
    assert llm.generate([7, 8], one).prompt_token_ids == [7, 8]
    assert [out.prompt_token_ids for out in llm.generate([[7], np.array([8])], one)] == [[7], [8]]  # type: ignore[list-item]
    assert llm.context == 300
    with pytest.raises(PromptError, match="the prompt has 301 tokens, but the context holds 300"):
        llm.generate([["a"], "a" * 300][1], one)
    with pytest.raises(PromptError, match="token 1 of the prompt is 258"):
        llm.generate([1, 258])
    with pytest.raises(ParameterError, match="2 prompts, but 1 params"):
        llm.generate(["a", "b"], [one])
    out = llm.generate([5] * 290, SamplingParams(max_tokens=None, ignore_eos=True))
    assert (len(out.token_ids), out.finish_reason) == (10, "length")


def test_seeds(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, max_tokens=20)
    first, second = llm.generate("a", params), llm.generate("a", params)
    assert first.seed != second.seed
    assert first.token_ids != second.token_ids
    assert llm.generate("a", params.replace(seed=first.seed)).token_ids == first.token_ids


def test_logprobs_and_logits_agree(llm: LLM) -> None:
    out = llm.generate([5, 6, 7], SamplingParams(max_tokens=40, logprobs=2, ignore_eos=True))
    assert out.logprobs
    logits = llm.logits([*out.prompt_token_ids, *out.token_ids]).astype(np.float64)
    assert logits.shape == (43, 258)
    exact = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    for row, token_id, entry in zip(exact[2:], out.token_ids, out.logprobs, strict=False):
        assert token_id == entry.token_id == int(np.argmax(row))
        assert entry.logprob == pytest.approx(row[token_id], abs=1e-5)
        assert [i for i, _ in entry.top] == np.argsort(-row, kind="stable")[:2].tolist()
    whole, part = llm.logits(list(range(200))), llm.logits(list(range(70)))
    np.testing.assert_array_equal(whole[:70], part)


def test_devices_agree(tiny: Path, alone: list[Any]) -> None:
    ids = [random.Random(1).randrange(258) for _ in range(100)]
    with LLM(tiny) as cpu, LLM(tiny, device="reference") as reference, LLM(tiny, device="torch:cpu") as torch:
        exact = reference.logits(ids)
        for other in (cpu, torch):
            assert np.abs(other.logits(ids) - exact).max() < 1e-4 * exact.std()
        greedy = SamplingParams(max_tokens=30)
        texts = {llm.generate("hello", greedy).text for llm in (cpu, reference, torch)}
        assert len(texts) == 1


def test_cached_tokens_are_told_and_not_timed(llm: LLM) -> None:
    ids, params = [9, 8] * 50, SamplingParams(max_tokens=2, ignore_eos=True)
    for n_cached in (0, 96):
        timings = llm.generate(ids, params).timings
        assert timings.cached_tokens == n_cached
        assert timings.prefill_tok_s == pytest.approx((100 - n_cached) / timings.ttft_s)


def test_what_a_closed_stream_had(llm: LLM) -> None:
    params = SamplingParams(max_tokens=50, ignore_eos=True, seed=0, logprobs=1)
    stream = llm.stream("hello", params)
    chunks = [next(stream), next(stream)]
    stream.close()
    out = stream.output()
    assert (out.finish_reason, out.text) == ("cancelled", "".join(chunk.text for chunk in chunks))
    assert out.token_ids == [token for chunk in chunks for token in chunk.token_ids]
    assert out.logprobs
    assert len(out.logprobs) == len(out.token_ids)
    unused = llm.stream("hello", params)
    unused.close()
    out = unused.output()
    assert (out.finish_reason, out.token_ids, out.timings.prefill_tok_s) == ("cancelled", [], 0)
    done = llm.stream("hello", params)
    assert list(done)
    done.close()
    assert done.output().finish_reason == "length"


def test_what_was_held_back_comes_when_it_is_closed(llm: LLM) -> None:
    """The beginning of a stop string, or of a character: the text is that of the tokens."""
    whole = llm.generate("hello", SamplingParams(max_tokens=8, ignore_eos=True, temperature=1, seed=5))
    stream = llm.stream("hello", SamplingParams(ignore_eos=True, temperature=1, seed=5, stop=[whole.text + "never"]))
    chunks = [next(stream) for _ in range(8)]
    assert "".join(chunk.text for chunk in chunks) == ""
    stream.close()
    out = stream.output()
    assert (out.finish_reason, out.token_ids, out.text) == ("cancelled", whole.token_ids, whole.text)


def test_what_is_no_prompt(llm: LLM) -> None:
    for prompt in (b"abc", bytearray(b"a"), [1.0, 2.0], 5, None, {1: 2}, [2**40], [None], [b"ab"], iter([1]), [1, "a"]):
        with pytest.raises(PromptError, match="the prompt is"):
            llm.generate(prompt, SamplingParams(max_tokens=1))  # type: ignore[call-overload]
    for ids in ("abc", b"abcd", [2**40], [1.5], 5):
        with pytest.raises(PromptError, match="no list of token ids"):
            llm.logits(ids)  # type: ignore[arg-type]
    for params in (5, {"max_tokens": 3}, [5]):
        with pytest.raises(ParameterError, match=r"params is .*expected SamplingParams"):
            llm.generate("a" if params != [5] else ["a"], params)  # type: ignore[call-overload]
    with pytest.raises(ParameterError, match="params is 5"):
        llm.stream("a", 5)  # type: ignore[arg-type]
    arrays = llm.generate([np.array([8]), np.array([9])], SamplingParams(max_tokens=1))  # type: ignore[list-item]
    assert [out.prompt_token_ids for out in arrays] == [[8], [9]]


def test_requests_with_other_ends_may_overlap(llm: LLM) -> None:
    """What ends a sequence is the request's own."""
    sure = SamplingParams(logit_bias={EOS: 100}, max_tokens=3)
    forever, ended = llm.generate(["a", "a"], [sure.replace(ignore_eos=True), sure])
    assert (forever.token_ids, ended.token_ids) == ([EOS] * 3, [EOS])


def test_timings(llm: LLM) -> None:
    out = llm.generate([1] * 50, SamplingParams(max_tokens=11, ignore_eos=True))
    timings = out.timings
    assert timings.load_s > 0
    assert timings.prefill_tok_s == pytest.approx(50 / timings.ttft_s)
    embedding, layers = 258 * 32, 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48 + 64)
    weights = 4 * (embedding + layers + 32)
    assert timings.bytes_per_token == weights + 2 * 2 * 16 * 4 * (50 + 5)
    assert timings.decode_tok_s
    assert timings.bandwidth_gb_s == pytest.approx(timings.bytes_per_token * timings.decode_tok_s / 1e9)
    assert llm.generate([1], SamplingParams(max_tokens=1)).timings.decode_tok_s is None


def test_samples(llm: LLM) -> None:
    """Each is what its seed gives alone, whole and streamed; the prompt is computed once."""
    params = SamplingParams(max_tokens=20, temperature=1.0, seed=2**64 - 2, n=4, logprobs=1)
    before = llm.stats()
    out = llm.generate([17, 3] * 50, params)
    after = llm.stats()
    assert after.prompt_tokens - before.prompt_tokens == 400
    assert after.cached_tokens - before.cached_tokens == 3 * 99
    assert [sample.seed for sample in out.samples] == [2**64 - 2, 2**64 - 1, 0, 1]
    for sample in out.samples:
        assert sample.others == () or sample is out
        same = llm.generate([17, 3] * 50, params.replace(n=1, seed=sample.seed))
        assert (same.token_ids, same.text, same.logprobs) == (sample.token_ids, sample.text, sample.logprobs)
    stream = llm.stream([17, 3] * 50, params)
    texts = [""] * 4
    for chunk in stream:
        texts[chunk.sample] += chunk.text
    assert texts == [sample.text for sample in out.samples] == [sample.text for sample in stream.output().samples]


def test_best_of(llm: LLM) -> None:
    """The samples of the likeliest tokens, best first; whose log-probabilities are told only if asked for."""
    params = SamplingParams(max_tokens=8, temperature=2.0, seed=1)
    every = llm.generate("a", params.replace(n=6, logprobs=0)).samples
    means = [sum(entry.logprob for entry in out.logprobs or ()) / len(out.token_ids) for out in every]
    best = llm.generate("a", params.replace(n=2, best_of=6))
    order = sorted(range(6), key=lambda i: -means[i])
    assert [out.token_ids for out in best.samples] == [every[i].token_ids for i in order[:2]]
    assert best.logprobs is None
    assert best.seed == 1 + order[0]
    with pytest.raises(ParameterError, match="best_of is 6"):
        llm.stream("a", params.replace(best_of=6))


@pytest.mark.parametrize("use_cache", [True, False])
def test_prompt_logprobs_and_logits_agree(tiny: Path, use_cache: bool) -> None:
    """Also of a prompt that the prefix cache has, and of one token."""
    ids = [7, 8] * 60
    with LLM(tiny, use_cache=use_cache) as llm:
        for params in (SamplingParams(max_tokens=1), SamplingParams(max_tokens=2, prompt_logprobs=3, logprobs=0)):
            out = llm.generate(ids, params)
        logits = llm.logits(ids).astype(np.float64)
        exact = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        assert out.prompt_logprobs
        assert out.prompt_logprobs[0] is None
        assert len(out.prompt_logprobs) == 120
        for row, token_id, entry in zip(exact, ids[1:], out.prompt_logprobs[1:], strict=False):
            assert entry
            assert entry.token_id == token_id
            assert entry.logprob == pytest.approx(row[token_id], abs=1e-5)
            assert [i for i, _ in entry.top] == np.argsort(-row, kind="stable")[:3].tolist()
        assert llm.generate([7], SamplingParams(max_tokens=1, prompt_logprobs=0)).prompt_logprobs == [None]


def test_ctrl_c_keeps_what_is_done(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = llm._engine
    assert engine
    params = [SamplingParams(max_tokens=n, ignore_eos=True, seed=0) for n in (3, 50)]
    alone = llm.generate(["a", "a"], params)
    steps = iter(range(10))
    original = engine.runner.run

    def run(batch: Any) -> memoryview:
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return original(batch)

    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "run", run)
        with pytest.raises(pronghorn.Interrupted, match="1 of 2 had ended") as interrupted:
            llm.generate(["a", "a"], params)
    done, cut = interrupted.value.outputs
    assert isinstance(interrupted.value, KeyboardInterrupt)
    assert done._replace(timings=None) == alone[0]._replace(timings=None)  # type: ignore[arg-type]
    assert (cut.finish_reason, len(cut.token_ids)) == ("cancelled", 10)
    assert cut.token_ids == alone[1].token_ids[:10]
    assert engine.stats().held_pages == 0


def test_run_gives_errors_in_their_places(llm: LLM) -> None:
    """And asks for jobs only as there is room for them."""
    asked: list[int] = []

    def jobs() -> Iterator[tuple[int, Any]]:
        for i in range(500):
            asked.append(i)
            yield i, PronghornError("bad") if i % 7 == 0 else llm.job([i % 250], SamplingParams(max_tokens=3))

    results = {}
    for key, result in llm.run(jobs()):
        results[key] = result
        assert len(asked) - len(results) <= 128
    assert sorted(results) == list(range(500))
    assert all(isinstance(result, PronghornError) == (key % 7 == 0) for key, result in results.items())
    partly = llm.run(jobs())
    next(partly)
    partly.close()
    assert llm.stats().running == llm.stats().waiting == 0


def test_without_a_tokenizer(tiny: Path, tmp_path: Path) -> None:
    """Ids go in and out; the config knows the ends; text is a clear error."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(tiny / name)
    with LLM(tmp_path) as llm:
        out = llm.generate([1, 2], SamplingParams(max_tokens=5, logit_bias={EOS: 100}))
        assert (out.text, out.token_ids, out.finish_reason) == ("", [EOS], "stop")
        assert llm.generate([[]], SamplingParams(max_tokens=1))[0].prompt_token_ids == [BOS]
        with pytest.raises(CheckpointError):
            llm.generate("text")
        with pytest.raises(CheckpointError):
            llm.generate([1], SamplingParams(stop="a"))
    (tmp_path / "tokenizer.json").write_text("{")
    with LLM(tmp_path) as llm, pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        llm.generate([1])  # a damaged one is not "none"


def test_chat(llm: LLM) -> None:
    ids = llm.chat_prompt([{"role": "user", "content": "hi"}])
    assert llm.tokenizer.decode(ids, skip_special=False) == "<s>[user]hi\n[assistant]"
    first = llm.generate(ids, SamplingParams(max_tokens=60, ignore_eos=True))
    more = [*ids, *first.token_ids, 1, 2, 3]
    stream = llm.stream(more, SamplingParams(max_tokens=3))
    assert list(stream)
    assert stream._job.requests[0].n_cached == (len(ids) + 59) // 32 * 32  # the conversation's pages are reused


def test_closed_and_forked(tiny: Path) -> None:
    llm = LLM(tiny)
    stream = llm.stream("a", SamplingParams(max_tokens=None, ignore_eos=True))
    next(stream)
    child = os.fork()
    if child == 0:
        try:
            llm.generate("a")
            os._exit(1)
        except PronghornError as error:
            os._exit(0 if "forked" in str(error) else 2)
        finally:
            os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    code = """if True:
        import os, sys, pronghorn
        llm = pronghorn.LLM(sys.argv[1], threads=2)
        llm.generate("a")
        child = os.fork()
        if child == 0:
            try:
                llm.generate("a")
            except pronghorn.PronghornError as error:
                sys.exit(7 if "forked" in str(error) else 1)
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, tiny], env=environment, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (7, "")  # the child leaves as others do
    llm.close()
    llm.close()
    with pytest.raises(PronghornError, match="closed"):
        next(stream)
    with pytest.raises(PronghornError, match="closed"):
        llm.generate("a")


def test_the_rank_is_of_no_concern_to_one_process(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for rank in ("", "x", "7"):
        monkeypatch.setenv("RANK", rank)
        with LLM(tiny, threads=1) as llm:
            assert llm.generate("a", SamplingParams(max_tokens=1)).token_ids
        with pytest.raises(ParameterError, match=f"RANK is '{rank}' in the environment: expected a number from 0 to 1"):
            LLM(tiny, device="torch:cpu", tensor_parallel=2)


def test_an_unknown_instruction_set_is_one_line(tiny: Path) -> None:
    code = "from pronghorn.cli import main; raise SystemExit(main(['generate', 'a', '-m', __import__('sys').argv[1]]))"
    environment = {**os.environ, "PRONGHORN_ISA": "abacus", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code, tiny], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("pronghorn: error: PRONGHORN_ISA=abacus")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int3"}, "dtype is 'int3'"),
        ({"kv_dtype": "f8"}, "kv_dtype is 'f8'"),
        ({"threads": 0}, "threads is 0"),
        ({"threads": 1.5}, "threads is 1.5"),
        ({"threads": 2, "device": "reference"}, "no such choice"),
        ({"draft": ""}, "expected self-int4, self-int8, ngram, or another model"),
        ({"kv_memory": 0}, "kv_memory is 0"),
        ({"kv_memory": 100}, "32 tokens alone need"),
        ({"device": "abacus"}, "device is 'abacus': expected cpu, reference, or a device of PyTorch's"),
        ({"device": None}, "device is None: expected cpu"),
        ({"device": 5}, "device is 5: expected cpu"),
        ({"device": "cpu:0"}, "torch:cpu:0"),
        ({"model": ""}, "model is ''"),
        ({"model": 5}, "model is 5"),
    ],
)
def test_options_are_checked(tiny: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ParameterError, ConfigError), match=message) as error:
        LLM(**{"model": tiny, **options})
    assert "\n" not in str(error.value)


def test_kv_memory(tiny: Path) -> None:
    token = 2 * 2 * 2 * 8 * 4
    with LLM(tiny, kv_memory=5 * 32 * token + 1) as llm:
        assert llm.context == 160
        with pytest.raises(PromptError, match=r"context holds 160 \(kv_memory; the model's is 300\)"):
            llm.generate([1] * 160)
        with pytest.raises(PromptError, match=r"context holds 160 \(kv_memory; the model's is 300\)"):
            llm.logits([1] * 161)
    with LLM(tiny, threads=np.int64(1), kv_memory=np.int64(2**20)) as llm:  # type: ignore[arg-type]
        assert llm.context == 300
    with pytest.raises(ParameterError, match="this machine has"):
        LLM(tiny, kv_memory=2**60)
    code = "import resource, sys, pronghorn; resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30));"
    code += "pronghorn.LLM(sys.argv[1]); pronghorn.LLM(sys.argv[1], kv_memory=2**30)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code, tiny], env=environment, capture_output=True, text=True)
    assert "no room for 1073741824 bytes of keys and values" in done.stderr
    assert "choose a smaller kv_memory" in done.stderr
    assert pages_for(1, 320, 3, None, (2**40, 2**30)) == 30
    assert pages_for(2**10, 320, 3, None, (2**40, 2**21)) == 16  # a quarter of what is free
    assert pages_for(2**50, 33, 3, None, (2**40, 0)) == 2  # a full context always, whatever is free now


def test_info(llm: LLM) -> None:
    facts = llm.info()
    assert facts["parameters"] * 4 == facts["bytes"] == facts["weights"][0]["bytes"]
    assert [(entry["dtype"], entry["becomes"], entry["how"]) for entry in facts["weights"]] == [
        ("f32", "f32", "mapped")
    ]
    assert facts["kv_bytes"]["f32"] == {"128": 128 * 256, "256": 256 * 256, "300": 300 * 256}
    assert facts["weight_bytes"] == facts["weights"][0]["becomes_bytes"] == facts["bytes"]
    assert facts["total_bytes"]["bf16"]["256"] == facts["bytes"] + 256 * 128
    less = describe(llm._checkpoint, "int4")
    assert less["weight_bytes"] == sum(entry["becomes_bytes"] for entry in less["weights"]) < facts["bytes"] / 2
    json.dumps(facts)


@pytest.mark.parametrize("form", ["", "stories260K.gguf", "model.safetensors"])
def test_golden(stories: Path, form: str) -> None:
    """200 greedy tokens from BOS of a real model, whole, from a prompt, and with nothing cached."""
    golden = (stories / "golden.txt").read_text()
    with LLM(stories / form) as llm:
        out = llm.generate("", SamplingParams(max_tokens=200))
        assert out.text.strip() == golden.strip()
        story = llm.generate(STORY, SamplingParams(max_tokens=120))
        assert golden.startswith(STORY + story.text)
    with LLM(stories / form, use_cache=False) as llm:
        assert llm.generate(STORY, SamplingParams(max_tokens=120)).text == story.text


@pytest.mark.skipif(not os.environ.get("PRONGHORN_GPT2_124M"), reason="PRONGHORN_GPT2_124M is not set (its folder)")
def test_gpt2_124m() -> None:
    """The real GPT-2, greedily."""
    with LLM(os.environ["PRONGHORN_GPT2_124M"]) as llm:
        params = SamplingParams(max_tokens=20)
        out = llm.generate(
            "Alan Turing theorized that computers would one day become very powerful, but even he could not imagine",
            params,
        )
        ids = "703 484 561 307 1498 284 466 523 13 198 198 1 40 892 326 262 749 1593 1517 318"
        assert out.token_ids == [int(part) for part in ids.split()]
        assert llm.generate("My name is", params).text.startswith(" John. I'm a man of God. I")


@pytest.mark.parametrize("dtype", ["f32", "bf16", "int8", "int4"])
def test_dtypes(stories: Path, dtype: str) -> None:
    """One answer in every format, and sense in it."""
    with LLM(stories, dtype=dtype) as llm:
        prompts = ["Once upon a time", STORY, STORY * 3]
        params = SamplingParams(max_tokens=40, temperature=0.7, seed=1)
        together = [out.token_ids for out in llm.generate(prompts, params)]
        assert [llm.generate(prompt, params).token_ids for prompt in prompts] == together
        golden = llm.tokenizer.encode((stories / "golden.txt").read_text())
        logits = llm.logits(golden).astype(np.float64)
        losses = np.log(np.exp(logits).sum(axis=1))[:-1] - logits[np.arange(len(golden) - 1), golden[1:]]
        assert losses.mean() < {"f32": 0.62, "bf16": 0.63, "int8": 0.63, "int4": 0.8}[dtype]


def test_reading_logits_takes_turns_with_steps(tmp_path: Path) -> None:
    """Also where the one leaves no pages to the other: it waits, or is told to come again."""
    with LLM(save_tiny(tmp_path / "model"), kv_memory=300 * 256, threads=1) as llm:
        params = SamplingParams(max_tokens=100, ignore_eos=True)
        alone, rows = llm.generate("a" * 100, params).token_ids, llm.logits([1] * 250)
        found: list[Any] = []

        def read() -> None:
            for _ in range(20):
                with suppress(QueueFull):
                    found.append(np.array_equal(llm.logits([1] * 250), rows))

        thread = threading.Thread(target=read)
        thread.start()
        for _ in range(5):
            assert llm.generate("a" * 100, params).token_ids == alone
        thread.join()
        assert all(found)
        assert llm.stats().held_pages == 0
