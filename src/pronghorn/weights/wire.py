"""Protocol buffers' wire format, as SentencePiece's models and TensorFlow's checkpoints need it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any


def fields(data: memoryview, fixed: Callable[[memoryview], Any]) -> Iterator[tuple[int, Any]]:
    """(field number, integer | bytes | what `fixed` makes of 4 or 8 bytes); ValueError where it is broken.

    Source: protobuf.dev/programming-guides/encoding.
    """
    at = 0
    while at < len(data):
        key, at = varint(data, at)
        wire = key & 7
        if wire == 0:
            value, at = varint(data, at)
            yield key >> 3, value
            continue
        if wire == 2:
            size, at = varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError
        if size > len(data) - at:
            raise ValueError
        part = data[at : at + size]
        at += size
        yield key >> 3, part if wire == 2 else fixed(part)


def varint(data: memoryview, at: int) -> tuple[int, int]:
    """The integer at `at`, of at most ten bytes, and where it ends; ValueError where it is broken."""
    value = 0
    for shift in range(0, 64, 7):
        if at >= len(data):
            break
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError
