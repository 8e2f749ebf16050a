"""A tokenizer as one mapped file: opened in a millisecond, and encoding without the `tokenizers` library.

The library stays the reference. The first opening loads it, says what it holds again as a file for the core's own
encoder (native/tokenizer.h), and asks both for the same texts; the file is kept in the cache folder, keyed by all the
files that were read. Whatever the encoder does not know how to do as the library does it is left to the library:
whole tokenizers here, single texts there (its answer is then None), and everything else that anyone asks of it.
"""

from __future__ import annotations

import json
import os
import time
from array import array
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pronghorn import __version__, _native
from pronghorn.errors import CheckpointError
from pronghorn.text.stream import _BYTE_OF, StreamDecoder, plan
from pronghorn.weights.files import map_file, put_file, shown

if TYPE_CHECKING:
    import tokenizers

    from pronghorn.text.tokenizer import Tokenizer
    from pronghorn.weights import TokenizerSource

_FORMAT = 1  # to be raised when the same tokenizer gives another file
_SETTLED = 2_000_000_000  # ns; a file that was just written may change again without changing its time
_CLASSIFIED = 0x20000  # code points whose classes are asked for; a text with one beyond is the library's

_NO_TOKEN = 0xFFFFFFFF

# What a Tokenizer holds beside its backend.
_KEPT = ("special_tokens", "chat_templates", "bos_id", "eos_ids", "_skipped", "_before", "_after")


class Encoded(NamedTuple):
    """What is used of the library's Encoding."""

    ids: list[int]


class Backend:
    """What is used of a tokenizers.Tokenizer, from a mapped file; the library itself, once something else is."""

    def __init__(self, mapped: _native.MappedTokenizer, about: dict[str, Any], load: Callable[[], Any]) -> None:
        self._mapped, self._load, self._library = mapped, load, None
        self._size: int = about["size"]
        self._added: dict[str, int] = about["added"]
        self._special = frozenset(about["_skipped"])
        self._steps = plan(about["decoder"])
        self.id_to_token = mapped.token

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copy and pickle ask for these
            raise AttributeError(name)
        return getattr(self._reference(), name)

    def _reference(self) -> Any:
        if self._library is None:
            self._library = self._load()
        return self._library

    def encode(self, text: str, *, add_special_tokens: bool = True) -> Any:
        ids = None if add_special_tokens else self._mapped.encode(text)
        if ids is None:
            return self._reference().encode(text, add_special_tokens=add_special_tokens)
        return Encoded(ids)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        if any(not 0 <= token_id < 1 << 32 for token_id in ids):
            raise OverflowError
        token_of = self.id_to_token
        if skip_special_tokens:
            ids = [token_id for token_id in ids if token_of(token_id) not in self._special]
        stream = StreamDecoder(token_of, self._steps)
        return "".join([*map(stream.push, ids), stream.finish()])

    def token_to_id(self, token: str) -> int | None:
        found = self._added.get(token)
        return self._mapped.find(token) if found is None else found

    def get_vocab_size(self) -> int:
        return self._size


def opened(source: TokenizerSource, load: Callable[[], Tokenizer]) -> Tokenizer:
    """The tokenizer that `load` gives, or one that is the same in all it does from the cache; `load` fills that."""
    key = _key(source)
    if key is None:
        return load()
    from pronghorn.weights.ahead import place_of
    from pronghorn.weights.hub import cache_folder

    path = cache_folder() / "tokenizers" / f"{place_of(_place(source))}.fast"

    def unchanged() -> Tokenizer:
        if _key(source) != key:
            raise CheckpointError(f"{shown(str(_place(source)), 4096)}: has changed since the model was opened")
        return load()

    with suppress(OSError, ValueError, KeyError, TypeError, CheckpointError):
        return restored(map_file(path), key, unchanged)
    tokenizer = load()
    if key == _key(source) and _settled(key) and (data := compiled(tokenizer, key, source.folder)):
        put_file(path, data)
    return tokenizer


def restored(data: bytes | memoryview, key: str, load: Callable[[], Tokenizer]) -> Tokenizer:
    """A Tokenizer from a cache file's bytes; ValueError, KeyError or TypeError where they are another's or damaged."""
    from pronghorn.text.tokenizer import Tokenizer

    mapped = _native.MappedTokenizer(data)
    about = json.loads(mapped.about)
    if about["key"] != key:
        raise ValueError("made of other files")
    tokenizer = Tokenizer.__new__(Tokenizer)
    for name in _KEPT:
        setattr(tokenizer, name, about[name])
    tokenizer.eos_ids, tokenizer._skipped = tuple(about["eos_ids"]), frozenset(about["_skipped"])
    backend: Any = Backend(mapped, about, lambda: load()._backend)
    tokenizer._backend, tokenizer._steps = backend, plan(about["decoder"])
    return tokenizer


