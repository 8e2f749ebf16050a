"""Mapped files and checked JSON: what the readers of checkpoints stand on."""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NoReturn, TypeVar

from pronghorn.errors import CheckpointError, PromptError

T = TypeVar("T")

CHUNK = 2 << 20  # bytes to copy at a time: what is written at once can be one page of the page cache

# What a file that is not what it should be turns out to be, by its first bytes.
_SIGNATURES = (
    (b"PK\x03\x04", "a zip archive (perhaps PyTorch's, a pickle: opening one can run any code)"),
    (b"\x80\x02", "a pickle (opening one can run any code)"),
    (b"\x80\x03", "a pickle (opening one can run any code)"),
    (b"\x80\x04", "a pickle (opening one can run any code)"),
    (b"\x80\x05", "a pickle (opening one can run any code)"),
    (b"version https://git-lfs", "a git-lfs pointer, not the file itself: run `git lfs pull`"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"GGUF", "a GGUF file"),
    (b"ggml", "a GGML file, older than GGUF"),
    (b"lmgg", "a GGML file, older than GGUF"),
    (b"tjgg", "a GGML file, older than GGUF"),
    (b"<", "HTML or XML"),
    (b"{", "JSON"),
)


def fail(path: object, fault: str) -> NoReturn:
    """Raises CheckpointError "PATH: the fault", with a path that stays on one line."""
    raise CheckpointError(f"{shown(str(path), 4096)}: {fault}")


def shown(text: str, limit: int = 100) -> str:
    """Text from a file, fit for a one-line message: escaped where it would not print, cut where long."""
    if not text or not text.isprintable():
        text = ascii(text)
    return text if len(text) <= limit else text[:limit] + "..."


def nature(head: bytes) -> str:
    """What a file that begins with these bytes is, or "" where that is not known."""
    return next((name for signature, name in _SIGNATURES if head.startswith(signature)), "")


def map_file(path: Path) -> memoryview:
    """The bytes of a regular file, mapped read-only and shared: nothing is read before it is used.

    The view keeps the mapping alive. A file that is replaced by renaming keeps its old contents here. Where
    another process cuts a file short in place, the kernel ends this one by SIGBUS at the first read past the new
    end, so that nothing wrong is ever computed (the commands say which file it was, and end with 2): replace a
    model's files, and never rewrite them.
    """
    try:
        # Without O_NONBLOCK, opening a named pipe would wait for its writer.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                fail(path, "is not a regular file")
            if status.st_size == 0:
                fail(path, "is empty")
            return memoryview(in_large_pages(mmap.mmap(fd, status.st_size, mmap.MAP_SHARED, mmap.PROT_READ)))
        finally:
            os.close(fd)
    except OSError as error:
        fail(path, error.strerror or str(error))


def in_large_pages(mapping: mmap.mmap) -> mmap.mmap:
    """The mapping, whose pages come into memory 2 MB at a time, where the system has such for files."""
    with suppress(AttributeError, OSError):
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return mapping


@contextmanager
def replacing(path: Path, size: int) -> Iterator[IO[bytes]]:
    """A file that takes the place of `path` when it is complete and on the disk, and leaves nothing behind if not."""
    import tempfile

    fd, name = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
    try:
        with os.fdopen(fd, "w+b", buffering=0) as file:
            # Where the system can, space is taken now: a full disk is an error here, not a signal in a mapping later.
            getattr(os, "posix_fallocate", lambda fd, _, size: os.ftruncate(fd, size))(fd, 0, size)
            yield file
            os.fsync(fd)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)  # noqa: PTH101 (mkstemp's are for the owner alone)
        os.replace(name, path)  # noqa: PTH105
    except BaseException:
        with suppress(OSError):
            os.unlink(name)  # noqa: PTH108
        raise


def write_all(file: IO[bytes], data: bytes | bytearray | memoryview) -> None:
    """Writes to a file without a buffer, which may take less than all at once."""
    view = memoryview(data).cast("B")
    while len(view):
        view = view[file.write(view) :]


def put_file(path: Path, data: bytes) -> None:
    """Puts a whole file in its place, or none: a full or read-only disk only means that it is made again next time."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, len(data)) as file:
            write_all(file, data)


def read_text(file: str) -> str:
    """The text of a file that a user has named. PromptError for one that cannot be read, or is no UTF-8."""
    try:
        return Path(file).read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(file, error) from None


def unreadable(name: str, error: OSError | UnicodeDecodeError) -> PromptError:
    """What to raise for a file that cannot be read, or is no text."""
    return PromptError(f"{name}: {error.strerror if isinstance(error, OSError) else error}")


def progress(sizes: Iterable[tuple[T, int]], what: str) -> Iterator[T]:
    """Things of these sizes in bytes, with a bar on a terminal's standard error if they take over a second."""
    from tqdm import tqdm

    sizes = list(sizes)
    total = sum(size for _, size in sizes)
    with tqdm(total=total, desc=what, unit="B", unit_scale=True, delay=1, disable=None) as bar:
        for thing, size in sizes:
            yield thing
            bar.update(size)


def read_json(path: Path, limit: int = 100_000_000) -> dict[str, Any]:
    """The JSON object that a file holds (see `parse_json`); the limit is in bytes."""
    view = map_file(path)
    if len(view) > limit:
        fail(path, f"is {len(view)} bytes long; {limit} is the limit")
    return parse_json(view, path)


def parse_json(data: bytes | memoryview, path: object, part: str = "") -> dict[str, Any]:
    """A JSON object. Duplicate keys, NaN, infinities, absurd numbers and absurd nesting are errors.

    `path` and `part` (such as "header: ") stand at the start of messages.
    """
    import json

    try:
        value = json.loads(
            str(data, "utf-8"),
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_float,
            parse_constant=_constant,
        )
    except json.JSONDecodeError as error:
        fail(path, f"{part}broken JSON at line {error.lineno}, column {error.colno}: {error.msg}")
    except UnicodeDecodeError as error:
        fail(path, f"{part}not UTF-8 at byte {error.start}")
    except RecursionError:
        fail(path, f"{part}JSON nested too deeply")
    except MemoryError:
        fail(path, f"{part}JSON too large for the memory")
    except ValueError as error:
        fail(path, f"{part}{error}")
    if not isinstance(value, dict):
        fail(path, f"{part}a JSON object was expected")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    named = dict(pairs)
    if len(named) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {shown(twice)} stands twice")
    return named


def _integer(digits: str) -> int:
    if len(digits) > 20:  # int() takes quadratic time
        raise ValueError(f"the number {shown(digits, 30)} is too large")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"the number {shown(digits, 30)} is too large")
    return value


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
