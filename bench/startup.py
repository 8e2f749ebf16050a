"""From process start to the first token and to 20, with peak memory, and where the time goes.

    python bench/startup.py [-m MODEL] [--dtype f32,int8] [--rounds 5] [--prompt TEXT]

Two kinds of runs alternate, each in a fresh process, the page cache warm:
- whole: the command line as users run it, untouched, for 1 token and for 20: wall time from before the fork to the
  end of the process, the time until the first byte of text, and the peak of the resident memory (of the child alone,
  by wait4; mapped pages of the model's file count).
- parts: the same command with clocks around its functions (which costs a little). A part's time is its own, without
  the parts within it. Imports are made before all else there, so that they are one part. The tokenizer loads in a
  thread of its own, beside the others: `tokenizer` is what that takes, `tokenizer_wait` what the first token waits
  for it.

Prints a table to standard error and one JSON object to standard output: medians, and the smallest and largest.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import wraps
from typing import Any

PROMPT = "Alan Turing theorized that computers would one day become very powerful, but even he could not imagine"
MODULES = (
    "pronghorn.cli",
    "pronghorn.llm",
    "pronghorn.ops.cpu",
    "pronghorn.weights.quantize",
    "pronghorn.weights.safetensors",
    "pronghorn.weights.gguf",
    "pronghorn.models.gpt2",
    "pronghorn.models.llama",
)
# Part -> what is timed as it, "module:name"; a name that is gone is said to be missing.
PARTS = {
    "options": "pronghorn.cli:parser",
    "open_and_map": "pronghorn.llm:open_model",
    "pack_check": "pronghorn.weights.quantize:prepare",
    "program": "pronghorn.llm:runner_for",
    "load_rest": "pronghorn.llm:LLM.__init__",
    "tokenizer": "pronghorn.llm:load_tokenizer",
    "tokenizer_wait": "pronghorn.llm:Later.get",
    "encode": "pronghorn.text.tokenizer:Tokenizer.encode",
    "steps": "pronghorn.engine.engine:Engine.step",
    "close": "pronghorn.llm:LLM.close",
}


def traced(arguments: list[str]) -> None:
    """In the child: runs the command with clocks, and writes their readings to standard error, as the last line."""
    import threading

    began = time.monotonic()
    missing = [module for module in MODULES if not importable(module)]
    imported = time.monotonic()
    own: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    first_step: list[float] = []
    local = threading.local()

    def clocked(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            within = local.__dict__.setdefault("within", [])  # seconds of parts inside of each open one
            within.append(0.0)
            started = time.monotonic()
            try:
                return function(*args, **kwargs)
            finally:
                took = time.monotonic() - started
                own[part] += took - within.pop()
                if part == "steps" and not first_step:
                    first_step.append(took)
                if within:
                    within[-1] += took

        return run

    for part, place in PARTS.items():
        module, _, path = place.partition(":")
        *outer, name = path.split(".")
        owner: Any = importlib.import_module(module)
        for step in outer:
            owner = getattr(owner, step, None)
        if hasattr(owner, name):
            setattr(owner, name, clocked(part, getattr(owner, name)))
        else:
            missing.append(place)
    from pronghorn.cli import main

    entered = time.monotonic()
    status = main(arguments)
    left = time.monotonic()
    own["prompt"] = first_step[0] if first_step else 0.0
    own["tokens"] = own.pop("steps") - own["prompt"]
    own["imports"] = imported - began
    own["other"] = left - entered - sum(own[part] for part in own if part not in ("tokenizer", "imports"))
    readings = {"began": began, "left": left, "missing": missing, "parts": own}
    print(json.dumps(readings), file=sys.stderr)
    sys.exit(status)


def importable(module: str) -> bool:
    """Imports it, if it is there."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError:
        return False
    return True


