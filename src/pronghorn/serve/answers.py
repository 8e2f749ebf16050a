"""What the engine gives, in OpenAI's words: whole answers, and the chunks of streams."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from pronghorn.errors import NoTokenizer
from pronghorn.serve.tools import CallReader, Form

if TYPE_CHECKING:
    from pronghorn.engine.scheduler import Logprob
    from pronghorn.generation import Chunk, Output, Timings
    from pronghorn.llm import LLM
    from pronghorn.serve.app import Served
    from pronghorn.text.tokenizer import StreamDecoder

LEAST = -9999.0  # for the logarithm of 0, which JSON does not have


def told(timings: Timings) -> dict[str, Any]:
    """What answers tell of timings."""
    return {
        "ttft_s": timings.ttft_s,
        "decode_tok_s": timings.decode_tok_s,
        "draft_proposed": timings.drafted_tokens,
        "draft_accepted": timings.accepted_tokens,
    }


class Pieces:
    """Tokens as texts and as bytes."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.of = lru_cache(1 << 16)(self._of)

    def _of(self, token_id: int) -> tuple[str, bytes, bool]:
        """A token's text (its bytes' names where it is no UTF-8), its bytes, and whether the text leaves it out."""
        try:
            data, special = self.llm.tokenizer.piece(token_id)
        except NoTokenizer:  # ids in, ids out
            return f"token_id:{token_id}", b"", True
        try:
            return data.decode(), data, special
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data), data, special

    def entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        """As chat completions have it."""
        text, data, special = self.of(token_id)
        return {"token": text, "logprob": max(logprob, LEAST), "bytes": None if special else list(data)}


class Legacy:
    """The legacy form of logprobs, chunk by chunk: offsets, in characters, go on from the last.

    `before`: a text whose tokens are not told of, and these tokens.
    """

    def __init__(self, pieces: Pieces, before: str, ids: Sequence[int]) -> None:
        self.pieces = pieces
        self.offset = len(before)
        self.decoder: StreamDecoder | None = None
        with suppress(NoTokenizer):
            self.decoder = pieces.llm.tokenizer.stream()
            self.decoder.prime(ids)

    def __call__(self, entries: Iterable[tuple[int, Logprob | None]], n_top: int) -> dict[str, Any]:
        found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token_id, entry in entries:
            text = self.pieces.of(token_id)[0]
            top: dict[str, float] = {}
            for other, logprob in [*entry.top, (token_id, entry.logprob)] if entry else ():
                top.setdefault(self.pieces.of(other)[0], max(logprob, LEAST))
            found["tokens"].append(text)
            found["token_logprobs"].append(entry and max(entry.logprob, LEAST))
            found["top_logprobs"].append(top or None)
            found["text_offset"].append(self.offset)
            self.offset += len(self.decoder.push(token_id)) if self.decoder else 0
        return {**found, "top_logprobs": found["top_logprobs"] if n_top else None}


class Answers:
    """The objects of one request: `whole` of what was made, or `chunks` as they come, and a last one."""

    def __init__(self, kind: str, prefix: str, served: Served) -> None:
        self.head: dict[str, Any] = {
            "id": f"{prefix}-{secrets.token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": served.name,
            "system_fingerprint": served.fingerprint,
        }
        self.pieces = served.pieces

    def choice(self, index: int, out: Output) -> dict[str, Any]:
        """A choice of a whole answer."""
        raise NotImplementedError

    def deltas(
        self, index: int, chunk: Chunk, prompt_ids: Sequence[int], prompt_logprobs: Sequence[Logprob]
    ) -> list[dict[str, Any]]:
        """What a stream tells of a chunk: choices, each in a message of its own."""
        raise NotImplementedError

    def whole(self, outs: list[Output]) -> dict[str, Any]:
        """The answer to a request that is no stream."""
        samples = [out for one in outs for out in one.samples]
        return {**self.head, "choices": [self.choice(i, out) for i, out in enumerate(samples)], **self.tail(outs)}

    def message(self, choice: dict[str, Any]) -> dict[str, Any]:
        """A stream's message of one choice."""
        return {**self.head, "choices": [choice]}

    def tail(self, outs: list[Output]) -> dict[str, Any]:
        """What is known at the end; `seed` and `timings` (of the first sample) are extensions."""
        n_prompt = sum(len(out.prompt_token_ids) for out in outs)
        n_new = sum(self.n_new(out) for one in outs for out in one.samples)
        return {
            "usage": {
                "prompt_tokens": n_prompt,
                "completion_tokens": n_new,
                "total_tokens": n_prompt + n_new,
                "prompt_tokens_details": {"cached_tokens": sum(out.timings.cached_tokens for out in outs)},
            },
            "seed": outs[0].seed,
            "timings": told(outs[0].timings),
        }

    def n_new(self, out: Output) -> int:
        """Tokens that are told of as generated."""
        return len(out.token_ids)


