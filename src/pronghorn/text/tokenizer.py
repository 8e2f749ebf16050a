"""A model's tokenizer, from whichever files it comes in.

The `tokenizers` library is the reference and does the work: every source is a tokenizer.json, or is said again as one
(`derive.py`), which is kept in the cache folder beside a checksum. What the configuration files beside it say about
special tokens is read here. `derive.py` is imported where something is to be derived, and not at every start.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pronghorn.errors import CheckpointError, NoTokenizer, PromptError, PronghornError
from pronghorn.text.stream import StreamDecoder, plan, token_bytes
from pronghorn.weights.files import fail, map_file, put_file, read_json, shown

if TYPE_CHECKING:
    import tokenizers

    from pronghorn.text.derive import Derived
    from pronghorn.weights import TokenizerSource

__all__ = ["StreamDecoder", "Tokenizer", "open_tokenizer", "token_ids"]

_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_CACHE_FORMAT = 1  # to be raised when derive.py gives another result for the same file

FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "encoder.json", "vocab.bpe", "generation_config.json", "chat_template.jinja",
)  # fmt: skip
"""The files of a folder that tell how its model's text is cut, and where it ends."""

_BYTE_LEVEL_CLASSES = {"GPT2Tokenizer": "gpt-2", "CodeGenTokenizer": "gpt-2", "Qwen2Tokenizer": "qwen2"}
"""How text is cut, which vocab.json and merges.txt do not say, by tokenizer_config.json's `tokenizer_class`."""

# What ends an answer in files that name only the end of a document (GGUF has had a key for it since late in 2024).
_END_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>")


class Tokenizer:
    """Text to token ids, and back.

    `bos_id`: the token that begins a text, None where the model has none. `eos_ids`: the tokens that end one.
    `special_tokens`: the texts of the named special tokens (`bos_token`, ...), which chat templates use.
    `chat_templates`: Jinja sources by name; the usual one is "default".
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        add_bos: bool | None = None,
        add_eos: bool | None = None,
        bos_id: int | None = None,
        eos_ids: Sequence[int] = (),
        special_tokens: Mapping[str, str] | None = None,
        chat_templates: Mapping[str, str] | None = None,
    ) -> None:
        """`add_bos`, `add_eos`: whether encoding adds them; None leaves it to the backend's own post-processor."""
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.special_tokens = dict(special_tokens or {})
        self.chat_templates = dict(chat_templates or {})
        self.bos_id = bos_id
        self.eos_ids = tuple(dict.fromkeys(eos_ids))
        added = backend.get_added_tokens_decoder().values()
        self._skipped = frozenset(token.content for token in added if token.special)
        decoder = backend.decoder
        self._steps = plan(None if decoder is None else json.loads(decoder.__getstate__()))
        self._before, self._after = self._wrapping()
        if add_bos is not None:
            self._before = [bos_id] if add_bos and bos_id is not None else []
        if add_eos is not None:
            self._after = list(self.eos_ids[:1]) if add_eos else []

    def _wrapping(self) -> tuple[list[int], list[int]]:
        """What the post-processor puts before and after a text, seen on a short one."""
        if self._backend.post_processor is None:
            return [], []
        encoding = self._backend.encode("a")
        ids, mask = encoding.ids, encoding.special_tokens_mask
        first = mask.index(0) if 0 in mask else len(mask)
        last = len(mask) - mask[::-1].index(0) if 0 in mask else len(mask)
        return ids[:first], ids[last:]

    @property
    def vocab_size(self) -> int:
        """How many tokens there are; a model's own vocabulary may be padded beyond it."""
        return self._backend.get_vocab_size()

    @property
    def chat_template(self) -> str | None:
        """The model's chat template, or None."""
        return self.chat_templates.get("default")

    def to_json(self) -> str:
        """The tokenizer as the text of a tokenizer.json, with all added tokens."""
        return self._backend.to_str()

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Token ids of a text, with the BOS and EOS that the model's files ask for unless `add_special` is false.

        The texts of special tokens within it become those tokens. A lone surrogate, which is no character, is a
        PromptError: UTF-8 cannot hold it, and replacing it would change the prompt in silence.
        """
        with _guard("the tokenizer"):
            try:
                ids = self._backend.encode(text, add_special_tokens=False).ids
            except TypeError:  # what the library says of a string that UTF-8 cannot hold
                at = next((i for i, character in enumerate(text) if "\ud800" <= character <= "\udfff"), None)
                if at is None:
                    raise
                code = f"U+{ord(text[at]):04X}"
                raise PromptError(f"character {at} of the text is a lone surrogate ({code})") from None
        return [*self._before, *ids, *self._after] if add_special else ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of token ids. Bytes that are not UTF-8 become U+FFFD; ids beyond the vocabulary are nothing."""
        with _guard("the tokenizer"):
            try:
                return self._backend.decode(ids, skip_special_tokens=skip_special)
            except OverflowError:
                raise PromptError("a token id is negative or beyond 32 bits") from None

    def stream(self, *, skip_special: bool = True) -> StreamDecoder:
        """A decoder that takes ids one by one, and gives in all what `decode` gives."""
        token_of = self._backend.id_to_token
        if not skip_special:
            return StreamDecoder(token_of, self._steps)
        skipped = self._skipped

        def shown_token(token_id: int) -> str | None:
            token = token_of(token_id)
            return None if token in skipped else token

        return StreamDecoder(shown_token, self._steps)

    def token_id(self, text: str) -> int | None:
        """The id of the token that is spelled so (in the vocabulary's own spelling), or None."""
        return self._backend.token_to_id(text)

    def id_to_token(self, token_id: int) -> str:
        """A token in the vocabulary's own spelling; PromptError where there is none."""
        token = self._backend.id_to_token(token_id) if 0 <= token_id < 1 << 32 else None
        if token is None:
            raise PromptError(f"there is no token {token_id} (the vocabulary has {self.vocab_size})")
        return token

    def piece(self, token_id: int) -> tuple[bytes, bool]:
        """The bytes that a token adds within a text, and whether it is special, so that `decode` leaves it out.

        A token beyond the vocabulary adds nothing.
        """
        token = self._backend.id_to_token(token_id)
        return (b"", True) if token is None else (token_bytes(token, self._steps), token in self._skipped)


