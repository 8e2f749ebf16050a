"""Tokenizers: token for token what transformers and sentencepiece give, from every kind of file; streams; damage."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pronghorn.errors import CheckpointError, NoTokenizer, PromptError, PronghornError
from pronghorn.text import open_tokenizer
from pronghorn.text.derive import PRE_TOKENIZERS, from_gguf
from pronghorn.text.stream import _BYTE_OF, StreamDecoder, plan, token_bytes
from pronghorn.text.tokenizer import Tokenizer
from pronghorn.weights import TokenizerSource, open_checkpoint

transformers = pytest.importorskip("transformers")
sentencepiece = pytest.importorskip("sentencepiece")
tokenizers = pytest.importorskip("tokenizers")

SPECIALS = ("<s>", "</s>", "<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "[INST]", "<user>")
PARTS = (
    "the", "The", "THE", "don't", "we'LL", "naïve", "straße", "fi", "Ⅷ½²", "x_1", "camelCaseWord", "e.g.", "U.S.A.",
    "def f(x):\n    return x[::-1]\n", "for (int i=0;i<n;++i) { a[i] *= 2; }", "<div class=\"a\">&amp;</div>",
    "\\ud800", "\\n", "https://example.org/?q=1&r=%20", "1234567890", "3.14159", "1,000,000", "٣٤٥", "二〇二四", "0x1F",
    "1e-9",
    "👩‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "😀", "🇫🇷",
    "世界こんにちは", "한국어", "中文，标点。", "العربية", "हिन्दी", "தமிழ்", "ไทย", "עברית",
    "e\u0301", "a\u0308\u0323", "Z\u0351\u036b\u0343", "ﬁ", "①", "Å", "\u200b", "\u00a0",
    "\ufeff", "\u2028", "\x00", "\x7f", " ", "  ", "   ", "\t", "\t\t", "\n", "\n\n\n", "\r\n", " \n ", "▁", "▁▁a",
    "<0x0A>", "<0xE2>", "Ġ", "Ċ", "!", "...", "—", "“quoted”", "'", "''s", "$", "€",
    "\u3000", "𝔘𝔫𝔦", "𐍈", "\U0010ffff", *SPECIALS,
)  # fmt: skip


def _strings(count: int = 10_000) -> list[str]:
    """Deterministic: parts joined in all ways, very long words, and characters from all of Unicode."""
    rng = random.Random(20_250_101)
    strings = ["", *PARTS, "a" * 5_000, "ab" * 3_000, " " * 700, "\n" * 300, "9" * 400, "é" * 1_000, "😀" * 300]
    while len(strings) < count:
        kind = rng.random()
        if kind < 0.7:
            separator = rng.choice(("", " ", " ", "\n"))
            strings.append(separator.join(rng.choice(PARTS) for _ in range(rng.randint(1, 12))))
        elif kind < 0.85:
            points = (rng.choice((0x7F, 0x7FF, 0xFFFF, 0x10FFFF)) for _ in range(rng.randint(1, 30)))
            text = "".join(chr(rng.randint(1, top)) for top in points)
            strings.append(text.encode("utf-8", "replace").decode())
        else:
            strings.append("".join(rng.choice("etaoin shrdlu,.\n\t'0123456789ETA-") for _ in range(rng.randint(1, 80))))
    return strings


STRINGS = _strings()
PLAIN = [text for text in STRINGS if not any(special in text for special in SPECIALS)]
_COMMON = {*"".join(PARTS), *"etaoinshrdlu"} - {"\x00"}
CORPUS = [text for text in STRINGS[:3_000] if len(text) < 400 and set(text) <= _COMMON]


def _same(tokenizer: Tokenizer, reference: Callable[[str], list[int]], strings: list[str] = STRINGS) -> None:
    different = [text for text in strings if tokenizer.encode(text, add_special=False) != reference(text)]
    assert not different, f"{len(different)} of {len(strings)} differ, such as {different[0]!r}"


def _ids_of(backend: Any) -> Callable[[str], list[int]]:
    return lambda text: backend.encode(text, add_special_tokens=False).ids  # type: ignore[no-any-return]


def _transformers(tokenizer: Any, strings: list[str] = STRINGS, **options: Any) -> Callable[[str], list[int]]:
    """What a tokenizer of transformers gives, asked for all the strings at once, which is quicker."""
    ids = tokenizer(strings, **{"add_special_tokens": False, **options})["input_ids"]
    return dict(zip(strings, ids, strict=True)).__getitem__


def _open(folder: Path) -> Tokenizer:
    return open_tokenizer(TokenizerSource(folder=folder))


def _write(folder: Path, **files: Any) -> Path:
    """Files by name, `__` for the dot, from text, bytes or what JSON can hold."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        if not isinstance(content, bytes):
            content = (content if isinstance(content, str) else json.dumps(content)).encode()
        path.write_bytes(content)
    return folder


# --- tokenizers that are trained here ---

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace("{1,3}", "")


