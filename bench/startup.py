"""From process start to the first token and to 20, with peak memory, and where the time goes.

    python bench/startup.py [-m MODEL] [--dtype f32,int8] [--rounds 7] [--prompt TEXT] [--beside COMMAND]

Two kinds of runs alternate, each in a fresh process, the page cache warm, byte code compiled, weights packed and the
tokenizer known (the first round, which sees to that, is not counted):
- whole: the command line as users run it, untouched, for 1 token and for 20: wall time from before the fork to the
  end of the process, the time until the first byte of text, and the peak of the resident memory (of the child alone,
  by wait4).
- parts: the same command with clocks around its functions (which costs a little). A part's time is its own, without
  the parts within it. The file of the weights is read by native threads from `reading` on; `reading_wait` is what the
  interpreter waits for them at the end, `weights` includes it where a checksum is verified. The memory before the
  model is closed is told apart: pages of files (the weights, the tokenizer, libraries) and the process's own.

`--beside` takes turns with another program, in whose command {prompt} and {n} are put in place, such as
"llama-completion -m gpt2.gguf -p {prompt} -n {n} --no-warmup -no-cnv --no-display-prompt".

Prints a table to standard error, beside the goals, and one JSON object to standard output: medians, and the smallest
and largest.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

PROMPT = "Alan Turing theorized that computers would one day become very powerful, but even he could not imagine"
GOAL_S = 0.1  # to the first token
GOAL_BYTES = 50e6  # beyond weights, keys and values
MODULES = (
    "llm",
    "text.fast",
    "text.tokenizer",
    "ops.cpu",
    "weights.quantize",
    "weights.safetensors",
    "weights.gguf",
    "models.gpt2",
    "models.llama",
)
# Part -> what is timed as it, "module:name" in the package.
PARTS = {
    "files": "llm:open_model",
    "tokenizer": "llm:load_tokenizer",
    "model": "llm:model_of",
    "weights": "weights.quantize:prepare",
    "program": "llm:runner_for",
    "reading_wait": "weights.ahead:end",
    "load_rest": "llm:LLM.__init__",
    "encode": "text.tokenizer:Tokenizer.encode",
    "steps": "engine.engine:Engine.step",
    "close": "llm:LLM.close",
}


def traced(arguments: list[str]) -> None:
    """In the child: runs the command with clocks, and writes their readings to standard error, as the last line."""
    began = time.monotonic()
    own: dict[str, float] = {}
    first_step: list[float] = []
    within: list[float] = []  # seconds of parts inside of each open one
    memory: dict[str, int] = {}

    def clocked(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if part == "close" and not memory:
                memory.update(resident(), **expected(args[0]))
            within.append(0.0)
            started = time.monotonic()
            try:
                return function(*args, **kwargs)
            finally:
                took = time.monotonic() - started
                own[part] = own.get(part, 0.0) + took - within.pop()
                if part == "steps" and not first_step:
                    first_step.append(took)
                if within:
                    within[-1] += took

        return run

    def patch(part: str, place: str) -> None:
        module, _, path = place.partition(":")
        owner: Any = import_module(f"pronghorn.{module}")
        *outer, name = path.split(".")
        for step in outer:
            owner = getattr(owner, step)
        setattr(owner, name, clocked(part, getattr(owner, name)))

    from pronghorn import cli

    own["imports_of_cli"] = time.monotonic() - began
    load = cli.load

    def loaded(args: Any) -> Any:
        started = time.monotonic()
        from pronghorn.weights import ahead

        begun = time.monotonic()
        ahead.begin(args.model, args.dtype)
        reading = time.monotonic()
        for module in MODULES:
            import_module(f"pronghorn.{module}")
        own["reading_begins"] = reading - begun
        own["imports_of_rest"] = time.monotonic() - started - own["reading_begins"]
        ahead.begin = lambda *_: None
        for part, place in PARTS.items():
            patch(part, place)
        return load(args)

    cli.load = loaded
    patch("options", "cli:parser")
    entered = time.monotonic()
    status = cli.main(arguments)
    left = time.monotonic()
    own["prompt"] = first_step[0] if first_step else 0.0
    own["tokens"] = own.pop("steps", own["prompt"]) - own["prompt"]
    own["other"] = left - entered - sum(own.values()) + own["imports_of_cli"]
    print(json.dumps({"began": began, "left": left, "parts": own, "memory": memory}), file=sys.stderr)
    sys.exit(status)


def resident() -> dict[str, int]:
    """Bytes of this process's memory: pages of files, and its own."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    sizes = {name: value for name, _, value in (line.partition(":") for line in lines)}
    return {kind: int(sizes[f"Rss{kind}"].split()[0]) * 1024 for kind in ("File", "Anon")}


def expected(llm: Any) -> dict[str, int]:
    """Bytes of the weights and of the keys and values that were in use."""
    pages = llm._engine.pool.n_pages - len(llm._engine.pool._blank)
    return {"weights": llm._cost.weight_bytes, "kv": llm._cost.kv_bytes * 32 * pages}


