"""pronghorn beside other engines: the same weights and prompts, in turns, in one run.

    python bench/shapes.py gpt2 /tmp/gpt2
    python bench/peers.py -m /tmp/gpt2 [--dtype int8] [--only pronghorn,llama.cpp] [--rounds 5] [--threads 2]
        [--work FOLDER] [--llama-bin FOLDER] [--fastgpt BINARY] [--start]

Nothing is installed: an engine that is not there is listed with what it lacks. What is there gets the model in its own
format, made once in a temporary folder (or in --work, and kept there) by `convert.py`. `-m FILE.gguf` compares with
llama.cpp alone, on that very file.

Each engine runs in a process of its own, which loads its model once and then waits, so that a crash is one engine's,
and idle threads are not in the way; in every round each has its turn, in an order that is rotated, and the first round
is not counted. A turn is: greedy decoding of one stream (19 prompt tokens, 100 new; the first token is not counted),
the time to the first of these, a prompt of 512, and 32 streams that decode together (19 prompt tokens, 20 new; counted
from when all have their first). `tokens_agree` is how many of the first 20 greedy tokens are those of pronghorn in f32:
f32 must agree nearly always, 4 bits need not (the weights of shapes.py are random, and its choices close).
With --start, times are whole processes instead: from before the fork to the end, for 1 token and for 20.

Prints a table to standard error and one JSON object to standard output: medians, the smallest and largest, and how
many times as fast pronghorn is in the same dtype.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

N_PROMPT, N_NEW, N_LONG, N_STREAMS, N_EACH = 19, 100, 512, 32, 20
CONTEXT = 1024
DTYPES = ("f32", "bf16", "int8", "int4")
PROMPT = "Alan Turing theorized that computers would one day become very powerful, but even he could not imagine"
Prompts = Sequence[Sequence[int]]


class Missing(Exception):
    """An engine, or what it needs, that is not here."""


class Trace(NamedTuple):
    """What a run gave: after each step the seconds since its start and the tokens made by then, and the ids of all."""

    seconds: list[float]
    made: list[int]
    tokens: list[list[int]]  # [stream][token]; empty where the engine does not tell

    def rate(self, streams: int) -> float:
        """Tokens a second, of all streams together, from when each had its first."""
        first = next(i for i, n in enumerate(self.made) if n >= streams)
        return (self.made[-1] - self.made[first]) / (self.seconds[-1] - self.seconds[first])


Run = Callable[[Prompts, int], Trace]
"""(prompts, new tokens of each) -> Trace"""
Steps = Callable[[Prompts, int], "Iterator[list[tuple[int, int]]]"]
"""The same, as (stream, token id) of each step, as they come."""


def traced(steps: Steps) -> Run:
    """With a clock around it. Prompts may take several steps: one that makes no token for some streams is none yet."""

    def run(prompts: Prompts, n_new: int) -> Trace:
        trace = Trace([], [], [[] for _ in prompts])
        started = time.perf_counter()
        for step in steps(prompts, n_new):
            now = time.perf_counter() - started
            for stream, token in step:
                trace.tokens[stream].append(token)
            if min(map(len, trace.tokens)):
                trace.seconds.append(now)
                trace.made.append(sum(map(len, trace.tokens)))
        return trace

    return run


class Ours:
    """pronghorn: the engine as `LLM` runs it, and the ceiling of the memory that its weights lie in."""

    def __init__(self, source: str, dtype: str, threads: int) -> None:
        from pronghorn.bench import Subject
        from pronghorn.loading import open_model
        from pronghorn.models import model_for

        checkpoint = open_model(source)
        self.subject = Subject(checkpoint, model_for(checkpoint.config), dtype, threads)

    def steps(self, prompts: Prompts, n_new: int) -> Iterator[list[tuple[int, int]]]:
        from pronghorn.engine.sampling import SamplingParams
        from pronghorn.engine.scheduler import Request

        params = SamplingParams(max_tokens=n_new, ignore_eos=True)
        requests = [Request(list(prompt), params) for prompt in prompts]
        number = {id(request): i for i, request in enumerate(requests)}
        for request in requests:
            self.subject.engine.add(request)
        while not all(request.finish_reason for request in requests):
            yield [(number[id(request)], request.token_ids[-1]) for request in self.subject.engine.step()]


def ours(source: str, dtype: str, threads: int) -> Run:
    """The engine of this repository."""
    return traced(Ours(source, dtype, threads).steps)


def pytorch(source: str, dtype: str, threads: int) -> Run:
    """PyTorch, eager: the model of transformers, with its KV cache, in a bare greedy loop (faster than `generate`)."""
    torch, transformers = need("torch"), need("transformers")
    torch.set_num_threads(threads)
    names = {"f32": "float32", "bf16": "bfloat16"}
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, names[dtype])).eval()

    def steps(prompts: Prompts, n_new: int) -> Iterator[list[tuple[int, int]]]:
        ids, past = torch.tensor([list(prompt) for prompt in prompts]), None
        for _ in range(n_new):
            with torch.inference_mode():
                out = model(ids, past_key_values=past, use_cache=True, logits_to_keep=1)
            past, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
            yield list(enumerate(ids[:, 0].tolist()))

    return traced(steps)


def llama_cpp(source: str, dtype: str, threads: int) -> Run:
    """llama.cpp by llama-cpp-python's plain bindings: `llama_decode` for all streams at once, NumPy's arg max."""
    low = need("llama_cpp").llama_cpp
    import ctypes

    import numpy as np

    low.llama_backend_init()
    model = low.llama_model_load_from_file(source.encode(), low.llama_model_default_params())
    if not model:
        raise Missing(f"it cannot load {source}")
    n_vocab = low.llama_vocab_n_tokens(low.llama_model_get_vocab(model))

    def context(streams: int, tokens: int) -> Any:
        options = low.llama_context_default_params()
        options.n_ctx, options.n_seq_max, options.kv_unified = tokens, streams, streams == 1
        options.n_batch = options.n_ubatch = max(N_LONG, streams * N_PROMPT)
        options.n_threads = options.n_threads_batch = threads
        return low.llama_init_from_model(model, options)

    contexts: dict[int, Any] = {}  # by streams: a process that starts for one needs no other
    batch = low.llama_batch_init(max(N_LONG, N_STREAMS * N_PROMPT), 0, 1)

    def steps(prompts: Prompts, n_new: int) -> Iterator[list[tuple[int, int]]]:
        n = len(prompts)
        if n not in contexts:
            contexts[n] = context(n, CONTEXT if n == 1 else n * 256)
        chosen = contexts[n]
        low.llama_memory_clear(low.llama_get_memory(chosen), False)
        new: list[tuple[int, int, int, bool]] = [
            (stream, at, token, at + 1 == len(prompt))
            for stream, prompt in enumerate(prompts)
            for at, token in enumerate(prompt)
        ]
        for _ in range(n_new):
            batch.n_tokens = len(new)
            for i, (stream, at, token, wanted) in enumerate(new):
                batch.token[i], batch.pos[i], batch.logits[i] = token, at, wanted
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, stream
            if status := low.llama_decode(chosen, batch):
                raise Missing(f"llama_decode gave {status}")
            rows = [(i, stream, at) for i, (stream, at, _, wanted) in enumerate(new) if wanted]
            new = []
            for i, stream, at in rows:
                logits = ctypes.cast(low.llama_get_logits_ith(chosen, i), ctypes.POINTER(ctypes.c_float * n_vocab))
                new.append((stream, at + 1, int(np.frombuffer(logits.contents, np.float32).argmax()), True))
            yield [(stream, token) for stream, _, token, _ in new]

    return traced(steps)


def ctranslate2(source: str, dtype: str, threads: int) -> Run:
    """CTranslate2."""
    kind = {"f32": "float32"}.get(dtype, dtype)
    generator = need("ctranslate2").Generator(source, device="cpu", compute_type=kind, intra_threads=threads)

    def run(prompts: Prompts, n_new: int) -> Trace:
        trace = Trace([], [], [[] for _ in prompts])
        started = time.perf_counter()

        def heard(step: Any) -> bool:
            trace.tokens[step.batch_id].append(step.token_id)
            made = sum(map(len, trace.tokens))
            if made % len(prompts) == 0:
                trace.seconds.append(time.perf_counter() - started)
                trace.made.append(made)
            return False

        generator.generate_batch(
            [[str(i) for i in prompt] for prompt in prompts], max_length=n_new, min_length=n_new, sampling_topk=1,
            beam_size=1, include_prompt_in_result=False, callback=heard,
        )  # fmt: skip
        return trace

    return run


def openvino(source: str, dtype: str, threads: int) -> Run:
    """OpenVINO GenAI, by its pipeline for many requests, which `LLMPipeline` runs too, for one."""
    module, core = need("openvino_genai"), need("openvino")
    import numpy as np

    schedule = module.SchedulerConfig()
    schedule.cache_size, schedule.enable_prefix_caching = 1, False  # GiB
    schedule.max_num_batched_tokens = N_STREAMS * N_PROMPT
    options: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads}
    if dtype in ("f32", "bf16"):
        options["INFERENCE_PRECISION_HINT"] = dtype
    pipeline = module.ContinuousBatchingPipeline(source, schedule, "CPU", options)
    count = iter(range(1 << 60))

    def steps(prompts: Prompts, n_new: int) -> Iterator[list[tuple[int, int]]]:
        config = module.GenerationConfig(max_new_tokens=n_new, min_new_tokens=n_new, ignore_eos=True, do_sample=False)
        handles = [
            pipeline.add_request(next(count), core.Tensor(np.array([prompt], np.int64)), config) for prompt in prompts
        ]
        while pipeline.has_non_finished_requests():
            pipeline.step()
            yield [
                (stream, token)
                for stream, handle in enumerate(handles)
                if handle.can_read()
                for output in handle.read().values()
                for token in output.generated_ids
            ]

    return traced(steps)


def llama_bench(source: str, dtype: str, threads: int) -> Run:
    """llama.cpp's own benchmarks: a process for each measurement, its averages, which leave loading out."""
    folder, _, gguf = source.partition(" with ")
    binary, batched = (need_program(Path(folder) / name) for name in ("llama-bench", "llama-batched-bench"))
    common = ["-m", gguf, "-t", str(threads)]

    def seconds(*options: str) -> float:
        return float(json.loads(output([binary, *common, "-r", "1", "-o", "json", *options]))[-1]["avg_ns"] / 1e9)

    def run(prompts: Prompts, n_new: int) -> Trace:
        n, n_prompt = len(prompts), len(prompts[0])
        if n > 1:
            sizes = ["-npp", str(n_prompt), "-ntg", str(n_new), "-npl", str(n), "-c", str(n * 256)]
            text = output([batched, *common, *sizes, "--output-format", "jsonl"])
            found = json.loads(next(line for line in text.splitlines() if line.startswith("{")))
            return Trace([found["t_pp"], found["t_pp"] + found["t_tg"]], [n, n + n * n_new], [])
        first = seconds("-p", str(n_prompt), "-n", "0")
        if n_new == 1:
            return Trace([first], [1], [])
        rest = seconds("-p", "0", "-n", str(n_new - 1), "-d", str(n_prompt))
        return Trace([first, first + rest], [1, n_new], [])

    return run


