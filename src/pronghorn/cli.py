"""The command line: text to standard output, all else to standard error.

Exit status: 0; 1 for an output that cannot be written; 2 for a user's mistake, in one line; 130 after Ctrl-C; 141
where whoever read the output has closed it, as the shell reports it of other programs.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pronghorn import __version__
from pronghorn.errors import ParameterError, PromptError, PronghornError

if TYPE_CHECKING:
    from pronghorn.engine.sampling import SamplingParams
    from pronghorn.generation import Output, Stream
    from pronghorn.llm import LLM


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command -> the exit status."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # models speak UTF-8, whatever the locale
            stream.reconfigure(encoding="utf-8", errors="replace" if stream is not sys.stdin else "strict")
    try:
        args = parser().parse_args(argv)
        command: Callable[[argparse.Namespace], None] = args.command
        command(args)
        sys.stdout.flush()
    except PronghornError as error:
        say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    except BrokenPipeError:
        # The interpreter flushes once more at exit: into nothing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        say(f"error: {error}")
        return 1
    return 0


def say(line: str) -> None:
    """One line to standard error, wherever the cursor is."""
    sys.stdout.flush()
    print(f"pronghorn: {' '.join(line.split())}", file=sys.stderr)


class Parser(argparse.ArgumentParser):
    """argparse, with mistakes in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"pronghorn: error: {message} (see: {self.prog} --help)\n")


def parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    top = Parser(prog="pronghorn", description="GPT-2 and Llama models at the speed of the memory.", allow_abbrev=False)
    top.add_argument("--version", action="version", version=f"pronghorn {__version__}")
    commands = top.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        made.set_defaults(command=run)
        return made

    add = command("generate", generate, "Go on from a prompt.")
    add.add_argument("prompt", nargs="?", metavar="PROMPT", help='the text to go on from; "" starts from nothing')
    prompt_options(add)
    add.add_argument("--chat", action="store_true", help="ask PROMPT as a user, in the model's chat template")
    add.add_argument("--system", metavar="TEXT", help="with --chat: the system's message")
    sampling_options(add, max_tokens=128)
    add.add_argument("--logprobs", type=int, metavar="N", help="with --json: each token's and the N likeliest's")
    model_options(add)
    add.add_argument("--json", action="store_true", help="print one object instead of the text")
    add.add_argument("-q", "--quiet", action="store_true", help="no line of statistics at the end")

    add = command("chat", chat, "Talk with a model. /clear begins anew, /exit or the end of input leaves.")
    add.add_argument("--system", metavar="TEXT", help="the system's message")
    sampling_options(add, max_tokens=None)
    model_options(add)
    add.add_argument("-q", "--quiet", action="store_true", help="no line of statistics after each answer")

    add = command("tokenize", tokenize, "Text to token ids, or back.")
    add.add_argument("text", nargs="*", metavar="TEXT", help="the text; with --decode: token ids")
    prompt_options(add)
    add.add_argument("--decode", action="store_true", help="token ids to text")
    add.add_argument("--no-special", action="store_true", help="leave out BOS, EOS and the like")
    add.add_argument("-m", "--model", help=MODEL)
    add.add_argument("--json", action="store_true", help="print one object")

    add = command("info", info, "What a model is, and the memory that it needs.")
    add.add_argument("-m", "--model", help=MODEL)
    add.add_argument("--dtype", default="auto", help="auto, f32, bf16, int8 or int4: what weights would become")
    add.add_argument("--json", action="store_true", help="print one object")

    add = command("pull", pull, "Fetch the default model, SmolLM2-135M-Instruct, and print where it is.")
    return top


MODEL = "a folder, a .safetensors or .gguf file, or a name from pull (default: SmolLM2-135M-Instruct)"


def prompt_options(add: argparse.ArgumentParser) -> None:
    """Where text may come from besides the command line."""
    add.add_argument("--prompt-file", metavar="FILE", help="read the text from a file (- is standard input)")


