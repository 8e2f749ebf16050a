"""Reading a model's file while the interpreter is still busy with its imports: what the command line does first.

The first token needs every page of the weights. Native threads map them, and verify the checksum of packed ones,
beside the imports; whoever opens the same file then gets that very mapping. Where the file cannot be told from the
model's name alone, nothing is begun, and nothing is lost but the head start.
"""

from __future__ import annotations

import os
from pathlib import Path

from pronghorn._native import ReadAhead, checksum
from pronghorn.errors import PronghornError
from pronghorn.machine import usable_processors
from pronghorn.weights.files import fail, map_file

MOST_THREADS = 8

_begun: dict[str, Reading] = {}


class Reading:
    """A mapped file that threads go through. `sums`: of a safetensors file's data, for the checksum.

    `reader.finish()` waits for them, helps, and gives the checksum.
    """

    def __init__(self, path: Path, threads: int, *, sums: bool) -> None:
        self.state = state_of(path)
        self.view = map_file(path)
        start = min(8 + int.from_bytes(self.view[:8], "little"), len(self.view)) if sums else 0
        self.reader = ReadAhead(self.view[start:], sums, min(threads, MOST_THREADS))


def begin(model: str | None, dtype: str) -> None:
    """Starts to read the file that these options of a command lead to, if it is there. Its faults are for others."""
    from pronghorn.weights.hub import cache_folder, default_place, place

    try:
        path = default_place() if model is None else Path(model)
        if model and not path.exists():
            path = place(model) or path
        if path.is_dir():
            path /= "model.safetensors"
        if not path.is_file():
            return
        beginning = f"{place_of(path)}-{dtype}-"
        folder = cache_folder() / "packed"
        packed = [file for file in folder.iterdir() if file.name.startswith(beginning)] if folder.is_dir() else []
        path = packed[0] if packed else path
        _begun[str(path)] = Reading(path, max(1, usable_processors() - 1), sums=bool(packed))
    except (PronghornError, OSError, ValueError):
        pass


def mapped(path: Path) -> memoryview:
    """The bytes of a file: the mapping that is being read, or else a new one."""
    begun = _begun.get(str(path))
    return begun.view if begun and begun.state == state_of(path) else map_file(path)


def reading(path: Path, threads: int) -> Reading:
    """A packed file on its way: begun before, or now."""
    begun = _begun.pop(str(path), None)
    return begun if begun and begun.state == state_of(path) else Reading(path, threads, sums=True)


def end() -> None:
    """Waits for what was begun, and helps it."""
    while _begun:
        _begun.popitem()[1].reader.finish()


def state_of(path: Path) -> tuple[int, ...]:
    """What tells that a file is another one by now; CheckpointError where it cannot be looked at."""
    try:
        status = path.stat()
    except OSError as error:
        fail(path, error.strerror or str(error))
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def place_of(path: Path) -> str:
    """A name for where a file is."""
    return f"{checksum(os.fsencode(os.path.realpath(path))):016x}"
