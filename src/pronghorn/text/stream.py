"""Decoding one token at a time: the same text as decoding the whole, piece by piece.

A tokenizer.json's decoder is a chain of steps over the list of tokens. Here each step takes its tokens one by one,
and holds back only what the next token may still change: the bytes of an unfinished character, or a run of byte
tokens, which stands or falls as a whole: one bad byte at its end would make U+FFFD of all characters before it.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from pronghorn.errors import CheckpointError


class Step:
    """One step of a decoder: tokens in, text out, which concatenated is what the step gives for the whole list."""

    def push(self, token: str) -> str | None:
        """What is certain after this token; None where nothing is."""
        raise NotImplementedError

    def settle(self) -> str:
        """Lets go of what is held back, but for an unfinished character: another text begins here."""
        return ""

    def finish(self) -> str:
        """What was held back."""
        return ""


class _Each(Step):
    """A step that looks at one token at a time."""

    def __init__(self, function: Callable[[str], str]) -> None:
        self._function = function

    def push(self, token: str) -> str:
        return self._function(token)


class _ByteLevel(Step):
    """GPT-2's alphabet, in which every byte is a printable character, back to bytes, back to text."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: str) -> str | None:
        try:
            data = bytes(map(_BYTE_OF.__getitem__, token))
        except KeyError:  # an added token, written as it is
            data = token.encode()
        return self._decoder.decode(data) or None

    def finish(self) -> str:
        return self._decoder.decode(b"", True)


def _byte_alphabet() -> dict[str, int]:
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


class _ByteFallback(Step):
    """Tokens such as <0xE2>: a run of them is text if all of it is UTF-8, else one U+FFFD for each byte."""

    _TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")

    def __init__(self) -> None:
        self._run = bytearray()

    def push(self, token: str) -> str | None:
        if match := self._TOKEN.fullmatch(token):
            self._run.append(int(match[1], 16))
            return None
        return self.finish() + token

    def settle(self) -> str:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        text = decoder.decode(self._run)
        self._run = bytearray(decoder.getstate()[0])
        return text

    def finish(self) -> str:
        run, self._run = self._run, bytearray()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return "�" * len(run)


class _StripStart(Step):
    """At most `count` of `character` off the start of the text."""

    def __init__(self, character: str, count: int) -> None:
        self._character, self._left = character, count

    def push(self, token: str) -> str:
        while self._left and token:
            if token[0] != self._character:
                self._left = 0
            else:
                self._left -= 1
                token = token[1:]
        return token


class _First(Step):
    """A step that treats the first token in its own way."""

    def __init__(self, first: Callable[[str], str], others: Callable[[str], str]) -> None:
        self._functions = iter((first,))
        self._others = others

    def push(self, token: str) -> str:
        return next(self._functions, self._others)(token)


def plan(decoder: dict[str, Any] | None) -> list[Callable[[], Step]]:
    """Makers of a decoder's steps; CheckpointError for one that this engine does not know.

    `decoder` is tokenizer.json's, as the `tokenizers` library (0.21 to 0.23) defines it.
    """
    if decoder is None:
        return [lambda: _First(str, " ".__add__)]
    chain = list(_flat(decoder))
    steps: list[Callable[[], Step]] = []
    fused = False
    for at, step in enumerate(chain):
        kind = step["type"]
        if kind == "Fuse":
            fused = True
        elif kind == "ByteLevel" and not fused and at == 0:
            steps.append(_ByteLevel)
            fused = True
        elif kind == "ByteFallback" and not fused:
            steps.append(_ByteFallback)
        elif kind == "Replace" and not fused and "String" in step["pattern"]:
            old, new = step["pattern"]["String"], step["content"]
            steps.append(lambda old=old, new=new: _Each(lambda token: token.replace(old, new)))  # type: ignore[misc]
        elif kind == "Strip" and fused and not step["stop"]:
            steps.append(lambda step=step: _StripStart(step["content"], step["start"]))  # type: ignore[misc]
        elif kind == "Metaspace" and not fused:
            sign, never = step["replacement"], step["prepend_scheme"] == "never"
            steps.append(lambda s=sign, n=never: _First(  # type: ignore[misc]
                lambda token: token.replace(s, " " if n else ""), lambda token: token.replace(s, " ")
            ))  # fmt: skip
        else:
            raise CheckpointError(f"the tokenizer's decoder has a step {kind} that is not supported at its place")
    return steps


def token_bytes(token: str, steps: list[Callable[[], Step]]) -> bytes:
    """What a token adds within a text, in which it may end or begin amid a character."""
    if steps and steps[0] is _ByteLevel:
        with suppress(KeyError):  # an added token, written as it is
            return bytes(map(_BYTE_OF.__getitem__, token))
        return token.encode()
    if _ByteFallback in steps and (match := _ByteFallback._TOKEN.fullmatch(token)):
        return bytes([int(match[1], 16)])
    decoder = StreamDecoder(("a", token).__getitem__, steps)
    decoder.prime([0])
    return (decoder.push(1) + decoder.finish()).encode()


def _flat(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    if decoder["type"] == "Sequence":
        return [step for part in decoder["decoders"] for step in _flat(part)]
    return [decoder]


class StreamDecoder:
    """Token ids to text as they come. Never half a character, never one lost; the cost does not grow with the text.

    The concatenation of what `push` and `finish` return is `Tokenizer.decode` of all the ids.
    """

    def __init__(self, token_of: Callable[[int], str | None], steps: list[Callable[[], Step]]) -> None:
        self._token_of = token_of  # None for what is not shown
        self._steps = [make() for make in steps]

    def prime(self, token_ids: Sequence[int]) -> None:
        """Makes what comes the continuation of these tokens, whose own text is not given.

        A space may begin it, and a character that they leave unfinished is completed by it, and given whole.
        """
        texts: list[str] = []
        for token_id in reversed(token_ids):
            if (text := self._token_of(token_id)) is not None:
                texts.append(text)
            if len(texts) == 4:  # the bytes of the longest character
                break
        for text in reversed(texts):
            self._through(text, 0)
        for at, step in enumerate(self._steps):
            if text := step.settle():
                self._through(text, at + 1)

    def push(self, token_id: int) -> str:
        """The text that is certain after this token; often a word, sometimes nothing."""
        text = self._token_of(token_id)
        if text is None:
            return ""
        return self._through(text, 0)

    def finish(self) -> str:
        """What was held back, when no more tokens come."""
        return "".join(self._through(step.finish(), at + 1) for at, step in enumerate(self._steps))

    def _through(self, text: str, start: int) -> str:
        for step in self._steps[start:]:
            after = step.push(text)
            if after is None:
                return ""
            text = after
        return text