def fastgpt(source: str, dtype: str, threads: int) -> Run:
    """The program of fastGPT, run where its model and `input` lie: it says how long all of its tokens took."""
    program = need_program(Path(source))

    def run(prompts: Prompts, n_new: int) -> Trace:
        environment = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
        text = output([program], cwd=Path(program).parent, env={**os.environ, **environment})
        took = re.search(r"Running model.*?done\. Time: *([\d.]+) *s", text, re.DOTALL)
        count = re.search(r"n_tokens_to_generate *= *(\d+)", text)
        if not took or not count:
            raise Missing("its output names no time, or no number of tokens, that is known here")
        each = float(took[1]) / int(count[1])
        return Trace([each, each * n_new], [1, n_new], [])

    return run


class Peer(NamedTuple):
    """A contender: `load(source, dtype, threads)` gives its Run, in a process of its own."""

    load: Callable[[str, str, int], Run]
    package: str | None = None  # whose version is noted
    own_prompt: bool = False  # it runs a prompt of its own: only its tokens a second are comparable


PEERS = {
    "pronghorn": Peer(ours, "pronghorn"),
    "torch": Peer(pytorch, "torch"),
    "llama.cpp": Peer(llama_cpp, "llama-cpp-python"),
    "ctranslate2": Peer(ctranslate2, "ctranslate2"),
    "openvino": Peer(openvino, "openvino-genai"),
    "llama-bench": Peer(llama_bench),
    "fastgpt": Peer(fastgpt, own_prompt=True),
}
# Engine -> its dtypes and what its converter calls them; llama.cpp's come from llama-cpp-python, or its own programs.
GGUF = {"f32": ("f32",), "bf16": ("bf16",), "int8": ("q8_0",), "int4": ("q4_0", "q4_1")}
CONVERTED = {
    "llama.cpp": ("gguf", GGUF),
    "llama-bench": ("gguf", GGUF),
    "ctranslate2": ("ctranslate2", {"f32": ("f32",), "int8": ("int8",)}),
    "openvino": ("openvino", {"f32": ("f32",), "bf16": ("f32",), "int8": ("int8",), "int4": ("int4",)}),
}


