"""A model's tokenizer said again for another format: GGUF's metadata, or the files of Hugging Face's layout.

The opposite of derive.py, and checked against it: what is written is read back, and must cut SAMPLES as the source.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pronghorn.errors import NoTokenizer
from pronghorn.text import derive, open_tokenizer
from pronghorn.text.derive import BYTE, CONTROL, NORMAL, PRE_TOKENIZERS, UNKNOWN, UNUSED, USER_DEFINED
from pronghorn.text.tokenizer import FILES
from pronghorn.weights import TokenizerSource
from pronghorn.weights.files import fail, map_file, read_json, shown
from pronghorn.weights.writing import Raw

if TYPE_CHECKING:
    from pronghorn.text.tokenizer import Tokenizer

SAMPLES = (
    "Alan Turing theorized that computers would one day become very powerful, but even he couldn't imagine: 1234567.",
    "  two  spaces,\ta tab\n\n\nlines \r\n don't STOP'S we'll x=y+z; ...!? (42) 3.14159 000 ",
    "Ünïcödé naïve façade Straße Привет мир 你好，世界 日本語テキスト 한국어 😀👍🏽 e\u0301 ﬁ ½",
    "",
    " ",
)
SPACES = "texts with spaces around them or several in a row are cut in GGUF's way, which is not quite the source's"


def gguf_keys(source: TokenizerSource, vocab_size: int, remarks: list[str]) -> dict[str, Any]:
    """`tokenizer.*` for a GGUF file; a vocabulary of `vocab_size` rows, the last of them perhaps unused.

    What a user should know is added to `remarks`.

    CheckpointError for a tokenizer that GGUF has no words for. Without a tokenizer, the keys say so.
    """
    if source.gguf is not None and "tokenizer.ggml.model" in source.gguf:
        raw = getattr(source.gguf, "raw", None)  # as they stand, in their own types
        names = [key for key in source.gguf if key.startswith("tokenizer.")]
        return {key: Raw(raw(key)) if raw else source.gguf[key] for key in names}
    try:
        tokenizer = open_tokenizer(source)
    except NoTokenizer:
        return {"tokenizer.ggml.model": "no_vocab"}
    assert source.folder is not None
    where = source.folder
    keys = _vocabulary(where, vocab_size)
    adds_bos, adds_eos = _adds(where, tokenizer)
    keys |= {"tokenizer.ggml.add_bos_token": adds_bos, "tokenizer.ggml.add_eos_token": adds_eos}
    ids = {"bos": tokenizer.bos_id, "eos": next(iter(tokenizer.eos_ids), None)}
    ids["eot"] = next(iter(tokenizer.eos_ids[1:]), None)
    for name, key in (("unk_token", "unknown"), ("pad_token", "padding")):
        ids[key] = tokenizer.token_id(tokenizer.special_tokens.get(name, ""))
    keys |= {f"tokenizer.ggml.{key}_token_id": index for key, index in ids.items() if index is not None}
    for name, template in tokenizer.chat_templates.items():
        keys["tokenizer.chat_template" + (f".{name}" if name != "default" else "")] = template
    others = [name for name in tokenizer.chat_templates if name != "default"]
    if others:
        keys["tokenizer.chat_templates"] = others
    _same(where, tokenizer, open_tokenizer(TokenizerSource(gguf=keys)), remarks)
    return keys


def save(source: TokenizerSource, folder: Path) -> Tokenizer | None:
    """Writes the tokenizer's files into `folder` -> the tokenizer, None where there is none."""
    if source.gguf is not None and "tokenizer.ggml.model" in source.gguf:
        try:
            tokenizer = open_tokenizer(source)
        except NoTokenizer:
            return None
        _save_gguf(source.gguf, tokenizer, folder)
        _same(folder, tokenizer, open_tokenizer(TokenizerSource(folder=folder)))
        return tokenizer
    if source.folder is None:
        return None
    names = {"encoder.json": "vocab.json", "vocab.bpe": "merges.txt"}  # OpenAI's, which transformers knows by others
    for name in FILES:
        if (path := source.folder / name).is_file():
            (folder / names.get(name, name)).write_bytes(map_file(path))
    for path in sorted(source.folder.glob("additional_chat_templates/*.jinja")):
        (folder / path.parent.name).mkdir(exist_ok=True)
        (folder / path.parent.name / path.name).write_bytes(map_file(path))
    try:
        tokenizer = open_tokenizer(source)
    except NoTokenizer:
        return None
    if not (folder / "tokenizer_config.json").exists():
        sentencepiece = (folder / "tokenizer.model").exists() and not (folder / "tokenizer.json").exists()
        kind: dict[str, Any] = {"tokenizer_class": "LlamaTokenizer" if sentencepiece else "GPT2Tokenizer"}
        if (folder / "tokenizer.json").exists():
            kind = {"tokenizer_class": "PreTrainedTokenizerFast"}
        adds_bos, adds_eos = _adds(source.folder, tokenizer)
        if sentencepiece:
            kind |= {"add_bos_token": adds_bos, "add_eos_token": adds_eos, "legacy": False}
        named = {name: text for name, text in tokenizer.special_tokens.items() if name != "pad_token"}
        (folder / "tokenizer_config.json").write_text(json.dumps(kind | named, indent=2) + "\n")
    _same(folder, tokenizer, open_tokenizer(TokenizerSource(folder=folder)))
    return tokenizer


