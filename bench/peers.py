"""pronghorn beside other engines: the same weights and prompt, in turns, in one run.

    python bench/shapes.py gpt2 /tmp/gpt2
    python bench/peers.py -m /tmp/gpt2 [--only pronghorn:int8,torch:bf16] [--rounds 5] [--threads 2]
        [--gguf FILE ...] [--ctranslate2 FOLDER] [--openvino FOLDER] [--llama-bench BINARY] [--fastgpt BINARY]

Nothing is installed: an engine that is not there is listed with what it lacks. Each runs in a process of its own,
which loads its model once and then waits, so that a crash is one engine's, and idle threads are not in the way; in
every round each has its turn, in an order that is rotated, and the first round is not counted. Measured: greedy
decoding at batch 1 (19 prompt tokens, 100 new; the first token is not counted), the time to the first of these, and a
prompt of 512. Other engines' files of the same weights are the caller's to make; there may be several GGUF files and
OpenVINO folders, whose names say their dtypes (f32, bf16, q8_0, q4_0, int8, int4).

Prints a table to standard error and one JSON object to standard output: medians, the smallest and largest, and the
ratio of pronghorn's median in the nearest dtype to each peer's.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

N_PROMPT, N_NEW, N_LONG = 19, 100, 512
Run = Callable[[Sequence[int], int], "list[float]"]
"""(prompt ids, number of new tokens) -> seconds from the start to each new token (at least the first and last)."""


class Missing(Exception):
    """An engine, or what it needs, that is not here."""


def ours(source: str, dtype: str, threads: int) -> Run:
    """pronghorn, through `LLM.stream`."""
    from pronghorn import LLM, SamplingParams

    llm = LLM(source, dtype=dtype, threads=threads, prefix_cache=False)

    def run(prompt: Sequence[int], n_new: int) -> list[float]:
        stream = llm.stream(list(prompt), SamplingParams(max_tokens=n_new, ignore_eos=True))
        return times(stream)

    return run


def pytorch(source: str, dtype: str, threads: int) -> Run:
    """PyTorch, eager: the model of transformers, with its KV cache, in a bare greedy loop (faster than `generate`)."""
    torch, transformers = need("torch"), need("transformers")
    torch.set_num_threads(threads)
    names = {"f32": "float32", "bf16": "bfloat16"}
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, names[dtype])).eval()

    def tokens(prompt: Sequence[int], n_new: int) -> Iterable[int]:
        ids, past = torch.tensor([list(prompt)]), None
        for _ in range(n_new):
            with torch.inference_mode():
                out = model(ids, past_key_values=past, use_cache=True, logits_to_keep=1)
            past, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
            yield int(ids)

    return lambda prompt, n_new: times(tokens(prompt, n_new))


def llama_cpp(source: str, dtype: str, threads: int) -> Run:
    """llama-cpp-python, token by token, the arg max taken by its own sampler."""
    llama = need("llama_cpp").Llama(
        model_path=source, n_ctx=1024, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False
    )

    def tokens(prompt: Sequence[int], n_new: int) -> Iterable[int]:
        llama.reset()
        llama.eval(list(prompt))
        for left in range(n_new, 0, -1):
            token = llama.sample(temp=0.0)
            yield token
            if left > 1:
                llama.eval([token])

    return lambda prompt, n_new: times(tokens(prompt, n_new))


def ctranslate2(source: str, dtype: str, threads: int) -> Run:
    """CTranslate2, from a converted folder whose vocabulary names the ids."""
    module = need("ctranslate2")
    generator = module.Generator(
        source, device="cpu", compute_type={"f32": "float32"}.get(dtype, dtype), intra_threads=threads
    )
    names = json.loads((Path(source) / "vocabulary.json").read_text(encoding="utf-8"))

    def run(prompt: Sequence[int], n_new: int) -> list[float]:
        marks: list[float] = []
        started = time.perf_counter()

        def heard(_: object) -> bool:
            marks.append(time.perf_counter() - started)
            return False

        generator.generate_batch(
            [[names[i] for i in prompt]], max_length=n_new, min_length=n_new, sampling_topk=1, beam_size=1,
            include_prompt_in_result=False, callback=heard,
        )  # fmt: skip
        return marks

    return run


def openvino(source: str, dtype: str, threads: int) -> Run:
    """OpenVINO GenAI, from an exported folder, whose dtype is what it was exported in."""
    module, core = need("openvino_genai"), need("openvino")
    import numpy as np

    pipeline = module.LLMPipeline(source, "CPU", INFERENCE_NUM_THREADS=threads)

    def run(prompt: Sequence[int], n_new: int) -> list[float]:
        marks: list[float] = []
        started = time.perf_counter()

        class Streamer(module.StreamerBase):  # type: ignore[misc,name-defined]
            def write(self, token: object) -> object:
                marks.append(time.perf_counter() - started)
                return module.StreamingStatus.RUNNING

            def end(self) -> None:
                pass

        config = module.GenerationConfig(max_new_tokens=n_new, min_new_tokens=n_new, ignore_eos=True)
        pipeline.generate(core.Tensor(np.array([prompt], np.int64)), config, Streamer())
        return marks

    return run


def llama_bench(source: str, dtype: str, threads: int) -> Run:
    """llama.cpp's own benchmark: a process for each measurement, its averages, which leave loading out."""
    binary, _, gguf = source.partition(" with ")
    need_program(binary)

    def seconds(*options: str) -> float:
        text = output([binary, "-m", gguf, "-t", str(threads), "-r", "1", "-o", "json", *options])
        return float(json.loads(text)[-1]["avg_ns"] / 1e9)

    def run(prompt: Sequence[int], n_new: int) -> list[float]:
        first = seconds("-p", str(len(prompt)), "-n", "0")
        if n_new == 1:
            return [first]
        return [first, first + seconds("-p", "0", "-n", str(n_new - 1), "-d", str(len(prompt)))]

    return run


