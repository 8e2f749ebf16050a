"""The command line: what it prints where, and how it ends."""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pronghorn import LLM, SamplingParams, __version__
from pronghorn.cli import COMMANDS, main, parser, size, size_of
from pronghorn.engine.engine import Engine
from pronghorn.engine.scheduler import Request
from tiny import STORY, save_tiny

COMMAND = [sys.executable, "-m", "pronghorn"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("tiny") / "model", max_position_embeddings=4000))


Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Runs a command here -> (exit status, standard output, standard error)."""

    def run(*args: str, stdin: str | bytes = "") -> tuple[int, str, str]:
        data = stdin.encode() if isinstance(stdin, str) else stdin
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        try:
            status = main(args)
        except SystemExit as end:
            status = int(end.code or 0)
        out, err = capsys.readouterr()
        return status, out, err

    return run


def fails(result: tuple[int, str, str], message: str) -> None:
    """A user's mistake: status 2, and one line that says so."""
    status, out, err = result
    assert (status, out) == (2, "")
    assert err.startswith("pronghorn: error: ")
    assert err.count("\n") == 1
    assert message in err


def test_generate(cli: Cli, model: str) -> None:
    with LLM(model) as llm:
        expected = llm.generate("hello", SamplingParams(max_tokens=20)).text
    status, out, err = cli("generate", "hello", "-m", model, "-n", "20")
    assert (status, out) == (0, expected + "\n")
    assert err.startswith("pronghorn: 20 tokens (length) at ")
    assert err.count("\n") == 1
    assert "GB/s" in err
    assert cli("generate", "hello", "-m", model, "-n", "20", "-q") == (0, expected + "\n", "")
    assert cli("generate", "hello", "-m", model, "-n", "20", "-q", "--no-cache", "--threads", "2")[1] == expected + "\n"


def test_generate_json(cli: Cli, model: str) -> None:
    options = "--temperature 0.7 --top-k 50 --top-p 0.9 --min-p 0.01 --seed 3 --repetition-penalty 1.1 "
    options += "--presence-penalty 0.1 --frequency-penalty 0.2 --min-tokens 2 --logit-bias 65=2.5 --logit-bias 66=-inf "
    options += "--stop zz --stop yy --stop-token-id 256 --ignore-eos -n 30 --logprobs 2 --json"
    status, out, err = cli("generate", "hello", "-m", model, *options.split())
    assert (status, err) == (0, "")
    found = json.loads(out)
    params = SamplingParams(
        temperature=0.7, top_k=50, top_p=0.9, min_p=0.01, seed=3, repetition_penalty=1.1, presence_penalty=0.1,
        frequency_penalty=0.2, min_tokens=2, logit_bias={65: 2.5, 66: -float("inf")}, stop=["zz", "yy"],
        stop_token_ids=[256], ignore_eos=True, max_tokens=30, logprobs=2,
    )  # fmt: skip
    with LLM(model) as llm:
        expected = llm.generate("hello", params)
    assert found["text"] == expected.text
    assert found["token_ids"] == expected.token_ids
    assert found["finish_reason"] == expected.finish_reason
    assert found["prompt_token_ids"] == expected.prompt_token_ids
    assert found["seed"] == 3
    assert expected.logprobs
    assert found["logprobs"][5] == json.loads(json.dumps(expected.logprobs[5]._asdict()))
    names = "load_s ttft_s prefill_tok_s decode_tok_s bytes_per_token bandwidth_gb_s cached_tokens"
    assert found["timings"].keys() == {*names.split(), "drafted_tokens", "accepted_tokens"}


