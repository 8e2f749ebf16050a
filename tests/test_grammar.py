"""Structured output: what comes out has its form, alone and in company; what is wrong with a form is one line."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pronghorn import LLM, ParameterError, PronghornError, SamplingParams
from pronghorn.engine.grammar import Grammar, Vocabulary
from pronghorn.engine.grammar import masks as masks_of
from tiny import EOS, save_tiny

pytest.importorskip("llguidance")

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 10}, "age": {"type": "integer", "maximum": 120}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
ARITHMETIC = 'start: sum\nsum: number ("+" number)+\nnumber: /[0-9]{1,3}/'
CHOICES = ["yes", "no", 'a "quoted"\\ one\n', "häß 🙂"]
FORMS: list[dict[str, Any]] = [
    {"json_schema": PERSON},
    {"json_schema": json.dumps({"type": "array", "items": {"enum": [1, "two"]}, "minItems": 1, "maxItems": 4})},
    {"regex": r"[0-9]{3}-[0-9]{4}"},
    {"regex": r"[ab]{2,30}"},
    {"grammar": ARITHMETIC},
    {"choice": CHOICES},
]


def has_form(text: str, form: dict[str, Any]) -> bool:
    (name, source), *_ = form.items()
    if name == "json_schema":
        value = json.loads(text)
        if source is PERSON:
            return set(value) == {"name", "age"} and len(value["name"]) <= 10 and isinstance(value["age"], int)
        return 1 <= len(value) <= 4 and all(item in (1, "two") for item in value)
    if name == "choice":
        return text in source
    return re.fullmatch(source if name == "regex" else r"[0-9]{1,3}(\+[0-9]{1,3})+", text) is not None


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    with LLM(save_tiny(tmp_path_factory.mktemp("tiny") / "model"), threads=1) as llm:
        yield llm


def params_of(form: dict[str, Any], seed: int) -> SamplingParams:
    # The end is made likely: a random model would not find it where it may come, but need not.
    return SamplingParams(**form, max_tokens=150, temperature=5.0, seed=seed, logit_bias={EOS: 3})


@pytest.mark.parametrize("form", FORMS, ids=lambda form: str(form)[:30])
def test_forms(llm: LLM, form: dict[str, Any]) -> None:
    texts = set()
    for seed in range(8):
        out = llm.generate("x", params_of(form, seed))
        assert out.finish_reason == "stop"
        assert has_form(out.text, form), out.text
        texts.add(out.text)
    assert len(texts) > 1


def test_company_streams_and_samples(llm: LLM) -> None:
    """Together with others of any form and of none; as a stream; as samples of one prompt; on two threads."""
    every = [params_of(form, seed) for form in FORMS for seed in range(3)]
    every += [SamplingParams(max_tokens=40, temperature=1.0, seed=seed) for seed in range(4)]
    alone = [llm.generate("x", params).token_ids for params in every]
    assert [out.token_ids for out in llm.generate(["x"] * len(every), every)] == alone
    for params, ids in zip(every, alone, strict=True):
        assert [token for chunk in llm.stream("x", params) for token in chunk.token_ids] == ids
    samples = llm.generate("x", params_of(FORMS[0], 0).replace(n=3)).samples
    assert [out.token_ids for out in samples] == alone[:3]


def test_preempted_and_cached(tmp_path: Path) -> None:
    """A text that is computed again stands where it stood."""
    with LLM(save_tiny(tmp_path / "model"), kv_memory=4 * 8192) as small:
        params = [params_of(form, seed) for form in FORMS[:3] for seed in range(4)]
        outs = small.generate([[1] * 20] * len(params), params)
        assert small.stats().preemptions > 0
        for out, p in zip(outs, params, strict=True):
            assert out.token_ids == small.generate([1] * 20, p).token_ids


def test_greedy_takes_the_best_that_is_allowed(llm: LLM) -> None:
    """By hand: at each place the arg max of the logits of digits."""
    out = llm.generate("x", SamplingParams(regex="[0-9]{12}"))
    logits = llm.logits([*out.prompt_token_ids, *out.token_ids])[len(out.prompt_token_ids) - 1 :]
    digits = [token for digit in "0123456789" for token in llm.tokenizer.encode(digit, add_special=False)]
    for row, token_id in zip(logits, out.token_ids, strict=False):
        assert token_id == max(digits, key=lambda token: (row[token], -token))
    assert len(out.token_ids) == 12
    assert out.finish_reason == "stop"


def test_the_end_comes_only_where_it_may(llm: LLM) -> None:
    early = SamplingParams(regex="[a-z]{5,9}", logit_bias={EOS: 100})
    out = llm.generate("x", early)
    assert (len(out.text), out.token_ids[-1]) == (5, EOS)
    cut = llm.generate("x", SamplingParams(regex="[a-z]{5,9}", max_tokens=3))
    assert (len(cut.text), cut.finish_reason) == (3, "length")
    stopped = llm.generate("x", SamplingParams(regex="a{9}", stop="aaa"))
    assert (stopped.text, stopped.finish_reason) == ("", "stop")


def test_what_no_token_can_satisfy_fails_alone(llm: LLM) -> None:
    banned = {token: -float("inf") for token in llm.tokenizer.encode("a", add_special=False)}
    jobs = [llm.job("x", SamplingParams(regex="a", logit_bias=banned)), llm.job("x", SamplingParams(max_tokens=3))]
    results = dict(llm.run(enumerate(jobs)))
    assert isinstance(results[0], PronghornError)
    assert "no token is left" in str(results[0])
    assert len(results[1].token_ids) == 3  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"regex": "("}, "regex: .*unclosed group"),
        ({"grammar": "start: nonsense"}, "grammar: .*nonsense"),
        ({"json_schema": {"type": "nonsense"}}, "json_schema: .*nonsense"),
        ({"json_schema": {"$ref": "http://x.invalid/y"}}, "json_schema: .*x.invalid"),
        ({"json_schema": {"properties": 5}}, "json_schema: "),
    ],
)
def test_a_bad_form_is_an_error_at_the_door(llm: LLM, form: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message) as error:
        llm.generate("x", SamplingParams(**form))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"json_schema": "{"}, "json_schema is no JSON"),
        ({"json_schema": [1]}, "json_schema is .*expected an object"),
        ({"json_schema": {"a": {1, 2}}}, "json_schema is no JSON"),
        ({"regex": ""}, "regex is ''"),
        ({"regex": 5}, "regex is 5"),
        ({"grammar": b"x"}, "grammar is b'x'"),
        ({"choice": "yes"}, "choice is 'yes'"),
        ({"choice": []}, "choice is "),
        ({"choice": ["a", ""]}, "choice is "),
        ({"choice": ["a"], "regex": "a"}, "choice is given beside regex"),
        ({"regex": "a", "min_tokens": 1}, "min_tokens is given beside regex"),
        ({"regex": "a", "ignore_eos": True}, "ignore_eos is given beside regex"),
    ],
)
def test_parameters_are_checked(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        SamplingParams(**values)


def test_a_copy_of_a_grammar_goes_its_own_way(llm: LLM) -> None:
    vocabulary = Vocabulary(llm.tokenizer.to_json(), 258, [EOS])
    first = Grammar(vocabulary, SamplingParams(json_schema=PERSON))
    grammar = first.copy()
    ids = llm.tokenizer.encode('{"name":"ab","age":7}', add_special=False)
    masks = []
    for token in ids:
        masks.append(grammar.mask())
        assert masks[-1][token // 8] >> token % 8 & 1
        grammar.advance(token)
    assert grammar.complete
    grammar = first
    for at, token in enumerate(ids[:7]):
        assert grammar.mask() == masks[at]
        grammar.advance(token)
    other = grammar.copy()
    other.advance(ids[7])
    assert grammar.mask() == masks[7]
    with pytest.raises(PronghornError, match="structured output"):
        other.advance(ids[0])
    found = masks_of({1: grammar, 2: other})
    assert found[1] == masks[7]
    assert isinstance(found[2], PronghornError)


def test_an_end_outside_of_the_vocabulary_is_none(tmp_path: Path) -> None:
    with LLM(save_tiny(tmp_path / "model", eos_token_id=[EOS, 9999]), threads=1) as llm:
        assert llm.generate("a", SamplingParams(max_tokens=9, regex="abc")).text == "abc"


def test_without_llguidance(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ParameterError, match=r"pip install 'pronghorn\[structured\]'"):
        Vocabulary(llm.tokenizer.to_json(), 258, [EOS])


@pytest.mark.parametrize("name", ["stories260K", "stories260K/stories260K.gguf"])
def test_byte_fallback(test_data: Path, name: str) -> None:
    """SentencePiece's tokens, and characters that it has only as bytes."""
    with LLM(test_data / "models" / name) as llm:
        for seed in range(4):
            for form in FORMS:
                out = llm.generate("It is", SamplingParams(**form, max_tokens=200, temperature=1.0, seed=seed))
                if out.finish_reason == "stop":
                    assert has_form(out.text, form), (form, out.text)


def test_choose_with_a_mask(llm: LLM) -> None:
    """The native mask, at all its edges, against filtered logits."""
    from array import array

    from pronghorn.engine.sampling import sampler

    rng = np.random.default_rng(0)
    for n in (1, 31, 32, 33, 257, 1000):
        logits = rng.standard_normal(n).astype(np.float32)
        for n_words in (1, n // 32 + 1):
            words = rng.integers(0, 2**32, n_words, dtype=np.uint32)
            words[0] |= 1
            bits = np.unpackbits(words.view(np.uint8), bitorder="little")[:n].astype(bool)
            allowed = np.zeros(n, bool)
            allowed[: len(bits)] = bits
            masked = np.where(allowed, logits, -np.inf).astype(np.float32)
            for temperature in (0.0, 1.0):
                native = sampler(SamplingParams(temperature=temperature), 7, [])
                chosen = native.choose(logits, 0, n, array("i"), 0, words)
                assert chosen == native.choose(masked, 0, n, array("i"), 0)
    with pytest.raises(IndexError, match="mask"):
        native.choose(logits, 0, n, array("i"), 0, b"")
    with pytest.raises(ValueError, match="no token is left"):
        native.choose(logits, 0, n, array("i"), 0, bytes(128))