def _key(source: TokenizerSource) -> str | None:
    """All files that say anything about a tokenizer, with their sizes and times; None where there are none."""
    if (path := getattr(source.gguf, "path", None)) and "tokenizer.ggml.model" in (source.gguf or ()):
        files = [str(path)]
    elif source.folder is not None and source.gguf is None:
        from pronghorn.text.tokenizer import FILES

        files = [os.path.join(source.folder, name) for name in (*FILES, "config.json")]  # noqa: PTH118 (a start's every millisecond)
        more = source.folder / "additional_chat_templates"
        files += sorted(map(str, more.glob("*.jinja"))) if more.is_dir() else []
    else:
        return None
    states: list[Any] = [__version__, _FORMAT, os.path.realpath(_place(source))]
    for file in files:
        try:
            status = os.stat(file)  # noqa: PTH116
        except OSError:
            if os.path.lexists(file):  # a broken link: an error, which the readers word
                return None
            continue
        states.append([os.path.basename(file), status.st_size, status.st_mtime_ns, status.st_ino])  # noqa: PTH119
    return json.dumps(states)


def _place(source: TokenizerSource) -> Path:
    return Path(getattr(source.gguf, "path", None) or source.folder or "")


def _settled(key: str) -> bool:
    latest = max((state[2] for state in json.loads(key)[3:]), default=0)
    return bool(latest + _SETTLED < time.time_ns())


# --- from the library's tokenizer to the file ---


class _Not(Exception):
    """Raised for a tokenizer that is not one that the core's encoder can do."""


def compiled(tokenizer: Tokenizer, key: str, folder: Path | None) -> bytes | None:
    """The file for a tokenizer that the library has loaded; None where the core's encoder would not be its equal."""
    try:
        data = _compiled(tokenizer, key, folder)
        fast = restored(data, key, lambda: tokenizer)
    except (_Not, KeyError, IndexError, TypeError, ValueError, OverflowError, AttributeError):
        return None
    return data if _agree(tokenizer, fast) else None


def _compiled(tokenizer: Tokenizer, key: str, folder: Path | None) -> bytes:
    library: tokenizers.Tokenizer = tokenizer._backend
    spec = json.loads(library.to_str())
    model, listed = spec["model"], spec["added_tokens"]
    odd = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    _need(model["type"] == "BPE" and not any(model.get(name) for name in odd))
    _need(spec["truncation"] is None and spec["padding"] is None)
    if folder is not None and (folder / "tokenizer.json").is_file():
        # Of a token that is listed twice the library keeps both, and shows one.
        added = json.loads((folder / "tokenizer.json").read_bytes()).get("added_tokens") or []
        _need(len({token["content"] for token in added}) == len({token["id"] for token in added}) == len(added))

    vocab: dict[str, int] = model["vocab"]
    size = 1 + max([*vocab.values(), *(token["id"] for token in listed)])
    _need(size < 1 << 22 and len(set(vocab.values())) == len(vocab))
    tokens: list[str | None] = [None] * size
    for text, index in vocab.items():
        tokens[index] = text or None
    in_model = bytearray(token is not None for token in tokens)
    found = array("I")
    for token in listed:
        index, text = token["id"], token["content"]
        _need(not (token["lstrip"] or token["rstrip"] or token["single_word"]) and tokens[index] in (None, text))
        _need(library.token_to_id(text) == index)
        tokens[index] = text
        found.extend((index, token["normalized"]))

    merges = array("I")
    for left, right in model["merges"]:
        merges.extend((vocab[left], vocab[right], vocab[left + right]))
    rules, alphabet = _rules(spec, any(token["normalized"] for token in listed))
    _need(not (rules[3] == 1 and any(token["normalized"] for token in listed)))  # the library looks for their NFC
    # Without a token for unknown ones, the library leaves out a byte that no token stands for.
    _need(all(token in vocab for token in alphabet) or (rules[0] != 0 and not model["unk_token"]))
    _need(rules[0] == 0 or not model["byte_fallback"])
    classes = b"" if rules[0] == 0 else _classes(bool(rules[3]))
    decoder = library.decoder
    about = {
        **{name: getattr(tokenizer, name) for name in _KEPT},
        "_skipped": sorted(tokenizer._skipped),
        "key": key,
        "size": library.get_vocab_size(),
        "added": {token["content"]: token["id"] for token in listed},
        "decoder": None if decoder is None else json.loads(decoder.__getstate__()),
    }
    return _native.build_tokenizer(
        tokens, in_model, merges, array("I", [vocab.get(token, _NO_TOKEN) for token in alphabet]), found,
        classes, rules, json.dumps(about).encode(),
    )  # fmt: skip


def _need(condition: bool) -> None:
    if not condition:
        raise _Not


_SPLITS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
    + digits
    + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": most
    for digits, most in ((r"\p{N}", 1), (r"\p{N}{1,3}", 3))
}
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
_PREPEND = {"type": "Prepend", "prepend": "▁"}
_SCHEMES = {"never": 0, "always": 2, "first": 3}