def _train_bpe(split: str | None, specials: list[str], nfc: bool = False, digits: bool = False) -> Any:
    """A byte-level BPE of 1,500 tokens, trained by the tokenizers library."""
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

    backend = tokenizers.Tokenizer(models.BPE())
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    if split:
        steps.append(pre_tokenizers.Split(Regex(split), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    if nfc:
        backend.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1_500, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


@pytest.fixture(scope="module")
def llama3() -> Any:
    from tokenizers import processors

    backend = _train_bpe(LLAMA3_SPLIT, ["<|begin_of_text|>", "<|eot_id|>", "<|im_end|>"])
    backend.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]),
    ])  # fmt: skip
    return backend


@pytest.fixture(scope="module")
def qwen2() -> Any:
    return _train_bpe(QWEN2_SPLIT, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], nfc=True)


@pytest.fixture(scope="module")
def smollm() -> Any:
    return _train_bpe(None, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], digits=True)


def _train_sentencepiece(folder: Path, **options: Any) -> bytes:
    text = folder / "corpus.txt"
    text.write_text("\n".join(line for text in CORPUS for line in text.split("\n") if line.strip()))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "trained"), minloglevel=2, hard_vocab_limit=False, num_threads=1,
        **options,
    )  # fmt: skip
    return (folder / "trained.model").read_bytes()


@pytest.fixture(scope="module", params=["llama", "unigram", "bpe"])
def spm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """SentencePiece models: as Llama has it; unigram with normalization; BPE without byte fallback."""
    options: dict[str, dict[str, Any]] = {
        "llama": {
            "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "vocab_size": 1_000,
            "remove_extra_whitespaces": False, "character_coverage": 0.98, "split_digits": True,
            "user_defined_symbols": ["<user>"], "max_sentence_length": 100_000,
        },
        "unigram": {"model_type": "unigram", "byte_fallback": True, "vocab_size": 1_000, "character_coverage": 0.98},
        "bpe": {
            "model_type": "bpe", "normalization_rule_name": "identity", "vocab_size": 900, "add_dummy_prefix": False,
        },
    }  # fmt: skip
    return _train_sentencepiece(tmp_path_factory.mktemp("spm"), **options[request.param])


def _gguf(backend: Any, pre: str, **extra: Any) -> dict[str, Any]:
    """The metadata that llama.cpp's converter writes for a byte-level tokenizer."""
    spec = json.loads(backend.to_str())
    tokens = [token for token, _ in sorted(spec["model"]["vocab"].items(), key=lambda item: item[1])]
    special = {token["content"] for token in spec["added_tokens"]}
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in spec["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        **extra,
    }


def _of_gguf(metadata: dict[str, Any]) -> Tokenizer:
    return open_tokenizer(TokenizerSource(gguf=metadata))


# --- the same tokens ---


def test_gpt2_files_of_openai(test_data: Path) -> None:
    folder = test_data / "models/gpt2-tokenizer"
    merges = [tuple(line.split()) for line in (folder / "vocab.bpe").read_text().split("\n")[1:] if line]
    vocab = json.loads((folder / "encoder.json").read_text())
    reference = transformers.GPT2TokenizerFast(vocab=vocab, merges=merges)
    tokenizer = _open(folder)
    _same(tokenizer, _transformers(reference))
    assert tokenizer.encode("My name is") == [3666, 1438, 318]
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.vocab_size) == (50256, (50256,), 50257)
    for text in STRINGS[:2_000]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids, skip_special=False) == text
        assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True)


def test_stories260k_tokenizer_json(test_data: Path) -> None:
    folder = test_data / "models/stories260K"
    tokenizer = _open(folder)
    _same(tokenizer, _ids_of(tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))))
    # transformers' own class puts a space sign after special tokens too; the file does not.
    auto = transformers.AutoTokenizer.from_pretrained(folder)
    _same(tokenizer, _transformers(auto, PLAIN), PLAIN)
    assert tokenizer.encode("Once") == [1, *tokenizer.encode("Once", add_special=False)]
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, (2,))


def test_stories260k_sentencepiece(test_data: Path, tmp_path: Path) -> None:
    model = test_data / "models/stories260K/tokenizer.model"
    shutil.copy(model, tmp_path)
    tokenizer = _open(tmp_path)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(model))
    _same(tokenizer, reference.encode, PLAIN)
    for text in PLAIN[:2_000]:
        ids = tokenizer.encode(text)
        assert ids[:1] == [1]
        # One space sign at the start stands for none, as in transformers; sentencepiece drops more of them here.
        assert tokenizer.decode(ids).lstrip(" ") == reference.decode(ids[1:]).lstrip(" ")


def test_stories260k_gguf(test_data: Path) -> None:
    folder = test_data / "models/stories260K"
    tokenizer = open_tokenizer(open_checkpoint(folder / "stories260K.gguf").tokenizer)
    # llama.cpp keeps runs of spaces, which this SentencePiece model would squeeze: the same model without that.
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString((folder / "tokenizer.model").read_bytes())
    proto.normalizer_spec.remove_extra_whitespaces = False
    reference = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    _same(tokenizer, reference.encode, PLAIN)
    assert tokenizer.encode("a</s>b") == [1, *reference.encode("a"), 2, *reference.encode("b")]
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, (2,))


def test_default_model(default_model: Path) -> None:
    """Cut as SmolLM2's own tokenizer.json says: digits apart, the rest as GPT-2 does.

    transformers' GGUF reader leaves out the digits, which shows where spaces meet one.
    """
    from gguf import GGUFReader
    from tokenizers import AddedToken, decoders, models, pre_tokenizers

    fields = GGUFReader(default_model).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    kinds = fields["tokenizer.ggml.token_type"].contents()
    backend = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    digits, byte_level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([
        AddedToken(token, normalized=False) for token, kind in zip(tokens, kinds, strict=True) if kind == 3
    ])  # fmt: skip
    tokenizer = open_tokenizer(open_checkpoint(default_model).tokenizer)
    _same(tokenizer, _ids_of(backend))
    auto = transformers.AutoTokenizer.from_pretrained(default_model.parent, gguf_file=default_model.name)
    without_digits = [text for text in STRINGS if not any(character.isnumeric() for character in text)]
    _same(tokenizer, _transformers(auto, without_digits), without_digits)
    assert tokenizer.encode("a  1") == tokenizer.encode("a  ") + tokenizer.encode("1")
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, (2,))
    assert tokenizer.special_tokens["bos_token"] == "<|im_start|>"
    assert tokenizer.chat_template is not None


def test_sentencepiece(spm: bytes, tmp_path: Path) -> None:
    tokenizer = _open(_write(tmp_path, tokenizer__model=spm))
    reference = sentencepiece.SentencePieceProcessor(model_proto=spm)
    strings = [text for text in PLAIN if "\x00" not in text]
    if reference.piece_to_id("<user>") != reference.unk_id():
        strings += ["a<user>b", "a <user> a", "a <user>"]
    normalized = [text for text in strings if _normalizes_alike(tokenizer, reference, text)]
    assert len(normalized) > 0.9 * len(strings)
    different = [text for text in normalized if not _equally_good(tokenizer, reference, text)]
    assert not different
    assert tokenizer.encode("a") == [1, *reference.encode("a")]
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, (2,))
    assert tokenizer.encode("a</s>")[-1] == 2
    for text in normalized[:2_000]:
        ids = reference.encode(text)
        if reference.unk_id() not in ids:
            assert tokenizer.decode(ids).lstrip(" ") == reference.decode(ids).lstrip(" ")


def _equally_good(tokenizer: Tokenizer, reference: Any, text: str) -> bool:
    """The same tokens; or in a unigram model, where the best way may not be the only one, others of the same score."""
    ours, theirs = tokenizer.encode(text, add_special=False), reference.encode(text)
    if ours == theirs:
        return True
    scores = [sum(map(reference.get_score, ids)) for ids in (ours, theirs)]
    unigram = "Unigram" in str(tokenizer._backend.model)
    return (
        unigram and reference.decode(ours) == reference.decode(theirs) and scores[0] == pytest.approx(scores[1], 1e-6)
    )


def _normalizes_alike(tokenizer: Tokenizer, reference: Any, text: str) -> bool:
    """Whether the two libraries normalize a text alike, but for spaces at the start.

    The tokenizers library looks up whole grapheme clusters where sentencepiece takes the longest match, so for rare
    sequences (a character, then a mark) they differ; transformers has the same.
    """
    normalizer = tokenizer._backend.normalizer
    ours = normalizer.normalize_str(text).replace("▁", " ").removeprefix(" ")
    return bool(ours == reference.normalize(text).replace("▁", " ").removeprefix(" "))


def test_legacy_prefix_space(tmp_path: Path) -> None:
    spm = _train_sentencepiece(tmp_path, model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
                               vocab_size=1_000, remove_extra_whitespaces=False, character_coverage=0.98)  # fmt: skip
    reference = sentencepiece.SentencePieceProcessor(model_proto=spm)
    old = _open(_write(tmp_path / "old", tokenizer__model=spm, tokenizer_config__json={"legacy": True}))
    new = _open(_write(tmp_path / "new", tokenizer__model=spm))
    none = _open(_write(tmp_path / "none", tokenizer__model=spm, tokenizer_config__json={"add_prefix_space": False}))
    _same(new, reference.encode, [text for text in PLAIN if "\x00" not in text])
    ours = {name: t.encode("a</s>a", add_special=False) for name, t in (("old", old), ("new", new), ("none", none))}
    a, bare = reference.encode("a"), none.encode("a", add_special=False)
    assert a != bare
    assert ours == {"old": [*a, 2, *a], "new": [*a, 2, *bare], "none": [*bare, 2, *bare]}
    llama = transformers.LlamaTokenizer.from_pretrained(tmp_path / "new", add_bos_token=False)
    # transformers adds no space before a text that begins with one; sentencepiece does.
    texts = [text for text in STRINGS if not text.startswith((" ", "▁")) and "\x00" not in text]
    _same(new, _transformers(llama, texts), texts)