@pytest.mark.parametrize("draft", ["self-int4", "self-int8", "ngram", "model"])
def test_drafts(cli: Cli, model: str, draft: str) -> None:
    draft = model if draft == "model" else draft
    plain = cli("generate", "hello hello hello", "-m", model, "-n", "60", "--temperature", "0.5", "--seed", "1")
    options = ("generate", "hello hello hello", "-m", model, "--draft", draft, "--temperature", "0.5", "--seed", "1")
    status, out, err = cli(*options, "-n", "60")
    assert (status, out) == plain[:2]
    assert (" drafted tokens right, " in err) == (draft != "ngram")
    status, out, err = cli(*options, "-n", "60", "--json")
    timings = json.loads(out)["timings"]
    assert timings["drafted_tokens"] >= timings["accepted_tokens"]
    assert "drafted" not in plain[2]


def test_prompts(cli: Cli, model: str, tmp_path: Path) -> None:
    plain = cli("generate", "two\nlines", "-m", model, "-q")
    file = tmp_path / "prompt"
    file.write_text("two\nlines\n")
    assert cli("generate", "--prompt-file", str(file), "-m", model, "-q") == plain
    assert cli("generate", "--prompt-file", "-", "-m", model, "-q", stdin="two\nlines\r\n") == plain
    assert cli("generate", "", "-m", model, "-q")[0] == 0
    assert cli("generate", "-m", model, "-q", "--", "--json")[0] == 0
    fails(cli("generate", "-m", model), "give either a text or --prompt-file")
    fails(cli("generate", "a", "--prompt-file", "-", "-m", model), "give either a text or --prompt-file")
    fails(cli("generate", "--prompt-file", str(tmp_path / "none"), "-m", model), "No such file")
    fails(cli("generate", "--prompt-file", "-", "-m", model, stdin=b"\xff"), "utf-8")
    fails(cli("generate", "a" * 4000, "-m", model), "the prompt has 4001 tokens, but the context holds 4000")


def test_chat_keeps_spaces_and_refuses_what_is_no_text(cli: Cli, model: str) -> None:
    with LLM(model) as llm:
        ids = llm.chat_prompt([{"role": "user", "content": "  hi"}])
        expected = llm.generate(ids, SamplingParams(max_tokens=3)).text + "\n"
    assert cli("chat", "-m", model, "-n", "3", "-q", stdin="  hi\r\n") == (0, expected, "")
    status, out, err = cli("chat", "-m", model, "-n", "3", "-q", stdin=b"  hi\n\xff\n")
    assert (status, out) == (2, expected)
    assert err.startswith("pronghorn: error: standard input: 'utf-8'")
    assert err.count("\n") == 1


def test_the_chat_prompt_is_not_output(model: str) -> None:
    """At a terminal whose output goes elsewhere."""
    terminal, user = os.openpty()
    process = start("chat", "-m", model, "-n", "3", "-q", stdin=user, stdout=subprocess.PIPE)
    os.write(terminal, b"hi\n/exit\n")
    out, err = process.communicate(timeout=60)
    os.close(terminal)
    os.close(user)
    with LLM(model) as llm:
        ids = llm.chat_prompt([{"role": "user", "content": "hi"}])
        assert out.decode() == llm.generate(ids, SamplingParams(max_tokens=3)).text + "\n"
    assert (process.returncode, err) == (0, b"pronghorn: model: /clear begins anew, /exit leaves\n> > ")


def test_chat_template_and_chat(cli: Cli, model: str) -> None:
    status, out, _ = cli("generate", "--chat", "--system", "be brief", "hi", "-m", model, "--json", "-n", "5")
    assert status == 0
    with LLM(model) as llm:
        ids = llm.chat_prompt([{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}])
        assert json.loads(out)["prompt_token_ids"] == ids
        messages = [{"role": "system", "content": "s"}]
        expected = []
        for text in ("one", "two"):
            messages.append({"role": "user", "content": text})
            expected.append(llm.generate(llm.chat_prompt(messages), SamplingParams(max_tokens=12)).text)
            messages.append({"role": "assistant", "content": expected[-1]})
    options = ("-m", model, "--system", "s", "-n", "12")
    answers = "".join(text + "\n" for text in expected)
    assert cli("chat", *options, "-q", stdin="one\n\ntwo\n") == (0, answers, "")
    status, out, err = cli("chat", *options, stdin="one\n/clear\none\n/exit\ntwo\n")
    assert (status, out) == (0, (expected[0] + "\n") * 2)
    assert err.count("pronghorn: ") == 2
    fails(cli("generate", "a", "--system", "b", "-m", model), "--system is for --chat")