class Contender(NamedTuple):
    """Who runs what: `source` is a path, or for llama-bench "FOLDER with FILE"; `kind` is GGUF's name of the dtype."""

    engine: str
    dtype: str
    kind: str
    source: str
    missing: str | None = None


def need(module: str) -> Any:
    """An engine's package."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Missing(f"{module} is not installed ({error})") from None


def need_program(path: Path) -> str:
    """An engine's program."""
    if not os.access(path, os.X_OK):
        raise Missing(f"{path} is no program that can be run")
    return str(path.resolve())


def output(command: list[str], **more: Any) -> str:
    """What a program prints."""
    try:
        return subprocess.run(command, stdout=-1, stderr=-3, stdin=-3, text=True, check=True, **more).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise Missing(f"{command[0]}: {error}") from None


def prompt_ids(length: int, vocabulary: int, stream: int = 0) -> list[int]:
    """Token ids that look like a text's; those of each stream are its own."""
    return [104729 * (i + 1 + N_LONG * stream) % vocabulary for i in range(length)]


def turn(engine: str, run: Run, vocabulary: int) -> dict[str, Any]:
    """One turn of an engine: all that is measured, once."""
    one = run([prompt_ids(N_PROMPT, vocabulary)], N_NEW)
    found: dict[str, Any] = {"decode_tok_s": one.rate(1)}
    if PEERS[engine].own_prompt:
        return found
    long = run([prompt_ids(N_LONG, vocabulary)], 1)
    many = run([prompt_ids(N_PROMPT, vocabulary, i) for i in range(N_STREAMS)], N_EACH)
    found |= {"ttft_s": one.seconds[0], "prompt_tok_s": N_LONG / long.seconds[0]}
    found |= {"streams_tok_s": many.rate(N_STREAMS)}
    return found | ({"tokens": one.tokens[0][:20]} if one.tokens else {})


