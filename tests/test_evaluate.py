"""`pronghorn eval`: its figures are those of a plain computation, and of transformers."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest

from pronghorn import LLM, ParameterError, PromptError, SamplingParams
from pronghorn.cli import main
from pronghorn.convert import convert
from pronghorn.evaluate import Window, cut, evaluate, log_softmax, windows_of, windows_of_llama_cpp
from tiny import STORY, save_tiny
from variants import logits as logits_of_transformers


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model", max_position_embeddings=100)


@pytest.fixture(scope="module")
def ids() -> list[int]:
    chance = random.Random(3)
    return [chance.randrange(256) for _ in range(150)]


def test_windows() -> None:
    assert windows_of(range(7), 3) == [(range(3), 1), (range(3, 6), 1)]  # the rest has nothing to score
    assert windows_of(range(8), 3) == [(range(3), 1), (range(3, 6), 1), (range(6, 8), 1)]
    assert windows_of(range(8), 3, 1) == [(range(3), 1)]
    assert windows_of(range(1), 3) == []
    assert windows_of(range(7), 4, stride=2) == [(range(4), 1), (range(2, 6), 2), (range(4, 7), 2)]
    assert windows_of(range(6), 4, stride=2) == [(range(4), 1), (range(2, 6), 2)]


def test_overlapping_windows_score_every_token_once() -> None:
    for n in range(2, 30):
        for window in range(2, 12):
            for stride in range(1, window):
                found = windows_of(range(n), window, stride=stride)
                assert [index for ids, first in found for index in ids[first:]] == list(range(1, n))
                assert all(len(ids) <= window for ids, _ in found)


def test_windows_of_llama_cpp() -> None:
    """As in llama-perplexity: full windows, BOS in the place of the first token, the second half is scored."""
    assert windows_of_llama_cpp(range(13), 6) == [([0, 1, 2, 3, 4, 5], 4), ([6, 7, 8, 9, 10, 11], 4)]
    assert windows_of_llama_cpp(range(13), 6, 1, bos_id=99) == [([99, 1, 2, 3, 4, 5], 4)]
    assert windows_of_llama_cpp(range(12), 6, bos_id=99)[1] == ([99, 7, 8, 9, 10, 11], 4)
    assert windows_of_llama_cpp(range(5), 6) == []


def test_texts_are_cut_by_either_protocol(model: Path) -> None:
    with LLM(model) as llm:
        ids = llm.tokenizer.encode(STORY, add_special=False)
    assert cut(model, STORY, 20, stride=10) == windows_of(ids, 20, stride=10)
    theirs = cut(model, STORY, 20, protocol="llama.cpp")
    assert theirs == windows_of_llama_cpp([256, *ids], 20, bos_id=256)
    assert [window.token_ids[0] for window in theirs] == [256, 256]


@pytest.mark.parametrize("dtype", ["auto", "bf16", "int8", "int4"])
def test_figures_are_those_of_a_plain_computation(model: Path, ids: list[int], dtype: str) -> None:
    found = evaluate(model, windows_of(ids, 60), [dtype])
    reference, result = found["results"]
    losses: dict[str, list[float]] = {"f32": [], dtype: []}
    kl, top1, top5 = [], [], []
    with LLM(model, dtype="f32") as exact, LLM(model, dtype=dtype) as llm:
        assert result["kv_dtype"] == llm.kv_dtype
        for window in (ids[:60], ids[60:120], ids[120:]):
            pair = []
            for name, one in (("f32", exact), (dtype, llm)):
                values = one.logits(window).astype(np.float64)
                p = np.exp(values) / np.exp(values).sum(1, keepdims=True)
                pair.append(p)
                losses[name] += [-np.log(p[i, window[i + 1]]) for i in range(len(window) - 1)]
            for p, q in zip(pair[0][:-1], pair[1][:-1], strict=True):
                kl.append(np.sum(p * np.log(p / q)))
                top1.append(p.argmax() == q.argmax())
                top5.append(len({*np.argsort(p)[-5:]} & {*np.argsort(q)[-5:]}) / 5)
    assert found["windows"] == 3
    assert result["scored_tokens"] == 59 + 59 + 29
    assert reference["perplexity"] == pytest.approx(np.exp(np.mean(losses["f32"])), rel=1e-12)
    assert result["perplexity"] == pytest.approx(np.exp(np.mean(losses[dtype])), rel=1e-12)
    assert result["kl"] == pytest.approx(np.mean(kl), rel=1e-9, abs=1e-15)
    assert result["top1"] == pytest.approx(np.mean(top1))
    assert result["top5"] == pytest.approx(np.mean(top5))
    assert result["perplexity_rise"] == pytest.approx(result["perplexity"] / reference["perplexity"] - 1)
    assert (reference["top1"], reference["top5"], reference["perplexity_rise"]) == (1, 1, 0)
    assert 0 <= reference["kl"] < 1e-12
    assert (result["kl"] > 1e-9) == (dtype != "auto")


def test_perplexity_is_that_of_transformers(model: Path, ids: list[int]) -> None:
    windows = (ids[:60], ids[60:120], ids[120:])
    losses: list[float] = []
    for window in windows:
        values = log_softmax(logits_of_transformers(model, window))
        losses += [-values[i, window[i + 1]] for i in range(len(window) - 1)]
    found = evaluate(model, windows_of(ids, 60), ["f32"])["results"][0]["perplexity"]
    assert found == pytest.approx(np.exp(np.mean(losses)), rel=1e-4)


def test_the_reference_may_be_another_model(model: Path, ids: list[int], tmp_path: Path) -> None:
    """A file in bf16 against its source; and against the first model in bf16, of which it is the same numbers."""
    convert(model, tmp_path / "half", "bf16")
    windows = windows_of(ids, 60, 1)
    first, second = evaluate(tmp_path / "half", windows, reference=model)["results"]
    assert (first["model"], first["dtype"], second["dtype"]) == (str(model), "f32", "auto")
    assert second["kl"] > 1e-7
    assert first["bits_per_weight"] == 32
    assert 16 < second["bits_per_weight"] < 16.3  # vectors stay in f32
    rows = evaluate([model, tmp_path / "half"], windows, ["bf16", "f32"], ["f32"], reference="bf16")["results"]
    assert [row["kl"] < 1e-12 for row in rows] == [True, True, False, False, False]  # its norms are in bf16
    other = save_tiny(tmp_path / "other", vocab_size=300)
    with pytest.raises(ParameterError, match="its vocabulary has 300 tokens, and the model's 258"):
        evaluate(other, windows, reference=model)


def test_length_of_match(model: Path, ids: list[int]) -> None:
    """The tokens until the first other one, generated from the first half of each window."""
    windows = windows_of(ids, 40, 3)
    rows = evaluate(model, windows, ["f32", "int4"], match=12)["results"]
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    lengths = []
    with LLM(model, dtype="f32", kv_dtype="f32") as exact, LLM(model, dtype="int4") as llm:
        for part, _ in windows:
            a, b = (one.generate(part[:20], params).token_ids for one in (exact, llm))
            lengths.append([*(x == y for x, y in zip(a, b, strict=True)), False].index(False))
    assert [row["match"] for row in rows] == [12, 12, np.mean(lengths)]
    assert 0 < np.mean(lengths) < 12


def test_command_line(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text(STORY * 4, encoding="utf-8")
    command = ["eval", str(text), "-m", str(model), "--dtype", "f32,int8", "--kv-dtype", "auto,int8", "--window", "64"]
    assert main([*command, "--limit", "2", "--match", "4", "--json"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    windows = cut(model, STORY * 4, 64, 2)
    expected = evaluate(model, windows, ["f32", "int8"], ["auto", "int8"], match=4)
    about = {"file": str(text), "protocol": "pronghorn", "window": 64, "stride": None}
    assert found == {**about, **expected}
    assert [line.split()[:2] for line in lines[2:]] == [
        ["f32", "f32"], ["f32", "f32"], ["f32", "int8"], ["int8", "bf16"], ["int8", "int8"]
    ]  # fmt: skip


def test_check(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each figure on either side of its threshold, and what a file of thresholds may not say."""
    text, limits = tmp_path / "text.txt", tmp_path / "thresholds.toml"
    text.write_text(STORY, encoding="utf-8")
    command = ["eval", str(text), "-m", str(model), "--dtype", "bf16,int4", "--match", "4", "--check", str(limits)]
    windows = cut(model, STORY)
    rows = {row["dtype"]: row for row in evaluate(model, windows, ["bf16", "int4"], match=4)["results"]}
    keys = ("perplexity", "perplexity_rise", "kl", "top1", "top5", "match")
    for key in keys:
        value = rows["int4"][key]
        for beyond in (True, False):
            sign = (1 if key in keys[3:] else -1) * (1e-6 if beyond else -1e-6)
            limits.write_text(f"[int4]\n{key} = {value + sign!r}\n")
            assert main(command) == int(beyond)
            said = capsys.readouterr().err.splitlines()
            assert (f"int4/bf16: {key} is" in "".join(said), len(said)) == (beyond, int(beyond))
    limits.write_text("kl = 0\n[int4]\nkl = 1e9\n")  # a table takes the place of what is for all
    assert main(command) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("model bf16/bf16: kl is ")
    for wrong, message in (
        ("kl = 0.1\n[int8]\nkl = 1", "[int8] is none of what is measured: bf16, int4"),
        ("KL = 0.1", "KL: expected one of perplexity, "),
        ("kl = true", "kl is True: expected a number"),
        ("kl = nan", "kl is nan: expected a number"),
        ("[int4]\nkl = [1]", "[int4] kl is [1]: expected a number"),
        ("kl 0.1", "thresholds.toml: "),
        ("", "there are no thresholds in it"),
        ("[int4]", "there are no thresholds in it"),
    ):
        limits.write_text(wrong)
        assert main(command) == 2, wrong
        said = capsys.readouterr().err
        assert message in said
        assert len(said.splitlines()) == 1
    limits.write_text("match = 1")
    assert main([part for part in command if part not in ("--match", "4")]) == 2
    assert "match needs --match N" in capsys.readouterr().err


