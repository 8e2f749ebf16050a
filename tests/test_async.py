"""AsyncLLM: streams of many event loops, of one engine thread."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pronghorn import (
    LLM,
    AsyncLLM,
    ParameterError,
    PromptError,
    PronghornError,
    QueueFull,
    SamplingParams,
    ShuttingDown,
)
from tiny import save_tiny

FOREVER = SamplingParams(max_tokens=None, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    with LLM(save_tiny(tmp_path_factory.mktemp("tiny") / "model"), threads=1) as llm:
        yield llm


def some_params(n: int) -> list[SamplingParams]:
    return [SamplingParams(max_tokens=5 + 3 * i, temperature=1.0, seed=i, logprobs=0, n=1 + i % 2) for i in range(n)]


async def read(engine: AsyncLLM, params: SamplingParams) -> list[list[int]]:
    """The token ids of a stream's samples."""
    ids: list[list[int]] = [[] for _ in range(params.n)]
    async with await engine.submit("hello", params) as stream:
        async for chunk in stream:
            ids[chunk.sample] += chunk.token_ids
        assert [out.token_ids for out in stream.output().samples] == ids
    return ids


def all_free(llm: LLM) -> bool:
    stats = llm.stats()
    return (stats.running, stats.waiting, stats.held_pages) == (0, 0, 0)