def worker(engine: str, source: str, dtype: str, threads: int, vocabulary: int) -> None:
    """The process of one engine: a line of JSON when it is ready, and one for each line that it is sent."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what engines print is no answer

    def answer(value: dict[str, Any]) -> None:
        print(json.dumps(value), file=answers, flush=True)

    try:
        if engine == "pronghorn":
            us = Ours(source, dtype, threads)
            run, subject = traced(us.steps), us.subject
            half = N_PROMPT + N_NEW / 2
            step_bytes = subject.weight_bytes + subject.token_bytes * half
        else:
            run, subject = PEERS[engine].load(source, dtype, threads), None
        answer({"ready": True})
        for _ in sys.stdin:
            if subject is None:
                answer(turn(engine, run, vocabulary))
            else:
                before = subject.ceiling()
                found = turn(engine, run, vocabulary)
                found["ceiling_gb_s"] = (before + subject.ceiling()) / 2e9
                found["share"] = found["decode_tok_s"] * step_bytes / found["ceiling_gb_s"] / 1e9
                answer(found)
    except Exception as error:
        answer({"missing": f"{error if isinstance(error, Missing) else repr(error)}"[:300]})


class Turns:
    """A contender in its process."""

    def __init__(self, who: Contender, threads: int, vocabulary: int) -> None:
        self.missing = who.missing
        self.found: list[dict[str, Any]] = []
        self.process: subprocess.Popen[str] | None = None
        if not self.missing:
            more = [who.engine, who.source, who.dtype, str(threads), str(vocabulary)]
            self.process = subprocess.Popen(
                [sys.executable, __file__, "--worker", *more], stdin=-1, stdout=-1, stderr=-3, text=True
            )
            self.hear()

    def hear(self) -> dict[str, Any]:
        """The next line of the process; what it lacks, if it ends."""
        assert self.process
        assert self.process.stdout
        line = self.process.stdout.readline()
        heard: dict[str, Any] = json.loads(line) if line else {"missing": f"ended: status {self.process.wait()}"}
        self.missing = heard.get("missing")
        return heard

    def turn(self, keep: bool) -> None:
        """Has it measured once."""
        if not self.missing:
            assert self.process
            assert self.process.stdin
            with contextlib.suppress(BrokenPipeError):  # it has ended, and hear() says how
                print("turn", file=self.process.stdin, flush=True)
            heard = self.hear()
            if keep and not self.missing:
                self.found.append(heard)

    def close(self) -> None:
        """Ends the process."""
        if self.process:
            with contextlib.suppress(BrokenPipeError):
                self.process.communicate()


class Starts:
    """A contender whose whole process is measured: for text where it takes text, else for the ids of the prompt."""

    def __init__(self, who: Contender, threads: int, vocabulary: int) -> None:
        self.missing, self.found = who.missing, list[dict[str, Any]]()
        n = "{}"
        if who.engine == "pronghorn" and has_tokenizer(Path(who.source)):
            command = [sys.executable, "-m", "pronghorn", "generate", PROMPT, "-m", who.source, "--dtype", who.dtype]
            command += ["-n", n, "--ignore-eos", "-q", "--threads", str(threads)]
        elif who.engine == "llama-bench":
            folder, _, gguf = who.source.partition(" with ")
            binary = Path(folder) / "llama-completion"
            if not self.missing and not os.access(binary, os.X_OK):
                self.missing = f"{binary} is no program that can be run"
            command = [str(binary), "-m", gguf, "-p", PROMPT, "-n", n, "-t", str(threads), "--temp", "0", "-no-cnv"]
            command += ["--no-warmup", "--ignore-eos", "--no-display-prompt", "-c", str(CONTEXT)]
        elif PEERS[who.engine].own_prompt:
            self.missing, command = "it runs a prompt of its own", []
        else:
            more = [who.engine, who.source, who.dtype, str(threads), str(vocabulary)]
            command = [sys.executable, __file__, "--once", *more, n]
        self.command = command

    def turn(self, keep: bool) -> None:
        """Runs it for 1 token and for 20."""
        found: dict[str, Any] = {}
        for n, name in ((1, "start_1_s"), (20, "start_20_s")):
            if self.missing:
                return
            command = [part.replace("{}", str(n)) for part in self.command]
            started = time.perf_counter()
            done = subprocess.run(command, stdout=-3, stderr=-1, stdin=-3, check=False)
            found[name] = time.perf_counter() - started
            if done.returncode:
                self.missing = f"status {done.returncode}: {done.stderr.decode(errors='replace').strip()[-300:]}"
        if keep and not self.missing:
            self.found.append(found)

    def close(self) -> None:
        """Nothing runs."""


def has_tokenizer(folder: Path) -> bool:
    """Whether a prompt may be text."""
    names = ("tokenizer.json", "vocab.json", "encoder.json")
    return folder.is_file() or any((folder / name).exists() for name in names)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    named = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: float(f"{value:.5g}") for name, value in named.items()}


def summary(
    contenders: Sequence[Contender], runs: Sequence[Turns | Starts], reference: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """What was measured; `pronghorn_is` so many times as fast, in the same dtype."""
    import importlib.metadata

    all_own = {c.dtype: r.found for c, r in zip(contenders, runs, strict=True) if c.engine == "pronghorn" and r.found}
    for who, run in zip(contenders, runs, strict=True):
        engine = "llama-completion" if who.engine == "llama-bench" and isinstance(run, Starts) else who.engine
        row: dict[str, Any] = {"engine": engine, "dtype": who.dtype, "kind": who.kind, "version": None}
        if package := PEERS[who.engine].package:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                row["version"] = importlib.metadata.version(package)
        if run.missing or not run.found:
            yield row | {"missing": run.missing or "no round was counted"}
            continue
        tokens = run.found[0].get("tokens")
        if tokens and reference:
            same = [a == b for a, b in zip(tokens, reference, strict=True)]
            row["tokens_agree"] = [*same, False].index(False)
        names = [name for name in run.found[0] if name != "tokens"]
        row |= {name: spread([found[name] for found in run.found]) for name in names}
        us = all_own.get(who.dtype)
        if us and us is not run.found:
            row["pronghorn_is"] = {}
            for name in names:
                own_one, one = (statistics.median(found[name] for found in each) for each in (us, run.found))
                row["pronghorn_is"][name] = float(f"{own_one / one if 'tok_s' in name else one / own_one:.4g}")
        yield row


COLUMNS = {  # heading, factor, digits
    "decode_tok_s": ("1 stream tok/s", 1, 1),
    "ttft_s": ("19 tokens ms", 1000, 1),
    "prompt_tok_s": ("512 tok/s", 1, 0),
    "streams_tok_s": ("32 streams tok/s", 1, 0),
    "start_1_s": ("start to 1 token ms", 1000, 0),
    "start_20_s": ("start to 20 ms", 1000, 0),
}


def table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The lines of the table, in Markdown: medians (smallest-largest) and how many times as fast pronghorn is."""
    names = [name for name in COLUMNS if any(name in row for row in rows)]
    told = any("tokens_agree" in row for row in rows)
    headings = ["dtype", "engine", *(COLUMNS[name][0] for name in names), *["agree"] * told]
    yield f"| {' | '.join(headings)} |"
    yield "|---" * len(headings) + "|"
    for row in rows:
        name = row["engine"] + ("" if row["kind"] == row["dtype"] else f" {row['kind']}")
        if "missing" in row:
            yield f"| {row['dtype']} | {name} | not there: {row['missing']}" + " |" * (len(headings) - 2)
            continue
        cells = []
        for column in names:
            if column not in row:
                cells.append("")
                continue
            _, factor, digits = COLUMNS[column]
            middle, low, high = (f"{row[column][part] * factor:.{digits}f}" for part in ("median", "min", "max"))
            ratio = row.get("pronghorn_is", {}).get(column)
            cells.append(f"{middle} ({low}-{high})" + (f" ×{ratio:.2f}" if ratio else ""))
        cells += [f"{row.get('tokens_agree', '')}"] * told
        yield f"| {row['dtype']} | {name} | {' | '.join(cells)} |"
    for row in rows:
        if "share" in row:
            share, ceiling = row["share"], row["ceiling_gb_s"]["median"]
            span = "{median:.2f} ({min:.2f}-{max:.2f})".format(**share)
            yield f"pronghorn {row['dtype']}: one stream reads its weights at {span} of the {ceiling:.1f} GB/s"


