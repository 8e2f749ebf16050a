"""Which tokens a text of a given form may go on with: a JSON schema, a regular expression, a grammar, a choice.

llguidance (the extra `structured`) does the work; here is what of it the engine needs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from pronghorn.engine.sampling import FORMS
from pronghorn.errors import ParameterError, PronghornError

if TYPE_CHECKING:
    from pronghorn.engine.sampling import SamplingParams

SPACE = r"\n? {0,16}"
"""Between the parts of JSON: room for indentation, and not for the endless space that small models fall into."""

Mask = bytes
"""A bit for each token that is allowed, the lowest first, in words of 32 bits."""


class Vocabulary:
    """A tokenizer as grammars see it. It takes a while to be made, once for a model.

    `source`: the tokenizer as the text of a tokenizer.json; `size`: logits in a row; `eos_ids`: what ends a text.
    """

    def __init__(self, source: str, size: int, eos_ids: Sequence[int]) -> None:
        try:
            import llguidance
        except ImportError:
            lacking = "needs llguidance, which the extra `structured` brings: pip install 'pronghorn[structured]'"
            raise ParameterError(f"structured output ({', '.join(FORMS)}) {lacking}") from None
        if not eos_ids:
            raise ParameterError("structured output needs an end-of-sequence token: the model has none")
        try:
            self.tokens: Any = llguidance.LLTokenizer(source, n_vocab=size, eos_token=list(eos_ids))
        except (ValueError, RuntimeError) as error:
            raise ParameterError(f"structured output cannot use this tokenizer: {one_line(error)}") from None


class Grammar:
    """Where a text stands in its form.

    `mask` says what is allowed next, and changes nothing; `advance` takes a token; `copy` is for another text that has
    begun alike. Any thread may use it, one at a time.
    """

    def __init__(self, vocabulary: Vocabulary, params: SamplingParams) -> None:
        from llguidance import LLMatcher

        name = next(name for name in FORMS if getattr(params, name) is not None)
        source = getattr(params, name)
        try:
            if name == "json_schema":
                grammar = LLMatcher.grammar_from_json_schema(source, defaults={"whitespace_pattern": SPACE})
            elif name == "regex":
                grammar = LLMatcher.grammar_from_regex(source)
            elif name == "grammar":
                grammar = LLMatcher.grammar_from_lark(source)
            else:
                grammar = LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, source)))
        except ValueError as error:
            raise ParameterError(f"{name}: {one_line(error)}") from None
        self._matcher: Any = LLMatcher(vocabulary.tokens, grammar, log_level=0)
        if self._matcher.is_error():
            raise ParameterError(f"{name}: {one_line(self._matcher.get_error())}")

    def mask(self) -> Mask:
        """What the next token may be: the end of the sequence too, where the text may end. Never nothing."""
        mask: bytes = self._matcher.compute_bitmask()
        self._check()
        return mask

    def advance(self, token_id: int) -> None:
        """The next token is this one. PronghornError where it is not allowed, or the form is too complex to go on."""
        self._matcher.consume_token(token_id)
        self._check()

    def copy(self) -> Grammar:
        """Another one that stands here."""
        other = object.__new__(Grammar)
        other._matcher = self._matcher.deep_copy()
        return other

    @property
    def complete(self) -> bool:
        """Whether nothing can follow but the end."""
        stopped: bool = self._matcher.is_stopped()
        return stopped

    def _check(self) -> None:
        if self._matcher.is_error():
            raise PronghornError(f"structured output: {one_line(self._matcher.get_error())}")


Key = TypeVar("Key")


def masks(grammars: dict[Key, Grammar]) -> dict[Key, Mask | PronghornError]:
    """The mask of each."""
    found: dict[Key, Mask | PronghornError] = {}
    for key, grammar in grammars.items():
        try:
            found[key] = grammar.mask()
        except PronghornError as error:
            found[key] = error
    return found


def one_line(error: object) -> str:
    """A message of a library in one line of bearable length."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:297]}..."