@contextmanager
def _guard(what: object) -> Iterator[None]:
    """Turns what the library raises for a damaged file into CheckpointError, its Rust panics included."""
    try:
        yield
    except (PronghornError, MemoryError):
        raise
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            message = " ".join(str(error).split())
            fail(what, f"cannot be used: {shown(message, 200)}")
        raise


def open_tokenizer(source: TokenizerSource) -> Tokenizer:
    """See `pronghorn.text.open_tokenizer`."""
    if source.gguf is not None and source.gguf.get("tokenizer.ggml.model", "no_vocab") not in ("no_vocab", "none"):
        return _open_gguf(source.gguf)
    if source.folder is not None:
        return _open_folder(source.folder)
    raise NoTokenizer("the model comes without a tokenizer")


def _open_folder(folder: Path) -> Tokenizer:
    config = _optional(folder / "tokenizer_config.json")
    backend, named, adds_bos, adds_eos = _folder_backend(folder, config)
    for source in (_optional(folder / "special_tokens_map.json"), config):
        named.update((name, text) for name in _NAMES if (text := _text(source.get(name))))
    with _guard(folder):
        _add_tokens(backend, folder, config, named)

    ids: dict[str, list[int]] = {"bos": [], "eos": []}
    generation, model = _optional(folder / "generation_config.json"), _optional(folder / "config.json")
    for name, found in ids.items():
        if (index := backend.token_to_id(named.get(f"{name}_token", ""))) is not None:
            found.append(index)
        found += token_ids(folder, generation, name) or token_ids(folder, model, name)
    add_bos, add_eos = (_flag(folder, config, name) for name in ("add_bos_token", "add_eos_token"))
    return _build(
        folder,
        backend,
        add_bos=adds_bos if add_bos is None else add_bos,
        add_eos=adds_eos if add_eos is None else add_eos,
        bos_id=ids["bos"][0] if ids["bos"] else None,
        eos_ids=ids["eos"],
        special_tokens=named,
        chat_templates=_templates(folder, config),
    )