def fastgpt(source: str, dtype: str, threads: int) -> Run:
    """The program of fastGPT, run where its model and `input` lie: it says how long all of its tokens took."""
    need_program(source)
    folder = Path(source).resolve().parent

    def run(prompt: Sequence[int], n_new: int) -> list[float]:
        environment = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
        text = output([str(Path(source).resolve())], cwd=folder, env={**os.environ, **environment})
        took = re.search(r"Running model.*?Time: *([\d.]+) *s", text, re.DOTALL)
        count = re.search(r"n_tokens_to_generate *= *(\d+)", (folder / "input").read_text(encoding="utf-8"))
        if not took or not count:
            raise Missing("its output names no time, or its input no number of tokens, that is known here")
        each = float(took[1]) / int(count[1])
        return [each, each * n_new]

    return run


class Peer(NamedTuple):
    """A contender: `load(source, dtype, threads)` gives its Run, in a process of its own."""

    load: Callable[[str, str, int], Run]
    package: str | None  # whose version is noted
    own_prompt: bool = False  # it runs a prompt of its own: only its tokens a second are comparable


PEERS = {
    "pronghorn": Peer(ours, "pronghorn"),
    "torch": Peer(pytorch, "torch"),
    "llama-cpp-python": Peer(llama_cpp, "llama-cpp-python"),
    "ctranslate2": Peer(ctranslate2, "ctranslate2"),
    "openvino": Peer(openvino, "openvino-genai"),
    "llama-bench": Peer(llama_bench, None),
    "fastgpt": Peer(fastgpt, None, own_prompt=True),
}


def need(module: str) -> Any:
    """An engine's package."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Missing(f"{module} is not installed ({error})") from None


def need_program(path: str) -> None:
    """An engine's program."""
    if not os.access(path, os.X_OK):
        raise Missing(f"{path} is no program that can be run")


def output(command: list[str], **more: Any) -> str:
    """What a program prints."""
    try:
        return str(subprocess.run(command, capture_output=True, text=True, check=True, **more).stdout)
    except (OSError, subprocess.CalledProcessError) as error:
        raise Missing(f"{command[0]}: {error}") from None


