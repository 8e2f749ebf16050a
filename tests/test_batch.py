"""`pronghorn batch`: every line once, whatever is wrong with it, and however often it is killed."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pronghorn import LLM, PronghornError, SamplingParams
from pronghorn.batch import run
from pronghorn.cli import main
from tiny import save_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def llm(model: Path) -> Iterator[LLM]:
    with LLM(model, threads=1) as llm:
        yield llm


def chat(custom_id: str, **body: Any) -> dict[str, Any]:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, **body}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def read(path: Path) -> dict[int, dict[str, Any]]:
    """OUT by line; no line is there twice."""
    values = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    found = {value["line"]: value for value in values}
    assert len(found) == len(values)
    return found


def test_lines_of_all_forms(llm: LLM, tmp_path: Path) -> None:
    completion = {"custom_id": "c", "url": "/v1/completions", "body": {"prompt": "é", "seed": 1, "temperature": 1}}
    source = write(
        tmp_path / "in",
        [
            {"prompt": "hello", "id": {"any": "value"}, "max_tokens": 5, "logprobs": 1, "prompt_logprobs": 0},
            {"prompt": [1, 2, 3], "n": 2, "seed": 4, "temperature": 1.0, "logit_bias": {"7": -100}},
            "",
            {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4},
            chat("a", logit_bias={"5": 100}, n=2),
            completion,
            chat("b", response_format={"type": "text"}, max_completion_tokens=3, max_tokens=None),
        ],
    )
    assert run(llm, source, tmp_path / "out", {"max_tokens": 9, "ignore_eos": True}) == (6, 0)
    found = read(tmp_path / "out")
    assert set(found) == {1, 2, 4, 5, 6, 7}
    expected = llm.generate("hello", SamplingParams(max_tokens=5, ignore_eos=True, logprobs=1, prompt_logprobs=0))
    first = found[1]
    assert (first["id"], first["text"], first["token_ids"]) == ({"any": "value"}, expected.text, expected.token_ids)
    assert expected.logprobs
    assert first["logprobs"][0]["logprob"] == expected.logprobs[0].logprob
    assert first["prompt_logprobs"][0] is None
    assert len(first["prompt_logprobs"]) == len(first["prompt_token_ids"]) == 6
    two = SamplingParams(max_tokens=9, ignore_eos=True, n=2, seed=4, temperature=1.0, logit_bias={7: -100})
    samples = llm.generate([1, 2, 3], two).samples
    assert [found[2]["token_ids"], found[2]["others"][0]["token_ids"]] == [out.token_ids for out in samples]
    messages = [{"role": "user", "content": "hi"}]
    plain = llm.generate(llm.chat_prompt(messages), SamplingParams(max_tokens=4, ignore_eos=True))
    assert found[4]["token_ids"] == plain.token_ids
    body = found[5]["response"]["body"]
    assert (found[5]["custom_id"], found[5]["error"], found[5]["response"]["status_code"]) == ("a", None, 200)
    assert body["object"] == "chat.completion"
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    assert body["usage"]["completion_tokens"] == 8
    assert body["choices"][0]["finish_reason"] == "length"
    assert found[6]["response"]["body"]["choices"][0]["text"]
    assert found[7]["response"]["body"]["usage"]["completion_tokens"] == 3


def test_errors_are_for_their_lines(llm: LLM, tmp_path: Path) -> None:
    bad: list[tuple[Any, str]] = [
        ("{", "line 1 is no JSON"),
        ("[1]", "no JSON object"),
        ({"prompt": "a", "max_token": 3}, "'max_token' is not known"),
        ({"prompt": "a", "temperature": -1}, "temperature is -1"),
        ({"max_tokens": 3}, "either prompt or messages"),
        ({"prompt": "a", "messages": []}, "either prompt or messages"),
        ({"prompt": 5}, "the prompt is"),
        ({"prompt": [999]}, "token 0 of the prompt is 999"),
        ({"prompt": "a" * 400}, "the context holds 300"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias"),
        (chat("x", stream=True), "stream is true"),
        (chat("x", prompt="a"), "prompt"),
        (chat("x", tools=[]), "'tools' is not known"),
        (chat("x", response_format={"type": "xml"}), "response_format is"),
        ({**chat("x"), "url": "/v1/embeddings"}, "/v1/embeddings|expected the method POST"),
        ({**chat("x"), "method": "GET"}, "expected the method POST"),
        ({**chat("x"), "body": 5}, "a body"),
    ]
    source = write(tmp_path / "in", [line for line, _ in bad] + [{"prompt": "a"}])
    assert run(llm, source, tmp_path / "out", {}) == (len(bad) + 1, len(bad))
    found = read(tmp_path / "out")
    for number, (line, message) in enumerate(bad, 1):
        value = found[number]
        if isinstance(line, dict) and "url" in line:
            assert value["response"]["status_code"] == 400
            assert value["custom_id"] == "x"
            error = value["response"]["body"]["error"]
        else:
            error = value["error"]
        assert re.search(message, error["message"]), error
    assert "text" in found[len(bad) + 1]


def test_what_is_there_is_not_done_again(llm: LLM, tmp_path: Path) -> None:
    """OUT cut anywhere, as a kill leaves it: what was whole stays as it was, and the rest is added."""
    source = write(tmp_path / "in", [{"prompt": [i], "max_tokens": 3, "seed": i, "id": i} for i in range(1, 30)])
    target = tmp_path / "out"
    assert run(llm, source, target, {}) == (29, 0)
    whole = target.read_bytes()
    by_line = read(target)
    assert run(llm, source, target, {}) == (0, 0)
    assert target.read_bytes() == whole
    for cut in random.Random(0).sample(range(len(whole)), 8):
        target.write_bytes(whole[:cut])
        kept = whole[:cut].rpartition(b"\n")
        n_done, n_errors = run(llm, source, target, {})
        assert (n_done, n_errors) == (29 - kept[0].count(b"\n") - bool(kept[1]), 0)
        assert target.read_bytes().startswith(kept[0] + kept[1])
        assert read(target) == by_line


def test_an_id_that_cannot_be_written_is_refused(llm: LLM, tmp_path: Path) -> None:
    """It would be written as another one, with which the file could not be gone on with."""
    source = write(
        tmp_path / "in",
        ['{"prompt": "a", "id": "\\ud800", "max_tokens": 2}', '{"prompt": "a", "id": NaN}', chat("\ud800"), chat("c")],
    )
    assert run(llm, source, tmp_path / "out", {}) == (4, 3)
    found = read(tmp_path / "out")
    for number, name in ((1, "id"), (2, "id"), (3, "custom_id")):
        assert found[number]["error"]["message"] == f"line {number}: {name} is nothing that can be written"
        assert "id" not in found[number]
    assert run(llm, source, tmp_path / "out", {}) == (0, 0)


def test_another_files_results_are_refused(llm: LLM, tmp_path: Path) -> None:
    source = write(tmp_path / "in", [{"prompt": "a", "id": 1, "max_tokens": 1}, {"prompt": "b", "max_tokens": 1}])
    for i, (text, message) in enumerate(
        (
            ("hello\n", "line 1 is not one that"),
            ('{"line": 1, "id": 1}\n{"line": 1, "id": 1}\n', "line 2 is not one that"),
            ('{"line": true}\n', "not one that"),
            ('{"line": 1, "id": 2}\n', "what it has of line 1 is not of"),
            ('{"line": 3}\n', "what it has of line 3 is not of"),
        )
    ):
        target = tmp_path / f"out{i}"
        target.write_text(text)
        with pytest.raises(PronghornError, match=message):
            run(llm, source, target, {})
        assert target.read_text() == text
    with pytest.raises(PronghornError, match="none: No such file"):
        run(llm, tmp_path / "none", tmp_path / "out", {})
    with pytest.raises(PronghornError, match="not a file"):
        run(llm, tmp_path, tmp_path / "out", {})
    with pytest.raises(PronghornError, match="No such file"):
        run(llm, source, tmp_path / "none" / "out", {})


def test_one_at_a_time(llm: LLM, tmp_path: Path) -> None:
    import fcntl

    source, target = write(tmp_path / "in", [{"prompt": "a"}]), tmp_path / "out"
    with target.open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(PronghornError, match="another process writes"):
            run(llm, source, target, {})


def test_killed_again_and_again(model: Path, tmp_path: Path) -> None:
    """SIGKILL, and Ctrl-C, at any time: in the end each line is there once, and is what it would have been."""
    n_lines = 400
    source = write(
        tmp_path / "in",
        [{"prompt": [i % 250, 7], "max_tokens": 40, "seed": i, "temperature": 1.0} for i in range(n_lines)],
    )
    target, sure = tmp_path / "out", tmp_path / "sure"
    command = [
        sys.executable,
        "-m",
        "pronghorn",
        "batch",
        source,
        target,
        "-m",
        model,
        "--ignore-eos",
        "--threads",
        "1",
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    n_before, statuses = 0, []
    for number in (signal.SIGKILL, signal.SIGINT, signal.SIGKILL):
        child = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
        while child.poll() is None and (not target.exists() or len(target.read_bytes().splitlines()) <= n_before):
            time.sleep(0.002)
        child.send_signal(number)
        child.communicate()
        statuses.append(child.returncode)
        n_before = len(target.read_bytes().splitlines())
    assert statuses[0] == -signal.SIGKILL
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0
    assert "0 of them errors" in done.stderr
    assert main(["batch", str(source), str(sure), "-m", str(model), "--ignore-eos", "-q"]) == 0
    assert read(target) == read(sure)
    assert set(read(target)) == set(range(1, n_lines + 1))


def test_command_line(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "in", [{"prompt": "a"}, {"prompt": "b", "max_tokens": 3}])
    assert main(["batch", str(source), str(source), "-m", str(model)]) == 2
    assert "OUT is IN" in capsys.readouterr().err
    assert main(["batch", str(source), str(tmp_path / "out"), "-m", str(model), "-n", "2", "--ignore-eos"]) == 0
    assert "2 lines, 0 of them errors" in capsys.readouterr().err
    assert [len(value["token_ids"]) for _, value in sorted(read(tmp_path / "out").items())] == [2, 3]
