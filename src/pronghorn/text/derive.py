"""Every other kind of tokenizer file, said again as a tokenizer.json: GPT-2's pairs, SentencePiece models, GGUF.

Each function returns a `Derived`: what the `tokenizers` library reads, and the named special tokens as far as the
source itself knows them. The result is cached by the caller, so clarity is worth more than speed here.
"""

from __future__ import annotations

import struct
from binascii import b2a_base64
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pronghorn.weights import wire
from pronghorn.weights.files import fail, map_file, read_json, shown

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Kinds of pieces, the same numbers in SentencePiece's proto and in GGUF's `tokenizer.ggml.token_type`."""

LONGEST_PIECE = 1024
"""Characters. Deriving merges takes the square of a piece's length; trained pieces have at most a few dozen."""


class Derived(NamedTuple):
    """A tokenizer.json as a dictionary, and special tokens' texts by name (`bos_token`, ...)."""

    spec: dict[str, Any]
    named: dict[str, str]

    def json(self, path: object) -> bytes:
        """The text of the tokenizer.json; `path` is for the message if it cannot be written."""
        import json

        rest = {"version": "1.0", "truncation": None, "padding": None, "post_processor": None}
        try:
            return json.dumps({**rest, **self.spec}, ensure_ascii=False, separators=(",", ":")).encode()
        except UnicodeEncodeError:
            fail(path, "a token is not UTF-8")


# --- byte-level BPE: GPT-2 and its heirs ---

_BYTES: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
_GPT2 = {**_BYTES, "use_regex": True}
_DIGITS = {"type": "Digits", "individual_digits": True}
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_CL100K = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|%s| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
    rf"|%s| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
_CJK = "[一-龥ࠀ-一가-퟿]+"

_LLAMA3 = (_CL100K % r"\p{N}{1,3}", _BYTES)
_QWEN2 = (_CL100K % r"\p{N}", _BYTES)
_DIGITS_GPT2 = (_DIGITS, _GPT2)
PRE_TOKENIZERS: dict[str, tuple[str | dict[str, Any], ...]] = {
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "gigachat", "exaone4", "mellum"), (_GPT2,)),
    **dict.fromkeys(("starcoder", "refact", "command-r", "smollm", "codeshell", "minerva-7b"), _DIGITS_GPT2),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "lfm2", "smaug-bpe", "dbrx"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2", "hunyuan"), _QWEN2),
    "tekken": (_O200K % ("", "", r"\p{N}"), _BYTES),
    **dict.fromkeys(("gpt-4o", "llama4"), (_O200K % (f"{_CONTRACTION}?", f"{_CONTRACTION}?", r"\p{N}{1,3}"), _BYTES)),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, _DIGITS, _BYTES),
    "deepseek-v3": (
        r"\p{N}{1,3}",
        "[一-龥぀-ゟ゠-ヿ]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}",
        _BYTES,
    ),
    "default": (  # llama.cpp's, for files that name none: close to GPT-2's, with punctuation and digits apart
        r"[\p{P}\$\+<=>\^~\|]+",
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
        r"\p{N}+",
        "[0-9][0-9][0-9]",
        _BYTES,
    ),
}
"""How text is cut before merging, by `tokenizer.ggml.pre`: regular expressions, each applied to what the one before
left, or steps of tokenizer.json. They are those of the models' own tokenizer.json, of which llama.cpp's table
(src/llama-vocab.cpp) keeps the names."""

FROM_TIKTOKEN = {"llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "lfm2", "tekken"}
"""Vocabularies from tiktoken: a word that is a token is that token, whatever its merges say. They begin with BOS."""

_COMPOSED = {"qwen2", "deepseek-r1-qwen"}
"""Qwen's tokenizer.json normalizes to NFC first. llama.cpp does not; the model was trained with it."""


def _byte_level(
    kind: str, vocab: dict[str, int], merges: list[str], added: list[dict[str, Any]], add_prefix_space: bool = False
) -> dict[str, Any]:
    steps: list[dict[str, Any]] = []
    for step in PRE_TOKENIZERS[kind]:
        if isinstance(step, str):
            steps.append({"type": "Split", "pattern": {"Regex": step}, "behavior": "Isolated", "invert": False})
        elif step["type"] == "ByteLevel":
            steps.append({**step, "add_prefix_space": add_prefix_space})
        else:
            steps.append(step)
    return {
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if kind in _COMPOSED else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps} if len(steps) > 1 else steps[0],
        "decoder": _BYTES,
        "model": {
            "type": "BPE",
            "vocab": vocab,
            "merges": merges,
            "ignore_merges": kind in FROM_TIKTOKEN,
        },
    }