def model_options(add: argparse.ArgumentParser) -> None:
    """Which model, and how it runs."""
    group = add.add_argument_group("model")
    group.add_argument("-m", "--model", help=MODEL)
    group.add_argument("--dtype", default="auto", help="auto, f32, bf16, int8 or int4 (default: the file's own)")
    group.add_argument("--kv-dtype", default="auto", help="auto, f32 or bf16: how keys and values are kept")
    group.add_argument("--threads", type=int, metavar="N", help="(default: as many as this process may use)")
    group.add_argument("--device", default="cpu", help="cpu, cuda, another torch device, or reference")
    group.add_argument("--no-cache", action="store_true", help="compute all from the beginning for every token")
    group.add_argument("--draft", metavar="DRAFT", help="speculation: self-int4, ngram or MODEL")


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
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text")
    group.add_argument("--stop-token-id", action="append", type=int, default=[], metavar="ID", help="end at a token")
    group.add_argument("--ignore-eos", action="store_true", help="go on after the end of the sequence")


def params_of(args: argparse.Namespace) -> SamplingParams:
    """The sampling parameters that were given."""
    from pronghorn.engine.sampling import NAMES, SamplingParams

    given = vars(args)
    values = {name: given[name] for name in NAMES if name in given}
    values["logit_bias"] = dict(biased(text) for text in args.logit_bias)
    return SamplingParams(**values, stop_token_ids=args.stop_token_id)


def biased(text: str) -> tuple[int, float]:
    """ID=X as numbers."""
    token_id, _, bias = text.partition("=")
    try:
        return int(token_id), float(bias)
    except ValueError:
        raise ParameterError(f"--logit-bias {text}: expected ID=X, such as 50256=-inf") from None


def load(args: argparse.Namespace) -> LLM:
    """The model that was asked for."""
    from pronghorn.llm import LLM

    return LLM(
        args.model,
        dtype=args.dtype,
        device=args.device,
        threads=args.threads,
        draft=args.draft,
        kv_dtype=args.kv_dtype,
        use_cache=not args.no_cache,
    )


def text_of(given: str | None, file: str | None) -> str:
    """The text of the command line, or of the file: without the line end that closes it."""
    if (given is None) == (file is None):
        raise PromptError("give either a text or --prompt-file FILE (- is standard input)")
    if file is None:
        return given or ""
    try:
        text = (sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"{file}: {error.strerror if isinstance(error, OSError) else error}") from None
    return text.removesuffix("\n").removesuffix("\r")


def messages_of(system: str | None, user: str) -> list[dict[str, str]]:
    """A conversation's first messages."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": user}]


def generate(args: argparse.Namespace) -> None:
    """`pronghorn generate`."""
    if args.logprobs is not None and not args.json:
        raise ParameterError("--logprobs is for --json")
    if args.system is not None and not args.chat:
        raise ParameterError("--system is for --chat")
    text, params = text_of(args.prompt, args.prompt_file), params_of(args)
    with load(args) as llm:
        prompt = llm.chat_prompt(messages_of(args.system, text)) if args.chat else text
        if args.json:
            out = llm.generate(prompt, params)
            logprobs = None if out.logprobs is None else [entry._asdict() for entry in out.logprobs]
            print_json({**out._asdict(), "logprobs": logprobs, "timings": out.timings._asdict()})
            return
        stream = llm.stream(prompt, params)
        show(stream)
        if not args.quiet:
            statistics(stream.output())


def chat(args: argparse.Namespace) -> None:
    """`pronghorn chat`: each turn's prompt is the whole conversation, whose pages the prefix cache still has."""
    params = params_of(args)
    interactive = sys.stdin.isatty()
    with load(args) as llm:
        llm.chat_prompt(messages_of(args.system, ""))  # no template is an error now, not after the first question
        if interactive:
            import readline  # noqa: F401 (gives input() its line editing)

            print(f"{llm.path.name}: /clear begins anew, /exit leaves", file=sys.stderr)
        start = messages_of(args.system, "")[:-1]
        messages = list(start)
        while True:
            try:
                line = input("> " if interactive else "").strip()
            except EOFError:
                return
            if line == "/exit":
                return
            if line == "/clear":
                messages = list(start)
                continue
            if not line:
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


