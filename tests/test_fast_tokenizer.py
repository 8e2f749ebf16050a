"""The core's own encoder: token for token the `tokenizers` library's, or none; its cache files, whole and damaged."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import test_tokenizer as whole
from pronghorn import _native
from pronghorn.errors import CheckpointError, PromptError
from pronghorn.text import fast, open_tokenizer
from pronghorn.text.tokenizer import Tokenizer
from pronghorn.weights import open_checkpoint

pytest.importorskip("sentencepiece")
tokenizers = pytest.importorskip("tokenizers")

llama3, qwen2, smollm = whole.llama3, whole.qwen2, whole.smollm
KEY = json.dumps([0, "test"])
FUZZ = int(os.environ.get("PRONGHORN_FUZZ") or 0)


def _data(tokenizer: Tokenizer) -> bytes:
    data = fast.compiled(tokenizer, KEY, None)
    assert data is not None
    return data


def _no_library() -> Tokenizer:
    raise AssertionError("the library was asked for")


def _pair(tokenizer: Tokenizer) -> tuple[Any, Any]:
    """The core's encoder, and the library."""
    return _native.MappedTokenizer(_data(tokenizer)), tokenizer._backend


def _compare(tokenizer: Tokenizer, texts: list[str], least: float) -> None:
    """Equal wherever the core answers, which it does for at least that share of the texts."""
    mapped, library = _pair(tokenizer)
    encodings = library.encode_batch(texts, add_special_tokens=False)
    answers = [mapped.encode(text) for text in texts]
    wrong = [
        text for text, ours, theirs in zip(texts, answers, encodings, strict=True) if ours not in (None, theirs.ids)
    ]
    assert not wrong, f"{len(wrong)} of {len(texts)} differ, such as {wrong[0]!r}"
    assert sum(ours is not None for ours in answers) >= least * len(texts)


def _spm(folder: Path, normalizer: Any, pre_tokenizer: Any) -> Tokenizer:
    """A small SentencePiece BPE of the kind that Llama 2 has."""
    model = whole._train_sentencepiece(
        folder, model_type="bpe", byte_fallback=True, normalization_rule_name="identity", vocab_size=1_000,
        remove_extra_whitespaces=False, character_coverage=0.98,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model)
    spec = json.loads(whole._open(folder)._backend.to_str())
    spec |= {"normalizer": normalizer, "pre_tokenizer": pre_tokenizer}
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(spec)))


REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
PREPEND = {"type": "Prepend", "prepend": "▁"}
SPM = {
    "spm": (REPLACE, None),
    "spm-prepend": ({"type": "Sequence", "normalizers": [PREPEND, REPLACE]}, None),
    **{
        f"spm-{scheme}": (
            None,
            {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False},
        )
        for scheme in ("never", "always", "first")
    },
}
KINDS = ["llama3", "qwen2", "smollm", "gpt2", "byteless", "normalized", *SPM]


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    kind = request.param
    if kind in SPM:
        return _spm(tmp_path_factory.mktemp(kind), *SPM[kind])
    if kind in ("llama3", "qwen2"):
        pre = {"llama3": "llama-bpe", "qwen2": "qwen2"}[kind]
        return whole._of_gguf(whole._gguf(request.getfixturevalue(kind), pre))
    if kind == "smollm":
        return Tokenizer(tokenizers.Tokenizer.from_str(request.getfixturevalue("smollm").to_str()))
    spec = json.loads(request.getfixturevalue("smollm").to_str())
    spec["pre_tokenizer"] = spec["pre_tokenizer"]["pretokenizers"][-1]
    if kind == "byteless":  # some bytes have no token: the library leaves them out
        for token in ("Ą", "ą", "Ć"):
            assert not any(token in merge for merge in map("".join, spec["model"]["merges"]))
            index = spec["model"]["vocab"].pop(token)
            spec["model"]["vocab"][f"[EMPTY_{index}]"] = index
    if kind == "normalized":  # added tokens that are looked for in two passes
        for token in spec["added_tokens"][1:]:
            token |= {"normalized": True, "special": False}
        size = len(spec["model"]["vocab"])
        for at, (text, normalized) in enumerate((("<|im_", False), ("m_start", True), ("ab", False), ("bcd", True))):
            spec["added_tokens"].append({**spec["added_tokens"][0], "id": size + at, "content": text,
                                         "normalized": normalized})  # fmt: skip
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(spec)))