def byte_level_spec(kind: str) -> dict[str, Any]:
    """How a kind of PRE_TOKENIZERS is said in a tokenizer.json, around an empty vocabulary."""
    return _byte_level(kind, {}, [], [])


def _check_merges(path: object, merges: list[str]) -> None:
    for merge in merges:
        if merge.count(" ") != 1 or merge[0] == " " or merge[-1] == " ":
            fail(path, f"the merge {shown(merge)} is not a pair of tokens")


def from_merges(vocab_file: Path, merges_file: Path, kind: str, add_prefix_space: bool) -> Derived:
    """`vocab.json` and `merges.txt`, or OpenAI's `encoder.json` and `vocab.bpe`, which are the same."""
    vocab = read_json(vocab_file)
    for token, index in vocab.items():
        if type(index) is not int or not 0 <= index < 2**31:
            fail(vocab_file, f"the id of {shown(token)} is {shown(str(index))}, not a number from 0 on")
    try:
        lines = str(map_file(merges_file), "utf-8").split("\n")
    except UnicodeDecodeError as error:
        fail(merges_file, f"not UTF-8 at byte {error.start}")
    merges = [line.rstrip("\r") for line in lines if line.strip() and not line.startswith("#version")]
    _check_merges(merges_file, merges)
    spec = _byte_level(kind, vocab, merges, [], add_prefix_space)
    end = "<|endoftext|>"
    return Derived(spec, dict.fromkeys(("bos_token", "eos_token", "unk_token"), end) if end in vocab else {})


# --- SentencePiece ---


class _Piece(NamedTuple):
    text: str
    score: float
    kind: int


def from_sentencepiece(path: Path, legacy: bool, add_prefix_space: bool | None) -> Derived:
    """A SentencePiece model (sentencepiece_model.proto): BPE or unigram. Plain text gives the library's own tokens.

    `legacy` is transformers' option of that name: the prefix space comes again after each special token.
    """
    pieces, trainer, normalizer = read_proto(path)
    for unsupported, feature in (
        (trainer.get(24), "spaces after words"),
        (not normalizer.get(5, 1), "unescaped spaces"),
        (trainer.get(3, 1) not in (1, 2), "a model of words or characters"),
    ):
        if unsupported:
            fail(path, f"a SentencePiece model with {feature} is not supported")
    charsmap = normalizer.get(2, b"")
    if charsmap:
        check_charsmap(charsmap, path)
    prefix = normalizer.get(3, 1) if add_prefix_space is None else add_prefix_space
    # BPE keeps the order of the pieces, as transformers does: a trained model's scores are -0, -1, -2, ...
    spec = _pieces(
        path, pieces, bpe=trainer.get(3, 1) == 2, order=range(len(pieces)), byte_fallback=bool(trainer.get(35)),
        charsmap=charsmap, prefix=bool(prefix), everywhere=legacy, squeeze=bool(normalizer.get(4, 1)),
    )  # fmt: skip
    named = {}
    for name, field, default in (
        ("unk_token", 40, 0),
        ("bos_token", 41, 1),
        ("eos_token", 42, 2),
        ("pad_token", 43, -1),
    ):
        index = trainer.get(field, default)
        if 0 <= index < len(pieces):
            named[name] = pieces[index].text
    return Derived(spec, named)


def read_proto(path: Path) -> tuple[list[_Piece], dict[int, Any], dict[int, Any]]:
    """A SentencePiece model's pieces, and the fields of its TrainerSpec and NormalizerSpec by number."""
    try:
        return _read_proto(map_file(path))
    except (ValueError, struct.error):
        fail(path, "is not a SentencePiece model, or is damaged")


def check_charsmap(charsmap: bytes, path: object) -> None:
    """Checks that a normalization table's trie lies within it: the library trusts that length before it reads."""
    size = int.from_bytes(charsmap[:4], "little")
    if len(charsmap) < 8 or size % 4 or not 4 <= size <= len(charsmap) - 4:
        fail(path, "the normalization table (precompiled_charsmap) is damaged")