def wanted(args: argparse.Namespace) -> Iterator[Contender]:
    """Who is asked to run, with the model in each one's format."""
    names = args.only.split(",") if args.only else list(PEERS)
    if unknown := [name for name in names if name not in PEERS]:
        raise SystemExit(f"peers.py: --only {unknown[0]}: expected one of {', '.join(PEERS)}")
    work = Path(args.work)
    file = Path(args.model).is_file()  # GGUF: as it is
    for dtype in ["auto"] if file else args.dtype.split(","):
        for engine in names:
            missing = None
            if engine == "llama-bench" and not args.llama_bin:
                missing = "no --llama-bin was given"
            if engine == "fastgpt" and not args.fastgpt:
                missing = "no --fastgpt was given"
            if engine == "pronghorn" or (engine == "torch" and dtype in ("f32", "bf16")):
                yield Contender(engine, dtype, dtype, args.model)
            elif engine == "fastgpt" and dtype == "f32":
                yield Contender(engine, dtype, dtype, args.fastgpt or "", missing)
            elif engine in CONVERTED:
                form, kinds = CONVERTED[engine]
                for kind in () if file and form != "gguf" else ("auto",) if file else kinds.get(dtype, ()):
                    source = Path(args.model) if file else work / f"{form}-{kind}{'.gguf' if form == 'gguf' else ''}"
                    if not missing and not source.exists():
                        missing = convert(args.model, form, kind, source)
                    where = f"{args.llama_bin} with {source}" if engine == "llama-bench" else str(source)
                    yield Contender(engine, dtype, kind if form == "gguf" else dtype, where, missing)