def _folder_backend(
    folder: Path, config: dict[str, Any]
) -> tuple[tokenizers.Tokenizer, dict[str, str], bool | None, bool | None]:
    """The best of a folder's files -> (backend, special tokens by name, whether BOS and EOS are added by default)."""
    if os.path.lexists(path := folder / "tokenizer.json"):  # a broken link is damage, not "no tokenizer"
        return _load(map_file(path), path), {}, None, None
    prefix = _flag(folder, config, "add_prefix_space")
    if os.path.lexists(path := folder / "tokenizer.model"):
        options: list[Any] = [_flag(folder, config, "legacy") is True, prefix]
        return *_derived([path], options, partial(_derive, "from_sentencepiece", path, *options)), True, False
    for vocabulary, merges in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
        if os.path.lexists(path := folder / vocabulary):
            name = str(config.get("tokenizer_class") or "GPT2Tokenizer")
            if (kind := _BYTE_LEVEL_CLASSES.get(name.removesuffix("Fast"))) is None:
                fail(folder, f"{vocabulary} and {merges} of a {shown(name)} are not supported without a tokenizer.json")
            make = partial(_derive, "from_merges", path, folder / merges, kind, bool(prefix))
            return *_derived([path, folder / merges], [kind, prefix], make), False, False
    missing = "holds no tokenizer: neither tokenizer.json, nor tokenizer.model, nor vocab.json and merges.txt"
    raise NoTokenizer(f"{shown(str(folder), 4096)}: {missing}")


def _open_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    from pronghorn.weights.gguf import Metadata

    what: object = "GGUF"
    if isinstance(metadata, Metadata):
        what = metadata.path
        backend, _ = _derived([metadata.path], [], partial(_derive, "from_gguf", metadata, what))
    else:
        backend = _load(_derive("from_gguf", metadata, what).json(what), what)

    def ids(*keys: str) -> list[int]:
        found = (metadata.get(f"tokenizer.ggml.{key}_token_id") for key in keys)
        return [index for index in found if type(index) is int and 0 <= index < backend.get_vocab_size()]

    spm = metadata["tokenizer.ggml.model"] == "llama"
    bos, eos = ids("bos"), ids("eos", "eot", "eom")
    if spm:  # llama.cpp's defaults
        bos, eos = bos or [1], eos or [2]
    if not ids("eot"):
        eos += [index for token in _END_OF_TURN if (index := backend.token_to_id(token)) is not None]
    named = {}
    keys = ("bos", "eos", "unknown", "seperator", "padding", "cls", "mask")  # spelled as GGUF spells them
    for name, key in zip(_NAMES, keys, strict=True):
        for index in ids(key):
            named[name] = backend.id_to_token(index) or ""
    templates = {"default": metadata.get("tokenizer.chat_template")} | {
        key.removeprefix("tokenizer.chat_template."): metadata[key]
        for key in metadata
        if key.startswith("tokenizer.chat_template.")
    }
    adds_bos = metadata.get("tokenizer.ggml.add_bos_token")
    if adds_bos is None:  # llama.cpp's defaults again: BOS for SentencePiece, and for Llama 3's and Mistral's
        adds_bos = spm or _derive("begins_with_bos", metadata)
    return _build(
        what,
        backend,
        add_bos=bool(adds_bos),
        add_eos=bool(metadata.get("tokenizer.ggml.add_eos_token", False)),
        bos_id=bos[0] if bos else None,
        eos_ids=eos,
        special_tokens=named,
        chat_templates={name: text for name, text in templates.items() if isinstance(text, str)},
    )


def _build(what: object, backend: tokenizers.Tokenizer, **properties: Any) -> Tokenizer:
    try:
        with _guard(what):
            return Tokenizer(backend, **properties)
    except CheckpointError as error:
        if str(what) in str(error):
            raise
        fail(what, str(error))


def _load(data: bytes | memoryview, path: object) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer as Backend

    data = bytes(data)
    if b"precompiled_charsmap" in data:
        _check_charsmaps(data, path)
    with _guard(path):
        return Backend.from_buffer(data)


def _check_charsmaps(data: bytes, path: object) -> None:
    """The library takes memory for as many entries as a normalization table claims to have; so check it first."""
    import base64
    import re

    for match in re.finditer(rb'"precompiled_charsmap"\s*:\s*"([^"]*)"', data):
        try:
            _derive("check_charsmap", base64.b64decode(match[1].replace(b"\\/", b"/"), validate=True), path)
        except ValueError:
            fail(path, "the normalization table (precompiled_charsmap) is not base64")


def _derive(function: str, *arguments: Any) -> Any:
    """What a function of derive.py gives; the module is imported only where something is to be derived."""
    from pronghorn.text import derive

    return getattr(derive, function)(*arguments)


