"""What a stream notices of company: busy Python threads, prompts of others, and the engine's own Python.

    python bench/company.py busy [-m MODEL] [--dtype D]     inter-token latency beside 16 busy Python threads
    python bench/company.py prompts                         the same while prompts of 400 tokens come in
    python bench/company.py share --streams 32              Python's part of a step
    python bench/company.py masks --streams 8               what it costs to hold streams to a JSON schema

`busy` measures where the tokens are read, in turns: nothing beside; busy threads beside the engine's thread, for
several of the interpreter's switch intervals; and busy threads beside a process of the engine's own.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

from pronghorn import LLM, AsyncLLM, SamplingParams

PROMPT = [1, 2, 3, 4, 5, 6, 7, 8]


def spans(times: list[float]) -> str:
    """Milliseconds between tokens: the median, and the tail."""
    gaps = sorted(1000 * (b - a) for a, b in pairwise(times))
    at = {p: gaps[min(len(gaps) - 1, int(p * len(gaps)))] for p in (0.5, 0.9, 0.99)}
    return f"p50 {at[0.5]:7.2f}  p90 {at[0.9]:7.2f}  p99 {at[0.99]:7.2f}  max {gaps[-1]:7.2f} ms  ({len(gaps)} gaps)"


@contextmanager
def busy(n_threads: int) -> Iterator[None]:
    """So many threads that run Python and nothing else."""
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            sum(range(1000))

    threads = [threading.Thread(target=work) for _ in range(n_threads)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


async def read(engine: AsyncLLM, n_tokens: int, prompt: list[int] = PROMPT) -> list[float]:
    """When the tokens of a stream came."""
    times = []
    async with await engine.submit(prompt, SamplingParams(max_tokens=n_tokens, ignore_eos=True)) as stream:
        async for chunk in stream:
            times += [time.perf_counter()] * len(chunk.token_ids)
    return times


def child(args: argparse.Namespace, pipe: Any) -> None:
    """An engine in a process of its own, which sends each token."""
    with LLM(args.model, dtype=args.dtype) as llm:
        pipe.send("ready")
        while n_tokens := pipe.recv():
            for chunk in llm.stream(PROMPT, SamplingParams(max_tokens=n_tokens, ignore_eos=True)):
                pipe.send((chunk.text, chunk.token_ids))
            pipe.send(None)


def beside_threads(args: argparse.Namespace) -> None:
    """`busy`."""
    default = sys.getswitchinterval()
    with LLM(args.model, dtype=args.dtype) as llm:

        async def measure() -> None:
            async with AsyncLLM(llm, switch_interval=None) as engine:
                await read(engine, 50)
                for _ in range(args.rounds):
                    print(f"nothing beside           {spans(await read(engine, args.tokens))}", flush=True)
                    for n_threads, interval in ((1, default), (16, default), (16, 0.001), (16, 0.0001)):
                        sys.setswitchinterval(interval)
                        with busy(n_threads):
                            times = await read(engine, args.tokens)
                        sys.setswitchinterval(default)
                        print(f"{n_threads:2} threads, switch {1000 * interval:3} ms {spans(times)}", flush=True)

        asyncio.run(measure())
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=child, args=(args, there))
    process.start()
    here.recv()
    for n_threads in (0, 16):
        with busy(n_threads):
            here.send(args.tokens)
            times = []
            while (message := here.recv()) is not None:
                times += [time.perf_counter()] * len(message[1])
        print(f"own process, {n_threads:2} threads  {spans(times)}", flush=True)
    here.send(0)
    process.join()


def beside_prompts(args: argparse.Namespace) -> None:
    """`prompts`: two readers, and prompts that come one after the other."""
    with LLM(args.model, dtype=args.dtype) as llm:

        async def others(engine: AsyncLLM, readers: asyncio.Task[Any]) -> int:
            n_prompts = 0
            while not readers.done():
                ids = [(7919 * n_prompts + 104729 * i) % 256 for i in range(400)]
                await engine.generate(ids, SamplingParams(max_tokens=1))
                n_prompts += 1
            return n_prompts

        async def measure() -> None:
            async with AsyncLLM(llm) as engine:
                await others(engine, asyncio.ensure_future(read(engine, 30)))
                for _ in range(args.rounds):
                    alone = asyncio.gather(*(read(engine, args.tokens, [i]) for i in range(2)))
                    print(f"two readers              {spans((await alone)[0])}", flush=True)
                    readers = asyncio.ensure_future(asyncio.gather(*(read(engine, args.tokens, [i]) for i in range(2))))
                    n_prompts = await others(engine, readers)  # type: ignore[arg-type]
                    print(f"and {n_prompts:3} prompts          {spans(readers.result()[0])}", flush=True)

        asyncio.run(measure())


def python_share(args: argparse.Namespace) -> None:
    """`share`: of the time of a step, what is spent neither in the native program nor in choosing tokens."""
    with LLM(args.model, dtype=args.dtype) as llm:
        engine = llm._engine
        assert engine
        spent = {"run": 0.0, "choose": 0.0}

        def timed(name: str) -> Callable[..., Any]:
            original = getattr(engine.runner, name)

            def call(*values: Any) -> Any:
                started = time.perf_counter()
                result = original(*values)
                spent[name] += time.perf_counter() - started
                return result

            return call

        for name in spent:
            setattr(engine.runner, name, timed(name))
        for sampled in (False, True):
            params = SamplingParams(
                max_tokens=None, ignore_eos=True, temperature=0.8 if sampled else 0.0, top_p=0.95, seed=1
            )
            jobs = [llm.job([i, *PROMPT], params) for i in range(args.streams)]
            for job in jobs:
                llm.submit(job)
            while not all(len(job.requests[0].token_ids) > 10 for job in jobs):
                llm.take_step()
            shares, choices, speeds = [], [], []
            for _ in range(args.rounds):
                spent.update(run=0.0, choose=0.0)
                started = time.perf_counter()
                for _ in range(20):
                    llm.take_step()
                    for job in jobs:
                        job.advance()
                seconds = time.perf_counter() - started
                shares.append(1 - sum(spent.values()) / seconds)
                choices.append(spent["choose"] / seconds)
                speeds.append(20 * args.streams / seconds)
            for job in jobs:
                llm.cancel(job)
            llm.take_step()
            print(
                f"{args.streams} streams, {'sampled' if sampled else 'greedy'}: "
                f"{statistics.median(speeds):.0f} tokens/s, "
                f"Python {100 * statistics.median(shares):.1f} % of a step "
                f"({100 * min(shares):.1f}-{100 * max(shares):.1f}), choosing {100 * statistics.median(choices):.1f} %",
                flush=True,
            )


def masked(args: argparse.Namespace) -> None:
    """`masks`: free streams, then held to a schema, the masks computed before the model runs, and meanwhile."""
    schema = {
        "type": "array",
        "minItems": 1000,
        "items": {"type": "object", "properties": {"name": {"type": "string"}}},
    }
    with LLM(args.model, dtype=args.dtype) as llm:
        engine = llm._engine
        assert engine
        meanwhile = engine._masks

        def before(work: Any) -> Any:
            found = meanwhile(work)()
            return lambda: found

        def speed(json_schema: Any) -> float:
            params = SamplingParams(
                max_tokens=args.tokens, temperature=0.8, seed=1, json_schema=json_schema, ignore_eos=json_schema is None
            )
            jobs = [llm.job([i, *PROMPT], params) for i in range(args.streams)]
            for job in jobs:
                llm.submit(job)
            started = 0.0
            while not all(job.finished for job in jobs):
                llm.take_step()
                for job in jobs:
                    job.advance()
                started = started or time.perf_counter()  # each has its first token
            n_tokens = sum(len(job.requests[0].token_ids) - job.requests[0].n_prompt - 1 for job in jobs)
            return n_tokens / (time.perf_counter() - started)

        speed(schema)
        for _ in range(args.rounds):
            free = speed(None)
            engine._masks = before  # type: ignore[method-assign]
            first = speed(schema)
            engine._masks = meanwhile  # type: ignore[method-assign]
            print(
                f"{args.streams} streams: free {free:.0f} tokens/s; in JSON, masks first {first:.0f}, "
                f"meanwhile {speed(schema):.0f}",
                flush=True,
            )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["busy", "prompts", "share", "masks"])
    parser.add_argument("-m", "--model", help="(default: SmolLM2-135M-Instruct)")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    {"busy": beside_threads, "prompts": beside_prompts, "share": python_share, "masks": masked}[args.what](args)


if __name__ == "__main__":
    main()
