"""How much of a prompt a step may take on, so that who is reading along does not notice."""

from __future__ import annotations

FIRST = 32
"""Prompt tokens beside decoding ones, before anything is known of their cost."""


class Pace:
    """A budget of prompt tokens for each step, from what steps were measured to cost.

    A step in which tokens are decoded should take no longer than `target_s`, or than twice what it takes when no
    prompt is there, if that is more. So the inter-token latency of running requests is bounded while prompts come in,
    and prompts are as fast as that allows. Tokens never depend on it: only when they come does.
    """

    def __init__(self, max_tokens: int, *, target_s: float = 0.030) -> None:
        self.max_tokens = max_tokens
        self.target_s = target_s
        self._alone: dict[int, float] = {}  # seconds of steps without prompts, by the bits of the number of rows
        self._token_s: float | None = None  # of a prompt's token beside decoding ones
        self._most = FIRST // 2  # prompt tokens that a step has had: what is learned of few is not true of many

    def alone(self, n_decoding: int) -> float:
        """Seconds that a step of so many decoding requests takes by itself; 0 where nothing like it was seen."""
        bits = n_decoding.bit_length()
        near = min(self._alone, key=lambda other: (abs(other - bits), other), default=None)
        return 0.0 if near is None or not n_decoding else self._alone[near]

    def budget(self, n_decoding: int) -> int:
        """Prompt tokens for a step that also decodes so many: at least 1, and all that fit if none decodes."""
        if not n_decoding:
            return self.max_tokens
        limit = 2 * self._most
        if self._token_s:
            alone = self.alone(n_decoding)
            # A quarter is left for what varies: p99 is to be within the target, not the median.
            limit = min(limit, int((0.75 * max(self.target_s, 2 * alone) - alone) / self._token_s))
        return max(1, min(limit, self.max_tokens))

    def note(self, n_decoding: int, n_prompt: int, seconds: float) -> None:
        """What a step has taken."""
        if not n_prompt:
            bits = n_decoding.bit_length()
            before = self._alone.get(bits, seconds)
            self._alone[bits] = before + (0.3 if seconds < before else 0.05) * (seconds - before)  # few are disturbed
            return
        cost = max(seconds - self.alone(n_decoding), 0.0) / n_prompt
        self._most = max(self._most, n_prompt)
        if self._token_s is None:
            self._token_s = cost
        else:  # dearer at once, cheaper by and by; a few tokens tell little
            weight = min(1.0, n_prompt / 32) * (0.7 if cost > self._token_s else 0.2)
            self._token_s += weight * (cost - self._token_s)