def times(tokens: Iterable[object]) -> list[float]:
    """Seconds from now to each item."""
    started = time.perf_counter()
    return [time.perf_counter() - started for _ in tokens]


def turn(run: Run, vocabulary: int, own_prompt: bool) -> dict[str, float]:
    """One turn of an engine: all that is measured, once."""
    ids = [104729 * (i + 1) % vocabulary for i in range(N_LONG)]
    marks = run(ids[:N_PROMPT], N_NEW)
    found = {"decode_tok_s": (N_NEW - 1) / (marks[-1] - marks[0])}
    return found if own_prompt else found | {"ttft_s": marks[0], "prompt_tok_s": N_LONG / run(ids, 1)[0]}


def worker(name: str, source: str, dtype: str, threads: int, vocabulary: int) -> None:
    """The process of one engine: a line of JSON when it is ready, and one for each line that it is sent."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what engines print is no answer

    def answer(value: dict[str, Any]) -> None:
        print(json.dumps(value), file=answers, flush=True)

    try:
        run = PEERS[name].load(source, dtype, threads)
        answer({"ready": True})
        for _ in sys.stdin:
            answer(turn(run, vocabulary, PEERS[name].own_prompt))
    except Exception as error:
        answer({"missing": f"{error if isinstance(error, Missing) else repr(error)}"[:300]})


class Contender:
    """An engine in one dtype, in its process."""

    def __init__(self, name: str, source: str | None, dtype: str, threads: int, vocabulary: int) -> None:
        self.name, self.dtype, self.source = name, dtype, source
        self.turns: list[dict[str, float]] = []
        self.missing: str | None = None if source else "no path was given (see --help)"
        self.process: subprocess.Popen[str] | None = None
        if source:
            command = [sys.executable, __file__, "--worker", name, source, dtype, str(threads), str(vocabulary)]
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            self.hear()

    def hear(self) -> dict[str, Any]:
        """The next line of the process; what it lacks, if it ends."""
        assert self.process
        assert self.process.stdout
        line = self.process.stdout.readline()
        heard: dict[str, Any] = json.loads(line) if line else {"missing": f"ended: status {self.process.wait()}"}
        if "missing" in heard:
            self.missing = heard["missing"]
        return heard

    def turn(self, keep: bool) -> None:
        """Has it measured once."""
        if self.missing is None:
            assert self.process
            assert self.process.stdin
            with contextlib.suppress(BrokenPipeError):  # it has ended, and hear() says how
                print("turn", file=self.process.stdin, flush=True)
            heard = self.hear()
            if keep and self.missing is None:
                self.turns.append(heard)

    def close(self) -> None:
        """Ends the process."""
        if self.process:
            with contextlib.suppress(BrokenPipeError):
                self.process.communicate()


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    named = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: float(f"{value:.5g}") for name, value in named.items()}


def summary(contenders: Sequence[Contender]) -> list[dict[str, Any]]:
    """What was measured; `pronghorn_is` so many times as fast, in the same dtype."""
    own = {c.dtype: c for c in contenders if c.name == "pronghorn" and c.turns}
    rows = []
    for contender in contenders:
        row: dict[str, Any] = {"engine": contender.name, "dtype": contender.dtype, "source": contender.source}
        package = PEERS[contender.name].package
        try:
            row["version"] = importlib.metadata.version(package) if package else None
        except importlib.metadata.PackageNotFoundError:
            row["version"] = None
        if contender.missing is not None:
            rows.append(row | {"missing": contender.missing})
            continue
        names = contender.turns[0] if contender.turns else {}
        row |= {name: spread([turn[name] for turn in contender.turns]) for name in names}
        peer = own.get(contender.dtype)
        if peer and peer is not contender:
            row["pronghorn_is"] = {}
            for name in names:
                us, they = (statistics.median(turn[name] for turn in c.turns) for c in (peer, contender))
                row["pronghorn_is"][name] = float(f"{they / us if name == 'ttft_s' else us / they:.4g}")
        rows.append(row)
    return rows


def dtype_of(path: str) -> str:
    """The dtype that a file's name speaks of: f32, bf16, int8 or int4."""
    found = re.findall(r"f32|bf16|f16|int8|int4|q8|q4", Path(path).name.lower())
    return {"q8": "int8", "q4": "int4"}.get(found[-1], found[-1]) if found else "auto"