def test_tokenizer_json_with_post_processor(llama3: Any, tmp_path: Path) -> None:
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    folder = _write(tmp_path, tokenizer__json=llama3.to_str(), tokenizer_config__json=config)
    tokenizer = _open(folder)
    auto = transformers.AutoTokenizer.from_pretrained(folder)
    reference = _transformers(auto, add_special_tokens=True)
    different = [text for text in STRINGS if tokenizer.encode(text) != reference(text)]
    assert not different
    assert tokenizer.encode("") == [0]
    assert tokenizer.encode("x", add_special=False)[0] != 0


def test_byte_level_vocabulary_and_merges(qwen2: Any, tmp_path: Path) -> None:
    model = json.loads(qwen2.to_str())["model"]
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
              "additional_special_tokens": ["<|im_start|>"], "unk_token": None}  # fmt: skip
    merges = "#version: 0.2\n" + "\n".join(map(" ".join, model["merges"])) + "\n"
    folder = _write(tmp_path, vocab__json=model["vocab"], merges__txt=merges, tokenizer_config__json=config)
    tokenizer = _open(folder)
    reference = transformers.Qwen2Tokenizer.from_pretrained(folder)
    _same(tokenizer, _transformers(reference))
    _same(tokenizer, _ids_of(qwen2))


@pytest.mark.parametrize(("fixture", "pre"), [("llama3", "llama-bpe"), ("qwen2", "qwen2"), ("smollm", "smollm")])
def test_gguf_is_the_same_as_its_tokenizer_json(fixture: str, pre: str, request: pytest.FixtureRequest) -> None:
    backend = request.getfixturevalue(fixture)
    _same(_of_gguf(_gguf(backend, pre)), _ids_of(backend))


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_every_pre_tokenizer_loses_nothing(pre: str, smollm: Any) -> None:
    tokenizer = _of_gguf(_gguf(smollm, pre))
    for text in STRINGS[:1_000]:
        decoded = tokenizer.decode(tokenizer.encode(text, add_special=False), skip_special=False)
        assert decoded == (unicodedata.normalize("NFC", text) if "qwen" in pre else text)


@pytest.mark.parametrize(("pre", "text", "words"), [
    ("gpt-2", "Don't  pay $1234.50!\n\n ok", "Don|'t| | pay| $|1234|.|50|!|\n\n| ok"),
    ("smollm", "a  12 b", "a|  |1|2| b"),
    ("llama-bpe", "DON'T pay 12345\n\n ok", "DON|'T| pay| |123|45|\n\n| ok"),
    ("qwen2", "pay 123 (ok)\n", "pay| |1|2|3| (|ok|)\n"),
    ("tekken", "camelCase HTTPServer 12 a/b/\n", "camel|Case| HTTPServer| |1|2| a|/b|/\n"),
    ("gpt-4o", "camelCase we'LL 1234", "camel|Case| we'LL| |123|4"),
    ("deepseek-coder", "a bc\n12, 世界x", "a| bc|\n|1|2|,| |世界|x"),
    ("deepseek-v3", "_foo 1234 世界x!", "_foo| |123|4| |世界|x|!"),
    ("default", "pay $1234 -- ok", "pay| |$|123|4| |--| ok"),
])  # fmt: skip
def test_pre_tokenizers_cut_where_they_should(pre: str, text: str, words: str, smollm: Any) -> None:
    backend = _of_gguf(_gguf(smollm, pre))._backend
    pieces = backend.pre_tokenizer.pre_tokenize_str(text)
    assert "|".join(text[start:end] for _, (start, end) in pieces) == words


# --- special tokens and configuration ---


def test_configuration_decides_bos_and_eos(llama3: Any, tmp_path: Path) -> None:
    spec = llama3.to_str()
    both = {"add_bos_token": True, "add_eos_token": True, "bos_token": {"content": "<|begin_of_text|>"},
            "eos_token": "<|eot_id|>"}  # fmt: skip
    assert _open(_write(tmp_path / "both", tokenizer__json=spec, tokenizer_config__json=both)).encode("") == [0, 1]
    neither = {**both, "add_bos_token": False, "add_eos_token": False}
    assert _open(_write(tmp_path / "none", tokenizer__json=spec, tokenizer_config__json=neither)).encode("") == []
    tokenizer = _open(_write(
        tmp_path / "generation", tokenizer__json=spec, special_tokens_map__json={"eos_token": "<|eot_id|>"},
        generation_config__json={"eos_token_id": [2, 1]}, config__json={"bos_token_id": 0, "eos_token_id": 7},
    ))  # fmt: skip
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (0, (1, 2))


def test_gguf_special_tokens(llama3: Any) -> None:
    tokenizer = _of_gguf(_gguf(llama3, "llama-bpe", **{"tokenizer.ggml.padding_token_id": 4294967295}))
    assert tokenizer.encode("") == [0]
    assert tokenizer.eos_ids == (1, 2)  # <|im_end|> ends a turn, for the file names no end of a turn
    tokenizer = _of_gguf(_gguf(llama3, "llama-bpe", **{
        "tokenizer.ggml.eot_token_id": 1, "tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_eos_token": True,
        "tokenizer.chat_template": "a", "tokenizer.chat_template.tool_use": "b",
    }))  # fmt: skip
    assert tokenizer.encode("") == [1]
    assert tokenizer.eos_ids == (1,)
    assert tokenizer.chat_templates == {"default": "a", "tool_use": "b"}
    assert tokenizer.special_tokens == {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}


