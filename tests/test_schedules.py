"""One answer through the engine: on a real model, each of 64 prompts alone = in any company, to the bit.

The suite draws some schedules of all that there are; `make soak` (PRONGHORN_SOAK=seconds) takes many more, each
combination of the options at least once, and then has random clients come and go for so long.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pronghorn import LLM, AsyncLLM, Output, PronghornError, SamplingParams
from pronghorn.engine.pace import Pace
from tiny import save_tiny

SOAK = float(os.environ.get("PRONGHORN_SOAK") or 0)
DTYPES = ("f32", "f16", "bf16", "int8", "int4")
THREADS = (1, 2, 4)
DRAFTS = (None, "ngram", "self-int8")
PAGE_VALUES = {"stories260K": 32 * 2 * 5 * 4 * 8, "SmolLM2": 32 * 2 * 30 * 3 * 64}  # keys and values in a page
N_PROMPTS = 64


def prompts() -> list[list[int]]:
    """Of 1 to 200 tokens, many of which begin alike."""
    rng = random.Random(11)
    shared = [rng.randrange(3, 512) for _ in range(160)]
    lengths = [0, 1, 30, 31, 32, 33, 63, 64, 65, 96, 130, 160]
    return [
        [1, *shared[: rng.choice(lengths)], *(rng.randrange(3, 512) for _ in range(rng.choice([0, 1, 5, 31, 38])))]
        for _ in range(N_PROMPTS)
    ]


def params() -> list[SamplingParams]:
    """Greedy and sampled, with all that looks back at the tokens before."""
    return [
        SamplingParams(
            max_tokens=1 + i * 7 % 40,
            temperature=(0.0, 0.7, 1.0, 1.5)[i % 4],
            seed=i,
            top_k=(0, 40)[i // 4 % 2],
            top_p=(1.0, 0.9)[i // 8 % 2],
            repetition_penalty=(1.0, 1.2)[i // 16 % 2],
            logprobs=(None, 2)[i % 2],
            prompt_logprobs=1 if i % 8 == 0 else None,
            n=3 if i % 16 == 5 else 1,
            stop=("th",) if i % 5 == 4 else (),
            ignore_eos=i % 3 == 0,
        )
        for i in range(N_PROMPTS)
    ]


PROMPTS, PARAMS = prompts(), params()


INEXACT: dict[str, Any] = {"logprobs": None, "prompt_logprobs": None}


def told(out: Output) -> list[Any]:
    """All of an output that is not time, of every sample."""
    return [sample._replace(timings=None, others=()) for sample in out.samples]  # type: ignore[arg-type]


@cache
def model_of(
    path: Path, dtype: str, where: int | str, prefix_cache: bool, n_pages: int, draft: str | None = None
) -> LLM:
    """`where`: so many threads, or another device."""
    page = PAGE_VALUES[path.name.split("-")[0]] * (4 if dtype in ("f32", "f16") else 2)
    place: dict[str, Any] = {"device": where} if isinstance(where, str) else {"threads": where}
    return LLM(path, dtype=dtype, prefix_cache=prefix_cache, kv_memory=n_pages * page, draft=draft, **place)


@cache
def alone(folder: Path, dtype: str, where: int | str, i: int) -> list[Any]:
    """What a prompt gives by itself, at once, with nothing cached."""
    return told(model_of(folder, dtype, where, False, 40).generate(PROMPTS[i], PARAMS[i]))


class Drawn(Pace):
    """Chunks of any size."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__(512)
        self.draw = draw

    def budget(self, n_decoding: int) -> int:
        """See Pace."""
        return self.draw.choice([1, 2, 7, 31, 32, 33, 100, 512])


def check(
    folder: Path, dtype: str, where: int | str, prefix_cache: bool, n_pages: int, draft: str | None, seed: int
) -> int:
    """A schedule, drawn -> its preemptions."""
    draw = random.Random(seed)
    llm = model_of(folder, dtype, where, prefix_cache, n_pages, draft)
    engine = llm._engine
    assert engine
    if engine.speculator:
        engine.speculator.lengths = draw.choice([None, 1, 3, 8])
    engine.scheduler.pace = Drawn(draw)
    before = engine.stats().preemptions
    coming = draw.sample(range(N_PROMPTS), draw.choice([8, 24] if isinstance(where, str) else [1, 2, 8, 24, 64]))
    there: dict[int, Any] = {}
    chunks: dict[int, list[Any]] = {}
    while coming or there:
        while coming and draw.random() < 0.5:
            i = coming.pop()
            there[i] = llm.job(PROMPTS[i], PARAMS[i], draw.choice([0, 0, 1]))
            chunks[i] = []
            llm.submit(there[i])
        if draw.random() < 0.1 and engine.scheduler.running:
            engine.scheduler._preempt(draw.choice(engine.scheduler.running))
        llm.take_step()
        for i, job in list(there.items()):
            if draw.random() < 0.7:  # who reads a stream may be late
                chunks[i] += job.advance()
            if job.finished:
                del there[i]
                found, expected = told(job.output()), alone(folder, dtype, where if isinstance(where, str) else 1, i)
                what = f"prompt {i}, {dtype}, {where}, draft {draft}, schedule {seed}"
                if isinstance(where, str):  # PyTorch's sums depend on the number of rows
                    pairs = zip(found, expected, strict=True)
                    for one, other in [(got.logprobs, want.logprobs) for got, want in pairs if want.logprobs]:
                        assert [p.logprob for p in one] == pytest.approx([p.logprob for p in other], abs=1e-3), what
                    found, expected = ([out._replace(**INEXACT) for out in outs] for outs in (found, expected))
                assert found == expected, what
                for sample, out in enumerate(found):
                    own = [chunk for chunk in chunks[i] if chunk.sample == sample]
                    assert "".join(chunk.text for chunk in own) == out.text
                    assert [token for chunk in own for token in chunk.token_ids] == out.token_ids
    assert engine.stats().held_pages == 0
    return engine.stats().preemptions - before