def main() -> None:
    """Runs what the options ask for."""
    parser = argparse.ArgumentParser(description="pronghorn beside other engines, in turns.")
    parser.add_argument("-m", "--model", required=True, help="a folder in Hugging Face's layout (see shapes.py)")
    parser.add_argument("--dtype", default="f32,bf16,int8,int4", help="of pronghorn (default: f32,bf16,int8,int4)")
    parser.add_argument("--gguf", action="append", default=[], metavar="FILE", help="the same weights for llama.cpp")
    parser.add_argument("--ctranslate2", metavar="FOLDER", help="the same weights, converted")
    parser.add_argument("--openvino", metavar="FOLDER", action="append", default=[], help="the same, exported")
    parser.add_argument("--llama-bench", metavar="BINARY", help="llama.cpp's program, for the --gguf files")
    parser.add_argument("--fastgpt", metavar="BINARY", help="fastGPT's program, its model and input beside it")
    parser.add_argument("--only", metavar="NAME[:DTYPE],...", help="these contenders only")
    parser.add_argument("--rounds", type=int, default=5, help="(default: 5)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="(default: all)")
    args = parser.parse_args()
    config = json.loads((Path(args.model) / "config.json").read_text(encoding="utf-8"))
    wanted = [("pronghorn", args.model, dtype) for dtype in args.dtype.split(",")]
    wanted += [("torch", args.model, dtype) for dtype in ("f32", "bf16")]
    wanted += [("llama-cpp-python", path, dtype_of(path)) for path in args.gguf] or [("llama-cpp-python", None, "auto")]
    wanted += [("ctranslate2", args.ctranslate2, dtype) for dtype in ("f32", "int8")]
    wanted += [("openvino", path, dtype_of(path)) for path in args.openvino] or [("openvino", None, "auto")]
    program = args.llama_bench
    wanted += [("llama-bench", f"{program} with {path}", dtype_of(path)) for path in args.gguf if program] or [
        ("llama-bench", None, "auto")
    ]
    wanted.append(("fastgpt", args.fastgpt, "f32"))
    if args.only:
        names = args.only.split(",")
        wanted = [w for w in wanted if w[0] in names or f"{w[0]}:{w[2]}" in names]
    if not wanted:
        parser.error(f"--only {args.only}: there is no such contender")
    contenders = [Contender(*which, args.threads, config["vocab_size"]) for which in wanted]
    from pronghorn.bench import machine

    place = machine(args.threads)
    try:
        for number in range(args.rounds + 1):  # the first is for the caches
            shift = number % len(contenders)
            for contender in contenders[shift:] + contenders[:shift]:
                contender.turn(keep=number > 0)
    finally:
        for contender in contenders:
            contender.close()
    rows = summary(contenders)
    for row in rows:
        name = f"{row['engine']} {row['dtype']}"
        if "missing" in row:
            print(f"{name:26} not there: {row['missing']}", file=sys.stderr)
            continue
        text = "".join(
            f"  {what} {row[what]['median']:.4g} ({row[what]['min']:.4g}-{row[what]['max']:.4g})"
            for what in ("decode_tok_s", "ttft_s", "prompt_tok_s")
            if what in row
        )
        ratios = "  x".join(f"{value:.2f}" for value in row.get("pronghorn_is", {}).values())
        print(f"{name:26}{text}" + (f"  pronghorn: x{ratios}" if ratios else ""), file=sys.stderr)
    print(json.dumps({"model": args.model, "machine": place, "rounds": args.rounds, "results": rows}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(*sys.argv[2:5], *map(int, sys.argv[5:]))  # type: ignore[arg-type]
    else:
        main()