def test_added_tokens(qwen2: Any, tmp_path: Path) -> None:
    n = qwen2.get_vocab_size()
    added = {str(n): {"content": "<think>", "special": False}, str(n + 1): {"content": "<pad>", "special": True}}
    tokenizer = _open(
        _write(tmp_path, tokenizer__json=qwen2.to_str(), tokenizer_config__json={"added_tokens_decoder": added})
    )
    ids = tokenizer.encode("<think>a<pad>")
    assert (ids[0], ids[-1]) == (n, n + 1)
    assert tokenizer.decode(ids) == "<think>a"
    older = _open(_write(tmp_path / "older", tokenizer__json=qwen2.to_str(), added_tokens__json={"<think>": n}))
    assert older.encode("<think>") == [n]
    gap = {"<think>": n + 5}
    with pytest.raises(CheckpointError, match=f"should be {n + 5}"):
        _open(_write(tmp_path / "gap", tokenizer__json=qwen2.to_str(), added_tokens__json=gap))


def test_chat_templates_by_name_and_by_file(qwen2: Any, tmp_path: Path) -> None:
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    folder = _write(tmp_path, tokenizer__json=qwen2.to_str(), tokenizer_config__json={"chat_template": named})
    assert _open(folder).chat_templates == {"default": "a", "tool_use": "b"}
    _write(tmp_path, chat_template__jinja="c")
    assert _open(folder).chat_template == "c"
    _write(tmp_path, tokenizer_config__json={"chat_template": "d"})
    (tmp_path / "chat_template.jinja").unlink()
    assert _open(folder).chat_template == "d"


def test_lookups(qwen2: Any) -> None:
    tokenizer = _of_gguf(_gguf(qwen2, "qwen2"))
    assert tokenizer.token_id("<|im_end|>") == 2
    assert tokenizer.token_id("no such token") is None
    assert tokenizer.id_to_token(2) == "<|im_end|>"
    for wrong in (-1, tokenizer.vocab_size, 2**40):
        with pytest.raises(PromptError, match="there is no token"):
            tokenizer.id_to_token(wrong)
    with pytest.raises(PromptError):
        tokenizer.decode([-1])


def test_a_lone_surrogate_is_an_error(qwen2: Any) -> None:
    tokenizer = _of_gguf(_gguf(qwen2, "qwen2"))
    with pytest.raises(PromptError, match=r"character 2 of the text is a lone surrogate \(U\+D800\)"):
        tokenizer.encode("ab\ud800c")
    assert tokenizer.decode(tokenizer.encode(r"\ud800")) == r"\ud800"


# --- the cache ---