def spawn(command: list[str]) -> dict[str, Any]:
    """Runs a process -> its times, the peak of its memory, and what it wrote."""
    started = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        first = process.stdout.read(1)
        text_after = time.monotonic() - started
        out = first + process.stdout.read()
        errors = process.stderr.read().decode()
        _, status, usage = os.wait4(process.pid, 0)
        ended = time.monotonic()
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"startup.py: {' '.join(command)}: status {process.returncode}: {errors.strip()[-300:]}")
    return {
        "started": started, "ended": ended, "seconds": ended - started, "first_text_s": text_after,
        "peak_bytes": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024), "errors": errors, "bytes": len(out),
    }  # fmt: skip


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest, to a microsecond."""
    named = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, 6) for name, value in named.items()}


def measure(options: list[str], prompt: str, rounds: int) -> dict[str, Any]:
    """One dtype: the whole and the parts, in alternating processes."""
    whole: dict[int, list[dict[str, Any]]] = {1: [], 20: []}
    parts: dict[str, list[float]] = {}
    missing: list[str] = []
    for _ in range(rounds + 1):  # the first of each is for the caches
        for n, runs in whole.items():
            arguments = ["generate", prompt, "-n", str(n), "--ignore-eos", "-q", *options]
            runs.append(spawn([sys.executable, "-m", "pronghorn", *arguments]))
        run = spawn([sys.executable, __file__, "--traced", *arguments])
        readings = json.loads(run["errors"].splitlines()[-1])
        missing = readings["missing"]
        found = {
            "interpreter": readings["began"] - run["started"],
            **readings["parts"],
            "exit": run["ended"] - readings["left"],
        }
        for name, value in found.items():
            parts.setdefault(name, []).append(value)
    return {
        "whole": {
            str(n): {
                "seconds": spread([run["seconds"] for run in runs[1:]]),
                "first_text_s": spread([run["first_text_s"] for run in runs[1:]]),
                "peak_bytes": max(run["peak_bytes"] for run in runs[1:]),
            }
            for n, runs in whole.items()
        },
        "parts_of_20_tokens": {name: spread(values[1:]) for name, values in parts.items()},
        "missing": missing,
    }


def main() -> None:
    """Runs what the options ask for."""
    parser = argparse.ArgumentParser(description="Whole-process times and memory of `pronghorn generate`.")
    parser.add_argument("-m", "--model", help="(default: the default model)")
    parser.add_argument("--dtype", default="auto", help="one or more, with commas (default: auto)")
    parser.add_argument("--threads", help="(default: as many as the process may use)")
    parser.add_argument("--prompt", default=PROMPT, help="(default: Alan Turing theorized...)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: 5)")
    args = parser.parse_args()
    common = [*(["-m", args.model] if args.model else []), *(["--threads", args.threads] if args.threads else [])]
    results = {dtype: measure(["--dtype", dtype, *common], args.prompt, args.rounds) for dtype in args.dtype.split(",")}
    for dtype, found in results.items():
        one, twenty = found["whole"]["1"], found["whole"]["20"]
        print(
            f"{dtype}: 1 token {one['seconds']['median'] * 1000:.0f} ms, "
            f"20 tokens {twenty['seconds']['median'] * 1000:.0f} ms (their first text after "
            f"{twenty['first_text_s']['median'] * 1000:.0f} ms), peak {twenty['peak_bytes'] / 1e6:.0f} MB",
            file=sys.stderr,
        )
        for name, value in found["parts_of_20_tokens"].items():
            beside = "  (in a thread beside)" if name == "tokenizer" else ""
            print(f"    {name:15} {value['median'] * 1000:7.1f} ms{beside}", file=sys.stderr)
        for place in found["missing"]:
            print(f"    not found, so not told apart: {place}", file=sys.stderr)
    print(json.dumps({"model": args.model, "prompt": args.prompt, "rounds": args.rounds, "results": results}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--traced"]:
        traced(sys.argv[2:])
    else:
        main()
