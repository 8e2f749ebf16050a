"""What becomes of a prompt: its tokens on their way to text, and what is told of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from math import inf
from typing import TYPE_CHECKING, NamedTuple

from pronghorn.engine.scheduler import Logprob, Request
from pronghorn.errors import PronghornError

if TYPE_CHECKING:
    from pronghorn.text.tokenizer import StreamDecoder


class Timings(NamedTuple):
    """How long a generation took. Speeds are None where there was too little to time.

    `bytes_per_token` is what decoding a token reads: every weight once (not the rows looked up in embedding tables,
    but the head, also where it is the same matrix), and keys and values at the middle of the output. With drafts, which
    are not counted in it, the bandwidth may be more than the memory has.
    """

    load_s: float  # making the model ready
    ttft_s: float  # from the call to the first token, or to the end where none came
    prefill_tok_s: float  # prompt tokens that were computed in ttft_s
    decode_tok_s: float | None  # tokens after the first
    bytes_per_token: int
    bandwidth_gb_s: float | None  # bytes_per_token * decode_tok_s
    cached_tokens: int  # of the prompt, whose keys and values the prefix cache had
    drafted_tokens: int = 0  # proposed by a draft (see LLM)
    accepted_tokens: int = 0  # of these, those that were right


class Chunk(NamedTuple):
    """A piece of a stream. Text may lag behind the tokens, while half a character or of a stop string is there."""

    text: str
    token_ids: list[int]
    finish_reason: str | None  # of the last chunk of a sample: "stop", "length" or "timeout"
    logprobs: list[Logprob] | None
    sample: int = 0  # which it is of, where there are several


class Output(NamedTuple):
    """What became of a prompt; the first sample, if several were made.

    `token_ids` ends with the token that stopped it, whose text is not in `text`; nor is a stop string. `text` is
    empty for a model without a tokenizer.
    """

    text: str
    token_ids: list[int]
    finish_reason: str  # "stop", "length" (max_tokens, or the context), "timeout", "cancelled" (closed, or Ctrl-C)
    logprobs: list[Logprob] | None
    prompt_token_ids: list[int]
    seed: int  # of this sample: with it, it is made again alone
    timings: Timings
    prompt_logprobs: list[Logprob | None] | None = None  # of each token of the prompt; None for its first
    others: tuple[Output, ...] = ()

    @property
    def samples(self) -> list[Output]:
        """All samples, of which this is the first."""
        return [self, *self.others]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, in the middle of a list of prompts: `outputs` is what they had by then, "cancelled" if not at an end."""

    def __init__(self, outputs: list[Output]) -> None:
        super().__init__(f"{sum(out.finish_reason != 'cancelled' for out in outputs)} of {len(outputs)} had ended")
        self.outputs = outputs


class Cost(NamedTuple):
    """What a model takes."""

    load_s: float  # to be made ready
    weight_bytes: int  # read for each token
    kv_bytes: int  # for each token before it