def convert(model: str, form: str, kind: str, path: Path) -> str | None:
    """Makes the model's copy in another format -> what was missing for it."""
    print(f"peers.py: converting to {path.name}", file=sys.stderr)
    unfinished = path.with_name(f"unfinished-{path.name}")
    script = Path(__file__).with_name("convert.py")
    done = subprocess.run(
        [sys.executable, script, model, form, kind, unfinished], stdout=-3, stderr=-1, text=True, check=False
    )
    if done.returncode:
        return f"it was not converted: {(done.stderr.strip().splitlines() or ['?'])[-1][:200]}"
    unfinished.rename(path)
    return None


def main() -> None:
    """Runs what the options ask for."""
    parser = argparse.ArgumentParser(description="pronghorn beside other engines, in turns.")
    parser.add_argument(
        "-m", "--model", required=True, help="a folder in Hugging Face's layout (see shapes.py), or GGUF"
    )
    parser.add_argument("--dtype", default=",".join(DTYPES), help="(default: f32,bf16,int8,int4)")
    parser.add_argument("--only", metavar="NAME,...", help=f"of {', '.join(PEERS)}")
    parser.add_argument("--work", metavar="FOLDER", help="where converted models are kept (default: nowhere)")
    parser.add_argument("--llama-bin", metavar="FOLDER", help="where llama-bench and its kin are")
    parser.add_argument("--fastgpt", metavar="BINARY", help="fastGPT's program, its model and input beside it")
    parser.add_argument("--rounds", type=int, default=5, help="(default: 5)")
    parser.add_argument("--start", action="store_true", help="whole processes, to the first token and to 20")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="(default: all)")
    args = parser.parse_args()
    from pronghorn.bench import machine
    from pronghorn.loading import open_model
    from pronghorn.models import model_for

    vocabulary = model_for(open_model(args.model).config).config.vocab_size
    place = machine(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        args.work = args.work or folder
        Path(args.work).mkdir(parents=True, exist_ok=True)
        contenders = list(wanted(args))
        if not contenders:
            parser.error("there is no such contender")
        runs: list[Turns | Starts] = []
        try:
            for who in contenders:
                runs.append((Starts if args.start else Turns)(who, args.threads, vocabulary))
            for number in range(args.rounds + 1):  # the first is for the caches
                shift = number % len(runs)
                for run in runs[shift:] + runs[:shift]:
                    run.turn(keep=number > 0)
        finally:
            for run in runs:
                run.close()
        reference = [] if args.start else greedy(args.model, vocabulary, args.threads)
    rows = list(summary(contenders, runs, reference))
    for line in table(rows):
        print(line, file=sys.stderr)
    print(json.dumps({"model": args.model, "machine": place, "rounds": args.rounds, "results": rows}))


def greedy(source: str, vocabulary: int, threads: int) -> list[int]:
    """The first tokens in f32 (in a GGUF file's own dtype), which all others are compared with."""
    dtype = "auto" if Path(source).is_file() else "f32"
    return ours(source, dtype, threads)([prompt_ids(N_PROMPT, vocabulary)], 20).tokens[0]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(*sys.argv[2:5], *map(int, sys.argv[5:]))  # type: ignore[arg-type]
    elif sys.argv[1:2] == ["--once"]:
        one, path, kind, n_threads, size, n_tokens = sys.argv[2:]
        PEERS[one].load(path, kind, int(n_threads))([prompt_ids(N_PROMPT, int(size))], int(n_tokens))
    else:
        main()