def test_the_ten_thousand_strings(tokenizer: Tokenizer) -> None:
    _compare(tokenizer, whole.STRINGS, 0.5)


def test_real_tokenizers(test_data: Path) -> None:
    models = test_data / "models"
    _compare(whole._open(models / "gpt2-tokenizer"), whole.STRINGS, 0.8)
    _compare(whole._open(models / "stories260K"), whole.STRINGS, 1.0)
    gguf = open_checkpoint(models / "stories260K/stories260K.gguf").tokenizer
    _compare(open_tokenizer(gguf), whole.STRINGS, 1.0)


def test_the_default_model(default_model: Path) -> None:
    tokenizer = open_tokenizer(open_checkpoint(default_model).tokenizer)
    library = Tokenizer(tokenizers.Tokenizer.from_str(tokenizer._backend.to_str()))
    _compare(library, whole.STRINGS, 0.8)


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", ["llama3", "qwen2", "smollm", "gpt2"], indirect=True)
def test_every_character_in_every_place(tokenizer: Tokenizer) -> None:
    """What the classes know, after and before every class, and after an apostrophe; PRONGHORN_FUZZ takes them all."""
    step = 1 if FUZZ else 13
    points = [*range(0x3100), *range(0x3100, 0xD800, step), *range(0xE000, 0x20000, step)]
    points += range(0x20000, 0x110000, 997 * step)
    texts = [f"a{c}b 1{c}2 '{c} {c}x  {c}\n{c}.{c}x'{c}e'r{c}'L{c}" for c in map(chr, points)]
    for first in range(0, len(texts), 4_000):
        _compare(tokenizer, texts[first : first + 4_000], 0.0)


ALPHABETS = ("abcdefgh '", "'sStTdDmMrReEvVlLſ", " \t\n\r\x0b\u00a0\u2003", "0123456789½²Ⅷ٣", "!?.,;:'\"-_", "éàüñßÅĀ",
             "e\u0301\u0308a\u0323", "世界こんにちは한국어", "😀👩\u200d🇫🇷", "\u1100\u1161\u11a8각", "▁ ")  # fmt: skip
TEXTS = st.lists(
    st.text() | st.sampled_from(ALPHABETS).flatmap(lambda letters: st.text(letters)) | st.sampled_from(whole.PARTS)
).map("".join)