def _save_gguf(metadata: Mapping[str, Any], tokenizer: Tokenizer, folder: Path) -> None:
    """A GGUF file's tokenizer as tokenizer.json, and what belongs beside it."""
    derived = derive.from_gguf(metadata, folder)
    adds_bos, adds_eos = _adds(folder, tokenizer)
    before = [tokenizer.id_to_token(tokenizer.bos_id)] if adds_bos and tokenizer.bos_id is not None else []
    after = [tokenizer.id_to_token(tokenizer.eos_ids[0])] if adds_eos else []
    if before or after:  # transformers asks tokenizer.json, and nothing else, what to add
        single = [{"SpecialToken": {"id": token, "type_id": 0}} for token in before]
        single.append({"Sequence": {"id": "A", "type_id": 0}})
        single += [{"SpecialToken": {"id": token, "type_id": 0}} for token in after]
        special = {
            token: {"id": token, "ids": [tokenizer.token_id(token)], "tokens": [token]} for token in {*before, *after}
        }
        pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
        derived.spec["post_processor"] = {
            "type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special
        }  # fmt: skip
    (folder / "tokenizer.json").write_bytes(derived.json(folder))
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= tokenizer.special_tokens
    if template := tokenizer.chat_template:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    if tokenizer.eos_ids:
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": list(tokenizer.eos_ids)}
        (folder / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n")


def _adds(where: Path, tokenizer: Tokenizer) -> tuple[bool, bool]:
    """Whether BOS and EOS are put around a text."""
    bare, full = tokenizer.encode("a", add_special=False), tokenizer.encode("a")
    bos, eos = [tokenizer.bos_id], list(tokenizer.eos_ids[:1])
    for adds_bos, adds_eos in ((False, False), (True, False), (False, True), (True, True)):
        if full == bos * adds_bos + bare + eos * adds_eos:
            return adds_bos, adds_eos
    fail(where, "its tokenizer puts other tokens than BOS and EOS around a text")


def _same(where: Path, old: Tokenizer, new: Tokenizer, remarks: list[str] | None = None) -> None:
    """Raises CheckpointError if the two cut a sample differently; if only spaces are at fault, it is a remark."""
    for text in SAMPLES:
        if old.encode(text) == new.encode(text):
            continue
        bare = " ".join(filter(None, text.split(" ")))
        if remarks is None or bare == text or (bare and old.encode(bare) != new.encode(bare)):
            fail(where, f"its tokenizer cannot be said in the other format: {shown(text)} would be cut in another way")
        if SPACES not in remarks:
            remarks.append(SPACES)


# The vocabulary, in GGUF's words ------------------------------------------------------------------------------


def _vocabulary(folder: Path, vocab_size: int) -> dict[str, Any]:
    tokenizer_json = folder / "tokenizer.json"
    if not tokenizer_json.exists() and (path := folder / "tokenizer.model").exists():
        return _sentencepiece(path, folder, vocab_size)
    if tokenizer_json.exists():
        spec = read_json(tokenizer_json)
    else:
        found = next(pair for pair in _PAIRS if (folder / pair[0]).exists())
        config = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
        kind = "qwen2" if "Qwen2" in str(config.get("tokenizer_class")) else "gpt-2"
        spec = derive.from_merges(folder / found[0], folder / found[1], kind, False).spec
    where = tokenizer_json if tokenizer_json.exists() else folder
    try:
        return _bpe(where, spec, folder, vocab_size)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        _no_words(where, f"of an unexpected form ({shown(str(error))})")


_PAIRS = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))


def _no_words(where: Path, what: str) -> NoReturn:
    fail(where, f"GGUF has no words for a tokenizer that is {what}")