def show(stream: Stream) -> str:
    """Writes a stream's text as it comes, and ends the line -> the text."""
    text = ""
    try:
        for chunk in stream:
            if chunk.text:
                text += chunk.text
                sys.stdout.write(chunk.text)
                sys.stdout.flush()
    finally:
        stream.close()
        sys.stdout.write("\n")
        sys.stdout.flush()
    return text


def statistics(out: Output) -> None:
    """The line of speeds, on standard error."""
    timings = out.timings
    parts = [f"{len(out.token_ids)} tokens"]
    if timings.decode_tok_s and timings.bandwidth_gb_s:
        parts[0] += f" at {timings.decode_tok_s:.1f} tok/s ({timings.bandwidth_gb_s:.1f} GB/s)"
    parts.append(f"prompt of {len(out.prompt_token_ids)} at {timings.prefill_tok_s:.0f} tok/s")
    parts.append(f"first token after {timings.ttft_s:.3f} s; loaded in {timings.load_s:.3f} s")
    say(", ".join(parts))


def tokenize(args: argparse.Namespace) -> None:
    """`pronghorn tokenize`."""
    from pronghorn.llm import load_tokenizer, open_model

    if args.decode and not args.prompt_file:
        text = " ".join(args.text)
    else:
        if len(args.text) > 1:
            raise PromptError("give one text, in quotes")
        text = text_of(args.text[0] if args.text else None, args.prompt_file)
    tokenizer = load_tokenizer(open_model(args.model).tokenizer)
    if args.decode:
        try:
            ids = [int(part) for part in text.replace(",", " ").split()]
        except ValueError as error:
            raise PromptError(f"--decode takes token ids: {error}") from None
        for token_id in ids:
            if not 0 <= token_id < tokenizer.vocab_size:
                raise PromptError(f"token id {token_id} is outside of the vocabulary (0 to {tokenizer.vocab_size - 1})")
        text = tokenizer.decode(ids, skip_special=args.no_special)
        if not args.json:
            print(text)
            return
    else:
        ids = tokenizer.encode(text, add_special=not args.no_special)
        if not args.json:
            print(*ids)
            return
    tokens = [tokenizer.id_to_token(token_id) for token_id in ids]
    print_json({"text": text, "token_ids": ids, "tokens": tokens})


def info(args: argparse.Namespace) -> None:
    """`pronghorn info`."""
    from pronghorn.llm import describe, open_model
    from pronghorn.models import model_for

    checkpoint = open_model(args.model)
    facts = describe(checkpoint, model_for(checkpoint.config), args.dtype)
    if args.json:
        print_json(facts)
        return
    print(f"{facts['path']}: {facts['format']}, {facts['parameters']:,} parameters, {size_of(facts['bytes'])}")
    for entry in facts["weights"]:
        form = entry["dtype"] if entry["how"] == "mapped" else f"{entry['dtype']} to {entry['becomes']}"
        print(f"  {entry['tensors']:5} tensors {size_of(entry['bytes']):>10}  {form}, {entry['how']}")
    print("config")
    for name, value in facts["config"].items():
        print(f"  {name} = {value}")
    print("keys and values, by tokens of context")
    for length in next(iter(facts["kv_bytes"].values())):
        sizes = "".join(f"  {dtype} {size_of(row[length]):>10}" for dtype, row in facts["kv_bytes"].items())
        print(f"  {length:>8}{sizes}")


def pull(args: argparse.Namespace) -> None:
    """`pronghorn pull`."""
    from pronghorn.weights.hub import default_model

    print(default_model())


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

    print(json.dumps(value, ensure_ascii=False))