@settings(max_examples=max(15, FUZZ // 5), deadline=None)
@given(texts=st.lists(TEXTS, max_size=20))
def test_fuzzed_texts(tokenizer: Tokenizer, texts: list[str]) -> None:
    mapped, library = _PAIRS.setdefault(id(tokenizer), (*_pair(tokenizer), tokenizer))[:2]
    for text in texts:
        assert mapped.encode(text) in (None, library.encode(text, add_special_tokens=False).ids)


_PAIRS: dict[int, tuple[Any, ...]] = {}


def test_garbage_and_special_tokens_inside(tokenizer: Tokenizer) -> None:
    rng = random.Random(5)
    added = [token.content for token in tokenizer._backend.get_added_tokens_decoder().values()]
    texts = []
    for _ in range(3_000):
        parts = [bytes(rng.randrange(256) for _ in range(rng.randrange(20))).decode("latin-1")]
        for _ in range(rng.randrange(6)):
            token = rng.choice(added)
            cut = rng.randrange(len(token) + 1)
            parts += [rng.choice((token, token[:cut], token[cut:], " ", "a", "\n", "\u00e9", "abcd"))]
        texts.append("".join(parts))
    _compare(tokenizer, texts, 0.9)


def test_long_words_take_linear_time(tokenizer: Tokenizer) -> None:
    mapped, library = _pair(tokenizer)
    rng = random.Random(6)
    for text in ("a" * 20_000, " " * 20_000, "\n " * 10_000, "".join(rng.choice("abcdefgh") for _ in range(20_000)),
                 "<" * 20_000, "1" * 20_000, "'" * 20_000):  # fmt: skip
        assert mapped.encode(text) == library.encode(text, add_special_tokens=False).ids
        assert mapped.encode(text * 50)  # which would take minutes if it went by the square


def test_the_rest_is_the_same(tokenizer: Tokenizer) -> None:
    """Decoding, streaming and lookups from the file, with the library out of reach."""
    quick = fast.restored(_data(tokenizer), KEY, _no_library)
    assert quick.vocab_size == tokenizer.vocab_size
    for name in fast._KEPT:
        assert getattr(quick, name) == getattr(tokenizer, name)
    for token_id in range(tokenizer.vocab_size):
        token = tokenizer.id_to_token(token_id)
        assert quick.id_to_token(token_id) == token
        assert quick.token_id(token) == tokenizer.token_id(token)
    for wrong in (-1, tokenizer.vocab_size, 2**40):
        with pytest.raises(PromptError, match="there is no token"):
            quick.id_to_token(wrong)
    assert quick.token_id("no such token") is None
    with pytest.raises(PromptError):
        quick.decode([-1])
    with pytest.raises(PromptError, match=r"character 2 of the text is a lone surrogate \(U\+D800\)"):
        quick.encode("ab\ud800c")
    rng = random.Random(7)
    for _ in range(2_000):
        top = rng.choice((300, tokenizer.vocab_size + 3))
        ids = [rng.randrange(top) for _ in range(rng.randrange(30))]
        for skip in (True, False):
            text = tokenizer.decode(ids, skip_special=skip)
            assert quick.decode(ids, skip_special=skip) == text
            assert whole._streamed(quick, ids, skip) == text


def test_what_the_core_cannot_do_is_the_librarys(llama3: Any, qwen2: Any) -> None:
    spec = json.loads(llama3.to_str())
    split = spec["pre_tokenizer"]["pretokenizers"]
    for change in (
        {"added_tokens": [{**spec["added_tokens"][0], "lstrip": True}]},
        {"added_tokens": [{**spec["added_tokens"][0], "single_word": True}]},
        {"normalizer": {"type": "NFKC"}},
        {"normalizer": {"type": "NFC"}, "added_tokens": [{**spec["added_tokens"][0], "normalized": True}]},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{**split[0], "invert": True}, split[1]]}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split[0], {**split[1], "add_prefix_space": True}]}},
        {"pre_tokenizer": split[0]},
        {"pre_tokenizer": None},
        {"model": {**spec["model"], "dropout": 0.5}},
        {"model": {**spec["model"], "end_of_word_suffix": "</w>"}},
    ):
        backend = tokenizers.Tokenizer.from_str(json.dumps({**spec, **change}))
        assert fast.compiled(Tokenizer(backend), KEY, None) is None
    # Single texts: what is not in NFC, and characters whose classes are not known.
    tokenizer = whole._of_gguf(whole._gguf(qwen2, "qwen2"))
    mapped = _native.MappedTokenizer(_data(tokenizer))
    assert [mapped.encode(text) for text in ("e\u0301", "\u212b", "\U000e0041")] == [None] * 3
    quick = fast.restored(_data(tokenizer), KEY, lambda: tokenizer)
    for text in ("e\u0301", "\u212b x", "\U000e0041"):
        assert quick.encode(text) == tokenizer.encode(text)
    assert quick._backend.normalizer is not None  # and all else that the library has


# --- the cache ---


def _settle(folder: Path) -> None:
    for file in folder.iterdir():
        os.utime(file, (1_000_000_000, 1_000_000_000))


def _cached() -> list[Path]:
    return list((Path(os.environ["PRONGHORN_CACHE"]) / "tokenizers").glob("*.fast"))


@pytest.fixture
def folder(qwen2: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PRONGHORN_CACHE", str(tmp_path / "cache"))
    config = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "add_bos_token": True, "chat_template": "x"}
    folder = whole._write(tmp_path / "model", tokenizer__json=qwen2.to_str(), tokenizer_config__json=config)
    _settle(folder)
    return folder