def _read_proto(data: memoryview) -> tuple[list[_Piece], dict[int, Any], dict[int, Any]]:
    """A serialized ModelProto -> (pieces, fields of TrainerSpec, fields of NormalizerSpec); ValueError."""
    pieces: list[_Piece] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    for field, value in _fields(data):
        if field == 1:
            piece = dict(_fields(_message(value)))
            text, score = piece.get(1, b""), piece.get(2, 0.0)
            if not isinstance(text, memoryview) or not isinstance(score, float):
                raise ValueError
            pieces.append(_Piece(str(text, "utf-8"), score, piece.get(3, NORMAL)))
        elif field == 2:
            trainer.update(_fields(_message(value)))
        elif field == 3:
            normalizer.update(_fields(_message(value)))
    if not pieces:
        raise ValueError
    for field in (3, 24, 35, 40, 41, 42, 43):
        value = trainer.get(field, 0)
        if not isinstance(value, int):
            raise ValueError
        if value >= 1 << 63:  # a negative int32 is written as 64 bits
            trainer[field] = value - (1 << 64)
    if not all(isinstance(normalizer.get(field, 0), int) for field in (3, 4, 5)):
        raise ValueError
    normalizer[2] = bytes(_message(normalizer.get(2, memoryview(b""))))
    return pieces, trainer, normalizer


def _message(value: Any) -> memoryview:
    if not isinstance(value, memoryview):
        raise ValueError
    return value


def _fields(data: memoryview) -> Iterator[tuple[int, Any]]:
    return wire.fields(data, lambda part: struct.unpack("<f", part)[0] if len(part) == 4 else part)