def _derived(
    files: list[Path], options: list[Any], make: Callable[[], Derived]
) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """What `make` makes of `files`, or the cache of it -> (backend, special tokens by name).

    A cache file is one line of JSON (what it was made from, and its checksum), then the tokenizer.json. One that is
    damaged, stale or another's is made anew.
    """
    import zlib

    from pronghorn.weights.hub import cache_folder

    source: list[Any] = [_CACHE_FORMAT, options]
    for file in files:
        try:
            status = file.stat()
        except OSError as error:
            fail(file, error.strerror or str(error))
        source.append([os.path.realpath(file), status.st_size, status.st_mtime_ns])
    key = json.dumps(source)
    cached = cache_folder() / "tokenizers" / f"{files[0].parent.name[:40]}-{zlib.crc32(os.fsencode(key)):08x}.json"
    try:
        line, _, data = cached.read_bytes().partition(b"\n")
        head = json.loads(line)
        if head["source"] == source and head["crc32"] == zlib.crc32(data):
            return _load(data, cached), head["named"]
    except (OSError, ValueError, KeyError, TypeError, CheckpointError):
        pass
    derived = make()
    data = derived.json(files[0])
    backend = _load(data, files[0])
    head = {"source": source, "crc32": zlib.crc32(data), "named": derived.named}
    put_file(cached, json.dumps(head).encode() + b"\n" + data)
    return backend, derived.named


def _add_tokens(backend: tokenizers.Tokenizer, folder: Path, config: dict[str, Any], named: dict[str, str]) -> None:
    """Adds what the configuration names beyond the vocabulary's own file, and marks named tokens as special.

    A named token that is in no vocabulary is left out: the model has no row for it.
    """
    from tokenizers import AddedToken

    listed = config.get("added_tokens_decoder")
    if isinstance(listed, dict):
        wanted = {_text(entry): (int(index), entry) for index, entry in listed.items() if str(index).isdecimal()}
    else:
        wanted = {text: (index, {}) for text, index in _optional(folder / "added_tokens.json").items()}
    extra = config.get("additional_special_tokens") or config.get("extra_special_tokens") or []
    special = {*named.values(), *map(_text, extra if isinstance(extra, list) else ())}
    known = {token.content: token.special for token in backend.get_added_tokens_decoder().values()}

    tokens = []
    for text, (index, entry) in sorted(wanted.items(), key=lambda item: item[1][0]):
        if text and text not in known:
            flags = {
                key: entry[key] is True for key in ("single_word", "lstrip", "rstrip", "normalized") if key in entry
            }
            is_special = text in special or entry.get("special") is True
            tokens.append((index, AddedToken(text, special=is_special, **{"normalized": not is_special, **flags})))
    for text in sorted(special - {""}):
        if not known.get(text, text in wanted) and (given := backend.token_to_id(text)) is not None:
            tokens.append((given, AddedToken(text, special=True, normalized=False)))
    for index, token in tokens:
        backend.add_tokens([token])
        if (given := backend.token_to_id(token.content)) != index:
            fail(folder, f"the added token {shown(token.content)} should be {index}, but comes out as {given}")


def _templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Chat templates by name: files of their own (transformers 4.43 and later), or tokenizer_config.json's."""
    templates = {}
    value = config.get("chat_template")
    if isinstance(value, str):
        templates["default"] = value
    elif isinstance(value, list):
        for entry in value:
            if (
                isinstance(entry, dict)
                and isinstance(entry.get("name"), str)
                and isinstance(entry.get("template"), str)
            ):
                templates[entry["name"]] = entry["template"]
    files = {"default": folder / "chat_template.jinja"}
    files.update((path.stem, path) for path in sorted(folder.glob("additional_chat_templates/*.jinja")))
    for name, path in files.items():
        if path.is_file():
            try:
                templates[name] = str(map_file(path), "utf-8")
            except UnicodeDecodeError as error:
                fail(path, f"not UTF-8 at byte {error.start}")
    return templates


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _text(value: Any) -> str:
    """A special token's text, which stands by itself or as the content of an object; "" for anything else."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""


def _flag(folder: Path, config: dict[str, Any], name: str) -> bool | None:
    value = config.get(name)
    if value is not None and not isinstance(value, bool):
        fail(folder / "tokenizer_config.json", f"{name} is {shown(str(value))}, neither true nor false")
    return value


def token_ids(where: object, config: dict[str, Any], name: str) -> list[int]:
    """A configuration's `bos_token_id` or `eos_token_id` (`name`: "bos" or "eos"): a number, a list, or nothing."""
    value = config.get(f"{name}_token_id")
    values = value if isinstance(value, list) else [] if value is None else [value]
    for index in values:
        if type(index) is not int or not 0 <= index < 2**31:
            fail(where, f"{name}_token_id is {shown(str(value))}, not the id of a token")
    return values