def test_opening_fills_the_cache_and_uses_it(folder: Path) -> None:
    first = whole._open(folder)
    assert not isinstance(first._backend, fast.Backend)
    (file,) = _cached()
    inode = file.stat().st_ino
    second = whole._open(folder)
    assert isinstance(second._backend, fast.Backend)
    assert file.stat().st_ino == inode
    for text in ("Once upon a time<|im_end|>", "e\u0301 \u212b", ""):
        assert second.encode(text) == first.encode(text)
    assert (second.chat_template, second.bos_id, second.eos_ids) == ("x", 0, (2,))


def test_the_library_is_not_imported(folder: Path) -> None:
    whole._open(folder)
    script = (
        "import sys; from pathlib import Path; from pronghorn.text import open_tokenizer\n"
        "from pronghorn.weights import TokenizerSource\n"
        f"t = open_tokenizer(TokenizerSource(folder=Path({str(folder)!r})))\n"
        "ids = t.encode('Once upon'); stream = t.stream(); [stream.push(i) for i in ids]; t.decode(ids)\n"
        "assert 'tokenizers' not in sys.modules, 'imported'"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_changed_file_is_read_again(folder: Path) -> None:
    opened = whole._open(folder)
    opened = whole._open(folder)
    config = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "add_bos_token": True, "chat_template": "y"}
    whole._write(folder, tokenizer_config__json=config)
    with pytest.raises(CheckpointError, match="has changed"):
        opened.encode("e\u0301")
    assert opened.encode("plain")[0] == 0
    fresh = whole._open(folder)
    assert (fresh.bos_id, fresh.chat_template) == (1, "y")
    assert isinstance(whole._open(folder)._backend, tokenizers.Tokenizer), "it may yet change within the same tick"
    _settle(folder)
    whole._open(folder)
    assert isinstance(whole._open(folder)._backend, fast.Backend)


def test_damaged_cache_files_are_made_anew(folder: Path) -> None:
    expected = whole._open(folder).encode("Once upon a time")
    (file,) = _cached()
    data = file.read_bytes()
    rng = random.Random(8)
    for _ in range(8):
        file.write_bytes(whole._mutated(data, rng))
        assert whole._open(folder).encode("Once upon a time") == expected
        assert file.read_bytes() == data
    for damaged in (b"", data[:50], data + b"\0", b"\xff" * len(data)):
        file.write_bytes(damaged)
        assert whole._open(folder).encode("Once upon a time") == expected
        assert file.read_bytes() == data


def _forged(data: bytes, checksum: int) -> bytes:
    return data[:16] + checksum.to_bytes(8, "little") + data[24:]


def test_no_damage_passes_the_checksum_and_none_crashes(tokenizer: Tokenizer) -> None:
    data = _data(tokenizer)
    rng = random.Random(9)
    for _ in range(200):
        at = rng.randrange(len(data))
        with pytest.raises(ValueError, match=r"\w"):
            _native.MappedTokenizer(data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :])
    for size in [*range(0, 200, 7), *(rng.randrange(len(data)) for _ in range(50))]:
        with pytest.raises(ValueError, match=r"\w"):
            _native.MappedTokenizer(data[:size])


def test_forged_files_give_wrong_tokens_at_worst(tokenizer: Tokenizer) -> None:
    """With a checksum that fits, every index is still checked."""
    data = _data(tokenizer)
    rng = random.Random(10)
    size = tokenizer.vocab_size + 10
    opened = 0
    for _ in range(300):
        forged = bytearray(data)
        for _ in range(rng.choice((1, 10, 1_000))):
            at = rng.randrange(rng.choice((104, len(data))))
            forged[at] = rng.choice((0, 255, rng.randrange(256)))
        try:
            mapped = _native.MappedTokenizer(_forged(bytes(forged), _native.tokenizer_checksum(forged)))
        except ValueError:
            continue
        opened += 1
        for text in ("Once upon <|im_end|></s> a time 12 \u4e16\u754c\n\n x", "a" * 200):
            ids = mapped.encode(text)
            assert ids is None or all(0 <= token_id < 1 << 22 for token_id in ids)
        for token_id in rng.sample(range(size), 20):
            mapped.find(mapped.token(token_id) or "")
    assert opened > 20
