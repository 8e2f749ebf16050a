"""The pages of the KV cache: who holds them, and which of them can be had again for the same tokens."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

from pronghorn.ops import PAGE

ROOT = 0
"""The chain of no tokens at all."""


class PagePool:
    """`n_pages` pages with reference counts, and a prefix cache.

    A full page is known by its chain: its own tokens after the chain of the page before it. Equal chains are equal
    tokens from position 0 on, so keys and values are equal too, bit for bit, and a request that starts alike reads
    the page instead of computing it. Pages that nobody holds keep their contents until they are needed: the least
    recently used goes first.
    """

    def __init__(self, n_pages: int, *, prefix_cache: bool = True) -> None:
        self.n_pages = n_pages
        self.prefix_cache = prefix_cache
        self._holders = [0] * n_pages
        self._blank = list(range(n_pages - 1, -1, -1))  # pages without contents to keep; the last goes first
        self._idle: dict[int, None] = {}  # known pages that nobody holds, oldest first
        self._page_of: dict[tuple[int, bytes], tuple[int, int]] = {}  # (chain before, tokens) -> page, chain
        self._key_of: dict[int, tuple[int, bytes]] = {}  # of each known page
        self._last_chain = ROOT  # chains are numbered, and no number is used again: a key cannot go stale

    @property
    def n_free(self) -> int:
        """Pages that can be taken."""
        return len(self._blank) + len(self._idle)

    def take(self, count: int) -> list[int] | None:
        """So many pages with one holder each, or None, and none, if there are too few."""
        if count > self.n_free:
            return None
        pages = []
        for _ in range(count):
            if self._blank:
                page = self._blank.pop()
            else:
                page = next(iter(self._idle))
                del self._idle[page]
                del self._page_of[self._key_of.pop(page)]
            self._holders[page] = 1
            pages.append(page)
        return pages

    def hold(self, pages: Iterable[int]) -> None:
        """One more hold on each page; somebody holds them already."""
        for page in pages:
            self._holders[page] += 1

    def is_shared(self, page: int) -> bool:
        """Whether a page has several holders: then it is read, and not written."""
        return self._holders[page] > 1

    def release(self, pages: Iterable[int]) -> None:
        """Gives up one hold on each page, last page first: a chain is forgotten from its end."""
        for page in reversed(list(pages)):
            self._holders[page] -= 1
            if self._holders[page] == 0:
                if page in self._key_of:
                    self._idle[page] = None
                else:
                    self._blank.append(page)

    def match(self, token_ids: array[int]) -> tuple[list[int], int]:
        """Known pages for the beginning of these tokens, now held, and the chain that they end.

        The last token is left out, since its logits are wanted.
        """
        pages: list[int] = []
        chain = ROOT
        for start in range(0, len(token_ids) - PAGE, PAGE) if self.prefix_cache else ():
            found = self._page_of.get((chain, token_ids[start : start + PAGE].tobytes()))
            if found is None:
                break
            page, chain = found
            if self._holders[page] == 0:
                del self._idle[page]
            self._holders[page] += 1
            pages.append(page)
        return pages, chain

    def contents(self, page: int) -> tuple[int, bytes] | None:
        """What a page is known by, if it is."""
        return self._key_of.get(page)

    def learn(self, page: int, chain: int, token_ids: array[int]) -> int:
        """Notes that a held page is full of these tokens, after the chain before it -> the chain that it ends."""
        key = (chain, token_ids.tobytes())
        if key not in self._page_of:
            if page in self._key_of:  # by a chain whose beginning was forgotten, and is known anew
                del self._page_of[self._key_of[page]]
            self._last_chain += 1
            self._page_of[key] = page, self._last_chain
            self._key_of[page] = key
        return self._page_of[key][1]