def test_tokenize(cli: Cli, model: str) -> None:
    with LLM(model) as llm:
        ids = llm.tokenizer.encode("héllo")
    assert cli("tokenize", "héllo", "-m", model) == (0, " ".join(map(str, ids)) + "\n", "")
    assert cli("tokenize", "--prompt-file", "-", "-m", model, stdin="héllo\n")[1].split() == [str(i) for i in ids]
    assert cli("tokenize", "héllo", "-m", model, "--no-special")[1].split() == [str(i) for i in ids[1:]]
    assert cli("tokenize", "--decode", *map(str, ids), "-m", model) == (0, "<s>héllo\n", "")
    assert cli("tokenize", "--decode", str(ids)[1:-1], "-m", model, "--no-special") == (0, "héllo\n", "")
    found = json.loads(cli("tokenize", "hé", "-m", model, "--json")[1])
    assert found["token_ids"] == ids[:4]
    assert found["tokens"][:2] == ["<s>", "h"]
    fails(cli("tokenize", "--decode", "x", "-m", model), "token ids")
    fails(cli("tokenize", "--decode", "258", "-m", model), "outside of the vocabulary (0 to 257)")
    fails(cli("tokenize", "a", "b", "-m", model), "one text")
    for given in (("1_0",), ("+5",), ("٣",), ("x",)):
        fails(cli("tokenize", "--decode", *given, "-m", "none"), "token ids")  # before anything is opened
    fails(cli("tokenize", "--decode", "-m", "none"), "give either token ids or --prompt-file")
    fails(
        cli("tokenize", "--decode", "5", "--prompt-file", "x", "-m", "none"), "give either token ids or --prompt-file"
    )
    fails(cli("tokenize", "--decode", "--prompt-file", "-", "-m", "none"), "there are none")


def test_info(cli: Cli, model: str) -> None:
    status, out, err = cli("info", "-m", model)
    assert (status, err) == (0, "")
    facts = json.loads(cli("info", "-m", model, "--json")[1])
    assert f"{facts['parameters']:,} parameters" in out
    assert "hidden_size = 32" in out
    assert facts["config"]["hidden_size"] == 32
    _, out, _ = cli("info", "-m", model, "--dtype", "int8")
    facts = json.loads(cli("info", "-m", model, "--dtype", "int8", "--json")[1])
    assert facts["weight_bytes"] < facts["bytes"] / 2
    assert f"with the weights ({size_of(facts['weight_bytes'])})" in out
    assert size_of(facts["total_bytes"]["bf16"]["4000"]) in out
    assert size_of(facts["weights"][0]["becomes_bytes"]) + ", converted" in out