def _rules(spec: dict[str, Any], normalized: bool) -> tuple[list[int], list[str]]:
    """native/tokenizer.h's TokenizerRules, and the tokens of the 256 bytes."""
    model, normalizer, steps = spec["model"], spec["normalizer"], spec["pre_tokenizer"]
    cut = digits = apart = prefix = 0
    composed = normalizer == {"type": "NFC"}
    steps = [] if steps is None else steps["pretokenizers"] if steps["type"] == "Sequence" else [steps]
    if steps and steps[-1]["type"] == "ByteLevel":
        _need((normalizer is None or composed) and not steps[-1]["add_prefix_space"])
        before = steps[:-1]
        if steps[-1].get("use_regex", True):
            cut = 1
            apart = before == [{"type": "Digits", "individual_digits": True}]
            _need(apart or not before)
        else:
            _need(len(before) == 1 and before[0]["type"] == "Split" and not before[0]["invert"])
            _need(before[0]["behavior"] == "Isolated")
            cut, digits = 2, _SPLITS[before[0]["pattern"]["Regex"]]
        alphabet = sorted(_BYTE_OF, key=_BYTE_OF.__getitem__)
    else:
        _need(model["byte_fallback"] is True and not model["ignore_merges"] and not normalized)
        parts = [] if normalizer is None else normalizer.get("normalizers") or [normalizer]
        if not steps:
            prefix = [[_REPLACE], [_PREPEND, _REPLACE]].index(parts)
        else:
            (step,) = steps
            _need(not parts and step["type"] == "Metaspace" and step["replacement"] == "▁" and not step["split"])
            prefix = _SCHEMES[step["prepend_scheme"]]
        alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    return [cut, digits, int(apart), int(composed), int(bool(model["ignore_merges"])), prefix], alphabet


def _classes(composed: bool) -> bytes:
    """What the library's regular expressions take every character for: bits of native/tokenizer.h's classes."""
    from tokenizers import Regex, pre_tokenizers

    patterns = (r"\p{L}+", r"\p{N}+", r"\s+")
    steps = [pre_tokenizers.Split(Regex(pattern), "removed") for pattern in patterns]
    digits = pre_tokenizers.Digits(individual_digits=True)
    classes = bytearray(_CLASSIFIED)
    for first in range(0, _CLASSIFIED, 0x800):  # in parts, for the library takes some twenty times their memory
        if first == 0xD800:
            continue
        points = "".join(map(chr, range(first, first + 0x800)))
        for bit, step in enumerate(steps):
            end = 0
            for _, (start, after) in [*step.pre_tokenize_str(points), ("", (len(points), 0))]:
                for at in range(end, start):  # what the pattern took away
                    classes[first + at] |= 1 << bit
                end = after
        for _, (start, end) in digits.pre_tokenize_str(points):
            if end - start == 1 and len(digits.pre_tokenize_str("_" + points[start])) == 2:
                classes[first + start] |= 8
    for bits in classes:
        _need(bits & 7 in (0, 1, 2, 4))
    _need(all(classes[point] & 4 for point in (10, 13, 32)))
    if composed:
        _mark_composed(classes)
    return bytes(classes)


def _mark_composed(classes: bytearray) -> None:
    """Marks the characters that NFC neither changes nor moves nor joins to one before, by Python's tables.

    What these say of an assigned character holds in every version of Unicode (its stability policy); unassigned ones
    are not marked.
    """
    import unicodedata

    seconds = {*range(0x1161, 0x1176), *range(0x11A8, 0x11C3)}  # the vowels and finals of Hangul
    for point in range(0x110000):
        parts = unicodedata.decomposition(chr(point)).split()
        if len(parts) == 2 and parts[0][0] != "<":
            seconds.add(int(parts[1], 16))
    for point in range(_CLASSIFIED):
        character = chr(point)
        if (
            unicodedata.category(character) != "Cn"
            and not unicodedata.combining(character)
            and point not in seconds
            and unicodedata.normalize("NFC", character) == character
        ):
            classes[point] |= 16


_TEXTS = (
    "", "Hello, world! It's 2024; they'LL pay $1,234.50 \u2014 don't.\n\n\tIndented  code = f(x)\r\n  ",
    "na\u00efve caf\u00e9 \u4e16\u754c \u3053\u3093\u306b\u3061\u306f \u0927\u093f \u0663\u0664 \u2167\u00b2 \U0001f600"
    "\U0001f468\u200d\U0001f469 e\u0301 \u1112\u1161\u11ab \u00a0\u2028 '\u017f \u2581\u2581x<0x0A>\x00\x7f",
    " " * 40, "ab" * 300,
)  # fmt: skip


def _agree(tokenizer: Tokenizer, fast: Tokenizer) -> bool:
    """Whether both give the same for some texts, each special token in its place among them."""
    texts = list(_TEXTS)
    added: dict[str, int] = fast._backend._added  # type: ignore[attr-defined]
    for at, token in enumerate(added):
        if at < 50:
            texts.append(f" a {token} b{token}{token}\n{token[:-1]}{token}c")
    for text in texts:
        library = tokenizer._backend.encode(text, add_special_tokens=False).ids
        if fast._backend.encode(text, add_special_tokens=False).ids != library:
            return False
        for skip in (True, False):
            if fast.decode(library, skip_special=skip) != tokenizer.decode(library, skip_special=skip):
                return False
    return all(fast.token_id(text) == tokenizer.token_id(text) for text in (*texts, *added))