THRESHOLDS = """
top1 = 0.95
perplexity_rise = 0.01
[bf16]
kl = 0.0003
top1 = 0.985
["bf16/int8"]
kl = 0.003
top1 = 0.95
[int8]
kl = 0.003
["int8/int8"]
kl = 0.006
[int4]
kl = 0.18
top1 = 0.80
perplexity_rise = 0.13
"""


def test_quality_of_a_trained_model(test_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What formats cost stories260K is within what was measured and half as much again; f32 is as transformers'."""
    path, text, limits = test_data / "models" / "stories260K", tmp_path / "story.txt", tmp_path / "thresholds.toml"
    with LLM(path, dtype="f32") as llm:
        params = SamplingParams(max_tokens=500, temperature=1.0, seed=1, ignore_eos=True)
        text.write_text(llm.generate("", params).text, encoding="utf-8")
        windows = cut(path, text.read_text(encoding="utf-8"), 256)
    limits.write_text(THRESHOLDS)
    command = ["eval", str(text), "-m", str(path), "--window", "256", "--dtype", "bf16,int8,int4"]
    assert main([*command, "--kv-dtype", "bf16,int8", "--check", str(limits), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["results"][0]
    losses: list[float] = []
    for ids, _ in windows:
        values = log_softmax(logits_of_transformers(path, ids))
        losses += [-values[i, ids[i + 1]] for i in range(len(ids) - 1)]
    assert found["scored_tokens"] == len(losses) > 450
    assert found["perplexity"] == pytest.approx(np.exp(np.mean(losses)), rel=1e-5)


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_picture(model: Path, ids: list[int], tmp_path: Path, kind: str) -> None:
    """Every format is in it but those of the same numbers, and none is outside of the axes."""
    pytest.importorskip("matplotlib", reason="the extra `bench` is not installed")
    from pronghorn.bench import figure_for
    from pronghorn.evaluate import draw

    path = tmp_path / f"picture.{kind}"
    figure = figure_for(str(path))
    draw(figure, evaluate(model, windows_of(ids, 60, 1), ["f32", "bf16", "int8"], ["f32", "int8"]))
    figure.savefig(path)
    assert path.stat().st_size > 1000
    for axes, missing in zip(figure.axes, (1, 0), strict=True):
        texts = [text.get_text() for text in axes.texts]
        assert texts == ["f32", "f32, KV int8", "bf16", "bf16, KV int8", "int8", "int8, KV int8"][missing:]
        low, high = axes.get_xlim()
        assert all(low < line.get_xdata()[0] < high for line in axes.lines)


def test_memory_does_not_grow_with_the_text(model: Path, ids: list[int]) -> None:
    """All that is kept of a window is in the sums: no array outlives its window."""
    import tracemalloc

    peaks = []
    for windows in (2, 20):
        tracemalloc.start()
        evaluate(model, windows_of(ids * 20, 60, windows), ["int8"])
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


@pytest.mark.parametrize(
    ("lacking", "more"), [("lm_eval", ["--harness", "wikitext"]), ("tomli", ["text.txt", "--check", "limits.toml"])]
)
def test_what_an_extra_brings(
    lacking: str, more: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [lacking, "tomllib"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "pronghorn.harness", raising=False)
    assert main(["eval", *more]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"needs {lacking}, which the extra `eval` brings: pip install 'pronghorn[eval]'" in line


def test_mistakes(model: Path, ids: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(PromptError, match="at least two"):
        cut(model, "a")
    with pytest.raises(PromptError, match="a window of 64 is needed"):
        cut(model, "a" * 60, 64, protocol="llama.cpp")
    with pytest.raises(PromptError, match="no token to score"):
        evaluate(model, [])
    with pytest.raises(ParameterError, match="window is 1: expected a whole number of at least 2"):
        cut(model, STORY, 1)
    with pytest.raises(ParameterError, match="limit is 0"):
        cut(model, STORY, limit=0)
    with pytest.raises(ParameterError, match="stride is 21: expected at most the window, 20"):
        cut(model, STORY, 20, stride=21)
    with pytest.raises(ParameterError, match=r"llama\.cpp's windows do not overlap"):
        cut(model, STORY, 20, stride=10, protocol="llama.cpp")
    with pytest.raises(ParameterError, match="protocol is 'hf'"):
        cut(model, STORY, protocol="hf")
    with pytest.raises(ParameterError, match="window is 101: the model's context holds 100"):
        evaluate(model, windows_of(ids, 101))
    with pytest.raises(ParameterError, match="match is 71: the context of 100 tokens has no room"):
        evaluate(model, [Window(ids[:60], 1)], match=71)
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9")
    for name, message in (("missing.txt", "No such file"), ("latin1.txt", "utf-8")):
        assert main(["eval", str(tmp_path / name), "-m", str(model)]) == 2
        assert message in capsys.readouterr().err
    for more, message in (
        (["--dtype", "int5"], "dtype is 'int5'"),
        (["--kv-dtype", "f16"], "kv_dtype is 'f16'"),
        (["--reference", "nowhere"], "nowhere"),
        (["--tasks", "."], "--tasks is for --harness"),
        (["--harness", "x"], "give either a FILE or --harness TASKS"),
    ):
        text = tmp_path / "text.txt"
        text.write_text(STORY, encoding="utf-8")
        assert main(["eval", str(text), "-m", str(model), *more]) == 2
        assert message in capsys.readouterr().err