def _pieces(
    path: object, pieces: list[_Piece], *, bpe: bool, order: Iterable[float], byte_fallback: bool, charsmap: bytes,
    prefix: bool, everywhere: bool, squeeze: bool,
) -> dict[str, Any]:  # fmt: skip
    """SentencePiece's model as tokenizer.json. `order` ranks pieces for merging, the lowest first.

    `prefix`: a space before the text (add_dummy_prefix), `everywhere` also after each special token. `squeeze`: runs
    of spaces count as one, and those around the text as none (remove_extra_whitespaces).
    """
    vocab: dict[str, int] = {}
    for index, piece in enumerate(pieces):
        if len(piece.text) > LONGEST_PIECE:
            fail(path, f"token {index} is {len(piece.text)} characters long; {LONGEST_PIECE} is the limit")
        if vocab.setdefault(piece.text, index) != index:
            fail(path, f"tokens {vocab[piece.text]} and {index} are both {shown(piece.text)}")
        if not abs(piece.score) < 1e30:
            fail(path, f"token {index} has the score {piece.score}")
    unknown = [index for index, piece in enumerate(pieces) if piece.kind == UNKNOWN]
    if len(unknown) > 1 or (not unknown and not byte_fallback):
        fail(path, f"has {len(unknown)} unknown tokens where one is needed")

    if bpe:
        model: dict[str, Any] = {
            "type": "BPE",
            "vocab": vocab,
            "merges": _merges(pieces, vocab, order),
            "unk_token": pieces[unknown[0]].text if unknown else None,
            "fuse_unk": True,
            "byte_fallback": byte_fallback,
        }
    else:
        # What stands for bytes or controls never matches text, so it must cost more than any way to spell it.
        normal = [piece.score for piece in pieces if piece.kind in (NORMAL, USER_DEFINED)]
        worst = 8 * (min(normal, default=0.0) - 10)
        unk_id = unknown[0] if unknown else None
        scored = [(p.text, p.score if p.kind in (NORMAL, USER_DEFINED) else worst) for p in pieces]
        model = {"type": "Unigram", "vocab": scored, "unk_id": unk_id, "byte_fallback": byte_fallback}

    def replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
        return {"type": "Replace", "pattern": pattern, "content": content}

    normalizers: list[dict[str, Any]] = []
    if charsmap:
        table = b2a_base64(charsmap, newline=False).decode()
        normalizers.append({"type": "Precompiled", "precompiled_charsmap": table})
    if squeeze:
        # A text's own leading spaces, squeezed to one, serve as its prefix: where they were dropped instead, "first"
        # below would not add one, because what is left is not the first of the text.
        around = r"[ ▁]+\z" if prefix and not everywhere else r"\A +|[ ▁]+\z"
        normalizers += [replace({"Regex": around}, ""), replace({"Regex": " {2,}"}, " ")]
    pre_tokenizer: dict[str, Any] | None = None
    if prefix and everywhere:
        normalizers.append({"type": "Prepend", "prepend": "▁"})
    elif prefix:
        # "first" adds its sign only where none stands yet, and sentencepiece in any case: so add another one.
        first = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
        if squeeze:
            normalizers.append(replace({"Regex": r"\A ?▁"}, "▁▁"))
            pre_tokenizer = first
        else:
            steps = [{**first, "replacement": " "}, {**first, "prepend_scheme": "never"}]
            pre_tokenizer = {"type": "Sequence", "pretokenizers": steps}
    normalizers.append(replace({"String": " "}, "▁"))
    decoders = [replace({"String": "▁"}, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "added_tokens": _added((index, piece.text, piece.kind) for index, piece in enumerate(pieces)),
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": pre_tokenizer,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": model,
    }


def _merges(pieces: list[_Piece], vocab: dict[str, int], order: Iterable[float]) -> list[str]:
    """Every way to make a piece of two others, in the order of the made pieces; then of the parts' ids.

    SentencePiece itself needs no merges: it joins the neighbours that make the best piece, the leftmost first. The
    two differ only where one piece can be made in two overlapping ways at once.
    """
    # Spaces are written ▁ before anything is merged, so a piece with a space in it is never made.
    whole = {piece.text for piece in pieces if piece.kind in (NORMAL, USER_DEFINED) and " " not in piece.text}
    ranked = []
    for piece, rank in zip(pieces, order, strict=True):
        if piece.text not in whole:
            continue
        for cut in range(1, len(piece.text)):
            left, right = piece.text[:cut], piece.text[cut:]
            if left in whole and right in whole:
                ranked.append((rank, vocab[left], vocab[right], left, right))
    ranked.sort()
    return [f"{left} {right}" for *_, left, right in ranked]


def _added(tokens: Iterable[tuple[int, str, int]]) -> list[dict[str, Any]]:
    """Tokens that are recognised whole in a text: special ones, which decoding may skip, and the user's own."""
    return [
        {"id": index, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": kind != USER_DEFINED}
        for index, text, kind in tokens
        if kind in (UNKNOWN, CONTROL, USER_DEFINED) and text
    ]  # fmt: skip


# --- GGUF ---


def from_gguf(metadata: Mapping[str, Any], path: object) -> Derived:
    """`tokenizer.ggml.*`, as llama.cpp writes and reads them."""
    tokens = _list(metadata, "tokens", str, path)
    kinds = _list(metadata, "token_type", int, path, len(tokens)) or [NORMAL] * len(tokens)
    model = metadata["tokenizer.ggml.model"]
    if model == "gpt2":
        kind = gguf_kind(metadata)
        if kind not in PRE_TOKENIZERS:
            fail(path, f"the pre-tokenizer {shown(kind)} is not supported ({', '.join(PRE_TOKENIZERS)} are)")
        # An empty token cannot be told apart in a text; it only keeps its place.
        tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(tokens)]
        vocab = {token: index for index, token in enumerate(tokens)}
        if len(vocab) < len(tokens):
            index = next(index for index, token in enumerate(tokens) if vocab[token] != index)
            fail(path, f"tokens {index} and {vocab[tokens[index]]} are both {shown(tokens[index])}")
        merges = _list(metadata, "merges", str, path)
        _check_merges(path, merges)
        added = _added((index, token, kinds[index]) for index, token in enumerate(tokens))
        return Derived(_byte_level(kind, vocab, merges, added), {})
    if model == "llama":
        scores = _list(metadata, "scores", float, path, len(tokens))
        pieces = [_Piece(*piece) for piece in zip(tokens, scores, kinds, strict=True)]
        prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
        spec = _pieces(
            path, pieces, bpe=True, order=[-score for score in scores], byte_fallback=BYTE in kinds, charsmap=b"",
            prefix=bool(prefix), everywhere=True, squeeze=False,
        )  # fmt: skip
        return Derived(spec, {})
    fail(path, f"the tokenizer {shown(str(model))} is not supported (gpt2 and llama are)")


def gguf_kind(metadata: Mapping[str, Any]) -> str:
    """The pre-tokenizer's name. Files from before it was written have llama.cpp's default, and GPT-2 its own."""
    plain = "gpt-2" if metadata.get("general.architecture") == "gpt2" else "default"
    return str(metadata.get("tokenizer.ggml.pre") or plain)


def begins_with_bos(metadata: Mapping[str, Any]) -> bool:
    """Whether BOS begins a text of this vocabulary where the file does not say."""
    return gguf_kind(metadata) in FROM_TIKTOKEN


def _list(metadata: Mapping[str, Any], name: str, kind: type, path: object, length: int | None = None) -> list[Any]:
    key = f"tokenizer.ggml.{name}"
    values = metadata.get(key)
    if values is None and name == "token_type":
        return []
    if not isinstance(values, list) or not values or not set(map(type, values)) <= {kind}:
        fail(path, f"{key} is missing or not a list of {kind.__name__}")
    if length is not None and len(values) != length:
        fail(path, f"{key} has {len(values)} entries for {length} tokens")
    return values
