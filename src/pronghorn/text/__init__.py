"""Text to token ids and back. Nothing here knows a model; importing it costs nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pronghorn.text.tokenizer import Tokenizer as Tokenizer
    from pronghorn.weights import TokenizerSource

__all__ = ["open_tokenizer"]


def open_tokenizer(source: TokenizerSource) -> Tokenizer:
    """The tokenizer of a checkpoint; CheckpointError where its files are missing, damaged or of an unknown kind."""
    from pronghorn.text import fast, tokenizer

    return fast.opened(source, lambda: tokenizer.open_tokenizer(source))
