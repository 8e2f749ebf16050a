"""`pronghorn bench`: how fast a model decodes and reads prompts here, against how fast its weights can be read at all.

The ceiling is a plain read of the very memory that the weights lie in, by the same threads, in the same process. As a
machine's speed drifts, it is measured before and after every timing, and a share is taken of the mean of the two.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from pronghorn import __version__, _native
from pronghorn.engine.engine import Engine
from pronghorn.engine.sampling import SamplingParams
from pronghorn.engine.scheduler import Request
from pronghorn.errors import CheckpointError, ParameterError, PronghornError
from pronghorn.loading import STEP_TOKENS, check_options, kv_bytes, kv_dtype_for, open_model, weights_read
from pronghorn.machine import free_memory, usable_processors
from pronghorn.models import Model, model_for
from pronghorn.ops import PAGE
from pronghorn.ops.cpu import CpuRunner
from pronghorn.weights import Checkpoint
from pronghorn.weights.quantize import describe, prepare
from pronghorn.weights.types import Module

DTYPES = ("f32", "bf16", "int8", "int4")
PROMPT, LONG_PROMPT = 19, 512
STREAMS = (1, 8, 32)
STEPS = {1: 100, 8: 20, 32: 20}  # decoded by each of so many streams in a round
SLICE = 10  # steps between two readings of the ceiling
PASSES = 3  # over the weights, for one reading
GAP = 1 << 16  # bytes between weights, padding or small tables, that a reading does not leave out
REGION = 1 << 20  # bytes below which starting the threads would be part of what is measured


class Sample(NamedTuple):
    """One timing: `rows` tokens a step, in `steps` steps of `bytes` each (weights, keys and values)."""

    rows: int
    steps: int
    bytes: float
    seconds: float
    ceiling: float  # bytes a second, read just before and after


class Subject:
    """A model in one dtype, ready to be measured: the engine, and the memory that its decoding reads."""

    def __init__(self, checkpoint: Checkpoint, model: Model, dtype: str, threads: int | None) -> None:
        self.model, self.dtype = model, dtype
        config, parameters = model.config, model.parameters()
        weights = prepare(checkpoint, parameters, model.resolve(checkpoint.tensors), dtype, threads)
        self.kv_dtype = kv_dtype_for(weights)
        self.token_bytes = kv_bytes(config, self.kv_dtype)
        self.read = weights_read(model, weights)
        self.weight_bytes = sum(weight.data.nbytes for weight in self.read.values())
        n_pages = max(-(-LONG_PROMPT // PAGE) + 1, *(n * pages_of(PROMPT + STEPS[n]) for n in STREAMS))
        try:
            self.runner = CpuRunner(
                model, Module.of(weights), n_pages=n_pages, kv_dtype=self.kv_dtype, max_tokens=STEP_TOKENS,
                threads=threads,
            )  # fmt: skip
        except MemoryError:
            size = n_pages * PAGE * self.token_bytes
            raise PronghornError(f"the memory has no room for {size} bytes of keys and values") from None
        except RuntimeError as error:  # PRONGHORN_ISA asks for what the machine has not
            raise PronghornError(str(error).partition("\n")[0]) from None
        self.engine = Engine(
            self.runner, n_pages=n_pages, context=config.context, vocabulary=config.vocab_size, max_tokens=STEP_TOKENS,
            prefix_cache=False,
        )  # fmt: skip
        self.regions = regions(weight.data for weight in self.read.values())

    def ceiling(self) -> float:
        """Bytes a second that all threads read of the weights' memory."""
        started = time.perf_counter()
        for _ in range(PASSES):
            for region in self.regions:
                _native.read_memory(region, self.runner.pool)
        return PASSES * sum(region.nbytes for region in self.regions) / (time.perf_counter() - started)

    def request(self, n_prompt: int, max_tokens: int | None, seed: int = 0) -> Request:
        """A prompt of such a length, shorter where the context is: token ids that look like a text's, all their own."""
        n_prompt = max(1, min(n_prompt, self.engine.context - 1))
        vocabulary = self.model.config.vocab_size
        ids = [(7919 * (seed + 1) + 104729 * i) % vocabulary for i in range(n_prompt)]
        return Request(ids, SamplingParams(max_tokens=max_tokens, ignore_eos=True))

    def decode(self, streams: int, n_steps: int) -> Iterator[Sample]:
        """Streams that decode together, their prompts done: a sample for every few steps."""
        requests = [self.request(PROMPT, None, seed) for seed in range(streams)]
        try:
            for request in requests:
                self.engine.add(request)
            while any(len(request.token_ids) == request.n_prompt for request in requests):
                self.engine.step()
            longest = max(len(request.token_ids) for request in requests)
            n_steps = min(n_steps, self.engine.context - longest)  # short contexts give shorter runs, or none
            for size in [SLICE] * (n_steps // SLICE) or [n_steps] * (n_steps > 0):
                tokens = sum(len(request.token_ids) for request in requests) + streams * (size - 1) / 2
                yield self.timed(partial(self.steps, size), streams, size, self.token_bytes * tokens)
        finally:
            for request in requests:
                self.engine.finish(request, "cancelled")

    def steps(self, count: int) -> None:
        """So many steps of the engine."""
        for _ in range(count):
            self.engine.step()

    def prompt(self, n_prompt: int) -> Sample:
        """A prompt in a warm engine, from the request to its first token."""
        rows = min(n_prompt, self.engine.context - 1)

        def run() -> None:
            request = self.request(rows, 1)
            self.engine.add(request)
            while not request.finish_reason:
                self.engine.step()

        return self.timed(run, rows, 1, self.token_bytes * rows)

    def timed(self, run: Callable[[], None], rows: int, steps: int, kv_bytes: float) -> Sample:
        """A timing between two readings of the ceiling."""
        before = self.ceiling()
        started = time.perf_counter()
        run()
        seconds = time.perf_counter() - started
        return Sample(rows, steps, self.weight_bytes + kv_bytes, seconds, (before + self.ceiling()) / 2)


def pages_of(n_tokens: int) -> int:
    """Pages of a sequence, with room for the steps in which the prompts of other streams were still running."""
    return -(-(n_tokens + 4) // PAGE)


def regions(views: Iterable[memoryview]) -> list[memoryview]:
    """The memory that the views lie in, as few large stretches; or written memory of the same size, where it is
    in many small pieces. (Memory that was never written would be one page of zeros in the cache, read at any speed.)
    """
    import mmap

    import numpy as np

    pieces: dict[int, list[tuple[int, int]]] = {}  # by the object that owns the memory: [begin, end) in it
    owners: dict[int, memoryview] = {}
    total = 0
    for view in views:
        owner = owners.setdefault(id(view.obj), memoryview(view.obj).cast("B"))
        begin = address(view) - address(owner)
        pieces.setdefault(id(view.obj), []).append((begin, begin + view.nbytes))
        total += view.nbytes
    found: list[memoryview] = []
    for key, spans in pieces.items():
        merged: list[tuple[int, int]] = []
        for begin, end in sorted(spans):
            if merged and begin - merged[-1][1] <= GAP:
                merged[-1] = merged[-1][0], max(end, merged[-1][1])
            else:
                merged.append((begin, end))
        found += [owners[key][begin:end] for begin, end in merged if end - begin >= REGION]
    if sum(region.nbytes for region in found) >= 0.9 * total:
        return found
    written = mmap.mmap(-1, max(total, REGION))
    np.frombuffer(written, np.uint8)[:] = 1
    return [memoryview(written)]


def address(view: memoryview) -> int:
    """Where a view's memory begins."""
    import numpy as np

    return int(np.frombuffer(view, np.uint8).__array_interface__["data"][0])


class Spread(NamedTuple):
    """What several samples say."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        values = list(values)
        found = statistics.median(values), min(values), max(values)
        return cls(*(float(f"{value:.5g}") for value in found))


def measure(subject: Subject, rounds: int) -> list[dict[str, Any]]:
    """All that is measured of one dtype, in rows of the table."""
    samples: dict[tuple[str, int], list[Sample]] = {("decode", n): [] for n in STREAMS}
    samples |= {("prompt", LONG_PROMPT): [], ("prompt", PROMPT): []}
    subject.prompt(LONG_PROMPT)  # touches all pages and buffers once
    for _ in range(rounds):
        for (kind, size), found in samples.items():
            if kind == "decode":
                found += subject.decode(size, STEPS[size])
            else:
                found += [subject.prompt(size) for _ in range(1 if size == LONG_PROMPT else 5)]
    return [summary(subject, kind, size, found) for (kind, size), found in samples.items() if found]


def summary(subject: Subject, kind: str, size: int, samples: Sequence[Sample]) -> dict[str, Any]:
    """One row: what was measured, its speed, the bytes of a step and their share of the ceiling."""
    step_bytes = statistics.mean(sample.bytes for sample in samples)
    rows = samples[0].rows
    row: dict[str, Any] = {
        "dtype": subject.dtype,
        "kind": kind,
        "streams" if kind == "decode" else "tokens": size if kind == "decode" else rows,
        "samples": len(samples),
        "tok_s": Spread.of(s.rows * s.steps / s.seconds for s in samples)._asdict(),
    }
    if kind == "prompt":
        row["ttft_s"] = Spread.of(s.seconds for s in samples)._asdict()
    operations = operations_of(subject, rows, rows if kind == "decode" else 1)
    return row | {
        "bytes_per_step": round(step_bytes),
        "operations_per_step": operations,
        "gb_s": Spread.of(s.bytes * s.steps / s.seconds / 1e9 for s in samples)._asdict(),
        "ceiling_gb_s": Spread.of(s.ceiling / 1e9 for s in samples)._asdict(),
        "share": Spread.of(s.bytes * s.steps / s.seconds / s.ceiling for s in samples)._asdict(),
    }


def operations_of(subject: Subject, rows: int, logits_rows: int) -> int:
    """Multiplications and additions of the matrix products of a step; attention's and all else are not counted."""
    head = subject.model.EMBEDDING if subject.model.config.tied else "lm_head.weight"
    parameters = subject.model.parameters()
    matrices = {name: w for name, w in subject.read.items() if parameters[name].kind == "matrix"}
    return sum(2 * w.n_out * w.n_in * (logits_rows if name == head else rows) for name, w in matrices.items())


def default_dtypes(checkpoint: Checkpoint, model: Model) -> list[str]:
    """Those worth measuring: none that is wider than a file of 16 bits, and none that the memory does not hold."""
    parameters, tensors = model.parameters(), model.resolve(checkpoint.tensors)
    matrices = [tensors[name].dtype for name, parameter in parameters.items() if parameter.kind == "matrix"]
    chosen = [dtype for dtype in DTYPES if dtype != "f32" or not {*matrices} <= {"f16", "bf16"}]
    room = 0.8 * free_memory()
    fitting = [
        dtype
        for dtype in chosen
        if sum(size for *_, size in describe(parameters, tensors, dtype).values()) < room
    ]  # fmt: skip
    if missing := [dtype for dtype in chosen if dtype not in fitting]:
        print(f"pronghorn: left out, as the memory has no room: {', '.join(missing)}", file=sys.stderr)
    if not fitting:
        raise PronghornError("the memory has no room for this model in any dtype")
    return fitting


def names_of(text: str) -> list[str]:
    """A list on the command line, such as "f32,int8"."""
    return list(dict.fromkeys(part.strip() for part in text.split(",")))


def dtypes_of(text: str) -> list[str]:
    """The same, each checked."""
    names = names_of(text)
    for name in names:
        check_options(name)
    return names


def machine(threads: int) -> dict[str, Any]:
    """What it was measured on."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass  # another system, or aarch64
    load = round(os.getloadavg()[0], 2)  # of the last minute: others' work takes from ours
    python = platform.python_version()
    return {"processor": name, "isa": _native.isa(), "threads": threads, "python": python, "load": load}


def bench(
    model: str | Path | None = None, dtypes: Sequence[str] = (), threads: int | None = None, rounds: int = 3
) -> dict[str, Any]:
    """Measures a model -> what `pronghorn bench --json` prints.

    Speeds are tokens a second, of all streams together. `share` is bytes_per_step (weights, and keys and values read)
    times steps a second, over the ceiling; medians, and the smallest and the largest sample.
    """
    check_options("auto", threads=threads)
    if rounds < 1:
        raise ParameterError(f"rounds is {rounds}: expected at least 1")
    checkpoint = open_model(model)
    described = model_for(checkpoint.config)
    if described.config.context < 4:
        raise CheckpointError(f"{checkpoint.path}: a context of {described.config.context} is too short to measure")
    results: list[dict[str, Any]] = []
    place = machine(threads or usable_processors())
    for dtype in dtypes or default_dtypes(checkpoint, described):
        subject = Subject(checkpoint, described, dtype, threads)
        rows = measure(subject, rounds)
        results += [{"kv_dtype": subject.kv_dtype, "weight_bytes": subject.weight_bytes, **row} for row in rows]
        del subject  # before the next one: there was room for each, and not for two
    return {
        "pronghorn": __version__,
        "model": str(checkpoint.path),
        "machine": place,
        "prompt_tokens": min(PROMPT, described.config.context - 1),
        "results": results,
    }


def table(found: Mapping[str, Any]) -> Iterator[str]:
    """The lines of the table."""
    place = found["machine"]
    kind = f"{place['processor']}, {place['isa']}, {place['threads']} threads"
    yield f"{Path(found['model']).name} on {kind}; load before: {place['load']}"
    yield f"{'dtype':6} {'what':16} {'tokens/s (min-max)':>24} {'GB/s':>7} {'ceiling':>8}    share (min-max)"
    for row in found["results"]:
        speed, share = (Spread(**row[name]) for name in ("tok_s", "share"))
        if row["kind"] == "decode":
            what = "decode" if row["streams"] == 1 else f"{row['streams']} streams"
            rest = f"{row['gb_s']['median']:7.1f} {row['ceiling_gb_s']['median']:8.1f}"
            rest += f"    {share.median:.2f} ({share.min:.2f}-{share.max:.2f})"
        else:
            what = f"prompt of {row['tokens']}"
            first = Spread(*(1000 * row["ttft_s"][name] for name in Spread._fields))
            rest = f"  first token after {first.median:.1f} ms ({first.min:.1f}-{first.max:.1f})"
        span = "{} ({}-{})".format(*(f"{x:.1f}" if x < 1000 else f"{x:.0f}" for x in speed))
        yield f"{row['dtype']:6} {what:16} {span:>24} {rest}"


def figure_for(path: str) -> Any:
    """An empty picture for this file. PronghornError where it could not be drawn, or written in this format."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        lacking = "--plot needs matplotlib, which the extra `bench` brings: pip install 'pronghorn[bench]'"
        raise PronghornError(lacking) from None
    figure = Figure(figsize=(8, 5), layout="constrained")
    known = figure.canvas.get_supported_filetypes()
    if Path(path).suffix.lower()[1:] not in known:
        raise ParameterError(f"--plot {path}: expected a name that ends in one of {', '.join(sorted(known))}")
    if not Path(path).absolute().parent.is_dir():
        raise ParameterError(f"--plot {path}: there is no such folder")
    return figure


def draw(figure: Any, found: Mapping[str, Any]) -> None:
    """Rooflines (Williams et al. 2009), one for each dtype: operations a second over operations a byte.

    The slope is the ceiling of that dtype's memory, as measured; it is drawn up to the most that was reached, as the
    arithmetic's own limit is not measured.
    """
    by_dtype: dict[str, list[dict[str, Any]]] = {}
    for row in found["results"]:
        by_dtype.setdefault(row["dtype"], []).append(row)
    n_columns = min(2, len(by_dtype))
    n_rows = -(-len(by_dtype) // n_columns)
    figure.set_size_inches(4.5 * n_columns, 3.2 * n_rows + 0.7)
    figure.set_facecolor("white")
    panels = figure.subplots(n_rows, n_columns, sharex=True, sharey=True, squeeze=False)
    lows: list[float] = []
    highs: list[float] = []
    where = "{processor} ({isa}, {threads} threads)".format(**found["machine"])
    figure.suptitle(f"{Path(found['model']).name} on {where}", fontsize=11)
    for axes in panels.flat[len(by_dtype) :]:
        axes.set_visible(False)
    for axes, (dtype, rows) in zip(panels.flat, by_dtype.items(), strict=False):
        ceiling = statistics.median(row["ceiling_gb_s"]["median"] for row in rows)
        points = [(row, row["operations_per_step"] / row["bytes_per_step"]) for row in rows]
        reached = {id(row): row["gb_s"]["median"] * x for row, x in points}
        most = max(reached.values())
        corner = most / ceiling
        ends = [min(x for _, x in points) / 2.5, corner, 1.6 * max(corner, *(x for _, x in points))]
        axes.plot(ends[1:], [most, most], color="#8c959f", linewidth=1, linestyle=":")
        axes.plot(ends[:2], [ceiling * x for x in ends[:2]], color="#57606a", linewidth=1.5)
        for kind, color, marker, label in (
            ("decode", "#0969da", "o", "decoding: number of streams"),
            ("prompt", "#bc4c00", "s", "prompt: number of tokens"),
        ):
            some = [(row, x) for row, x in points if row["kind"] == kind]
            axes.plot([x for _, x in some], [reached[id(row)] for row, _ in some], marker, color=color, label=label)
            for row, x in some:
                size = row["streams" if kind == "decode" else "tokens"]
                name = f"1 ({100 * row['share']['median']:.0f} % of the line)" if size == 1 else str(size)
                place = {"xytext": (5, -12), "textcoords": "offset points"}  # to the right, below: lines are above
                axes.annotate(name, (x, reached[id(row)]), **place, fontsize=9, color=color)
        axes.set(xscale="log", yscale="log")
        axes.fill_between(ends, [ceiling * ends[0], most, most], 1e-9, color="#f6f8fa", linewidth=0)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter("")
        lows.append(ceiling * ends[0])
        highs.append(most)
        axes.set_title(f"{dtype}: the memory gives {ceiling:.1f} GB/s", fontsize=10)
        axes.grid(visible=True, linewidth=0.4, color="#d0d7de")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    panels.flat[0].set_ylim(0.6 * min(lows), 2.5 * max(highs))  # all panels share it
    panels.flat[0].legend(fontsize=8, loc="upper left", frameon=False)
    for axes in panels[:, 0]:
        axes.set_ylabel("10⁹ operations a second", fontsize=9)
    for axes in panels[-1]:
        axes.set_xlabel("operations a byte that is read", fontsize=9)


def run(args: argparse.Namespace) -> None:
    """`pronghorn bench`."""
    dtypes = dtypes_of(args.dtype) if args.dtype else []
    figure = figure_for(args.plot) if args.plot else None
    found = bench(args.model, dtypes, args.threads, args.rounds)
    for line in table(found):
        print(line)
    if figure:
        draw(figure, found)
        figure.savefig(args.plot)
    if args.json:
        print(json.dumps(found, ensure_ascii=False))