def _bpe(where: Path, spec: dict[str, Any], folder: Path, vocab_size: int) -> dict[str, Any]:
    model = spec["model"]
    if model.get("type", "BPE") != "BPE":
        _no_words(where, f"of the kind {shown(str(model['type']))}")
    tokens: list[str | None] = [None] * vocab_size
    kinds = [UNUSED] * vocab_size
    for token, index in model["vocab"].items():
        _place(where, tokens, index, token)
        kinds[index] = NORMAL
    for added in [*spec.get("added_tokens", ()), *_added(folder)]:
        _place(where, tokens, added["id"], added["content"])
        kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    filled = [f"[PAD{index}]" if token is None else token for index, token in enumerate(tokens)]
    keys: dict[str, Any] = {"tokenizer.ggml.tokens": filled, "tokenizer.ggml.token_type": kinds}
    if not model.get("byte_fallback"):
        pre = _pre_tokenizer(where, spec)
        return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, **keys, "tokenizer.ggml.merges": merges}
    # SentencePiece's BPE in tokenizer.json: a piece's score says when it is made, as the merges' order does.
    made: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        made.setdefault(merge.replace(" ", ""), rank)
    scores = [-1.0 - made.get(token, len(merges)) for token in filled]
    for index, token in enumerate(filled):
        if kinds[index] == NORMAL and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            kinds[index] = BYTE
        if token == model.get("unk_token"):
            kinds[index] = UNKNOWN
    prefix = '"prepend"' in json.dumps(spec.get("normalizer")) or (
        '"prepend_scheme": "never"' not in (steps := json.dumps(spec.get("pre_tokenizer"))) and "Metaspace" in steps
    )
    keys |= {"tokenizer.ggml.scores": scores, "tokenizer.ggml.add_space_prefix": prefix}
    return {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default", **keys}


def _sentencepiece(path: Path, folder: Path, vocab_size: int) -> dict[str, Any]:
    pieces, trainer, normalizer = derive.read_proto(path)
    if trainer.get(3, 1) != 2:
        _no_words(path, "SentencePiece's unigram")
    tokens: list[str | None] = [None] * vocab_size
    kinds, scores = [UNUSED] * vocab_size, [-1e6] * vocab_size
    for index, piece in enumerate(pieces):
        _place(path, tokens, index, piece.text)
        kinds[index], scores[index] = piece.kind, piece.score
    for added in _added(folder):
        _place(path, tokens, added["id"], added["content"])
        kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [f"[PAD{i}]" if token is None else token for i, token in enumerate(tokens)],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": bool(normalizer.get(3, 1)),
    }


def _added(folder: Path) -> Iterable[dict[str, Any]]:
    """What tokenizer_config.json and added_tokens.json add to the vocabulary's own file."""
    config = read_json(path) if (path := folder / "tokenizer_config.json").exists() else {}
    if listed := config.get("added_tokens_decoder"):
        for index, entry in listed.items():
            yield {"id": int(index), "content": entry["content"], "special": entry.get("special") is True}
    elif (path := folder / "added_tokens.json").exists():
        for content, index in read_json(path).items():
            yield {"id": index, "content": content, "special": False}


def _place(where: Path, tokens: list[str | None], index: Any, token: Any) -> None:
    if type(index) is not int or not 0 <= index < len(tokens):
        fail(where, f"token {shown(str(token))} is number {shown(str(index))}; the model has {len(tokens)}")
    if tokens[index] not in (None, token):
        fail(where, f"token {index} is both {shown(str(tokens[index]))} and {shown(str(token))}")
    tokens[index] = token


def _pre_tokenizer(where: Path, spec: dict[str, Any]) -> str:
    """The name that llama.cpp has for a pre-tokenizer (see derive.PRE_TOKENIZERS)."""
    wanted = _steps(spec)
    for name in PRE_TOKENIZERS:
        if _steps(derive.byte_level_spec(name)) == wanted:
            return name
    _no_words(where, f"cut by {shown(json.dumps(spec.get('pre_tokenizer')), 200)}")


def _steps(spec: dict[str, Any]) -> list[Any]:
    """A spec's normalizer and pre-tokenizer without what changes nothing."""
    normalizer, pre = spec.get("normalizer"), spec.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", [pre])
    kept: list[Any] = [normalizer and normalizer.get("type")]
    for step in steps:
        match step.get("type"):
            case "ByteLevel":
                kept.append(("bytes", step.get("add_prefix_space", True), step.get("use_regex", True)))
            case "Split":
                kept.append((next(iter(step["pattern"].values())), step["behavior"], step.get("invert", False)))
            case "Digits":
                kept.append(("digits", step.get("individual_digits", False)))
            case kind:
                kept.append((kind, json.dumps(step)))
    return [*kept, bool(spec["model"].get("ignore_merges"))]