def test_mistakes(cli: Cli, model: str, tmp_path: Path) -> None:
    for args, message in (
        ([], "required"),
        (["fly"], "fly"),
        (["generate", "a", "--frobnicate"], "--frobnicate"),
        (["generate", "a", "--temp", "1"], "--temp"),
        (["generate", "a", "-n", "many"], "-n/--max-tokens"),
        (["generate", "a", "-m", model, "--temperature", "-1"], "temperature is -1.0"),
        (["generate", "a", "-m", model, "--dtype", "int3"], "dtype is 'int3'"),
        (["generate", "a", "-m", model, "--threads", "0"], "threads is 0"),
        (["generate", "a", "-m", model, "--device", "abacus"], "abacus"),
        (["generate", "a", "-m", model, "--draft", "ngram", "--no-cache"], "drafts need the cache"),
        (["generate", "a", "-m", model, "--logit-bias", "x"], "--logit-bias x"),
        (["generate", "a", "-m", model, "--logit-bias", "999=1"], "token id 999"),
        (["generate", "a", "-m", model, "--logit-bias", "5=1", "--logit-bias", "05=2"], "token 5 has one already"),
        (["generate", "a", "-m", model, "--logit-bias", "1_0=1"], "--logit-bias 1_0=1"),
        (["generate", "a", "-m", model, "--stop-token-id", "1_0"], "--stop-token-id"),
        (["generate", "a", "-m", model, "--device", "cpu:0"], "torch:cpu:0"),
        (["generate", "a", "-m", model, "--kv-memory", "1T"], "--kv-memory"),
        (["generate", "a" * 70, "-m", model, "--kv-memory", "16K"], "holds 64 (kv_memory; the model's is 4000)"),
        (["generate", "a", "-m", ""], "model is ''"),
        (["generate", "--prompt-file", "", "-m", model], "--prompt-file is ''"),
        (["generate", "a", "-m", model, "--logprobs", "1"], "--logprobs is for --json"),
        (["generate", "a", "-m", str(tmp_path)], str(tmp_path)),
        (["generate", "a", "-m", str(tmp_path / "none")], "none"),
        (["info", "-m", "/dev/null"], "/dev/null"),
        (["tokenize", "a", "-m", str(tmp_path)], str(tmp_path)),
    ):
        fails(cli(*args), message)


def test_help_and_version(cli: Cli) -> None:
    assert cli("--version") == (0, f"pronghorn {__version__}\n", "")
    status, out, _ = cli("--help")
    assert status == 0
    assert all(name in out for name in ("generate", "chat", "tokenize", "info", "pull"))
    status, out, _ = cli("generate", "--help")
    options = (
        "-m -n --temperature --top-k --top-p --min-p --seed --dtype --kv-dtype --threads --no-cache --draft --stop "
    )
    assert all(option in out for option in (options + "--ignore-eos --device --json").split())


def test_a_command_is_parsed_without_the_others() -> None:
    """Whose options would take longer to be described than the rest of a start's Python; the help is the same."""

    def commands(top: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
        (found,) = (action for action in top._actions if isinstance(action, argparse._SubParsersAction))
        return dict(found.choices)

    for first in ("", "--help", "nothing"):
        assert list(commands(parser(first))) == list(COMMANDS)
    for name, whole in commands(parser()).items():
        ((only, alone),) = commands(parser(name)).items()
        assert (only, alone.format_help()) == (name, whole.format_help())
        assert alone.get_default("command") == COMMANDS[name][0]


def test_sizes() -> None:
    assert [size(text) for text in ("5", "5K", "5m", "5G")] == [5, 5 << 10, 5 << 20, 5 << 30]
    for text in ("", "K", "1KB", "-1", "1.5G", "1_0"):
        with pytest.raises(ValueError, match="is none"):
            size(text)


def test_statistics(cli: Cli, model: str) -> None:
    bias = ("--logit-bias", "257=100", "-m", model)
    assert cli("generate", "a", *bias, "-n", "3")[2].startswith("pronghorn: 1 tokens, prompt")
    assert cli("generate", "a", *bias, "-n", "3", "--ignore-eos")[2].startswith("pronghorn: 3 tokens (length) at ")
    lines = cli("chat", "-m", model, "-n", "3", stdin="a" * 70 + "\nb\n")[2].splitlines()
    assert "cached" not in lines[0]
    assert "(64 cached)" in lines[1]


def start(*args: str, **options: Any) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.Popen([*COMMAND, *args], env=environment, stderr=subprocess.PIPE, **options)


ENDLESS = ("-n", "3900", "--ignore-eos", "--temperature", "1", "--seed", "1")


def test_text_comes_as_it_is_made_and_ctrl_c_ends_it(model: str) -> None:
    process = start("generate", "hello", "-m", model, *ENDLESS, "--device", "reference", stdout=subprocess.PIPE)
    assert process.stdout
    assert process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, b"pronghorn: interrupted\n")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system has no /proc")