def test_derived_tokenizers_are_cached_and_rebuilt(cache: Path, tmp_path: Path) -> None:
    spm = _train_sentencepiece(tmp_path, model_type="bpe", vocab_size=900, byte_fallback=True)
    folder = _write(tmp_path / "cached-model", tokenizer__model=spm)
    expected = _open(folder).encode("once upon a time")
    (cached,) = (cache / "tokenizers").glob("cached-model-*.json")
    whole = cached.read_bytes()
    inode = cached.stat().st_ino
    assert _open(folder).encode("once upon a time") == expected
    assert cached.stat().st_ino == inode, "a good file is not written again"
    for damaged in (b"", whole[: len(whole) // 2], whole[:-2] + b"\0\0", b"{}\n" + whole, b"\xff" * 100):
        cached.write_bytes(damaged)
        assert _open(folder).encode("once upon a time") == expected
        assert cached.read_bytes() == whole
    other = _train_sentencepiece(tmp_path, model_type="bpe", vocab_size=600, byte_fallback=True)
    _write(folder, tokenizer__model=other)
    assert _open(folder).vocab_size == sentencepiece.SentencePieceProcessor(model_proto=other).vocab_size()


def test_no_cache_folder_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spm = _train_sentencepiece(tmp_path, model_type="bpe", vocab_size=600, byte_fallback=True)
    monkeypatch.setenv("PRONGHORN_CACHE", str(_write(tmp_path / "a", file=b"") / "file" / "under"))
    assert _open(_write(tmp_path / "model", tokenizer__model=spm)).encode("a")


# --- one token at a time ---


def _streamed(tokenizer: Tokenizer, ids: list[int], skip_special: bool) -> str:
    stream = tokenizer.stream(skip_special=skip_special)
    return "".join([*map(stream.push, ids), stream.finish()])


@pytest.fixture(scope="module")
def every(llama3: Any, qwen2: Any, smollm: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Tokenizer]:
    """One of each kind of decoder, with few tokens, so that random ids make broken characters often."""
    folder = tmp_path_factory.mktemp("every")
    spms = [
        _train_sentencepiece(folder, vocab_size=600, **options)
        for options in (
            {"model_type": "bpe", "byte_fallback": True, "character_coverage": 0.98},
            {"model_type": "unigram", "byte_fallback": True, "add_dummy_prefix": False, "character_coverage": 0.98},
        )
    ]
    opened = [_open(_write(folder / str(i), tokenizer__model=spm)) for i, spm in enumerate(spms)]
    spec = json.loads(from_gguf(_gguf(qwen2, "qwen2"), "test").json("test"))
    vocabulary = {"▁": 0, "▁a": 1, "b▁": 2, "<x>": 3, "c": 4, "▁▁": 5}
    added = [{"id": 3, "content": "<x>", "special": True, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False}]  # fmt: skip
    for decoder in (None, *({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": True}
                            for scheme in ("always", "never"))):  # fmt: skip
        spec = {**spec, "added_tokens": added, "decoder": decoder,
                "model": {"type": "BPE", "vocab": vocabulary, "merges": []}}  # fmt: skip
        opened.append(Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(spec))))
    return [*opened, *(_of_gguf(_gguf(backend, "qwen2")) for backend in (llama3, qwen2, smollm))]


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_stream_is_the_whole(data: st.DataObject, every: list[Tokenizer]) -> None:
    tokenizer = data.draw(st.sampled_from(every))
    low = st.integers(0, min(tokenizer.vocab_size + 2, 300))  # bytes and special tokens stand first
    ids = data.draw(st.lists(low | st.integers(0, tokenizer.vocab_size + 2), max_size=40))
    skip_special = data.draw(st.booleans())
    assert _streamed(tokenizer, ids, skip_special) == tokenizer.decode(ids, skip_special=skip_special)


def test_a_stream_of_real_text(every: list[Tokenizer]) -> None:
    for tokenizer in every:
        for text in STRINGS[:500]:
            try:
                ids = tokenizer.encode(text)
            except CheckpointError:  # the toy vocabularies lack most characters
                continue
            for skip_special in (True, False):
                assert _streamed(tokenizer, ids, skip_special) == tokenizer.decode(ids, skip_special=skip_special)


def test_a_stream_shows_text_at_once_and_never_half_a_character(qwen2: Any) -> None:
    tokenizer = _of_gguf(_gguf(qwen2, "qwen2"))
    text = "a 👩‍👩‍👧‍👦 naïve 世界 test 😀"
    stream = tokenizer.stream()
    shown = ""
    for token_id in tokenizer.encode(text):
        shown += stream.push(token_id)
        assert text.startswith(shown)
    assert shown == text
    assert stream.finish() == ""
    ascii_stream = tokenizer.stream()
    for token_id in tokenizer.encode("plain words, one by one"):
        assert ascii_stream.push(token_id) == tokenizer.decode([token_id])


def test_invalid_utf8_is_replaced_as_in_the_whole(qwen2: Any) -> None:
    tokenizer = _of_gguf(_gguf(qwen2, "qwen2"))
    alphabet = {byte: token for token, byte in _BYTE_OF.items()}
    rng = random.Random(3)
    lead = [
        0x41,
        0x80,
        0xBF,
        0xC0,
        0xC3,
        0xA9,
        0xE0,
        0xE2,
        0x82,
        0xAC,
        0xED,
        0xA0,
        0xF0,
        0x9F,
        0x98,
        0x90,
        0xF4,
        0xF5,
        0xFF,
    ]
    for _ in range(3_000):
        data = bytes(rng.choice(lead) for _ in range(rng.randint(1, 9)))
        ids = [tokenizer._backend.token_to_id(alphabet[byte]) for byte in data]
        assert tokenizer.decode(ids) == data.decode("utf-8", "replace")
        assert _streamed(tokenizer, ids, True) == data.decode("utf-8", "replace")


def _continuation(tokenizer: Tokenizer, prompt: list[int], ids: list[int]) -> str:
    stream = tokenizer.stream()
    stream.prime(prompt)
    return "".join([*map(stream.push, ids), stream.finish()])


def test_a_primed_stream_is_the_continuation_alone(every: list[Tokenizer]) -> None:
    """Nothing of the prompt, however it ends; but its last character is made whole, and a space may begin."""
    for at, tokenizer in enumerate(every):
        for prompt in ("hello 😀", "日本語😀", "a", "😀" * 9, "a" * 40):
            for text in ("😀 b", "é", " the end"):
                try:
                    before = tokenizer.encode(prompt, add_special=False)
                    ids = tokenizer.encode(f"a{text}", add_special=False)[
                        len(tokenizer.encode("a", add_special=False)) :
                    ]
                except CheckpointError:  # the toy vocabularies lack most characters
                    continue
                # What follows a letter, and so no stripped space and no run of bytes, is the text of the ids alone.
                context = tokenizer.encode("a", add_special=False)
                expected = tokenizer.decode([*context, *ids])[len(tokenizer.decode(context)) :]
                assert _continuation(tokenizer, before, ids) == expected, (at, prompt, text)


def test_a_primed_stream_completes_a_character(every: list[Tokenizer]) -> None:
    completed = 0
    for tokenizer in every:
        try:
            ids = tokenizer.encode("a𓂀", add_special=False)
        except CheckpointError:
            continue
        for n in range(1, 4):
            if tokenizer.decode(ids[-n:]).strip("�") == "" and len(ids) > n:  # within the character
                completed += 1
                assert _continuation(tokenizer, [*ids, *ids[:-n]], ids[-n:]) == "𓂀"
    assert completed > 3


def test_a_cached_tokenizer_needs_no_derivation(tmp_path: Path) -> None:
    spm = _train_sentencepiece(tmp_path, model_type="bpe", vocab_size=600, normalization_rule_name="identity")
    folder = _write(tmp_path / "model", tokenizer__model=spm)
    code = (
        "import sys; from pathlib import Path; from pronghorn.text import open_tokenizer;"
        "from pronghorn.weights import TokenizerSource; open_tokenizer(TokenizerSource(folder=Path(sys.argv[1])));"
        "print('pronghorn.text.derive' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    for derived in ("True\n", "False\n"):
        done = subprocess.run([sys.executable, "-c", code, folder], env=environment, capture_output=True, text=True)
        assert done.stdout == derived, done.stderr


def test_a_damaged_tokenizer_is_not_none_at_all(tmp_path: Path) -> None:
    with pytest.raises(NoTokenizer, match="holds no tokenizer"):
        _open(_write(tmp_path / "none"))
    with pytest.raises(CheckpointError) as error:
        _open(_write(tmp_path / "damaged", tokenizer__json=b"{"))
    assert not isinstance(error.value, NoTokenizer)
    (tmp_path / "none" / "tokenizer.json").symlink_to(tmp_path / "gone")
    with pytest.raises(CheckpointError, match="No such file") as error:
        _open(tmp_path / "none")
    assert not isinstance(error.value, NoTokenizer)


def test_a_stream_costs_the_same_for_every_token() -> None:
    stream = StreamDecoder(lambda token_id: "▁word", plan({"type": "Metaspace", "replacement": "▁",
                                                            "prepend_scheme": "always", "split": True}))  # fmt: skip
    for _ in range(50_000):
        stream.push(0)
    assert stream.push(0) == " word"
    assert stream.finish() == ""  # nothing is kept


def test_an_unknown_decoder_is_refused_by_name() -> None:
    for decoder in ({"type": "CTC"}, {"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "ByteFallback"}]}):
        with pytest.raises(CheckpointError, match=r"CTC|ByteFallback"):
            plan(decoder)


# --- damage ---


def _use(open_it: Callable[[], Tokenizer]) -> bool:
    """Opens and uses a tokenizer that may be damaged: it works, or says why not in one line."""
    message = ""
    try:
        tokenizer = open_it()
        ids = tokenizer.encode("Once upon a time 世界 </s><|im_end|>\n\t  x" + "a" * 50)
        assert _streamed(tokenizer, ids, True) == tokenizer.decode(ids)
    except PronghornError as error:
        message = str(error)
    assert "\n" not in message
    assert len(message) < 6_000
    return not message


def _mutated(data: bytes, rng: random.Random) -> bytes:
    data = bytes(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(data) or 1)
        kind = rng.randrange(6)
        if kind == 0:
            data = data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
        elif kind == 1:
            data = data[:at] + data[at + rng.randint(1, 40) :]
        elif kind == 2:
            data = data[: max(at, 1)]
        elif kind == 3:
            data = data[:at] + data[at : at + rng.randint(1, 200)] + data[at:]
        elif kind == 4:
            data = data[:at] + rng.choice((b"\xff" * 4, b"\0", b"[", b"{", b'"', b"-1", b"1e999", b"null")) + data[at:]
        else:
            data = data[:at] + bytes(byte ^ (1 << rng.randrange(8)) for byte in data[at : at + 1]) + data[at + 1 :]
    return data or b"\0"


WRONG = (None, True, -1, 0, 2**31, 2**64, 1.5, "", "x", "\ud800", [], {}, [None], {"type": "x"}, "▁" * 5_000, [[1, 2]])


def _distorted(value: Any, rng: random.Random) -> Any:
    """A copy of a JSON value with one node, anywhere in it, replaced or dropped."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        if rng.random() < 0.05:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: _distorted(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        at = rng.randrange(len(value))
        if rng.random() < 0.2:
            return value[:at] + value[at + 1 :]
        return [*value[:at], _distorted(value[at], rng), *value[at + 1 :]]
    return rng.choice(WRONG)


N_MUTATIONS = max(150, int(os.environ.get("PRONGHORN_FUZZ") or 0) // 9)  # of each of nine files


def _spoil_folder(folder: Path, name: str, whole: bytes, seed: int, n: int = N_MUTATIONS) -> tuple[int, int]:
    rng = random.Random(seed)
    good = 0
    for _ in range(n):
        structured = name.endswith(".json") and rng.random() < 0.6
        data = json.dumps(_distorted(json.loads(whole), rng)).encode() if structured else _mutated(whole, rng)
        (folder / name).write_bytes(data)
        good += _use(lambda: _open(folder))
    return good, n


def test_damaged_tokenizer_json(llama3: Any, qwen2: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for seed, backend in enumerate((llama3, qwen2)):
        good, n = _spoil_folder(tmp_path, "tokenizer.json", backend.to_str().encode(), seed)
        assert 0 < good < n
    capfd.readouterr()  # the library's panics write to standard error


def test_damaged_sentencepiece(spm: bytes, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    good, n = _spoil_folder(tmp_path, "tokenizer.model", spm, 7)
    assert good < n
    capfd.readouterr()


def test_damaged_normalization_table(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    spm = _train_sentencepiece(tmp_path, model_type="unigram", vocab_size=600)
    folder = _write(tmp_path / "model", tokenizer__model=spm)
    spec = json.loads(_open(folder)._backend.to_str())
    charsmap = spec["normalizer"]["normalizers"][0]["precompiled_charsmap"]
    for wrong in ("", "AAAA", "/////w==", "not base64", charsmap[:1000], "/////" + charsmap[5:]):
        spec["normalizer"]["normalizers"][0]["precompiled_charsmap"] = wrong
        assert not _use(lambda: _open(_write(tmp_path / "json", tokenizer__json=json.dumps(spec))))
    capfd.readouterr()


def test_damaged_merges_and_configuration(qwen2: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = json.loads(qwen2.to_str())["model"]
    merges = "\n".join(map(" ".join, model["merges"])).encode()
    vocabulary = json.dumps(model["vocab"]).encode()
    config = json.dumps({
        "bos_token": "<|endoftext|>", "eos_token": {"content": "<|im_end|>"}, "add_bos_token": True,
        "chat_template": "x",
        "added_tokens_decoder": {"0": {"content": "<|endoftext|>", "special": True, "lstrip": False}},
        "additional_special_tokens": ["<|im_start|>"],
    }).encode()  # fmt: skip
    generation = json.dumps({"bos_token_id": 0, "eos_token_id": [1, 2]}).encode()
    files = {"merges.txt": merges, "vocab.json": vocabulary, "tokenizer_config.json": config,
             "generation_config.json": generation}  # fmt: skip
    for seed, name in enumerate(files):
        for other, whole in files.items():
            (tmp_path / other).write_bytes(whole)
        assert _use(lambda: _open(tmp_path))
        good, n = _spoil_folder(tmp_path, name, files[name], seed)
        assert good < n
    capfd.readouterr()


def test_damaged_gguf_metadata(qwen2: Any, capfd: pytest.CaptureFixture[str]) -> None:
    rng = random.Random(11)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁a", "n", "O", "On"]
    llama = {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [float(-index) for index in range(len(tokens))],
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * 6], "tokenizer.ggml.bos_token_id": 1,
    }  # fmt: skip
    good = 0
    for metadata in (_gguf(qwen2, "qwen2"), llama):
        for _ in range(N_MUTATIONS):
            spoiled = _distorted(metadata, rng)
            if isinstance(spoiled, dict) and "tokenizer.ggml.model" in spoiled:
                good += _use(lambda: _of_gguf(spoiled))  # noqa: B023
    assert 0 < good < 2 * N_MUTATIONS
    capfd.readouterr()


def test_clear_errors(qwen2: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        _open(tmp_path)
    with pytest.raises(CheckpointError, match="without a tokenizer"):
        open_tokenizer(TokenizerSource())
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: cannot be used"):
        _open(_write(tmp_path / "a", tokenizer__json="{"))
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: is not a SentencePiece model"):
        _open(_write(tmp_path / "b", tokenizer__model=b"IQ== 0\nIg== 1\n"))
    with pytest.raises(CheckpointError, match="the pre-tokenizer kimi-k2 is not supported"):
        _of_gguf(_gguf(qwen2, "kimi-k2"))
    with pytest.raises(CheckpointError, match="the tokenizer t5 is not supported"):
        _of_gguf({**_gguf(qwen2, "qwen2"), "tokenizer.ggml.model": "t5"})
    with pytest.raises(CheckpointError, match=r"merges\.txt.*No such file"):
        _open(_write(tmp_path / "c", vocab__json={"a": 0}))


def test_the_bytes_of_a_token_are_those_within_a_text() -> None:
    llama = {"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}, {"type": "ByteFallback"},
        {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]}  # fmt: skip
    for decoder, token, data in (
        (llama, "\u2581a", b" a"),
        (llama, "<0xE2>", b"\xe2"),
        (llama, "\u00e9", b"\xc3\xa9"),
        ({"type": "ByteLevel"}, "\u0120a", b" a"),
        ({"type": "ByteLevel"}, "\u00e2", b"\xe2"),
        ({"type": "ByteLevel"}, "<|\u4e00|>", "<|\u4e00|>".encode()),
        ({"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}, "\u2581a", b" a"),
        (None, "a", b" a"),
    ):
        assert token_bytes(token, plan(decoder)) == data