class Completions(Answers):
    """Legacy completions. `scores` the prompt alone: the one token that the engine makes is not told of."""

    def __init__(
        self, served: Served, prompts: list[str], *, echo: bool, n_top: int | None, n: int, scores: bool
    ) -> None:
        super().__init__("text_completion", "cmpl", served)
        self.prompts, self.echo, self.n_top, self.n, self.scores = prompts, echo, n_top, n, scores
        self.legacy: dict[int, Legacy] = {}

    def choice(self, index: int, out: Output) -> dict[str, Any]:
        return self._choice(
            index,
            out.text,
            out.token_ids,
            out.logprobs,
            out.finish_reason,
            out.prompt_token_ids,
            (out.prompt_logprobs or [None])[1:],
        )

    def deltas(
        self, index: int, chunk: Chunk, prompt_ids: Sequence[int], prompt_logprobs: Sequence[Logprob]
    ) -> list[dict[str, Any]]:
        choice = self._choice(
            index, chunk.text, chunk.token_ids, chunk.logprobs, chunk.finish_reason, prompt_ids, prompt_logprobs
        )
        told = choice["text"] or choice["finish_reason"] or (choice["logprobs"] and choice["logprobs"]["tokens"])
        return [choice] if told else []

    def _choice(
        self,
        index: int,
        text: str,
        ids: Sequence[int],
        logprobs: list[Logprob] | None,
        finish_reason: str | None,
        prompt_ids: Sequence[int],
        prompt_logprobs: Sequence[Logprob | None],
    ) -> dict[str, Any]:
        prompt, first = self.prompts[index // self.n], index not in self.legacy
        if first:
            before = ("", ()) if self.echo else (prompt, prompt_ids)
            self.legacy[index] = Legacy(self.pieces, *before)
        if self.scores:
            text, ids, logprobs, finish_reason = "", [], [], finish_reason and "length"
        entries: list[tuple[int, Logprob | None]] = []
        if first and self.echo:
            text = prompt + text
            entries += zip(prompt_ids, [None, *prompt_logprobs], strict=False)
        entries += zip(ids, logprobs or (), strict=False)
        told = None if self.n_top is None else self.legacy[index](entries, self.n_top)
        return {"index": index, "text": text, "logprobs": told, "finish_reason": finish_reason}

    def n_new(self, out: Output) -> int:
        return 0 if self.scores else super().n_new(out)


class Chats(Answers):
    """Chat completions. `form`: how calls are read from the text, if any may come; `one_call`: the first alone."""

    def __init__(self, served: Served, form: Form | None, *, one_call: bool) -> None:
        super().__init__("chat.completion", "chatcmpl", served)
        self.form, self.one_call = form, one_call
        self.readers: dict[int, CallReader] = {}
        self.begun: set[int] = set()

    def choice(self, index: int, out: Output) -> dict[str, Any]:
        text, calls = self._read(index, out.text, out.finish_reason)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message |= {"content": text or None, "tool_calls": calls}
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(out.logprobs),
            "finish_reason": "tool_calls" if calls else out.finish_reason,
        }

    def message(self, choice: dict[str, Any]) -> dict[str, Any]:
        return {**super().message(choice), "object": "chat.completion.chunk"}

    def deltas(
        self, index: int, chunk: Chunk, prompt_ids: Sequence[int], prompt_logprobs: Sequence[Logprob]
    ) -> list[dict[str, Any]]:
        text, calls = self._read(index, chunk.text, chunk.finish_reason)
        found: list[dict[str, Any]] = []
        if index not in self.begun:
            self.begun.add(index)
            found.append({"delta": {"role": "assistant", "content": ""}})
        logprobs = self._logprobs(chunk.logprobs)
        if text or (logprobs and logprobs["content"]):
            found.append({"delta": {"content": text}, "logprobs": logprobs})
        if calls:
            found.append({"delta": {"tool_calls": [{"index": i, **call} for i, call in enumerate(calls)]}})
        if chunk.finish_reason:
            reason = "tool_calls" if calls else chunk.finish_reason
            found.append({"delta": {}, "finish_reason": reason})
        return [{"index": index, "finish_reason": None, "logprobs": None, **choice} for choice in found]

    def _read(self, index: int, text: str, finish_reason: str | None) -> tuple[str, list[dict[str, Any]]]:
        """The text that is no call, and at the end the calls."""
        if self.form is None:
            return text, []
        reader = self.readers.setdefault(index, CallReader(self.form))
        text = reader.push(text)
        if not finish_reason:
            return text, []
        rest, calls = reader.finish()
        named = [
            {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": call}
            for call in calls[: 1 if self.one_call else None]
        ]
        return text + rest, named

    def _logprobs(self, entries: list[Logprob] | None) -> dict[str, Any] | None:
        if entries is None:
            return None
        entry = self.pieces.entry
        content = [
            {**entry(token.token_id, token.logprob), "top_logprobs": [entry(*other) for other in token.top]}
            for token in entries
        ]
        return {"content": content, "refusal": None}