def test_ctrl_c_at_any_time(model: str) -> None:
    """While modules are imported, and three times in a row: one line, and no going on."""
    for i in range(12):
        process = start("generate", "hello", "-m", model, *ENDLESS, "--device", ("cpu", "reference")[i % 2],
                        stdout=subprocess.DEVNULL)  # fmt: skip
        handled, deadline = 0, time.monotonic() + 30
        while not handled and time.monotonic() < deadline:  # until our own handler stands, the interpreter's is there
            status = Path(f"/proc/{process.pid}/status").read_text()
            handled = int(status.partition("SigCgt:")[2].split()[0], 16) >> signal.SIGALRM - 1 & 1
        time.sleep(0.008 * i)
        for _ in range(3):
            process.send_signal(signal.SIGINT)
            time.sleep(0.002)
        _, err = process.communicate(timeout=30)
        assert (process.returncode, err) == (130, b"pronghorn: interrupted\n")


def test_a_dropped_ctrl_c_comes_again(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    class Deaf:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    def listen() -> None:
        Deaf()
        time.sleep(20)

    monkeypatch.setattr("pronghorn.weights.hub.default_model", listen)
    before = signal.getsignal(signal.SIGINT)
    assert cli("pull") == (130, "", "pronghorn: interrupted\n")
    assert signal.getsignal(signal.SIGINT) is before

    def translate() -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("something else") from None

    monkeypatch.setattr("pronghorn.weights.hub.default_model", translate)
    assert cli("pull") == (130, "", "pronghorn: interrupted\n")


@pytest.mark.parametrize(
    ("redirection", "args", "status", "message"),
    [
        ("<&-", "generate a -n 2 -q", 0, b""),
        ("<&-", "generate --prompt-file -", 2, b"standard input: Bad file descriptor"),
        ("<&-", "chat", 2, b"standard input: Bad file descriptor"),
        (">&-", "generate a -n 2", 1, b"standard output: Bad file descriptor"),
        (">&-", "--help", 1, b"standard output: Bad file descriptor"),
        ("2>&-", "generate a -n 2", 0, b""),
        ("2>&-", "generate a --frobnicate", 2, b""),
    ],
)
def test_closed_streams(model: str, redirection: str, args: str, status: int, message: bytes) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    more = "" if args == "--help" else f"-m '{model}'"
    line = f"'{sys.executable}' -m pronghorn {args} {more} {redirection}"
    done = subprocess.run(["sh", "-c", line], env=environment, capture_output=True, timeout=60)
    assert done.returncode == status
    assert message in done.stderr
    assert done.stderr.count(b"\n") == (1 if message else 0)


def test_faults_of_the_system_that_are_not_the_output_s(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("pronghorn.weights.hub.default_model", fail)
    fails(cli("pull"), "Too many open files")


def test_ctrl_c_in_a_long_prompt(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The native step that runs is waited for, and not one more."""
    slow = save_tiny(tmp_path / "slow", max_position_embeddings=100_000)
    steps = 0
    step = Engine.step

    def counted(engine: Engine) -> list[Request]:
        nonlocal steps
        steps += 1
        if steps == 3:
            threading.Timer(0.001, os.kill, (os.getpid(), signal.SIGINT)).start()
        return step(engine)

    monkeypatch.setattr(Engine, "step", counted)
    assert cli("generate", "a" * 90_000, "-m", str(slow)) == (130, "\n", "pronghorn: interrupted\n")
    assert 3 <= steps < 50


def test_a_closed_pipe_is_no_traceback(model: str) -> None:
    process = start("generate", "hello", "-m", model, *ENDLESS, stdout=subprocess.PIPE)
    assert process.stdout
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr
    err = process.stderr.read()
    process.stderr.close()
    assert (process.wait(timeout=60), err) == (141, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_one_line(model: str) -> None:
    with Path("/dev/full").open("wb") as full:
        process = start("generate", "hello", "-m", model, "-q", stdout=full)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 1
        assert err.count(b"\n") == 1
        assert b"No space left" in err


def test_text_is_utf_8_in_any_locale(model: str) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "LC_ALL": "C"}
    environment["PYTHONIOENCODING"] = "ascii"
    args = [*COMMAND, "tokenize", "--decode", "-m", model, "--no-special", "--prompt-file", "-"]
    with LLM(model) as llm:
        ids = " ".join(map(str, llm.tokenizer.encode("é🙂")))
    done = subprocess.run(args, env=environment, input=ids.encode(), capture_output=True, check=True)
    assert done.stdout.decode() == "é🙂\n"
    environment |= {"PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    args = [*COMMAND, "tokenize", "-m", model, "é🙂"]
    done = subprocess.run(args, env=environment, capture_output=True, check=True)
    assert done.stdout.decode().strip() == ids


ROAD = """
_native cli engine engine.engine engine.pace engine.pages engine.sampling engine.scheduler errors generation llm
loading machine models models.base models.config models.llama models.positions ops ops.cpu text text.fast text.stream
text.tokenizer weights weights.ahead weights.files weights.hub weights.quantize weights.safetensors weights.types
"""
HEAVY = """
ast asyncio bz2 ctypes dataclasses decimal email hashlib http inspect jinja2 logging lzma multiprocessing numpy pickle
platform random selectors shutil socket ssl subprocess tempfile tokenizers torch tqdm traceback transformers unicodedata
uuid zipfile zlib
"""


@pytest.mark.parametrize("dtype", ["auto", "int8"])
def test_the_road_to_the_first_token_is_light(model: str, dtype: str, tmp_path: Path) -> None:
    """Once weights are packed and the tokenizer is known, these modules of ours, and none of weight.

    Each costs a part of a millisecond or more; NumPy alone would take as long as all the rest.
    """
    for file in Path(model).iterdir():  # what has just been written may still change, and is not kept
        os.utime(file, (1e9, 1e9))
    code = (
        "import sys; before = set(sys.modules); from pronghorn.weights import quantize; quantize.SMALL = 0;"
        "from pronghorn.cli import main; status = main(sys.argv[1:]);"
        "print(*sorted(set(sys.modules) - before), file=sys.stderr); sys.exit(status)"
    )
    path = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "PYTHONPATH": path, "PRONGHORN_CACHE": str(tmp_path)}
    args = [sys.executable, "-c", code, "generate", "hello", "-q", "-n", "5", "-m", model, "--dtype", dtype]
    first, second = (
        subprocess.run(args, env=environment, capture_output=True, text=True, check=True) for _ in range(2)
    )
    assert "tokenizers" in first.stderr.split()
    assert second.stdout == first.stdout
    modules = second.stderr.split()
    ours = [name.partition(".")[2] for name in modules if name.startswith("pronghorn.")]
    assert ours == sorted(ROAD.split())
    assert [name for name in modules if name.partition(".")[0] in HEAVY.split()] == []
    code = "import sys; before = set(sys.modules); import pronghorn; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "pronghorn\n"


@pytest.mark.parametrize("form", ["", "stories260K.gguf"])
def test_golden(cli: Cli, test_data: Path, form: str) -> None:
    """The characters of golden.txt that follow the prompt."""
    stories = test_data / "models" / "stories260K"
    golden = (stories / "golden.txt").read_text()
    for more in ([], ["--no-cache"]):
        status, out, _ = cli("generate", STORY, "-m", str(stories / form), "-n", "120", "--temperature", "0", *more)
        assert status == 0
        assert len(out) > 200
        assert golden.startswith(STORY + out.removesuffix("\n"))


def test_the_default_model_answers(cli: Cli, default_model: Path) -> None:
    """Sensible English from SmolLM2."""
    status, out, _ = cli("generate", "The capital of France is", "-n", "5")
    assert status == 0
    assert "Paris" in out
    status, out, _ = cli("generate", "--chat", "Why is the sky blue?", "-n", "60")
    assert status == 0
    assert "scatter" in out or "light" in out