@pytest.fixture(scope="module")
def stories(test_data: Path) -> Path:
    return test_data / "models" / "stories260K"


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_schedule_gives_the_same(stories: Path, dtype: str) -> None:
    @settings(max_examples=200 if SOAK else 6, deadline=None, database=None)
    @given(
        st.sampled_from(THREADS), st.booleans(), st.sampled_from([10, 30, 200]), st.sampled_from(DRAFTS),
        st.integers(0, 2**32),
    )  # fmt: skip
    def drawn(threads: int, prefix_cache: bool, n_pages: int, draft: str | None, seed: int) -> None:
        check(stories, dtype, threads, prefix_cache, n_pages, draft, seed)

    drawn()


@pytest.mark.parametrize(("prefix_cache", "n_pages", "draft"), [(True, 10, None), (False, 30, "self-int8")])
def test_any_schedule_gives_the_same_on_another_device(
    stories: Path, prefix_cache: bool, n_pages: int, draft: str | None
) -> None:
    """The same tokens, there; their chances differ by rounding."""
    pytest.importorskip("torch")
    for seed in range(20 if SOAK else 2):
        check(stories, "f32", "torch:cpu", prefix_cache, n_pages, draft, seed)


def test_pages_run_out_and_nothing_changes(stories: Path) -> None:
    """A tenth of the pages that all would take: they give way again and again."""
    assert sum(check(stories, "int8", 2, True, 10, None, seed) for seed in range(3)) > 20


@pytest.mark.skipif(not SOAK, reason="PRONGHORN_SOAK is not set: `make soak` runs the whole product")
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_whole_product(stories: Path, dtype: str) -> None:
    for number, options in enumerate(itertools.product(THREADS, (True, False), (10, 30, 200), DRAFTS)):
        for seed in range(2):
            check(stories, dtype, *options, seed=1000 * number + seed)


@pytest.mark.skipif(not SOAK, reason="PRONGHORN_SOAK is not set: `make soak` runs it on SmolLM2 too")
@pytest.mark.parametrize("dtype", ["f32", "bf16", "int8"])
def test_smollm2(default_model: Path, dtype: str) -> None:
    for number, draft in enumerate(DRAFTS):
        check(default_model, dtype, 1 + number % 2, number != 1, 60, draft, seed=number)


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_soak(tmp_path: Path) -> None:
    """Clients come, read, tire, and go, at random: no page is lost, the memory stays flat, and all are served."""
    seconds = SOAK or 2.0
    llm = LLM(save_tiny(tmp_path / "model"), kv_memory=60 * 8192)
    draw = random.Random(1)
    counts = {"whole": 0, "left": 0, "timeout": 0, "refused": 0, "cancelled": 0, "faults": 0}
    sizes: list[int] = []

    async def client(engine: AsyncLLM, until: float) -> None:
        loop = asyncio.get_running_loop()
        while loop.time() < until:
            await asyncio.sleep(draw.expovariate(30))
            ids = [draw.randrange(256) for _ in range(draw.choice([1, 10, 40, 150, 250]))]
            params = SamplingParams(
                max_tokens=draw.choice([1, 5, 40]), temperature=1.0, n=draw.choice([1, 1, 4]), ignore_eos=True
            )
            kind = draw.random()
            try:
                stream = await engine.submit(
                    ids, params, priority=draw.choice([0, 0, 1]), timeout=draw.choice([None, 60, 0.02])
                )
            except PronghornError:
                counts["refused"] += 1
                continue
            if kind < 0.1:
                continue  # it lets go
            async with stream:
                try:
                    async for _ in stream:
                        if kind < 0.3:
                            counts["left"] += 1
                            break
                        if kind < 0.4:
                            engine.cancel(stream.request_id)
                    else:
                        out = stream.output()
                        reasons = {sample.finish_reason for sample in out.samples}
                        assert reasons <= {"length", "timeout"}
                        counts["timeout" if "timeout" in reasons else "whole"] += 1
                except PronghornError as error:
                    counts["cancelled" if "cancelled" in str(error) else "faults"] += 1

    async def main() -> None:
        async with AsyncLLM(llm, max_waiting=20) as engine:
            until = asyncio.get_running_loop().time() + seconds
            clients = [asyncio.create_task(client(engine, until)) for _ in range(80)]
            for _ in range(10):
                await asyncio.sleep(seconds / 10)
                gc.collect()
                sizes.append(resident())
            await asyncio.gather(*clients)
            gc.collect()
            assert await engine.drain()
            stats = engine.stats()
            assert (stats.running, stats.waiting, stats.held_pages) == (0, 0, 0)
            assert not any(llm._engine.pool._holders)  # type: ignore[union-attr]
            assert not engine._streams
            assert not llm._engine._timed  # type: ignore[union-attr]
            print(counts, stats, [size >> 20 for size in sizes])

    asyncio.run(main())
    llm.close()
    assert all(counts[name] for name in ("whole", "left", "cancelled"))
    assert not counts["faults"]
    if SOAK >= 60:
        assert max(sizes[5:]) - max(sizes[:5]) < 4 << 20