def test_streams_are_what_generate_gives(llm: LLM) -> None:
    """From two event loops, and from threads that call the LLM itself, all at once."""
    every = some_params(20)
    alone = [[out.token_ids for out in llm.generate("hello", params).samples] for params in every]
    engine = AsyncLLM(llm)
    results: dict[str, Any] = {}

    async def both() -> Any:
        streams = await asyncio.gather(*(read(engine, params) for params in every))
        outs = await asyncio.gather(*(engine.generate("hello", params) for params in every))
        return streams, [[out.token_ids for out in whole.samples] for whole in outs]

    def own_loop(name: str) -> None:
        results[name] = asyncio.run(both())

    def beside(name: str) -> None:
        outs = llm.generate(["hello"] * len(every), every)
        results[name] = [[out.token_ids for out in whole.samples] for whole in outs]

    jobs = [(own_loop, "a"), (own_loop, "b"), (beside, "c"), (beside, "d")]
    threads = [threading.Thread(target=target, args=(name,)) for target, name in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    engine.close()
    engine.close()
    assert results["a"] == results["b"] == (alone, alone)
    assert results["c"] == results["d"] == alone
    assert all_free(llm)
    assert llm.generate("hello", every[0]).token_ids == alone[0][0]  # the LLM takes its own steps again


def test_streams_are_read_along_and_wholes_are_not(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is how prompts of others are held back (see the scheduler), so each way to ask has to say it."""
    assert llm._engine
    seen: list[bool] = []
    add = llm._engine.add
    monkeypatch.setattr(llm._engine, "add", lambda request: (seen.append(request.streamed), add(request)))
    params = SamplingParams(max_tokens=2, n=2)

    async def ask() -> None:
        async with AsyncLLM(llm) as engine:
            await read(engine, params)
            await engine.generate("hello", params)

    llm.generate(["hello", "you"], params)
    list(llm.stream("hello", params))
    asyncio.run(ask())
    assert seen == [False] * 4 + [True] * 2 + [True] * 2 + [False] * 2


def test_closing_and_letting_go_end_a_request(llm: LLM) -> None:
    async def main() -> None:
        async with AsyncLLM(llm) as engine:
            closed = await engine.submit("a", FOREVER)
            first = await anext(closed)
            await closed.aclose()
            assert [chunk async for chunk in closed] == []
            assert closed.output().finish_reason == "cancelled"
            assert closed.output().token_ids[: len(first.token_ids)] == first.token_ids
            dropped = await engine.submit("a", FOREVER)
            await anext(dropped)
            del dropped
            gc.collect()
            task = asyncio.create_task(engine.generate("a", FOREVER))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await engine.drain(30)
            assert all_free(llm)

    asyncio.run(main())


def test_cancel_by_name(llm: LLM) -> None:
    async def main() -> None:
        async with AsyncLLM(llm) as engine:
            stream = await engine.submit("a", FOREVER, request_id="x")
            assert stream.request_id == "x"
            await anext(stream)
            with pytest.raises(ParameterError, match="request_id is 'x'"):
                await engine.submit("a", FOREVER, request_id="x")
            assert engine.cancel("x")
            with pytest.raises(PronghornError, match="cancelled"):
                async for _ in stream:
                    pass
            assert not engine.cancel("x")
            assert not engine.cancel("y")
            assert await engine.drain(30)
            assert all_free(llm)

    asyncio.run(main())


def test_errors_at_the_door(llm: LLM) -> None:
    async def main() -> None:
        async with AsyncLLM(llm) as engine:
            for prompt, options, kind in (
                ([999], {}, PromptError),
                ("a" * 5000, {}, PromptError),
                ("a", {"params": 5}, ParameterError),
                ("a", {"timeout": 0}, ParameterError),
                ("a", {"timeout": "1"}, ParameterError),
                ("a", {"priority": 1.5}, ParameterError),
                ("a", {"params": SamplingParams(best_of=2)}, ParameterError),
            ):
                with pytest.raises(kind):
                    await engine.submit(prompt, **options)  # type: ignore[arg-type]
            assert (await engine.generate("a", SamplingParams(best_of=3, max_tokens=2))).text is not None
            with pytest.raises(PronghornError, match="AsyncLLM already"):
                AsyncLLM(llm)

    asyncio.run(main())
    for bad in (5, "model"):
        with pytest.raises(ParameterError, match="llm is"):
            AsyncLLM(bad)  # type: ignore[arg-type]


def test_a_full_queue_refuses(llm: LLM) -> None:
    async def main() -> None:
        async with AsyncLLM(llm, max_waiting=2) as engine:
            with llm._lock:  # a step that takes long: nobody waits for it
                streams = [await engine.submit("a", FOREVER) for _ in range(engine.max_sequences + 2)]
                with pytest.raises(QueueFull, match="at most 66 may"):
                    await engine.submit("a")
                with pytest.raises(QueueFull):
                    await engine.generate("a", SamplingParams(n=2))
                await streams[0].aclose()  # whose place is free at once, though the step goes on
                streams.append(await engine.submit("a", FOREVER))
                with pytest.raises(QueueFull, match="66 samples"):
                    await engine.submit("a")
            for stream in streams:
                await stream.aclose()
            assert len((await engine.generate("a", SamplingParams(max_tokens=3, ignore_eos=True))).token_ids) == 3

    asyncio.run(main())


def test_timeouts(llm: LLM) -> None:
    async def main() -> None:
        async with AsyncLLM(llm) as engine:
            out = await engine.generate("a", FOREVER, timeout=1e-9)
            assert (out.finish_reason, out.token_ids) == ("timeout", [])

    asyncio.run(main())
    assert llm.generate("a", FOREVER, timeout=1e-9).finish_reason == "timeout"
    chunks = list(llm.stream("a", FOREVER, timeout=1e-9))
    assert [chunk.finish_reason for chunk in chunks] == ["timeout"]


def test_a_fault_of_a_step_ends_what_ran_and_no_more(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    engine_ = llm._engine
    assert engine_
    original = engine_.runner.run
    faults = [RuntimeError("a fault\nof two lines")]

    def run(batch: Any) -> memoryview:
        if faults:
            raise faults.pop()
        return original(batch)

    monkeypatch.setattr(engine_.runner, "run", run)

    async def main() -> None:
        async with AsyncLLM(llm) as engine:
            stream = await engine.submit("a", FOREVER)
            with pytest.raises(PronghornError, match="RuntimeError: a fault of two lines"):
                async for _ in stream:
                    pass
            assert len((await engine.generate("a", SamplingParams(max_tokens=4, ignore_eos=True))).token_ids) == 4
            assert await engine.drain(30)
            assert all_free(llm)

    asyncio.run(main())


def test_whoever_waits_for_pages_that_a_reader_holds_does_not_spin(llm: LLM) -> None:
    assert llm._engine
    pool = llm._engine.pool
    held = pool.take(pool.n_free)
    assert held
    llm._n_reading += 1  # as in the middle of `logits`

    async def main() -> None:
        async with AsyncLLM(llm) as engine:
            stream = await engine.submit("hello", SamplingParams(max_tokens=3, ignore_eos=True))
            before, started = engine._n_rounds, time.perf_counter()
            await asyncio.sleep(0.3)
            n_rounds, seconds = engine._n_rounds - before, time.perf_counter() - started
            pool.release(held)
            llm._n_reading -= 1
            assert 1 <= n_rounds <= 2 + seconds / 0.001
            assert sum([len(chunk.token_ids) async for chunk in stream]) == 3

    asyncio.run(main())
    assert all_free(llm)


def test_the_switch_interval_is_shorter_while_it_is_open(llm: LLM) -> None:
    before = sys.getswitchinterval()
    for given, during in ((0.002, 0.002), (1.0, before), (None, before)):
        engine = AsyncLLM(llm, switch_interval=given)
        assert sys.getswitchinterval() == pytest.approx(during)
        engine.close()
        assert sys.getswitchinterval() == before
    with pytest.raises(ParameterError, match="switch_interval is 0"):
        AsyncLLM(llm, switch_interval=0)


def test_draining_and_closing(llm: LLM) -> None:
    async def main() -> None:
        engine = AsyncLLM(llm)
        stream = await engine.submit("a", SamplingParams(max_tokens=200, ignore_eos=True))
        assert await engine.drain()
        with pytest.raises(ShuttingDown):
            await engine.submit("a")
        assert sum([len(chunk.token_ids) async for chunk in stream]) == 200
        engine.close()
        engine = AsyncLLM(llm)
        # (More than run at once, so that the last is not done yet, however late this thread has its turn.)
        streams = [await engine.submit("a", FOREVER) for _ in range(engine.max_sequences + 2)]
        await anext(streams[0])
        engine.close()
        with pytest.raises(PronghornError, match="cancelled"):
            async for _ in streams[-1]:
                pass
        assert all_free(llm)

    asyncio.run(main())


def test_closing_the_llm_closes_it(tmp_path: Path) -> None:
    async def main() -> None:
        llm = LLM(save_tiny(tmp_path / "model"))
        engine = AsyncLLM(llm)
        stream = await engine.submit("a", FOREVER)
        await anext(stream)
        await asyncio.to_thread(llm.close)
        with pytest.raises(PronghornError):
            async for _ in stream:
                pass
        with pytest.raises(ShuttingDown):
            await engine.submit("a")

    asyncio.run(main())


def test_the_interpreter_ends_while_it_runs(tmp_path: Path) -> None:
    """And while its event loop is gone."""
    code = """if True:
        import asyncio, sys
        from pronghorn import LLM, AsyncLLM, SamplingParams
        engine = AsyncLLM(LLM(sys.argv[1], threads=2))
        async def main():
            stream = await engine.submit("a", SamplingParams(max_tokens=None, ignore_eos=True))
            await anext(stream)
            return stream
        stream = asyncio.run(main())
    """
    model = save_tiny(tmp_path / "model", max_position_embeddings=100_000)
    done = subprocess.run([sys.executable, "-c", code, model], capture_output=True, text=True, timeout=60,
                          env={**__import__("os").environ, "PYTHONPATH": ":".join(filter(None, sys.path))})  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
