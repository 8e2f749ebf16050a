"""Decoding at a long context against a short one: is the difference the time that its keys and values take to read?

    python bench/context.py [-m MODEL] [--dtype int4] [--kv-dtype f32,bf16,int8] [--context 1000] [--rounds 15]

Two requests, of 20 tokens of context and of many, decode in turns of a few steps each, in one process. `read` is how
fast the same threads read memory of the size that a step reads (weights, keys and values), measured in the same turns.
`explained` is the time that the additional keys and values take at that speed, over the difference of the steps' times:
1.00 where it is all of it. Medians over the rounds, of ratios that are each taken in one round.
"""

from __future__ import annotations

import argparse
import json
import mmap
import statistics
import sys
import time
from functools import partial

import numpy as np

from pronghorn import _native
from pronghorn.bench import machine
from pronghorn.engine.engine import Engine
from pronghorn.engine.sampling import SamplingParams
from pronghorn.engine.scheduler import Request
from pronghorn.errors import PronghornError
from pronghorn.loading import STEP_TOKENS, bytes_read, check_options, kv_bytes, open_model
from pronghorn.machine import usable_processors
from pronghorn.models import model_for
from pronghorn.ops import PAGE
from pronghorn.ops.cpu import CpuRunner
from pronghorn.weights.quantize import prepare
from pronghorn.weights.types import Module

SHORT = 20
STEPS = 4  # in a turn: the context grows little


def measure(model_name: str | None, dtype: str, kv_dtype: str, context: int, rounds: int, threads: int | None) -> dict:
    """One row of the table."""
    checkpoint = open_model(model_name)
    model = model_for(checkpoint.config)
    config = model.config
    steps = STEPS * (rounds + 1)
    if context + steps > config.context:
        raise PronghornError(f"--context {context}: with {steps} steps it is more than the model's {config.context}")
    weights = prepare(checkpoint, model.parameters(), model.resolve(checkpoint.tensors), dtype, threads)
    weight_bytes = bytes_read(model, weights)
    n_pages = sum(-(-(n + steps) // PAGE) + 1 for n in (SHORT, context))
    runner = CpuRunner(
        model, Module.of(weights), n_pages=n_pages, kv_dtype=kv_dtype, max_tokens=STEP_TOKENS, threads=threads
    )
    token_bytes = kv_bytes(config, kv_dtype)
    read = mmap.mmap(-1, weight_bytes + context * token_bytes)
    np.frombuffer(read, np.uint8)[:] = 1

    engines = []
    for _ in (SHORT, context):  # one engine each: a step is one request's
        engine = Engine(
            runner, n_pages=n_pages, context=config.context, vocabulary=config.vocab_size, prefix_cache=False
        )
        engines.append(engine)
    engines[1].pool = engines[1].scheduler.pool = engines[0].pool  # of the same cache
    requests = []
    for engine, n in zip(engines, (SHORT, context), strict=True):
        ids = [(7919 + 104729 * i) % config.vocab_size for i in range(n - 1)]
        requests.append(Request(ids, SamplingParams(max_tokens=None, ignore_eos=True)))
        engine.add(requests[-1])
        while len(requests[-1].token_ids) < n:
            engine.step()

    def step(engine: Engine) -> None:
        for _ in range(STEPS):
            engine.step()

    def timed(run: partial) -> float:
        started = time.perf_counter()
        run()
        return time.perf_counter() - started

    jobs = [
        partial(step, engines[0]),
        partial(_native.read_memory, memoryview(read), runner.pool),
        partial(step, engines[1]),
    ]
    turns = []
    for turn in range(rounds + 1):
        tokens = len(requests[1].token_ids) - len(requests[0].token_ids)
        short, reading, long = (timed(job) for job in jobs)
        if turn:  # the first warms
            turns.append((short / STEPS, long / STEPS, len(read) / reading, tokens * token_bytes))
    median = statistics.median
    return {
        "dtype": dtype,
        "kv_dtype": kv_dtype,
        "context": context,
        "short_tok_s": 1 / median(short for short, *_ in turns),
        "long_tok_s": 1 / median(long for _, long, *_ in turns),
        "difference_s": median(long - short for short, long, *_ in turns),
        "kv_bytes": turns[0][3],
        "read_gb_s": median(speed for *_, speed, _ in turns) / 1e9,
        "explained": median(size / speed / (long - short) for short, long, speed, size in turns),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--kv-dtype", default="f32,bf16,int8")
    parser.add_argument("--context", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    rows = []
    try:
        place = machine(args.threads or usable_processors())
        print(f"{place['processor']}, {place['isa']}, {place['threads']} threads; load before: {place['load']}")
        columns = f"{f'at {SHORT}':>9} {f'at {args.context}':>9} {'ms more':>8} {'MB more':>8} {'read':>6} explained"
        print(f"{'dtype':6} {'KV':5} {columns}")
        for kv_dtype in args.kv_dtype.split(","):
            check_options(args.dtype, threads=args.threads, kv_dtype=kv_dtype)
            row = measure(args.model, args.dtype, kv_dtype, args.context, args.rounds, args.threads)
            rows.append(row)
            print(
                f"{row['dtype']:6} {row['kv_dtype']:5} {row['short_tok_s']:9.1f} {row['long_tok_s']:9.1f} "
                f"{row['difference_s'] * 1e3:8.3f} {row['kv_bytes'] / 1e6:8.1f} {row['read_gb_s']:6.1f} "
                f"{row['explained']:9.2f}"
            )
    except PronghornError as error:
        sys.exit(f"context.py: {error}")
    print(json.dumps({"machine": place, "results": rows}))


if __name__ == "__main__":
    main()