def spawn(command: list[str]) -> dict[str, Any]:
    """Runs a process -> its times, the peak of its memory, and what it wrote."""
    import subprocess

    # Byte code is kept and output buffered, as where people work.
    environment = {name: value for name, value in os.environ.items() if name not in UNUSUAL}
    started = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stdout
        assert process.stderr
        first = process.stdout.read(1)
        text_after = time.monotonic() - started
        out = first + process.stdout.read()
        errors = process.stderr.read().decode(errors="replace")
        _, status, usage = os.wait4(process.pid, 0)
        ended = time.monotonic()
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"startup.py: {' '.join(command)}: status {process.returncode}: {errors.strip()[-300:]}")
    return {
        "started": started, "ended": ended, "seconds": ended - started, "first_text_s": text_after,
        "peak_bytes": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024), "errors": errors, "bytes": len(out),
    }  # fmt: skip


UNUSUAL = ("PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED")


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest, to a microsecond."""
    import statistics

    named = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, 6) for name, value in named.items()}


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the same command, run again and again."""
    return {
        "seconds": spread([run["seconds"] for run in runs]),
        "first_text_s": spread([run["first_text_s"] for run in runs]),
        "peak_bytes": max(run["peak_bytes"] for run in runs),
    }


def measure(options: list[str], prompt: str, rounds: int, beside: str | None) -> dict[str, Any]:
    """One dtype: the whole, the parts, and the other program, in alternating processes."""
    import shlex

    whole: dict[int, list[dict[str, Any]]] = {1: [], 20: []}
    others: dict[int, list[dict[str, Any]]] = {1: [], 20: []}
    parts: dict[str, list[float]] = {}
    memory: dict[str, int] = {}
    for _ in range(rounds + 1):  # the first of each is for the caches
        for n, runs in whole.items():
            arguments = ["generate", prompt, "-n", str(n), "--ignore-eos", "-q", *options]
            runs.append(spawn([sys.executable, "-m", "pronghorn", *arguments]))
            if beside:
                others[n].append(spawn([word.format(prompt=prompt, n=n) for word in shlex.split(beside)]))
        run = spawn([sys.executable, __file__, "--traced", *arguments])
        readings = json.loads(run["errors"].splitlines()[-1])
        memory = readings["memory"]
        found = {
            "interpreter": readings["began"] - run["started"],
            **readings["parts"],
            "exit": run["ended"] - readings["left"],
        }
        for name, value in found.items():
            parts.setdefault(name, []).append(value)
    return {
        "whole": {str(n): summary(runs[1:]) for n, runs in whole.items()},
        "beside": {str(n): summary(runs[1:]) for n, runs in others.items() if runs},
        "parts_of_20_tokens": {name: spread(values[1:]) for name, values in parts.items()},
        "memory_bytes": memory,
    }


def show(dtype: str, found: dict[str, Any]) -> None:
    """One dtype's table."""

    def line(text: str) -> None:
        print(text, file=sys.stderr)

    one, twenty = found["whole"]["1"], found["whole"]["20"]
    first = one["first_text_s"]["median"]
    line(
        f"{dtype}: first token after {first * 1000:.0f} ms (goal: {GOAL_S * 1000:.0f}), "
        f"20 tokens and the end after {twenty['seconds']['median'] * 1000:.0f} ms"
    )
    for n, run in found["beside"].items():
        theirs, ours = run["seconds"]["median"], found["whole"][n]["seconds"]["median"]
        line(f"    beside: {n} tokens and the end after {theirs * 1000:.0f} ms; ours takes {ours / theirs:.2f} of it")
    memory = found["memory_bytes"]
    peak = twenty["peak_bytes"]
    more = peak - memory["weights"] - memory["kv"]
    line(f"    memory: {peak / 1e6:.0f} MB, {more / 1e6:.0f} beyond weights, K and V (goal: {GOAL_BYTES / 1e6:.0f})")
    if "Anon" in memory:
        line(f"    of it, at the end: {memory['File'] / 1e6:.0f} MB of files, {memory['Anon'] / 1e6:.0f} MB its own")
    for name, value in found["parts_of_20_tokens"].items():
        line(f"    {name:15} {value['median'] * 1000:7.1f} ms")


def main() -> None:
    """Runs what the options ask for."""
    import argparse

    parser = argparse.ArgumentParser(description="Whole-process times and memory of `pronghorn generate`.")
    parser.add_argument("-m", "--model", help="(default: the default model)")
    parser.add_argument("--dtype", default="auto", help="one or more, with commas (default: auto)")
    parser.add_argument("--threads", help="(default: as many as the process may use)")
    parser.add_argument("--prompt", default=PROMPT, help="(default: Alan Turing theorized...)")
    parser.add_argument("--rounds", type=int, default=7, help="(default: 7)")
    parser.add_argument("--beside", metavar="COMMAND", help="another program, in turns: with {prompt} and {n}")
    args = parser.parse_args()
    common = [*(["-m", args.model] if args.model else []), *(["--threads", args.threads] if args.threads else [])]
    results = {}
    for dtype in args.dtype.split(","):
        results[dtype] = measure(["--dtype", dtype, *common], args.prompt, args.rounds, args.beside)
        show(dtype, results[dtype])
    print(json.dumps({"model": args.model, "prompt": args.prompt, "rounds": args.rounds, "results": results}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--traced"]:
        traced(sys.argv[2:])
    else:
        main()