class Generation:
    """One request's way from token ids to text."""

    def __init__(
        self,
        request: Request,
        decoder: StreamDecoder | None,
        cost: Cost,
        cancel: Callable[[Request], None],
        started: float,
    ) -> None:
        self.request = request
        self.finish_reason: str | None = None
        self.n_read = request.n_prompt  # tokens whose text has been taken
        self.text = ""
        self.stream = TextStream(decoder, request.params.stop) if decoder else None
        self.cost = cost
        self.cancel = cancel
        self.started, self.first, self.last = started, 0.0, 0.0
        if decoder:
            decoder.prime(request.token_ids)

    def advance(self) -> Chunk | None:
        """What is new since the last call, if anything."""
        if self.finish_reason:
            return None
        request = self.request
        ended, n_tokens, start = request.finish_reason, len(request.token_ids), self.n_read
        if n_tokens == start and not ended:
            return None
        if ended in ("error", "cancelled"):
            raise request.error or PronghornError("the generation was cancelled")
        self.last = time.perf_counter()
        self.first = self.first or self.last
        text = ""
        while self.n_read < n_tokens and not self.finish_reason:
            token_id = request.token_ids[self.n_read]
            self.n_read += 1
            if token_id in request.stop_ids:
                self.finish_reason = "stop"
            elif self.stream:
                text += self.stream.push(token_id)
                if self.stream.stopped:
                    self.finish_reason = "stop"
                    self.cancel(request)
        if not self.finish_reason and self.n_read == n_tokens:
            self.finish_reason = ended
        if self.finish_reason and self.stream:
            text += self.stream.finish()
            self.finish_reason = "stop" if self.stream.stopped else self.finish_reason
        self.text += text
        ids = request.token_ids[start : self.n_read].tolist()
        return Chunk(text, ids, self.finish_reason, self._logprobs(start), request.index)

    def end(self) -> None:
        """Leaves it at what there is, if it has not finished."""
        if not self.finish_reason:
            self.text += self.stream.finish() if self.stream else ""  # what was held back
            self.finish_reason = "stop" if self.stream and self.stream.stopped else "cancelled"
        self.last = self.last or time.perf_counter()
        self.first = self.first or self.last

    def output(self) -> Output:
        """The whole, once it has finished."""
        request = self.request
        if not self.finish_reason:
            raise PronghornError("the generation has not ended")
        return Output(
            text=self.text,
            token_ids=request.token_ids[request.n_prompt : self.n_read].tolist(),
            finish_reason=self.finish_reason,
            logprobs=self._logprobs(request.n_prompt),
            prompt_token_ids=request.token_ids[: request.n_prompt].tolist(),
            seed=request.seed,
            timings=self.timings(),
            prompt_logprobs=None if request.params.prompt_logprobs is None else [None, *request.prompt_logprobs],
        )

    def likelihood(self) -> float:
        """The mean logarithm of the tokens' probabilities, by which `best_of` chooses."""
        n_new = self.n_read - self.request.n_prompt
        return sum(entry.logprob for entry in self.request.logprobs[:n_new]) / n_new if n_new else -inf

    def timings(self) -> Timings:
        """See Timings."""
        n_prompt, n_new = self.request.n_prompt, self.n_read - self.request.n_prompt
        n_cached = self.request.n_cached or 0
        ttft = self.first - self.started
        prefill = (n_prompt - n_cached) / ttft if n_new else 0.0
        speed = (n_new - 1) / (self.last - self.first) if n_new > 1 and self.last > self.first else None
        size = self.cost.weight_bytes + self.cost.kv_bytes * (n_prompt + n_new // 2)
        drafts = self.request.n_drafted, self.request.n_accepted
        return Timings(self.cost.load_s, ttft, prefill, speed, size, speed and size * speed / 1e9, n_cached, *drafts)

    def _logprobs(self, start: int) -> list[Logprob] | None:
        if self.request.params.logprobs is None:
            return None
        n_prompt = self.request.n_prompt
        return self.request.logprobs[start - n_prompt : self.n_read - n_prompt]


class Job:
    """A prompt's samples, on their way together."""

    def __init__(self, generations: list[Generation], n: int) -> None:
        self.generations = generations
        self.n = n  # of which so many are given

    @property
    def requests(self) -> list[Request]:
        """One for each sample."""
        return [generation.request for generation in self.generations]

    @property
    def finished(self) -> bool:
        """Whether all samples have."""
        return all(generation.finish_reason for generation in self.generations)

    def advance(self) -> list[Chunk]:
        """What is new since the last call. Raises what ended a sample by an error, or a cancellation elsewhere."""
        return [chunk for generation in self.generations if (chunk := generation.advance())]

    def end(self) -> None:
        """Leaves it at what there is."""
        for generation in self.generations:
            generation.end()

    def output(self) -> Output:
        """The whole, once all have finished."""
        chosen = self.generations
        if chosen[0].request.params.best_of is not None:
            chosen = sorted(chosen, key=lambda generation: -generation.likelihood())  # of equals the first
        first, *others = (generation.output() for generation in chosen[: self.n])
        return first._replace(others=tuple(others))


class Stream(Iterator[Chunk]):
    """The chunks of a generation. It runs while chunks are asked for: of this one, or of others that share its steps.

    Closing it ends it and frees its memory.
    """

    def __init__(self, job: Job, chunks: Generator[Chunk, None, None]) -> None:
        self._job = job
        self._chunks = chunks

    def __next__(self) -> Chunk:
        return next(self._chunks)

    def close(self) -> None:
        """Ends the generation; no effect on one that has ended."""
        self._chunks.close()
        self._job.end()

    def output(self) -> Output:
        """The whole, after the last chunk; after `close`, what had come by then."""
        return self._job.output()


class TextStream:
    """Token ids to text that is cut before the first stop string.

    The first is the one that is complete first (of those, the longest), wherever the borders of tokens are. Text is
    held back only while it may be the beginning of one.
    """

    def __init__(self, decoder: StreamDecoder, stop: Sequence[str]) -> None:
        self.decoder = decoder
        self.stop = stop
        self.held = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """The text that can be shown now."""
        return self._show(self.decoder.push(token_id))

    def finish(self) -> str:
        """The rest of the text, at the end."""
        if self.stopped:
            return ""
        text = self._show(self.decoder.finish()) + self.held
        self.held = ""
        return text

    def _show(self, piece: str) -> str:
        text = self.held + piece
        found = [(at + len(stop), at) for stop in self.stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self.held = True, ""
            return text[: min(found)[1]]
        n_held = max((beginning_at_end(text, stop) for stop in self.stop), default=0)
        self.held = text[len(text) - n_held :]
        return text[: len(text) - n_held]


def beginning_at_end(text: str, stop: str) -> int:
    """Characters at the end of the text that are the beginning of the stop string."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
