"""`pronghorn batch`: a file of prompts, at full throughput; it may be killed and begun again.

IN has one JSON object a line, of either form:

- `{"prompt": "..." or [token ids], "id": "...", ...}` or `{"messages": [...], ...}`, with any of SamplingParams' names.
  OUT gets `{"line": 1, "id": "...", "text": ..., "token_ids": ..., "finish_reason": ..., ...}`, or
  `{"line": 1, "id": "...", "error": {"message": ...}}`.
- OpenAI's batch: `{"custom_id": "...", "method": "POST", "url": "/v1/chat/completions" or "/v1/completions",
  "body": {...}}`. OUT gets `{"line": 1, "id": ..., "custom_id": ..., "response": {"status_code": 200, "body": {...}},
  "error": null}`, and where the line is at fault, status_code 400 and the body `{"error": {...}}`.

OUT's lines come as they are done; `line` counts IN's from 1. A line is written whole, and once: what is there when it
begins is done, but for a last line that was cut off.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from pronghorn.engine.sampling import NAMES, SamplingParams
from pronghorn.errors import ParameterError, PromptError, PronghornError

if TYPE_CHECKING:
    from pronghorn.generation import Job, Output
    from pronghorn.llm import LLM

URLS = {"/v1/chat/completions": "chat.completion", "/v1/completions": "text_completion"}
PLAIN = ("id", "prompt", "messages", *NAMES)
OPENAI = (
    "frequency_penalty", "logit_bias", "max_tokens", "messages", "model", "n", "presence_penalty", "prompt", "seed",
    "stop", "temperature", "top_p", "user", "best_of", "max_completion_tokens", "response_format", "stream",
    "top_k", "min_p", "repetition_penalty", "min_tokens", "ignore_eos", "stop_token_ids",
)  # fmt: skip
"""What a body may have; the last row is ours."""


class Line(NamedTuple):
    """A line of IN: what it asks for, or what is wrong with it."""

    number: int  # from 1
    id: Any
    url: str | None  # of OpenAI's form
    body: Mapping[str, Any]
    error: PronghornError | None = None


def read_line(number: int, data: bytes) -> Line:
    """A line, as far as it can be understood."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        return Line(number, None, None, {}, PromptError(f"line {number} is no JSON: {error}"))
    if not isinstance(value, dict):
        return Line(number, None, None, {}, PromptError(f"line {number} is no JSON object"))
    for name in ("id", "custom_id"):
        if name in value and not comes_back(value[name]):
            return Line(number, None, None, {}, PromptError(f"line {number}: {name} is nothing that can be written"))
    if "body" not in value and "url" not in value:
        return Line(number, value.get("id"), None, value)
    custom_id, url, body = (value.get(name) for name in ("custom_id", "url", "body"))
    if url not in URLS or not isinstance(body, dict) or value.get("method", "POST") != "POST":
        wrong = f"expected the method POST, a body, and one of the urls {', '.join(URLS)}"
        return Line(number, custom_id, str(url), {}, PromptError(f"line {number}: {wrong}"))
    return Line(number, custom_id, url, body)


def comes_back(value: Any) -> bool:
    """Whether a value that JSON gave can be told by what is written of it: no NaN can, nor half of a surrogate pair."""
    try:
        return bool(json.loads(json.dumps(value, ensure_ascii=False).encode()) == value)
    except (ValueError, RecursionError):
        return False


def job_of(llm: LLM, line: Line, defaults: Mapping[str, Any]) -> Job | PronghornError:
    """What a line asks for, on its way; or its error."""
    try:
        if line.error:
            raise line.error
        return llm.job(*(plain if line.url is None else openai)(llm, line, defaults))
    except PronghornError as error:
        return error


def plain(llm: LLM, line: Line, defaults: Mapping[str, Any]) -> tuple[Any, SamplingParams]:
    """The prompt and the parameters of our own form."""
    refuse_unknown(line.body, PLAIN)
    values = {**defaults, **{name: value for name, value in line.body.items() if name in NAMES}}
    return prompt_of(llm, line.body), SamplingParams(**numbered(values))


def openai(llm: LLM, line: Line, defaults: Mapping[str, Any]) -> tuple[Any, SamplingParams]:
    """The prompt and the parameters of OpenAI's form; what it leaves to us is as on the command line."""
    body = {name: value for name, value in line.body.items() if value is not None}
    refuse_unknown(body, OPENAI)
    if body.pop("stream", False):
        raise ParameterError("stream is true: a batch has no streams")
    if ("messages" in body) != (line.url == "/v1/chat/completions"):
        raise PromptError(f"{line.url} takes {'prompt' if 'messages' in body else 'messages'}")
    if "max_completion_tokens" in body:
        body["max_tokens"] = body.pop("max_completion_tokens")
    form = body.pop("response_format", {"type": "text"})
    match form:
        case {"type": "text"}:
            pass
        case {"type": "json_object"}:
            body["json_schema"] = {"type": "object"}
        case {"type": "json_schema", "json_schema": {"schema": schema}}:
            body["json_schema"] = schema
        case _:
            raise ParameterError(f"response_format is {form!r}: expected the type text, json_object or json_schema")
    values = {**defaults, **{name: value for name, value in body.items() if name in NAMES}}
    return prompt_of(llm, body), SamplingParams(**numbered(values))


def numbered(values: dict[str, Any]) -> dict[str, Any]:
    """The parameters with token ids as numbers, where JSON had them as keys."""
    if isinstance(biases := values.get("logit_bias"), dict):
        values["logit_bias"] = {
            int(key) if key.isdecimal() and len(key) < 20 else key: bias for key, bias in biases.items()
        }
    return values


def refuse_unknown(body: Mapping[str, Any], known: tuple[str, ...]) -> None:
    """ParameterError for a name that is none of ours."""
    if unknown := [name for name in body if name not in known]:
        raise ParameterError(f"{unknown[0]!r} is not known: expected {', '.join(sorted(known))}")


def prompt_of(llm: LLM, body: Mapping[str, Any]) -> Any:
    """The prompt of a line, or its conversation in the model's template."""
    if ("prompt" in body) == ("messages" in body):
        raise PromptError("expected either prompt or messages")
    return body["prompt"] if "prompt" in body else llm.chat_prompt(body["messages"])


def result_of(line: Line, result: Output | PronghornError, model: str) -> dict[str, Any]:
    """The line of OUT."""
    if line.url is None:
        head = {"line": line.number} | ({} if line.id is None else {"id": line.id})
        if isinstance(result, PronghornError):
            return {**head, "error": {"message": str(result), "type": type(result).__name__}}
        samples = [sample_of(out) for out in result.samples]
        first = {**samples[0], "others": samples[1:]} if len(samples) > 1 else samples[0]
        return {**head, **first, "prompt_token_ids": result.prompt_token_ids}
    name = f"batch-{line.number}"
    head = {"line": line.number, "id": name, "custom_id": line.id}
    if isinstance(result, PronghornError):
        body: dict[str, Any] = {"error": {"message": str(result), "type": "invalid_request_error"}}
        return {**head, "response": {"status_code": 400, "request_id": name, "body": body}, "error": None}
    n_prompt, n_new = len(result.prompt_token_ids), sum(len(out.token_ids) for out in result.samples)
    chat = line.url == "/v1/chat/completions"
    body = {
        "id": name, "object": URLS[line.url], "created": int(time.time()), "model": line.body.get("model", model),
        "choices": [
            {
                "index": index,
                **({"message": {"role": "assistant", "content": out.text}} if chat else {"text": out.text}),
                "finish_reason": out.finish_reason,
                "logprobs": None,
            }
            for index, out in enumerate(result.samples)
        ],
        "usage": {"prompt_tokens": n_prompt, "completion_tokens": n_new, "total_tokens": n_prompt + n_new},
    }  # fmt: skip
    return {**head, "response": {"status_code": 200, "request_id": name, "body": body}, "error": None}


def sample_of(out: Output) -> dict[str, Any]:
    """What is told of a sample."""
    found: dict[str, Any] = {name: getattr(out, name) for name in ("text", "token_ids", "finish_reason", "seed")}
    for name in ("logprobs", "prompt_logprobs"):
        if (entries := getattr(out, name)) is not None:
            found[name] = [None if entry is None else entry._asdict() for entry in entries]
    return found


class Results:
    """OUT: the lines that are done, and a place for more. Nobody else may write to it meanwhile."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file: IO[bytes] = path.open("a+b", buffering=0)
        except OSError as error:
            raise PronghornError(f"{path}: {error.strerror}") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise PronghornError(f"{path}: another process writes to it") from None
        self.done: dict[int, Any] = {}  # the names that lines have, by their numbers
        try:
            self._read()
        except BaseException:
            self._file.close()
            raise

    def _read(self) -> None:
        self._file.seek(0)
        end = 0
        with os.fdopen(os.dup(self._file.fileno()), "rb") as lines:
            for at, data in enumerate(lines, 1):
                if not data.endswith(b"\n"):  # it was cut off: it is done again
                    os.ftruncate(self._file.fileno(), end)
                    break
                end += len(data)
                try:
                    value = json.loads(data)
                    number, name = value["line"], value.get("custom_id", value.get("id"))
                    if type(number) is not int or number in self.done:
                        raise ValueError
                except (ValueError, KeyError, TypeError, AttributeError):
                    raise PronghornError(
                        f"{self.path}: line {at} is not one that `pronghorn batch` has written"
                    ) from None
                self.done[number] = name

    def write(self, value: dict[str, Any]) -> None:
        """One more line, whole: what a full disk has cut off is taken back."""
        data = memoryview(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
        end = os.fstat(self._file.fileno()).st_size
        try:
            while data:
                data = data[self._file.write(data) or 0 :]
        except BaseException as error:
            os.ftruncate(self._file.fileno(), end)
            if isinstance(error, OSError):
                raise PronghornError(f"{self.path}: {error.strerror}") from None
            raise
        self.done[value["line"]] = value.get("custom_id", value.get("id"))

    def close(self) -> None:
        """Syncs what was written, and lets go of the file."""
        os.fsync(self._file.fileno())
        self._file.close()


def lines_of(path: Path) -> Iterator[tuple[int, bytes]]:
    """IN's lines with their numbers; empty ones are none."""
    try:
        with path.open("rb") as file:
            for number, data in enumerate(file, 1):
                if data.strip():
                    yield number, data
    except OSError as error:
        raise PronghornError(f"{path}: {error.strerror}") from None


def run(llm: LLM, source: Path, target: Path, defaults: Mapping[str, Any]) -> tuple[int, int]:
    """Runs what is not done yet -> lines that were done now, and of these the errors. `defaults`: SamplingParams."""
    from tqdm import tqdm

    if source.exists() and not source.is_file():  # it is read twice
        raise PronghornError(f"{source} is not a file")
    numbers = {number for number, _ in lines_of(source)}
    results = Results(target)
    n_done = n_errors = 0
    try:
        if strange := min(results.done.keys() - numbers, default=None):
            raise PronghornError(f"{target}: what it has of line {strange} is not of {source}")
        lines: dict[int, Line] = {}

        def jobs() -> Iterator[tuple[int, Job | PronghornError]]:
            for number, data in lines_of(source):
                line = read_line(number, data)
                if number in results.done:
                    if results.done[number] != line.id:
                        raise PronghornError(f"{target}: what it has of line {number} is not of {source}")
                    continue
                lines[number] = line
                yield number, job_of(llm, line, defaults)

        before = len(results.done)
        with tqdm(
            total=len(numbers), initial=before, unit="line", disable=None, file=sys.stderr, smoothing=0.05
        ) as bar:
            for number, result in llm.run(jobs()):
                results.write(result_of(lines.pop(number), result, llm.path.name))
                n_done += 1
                n_errors += isinstance(result, PronghornError)
                bar.update()
    finally:
        results.close()
    return n_done, n_errors


def main(args: argparse.Namespace, llm: LLM, params: SamplingParams) -> str:
    """`pronghorn batch` -> what is said at the end."""
    source, target = Path(args.input), Path(args.output)
    if target.exists() and source.exists() and target.samefile(source):
        raise ParameterError(f"{target}: OUT is IN")
    started, before = time.perf_counter(), llm.stats().generated_tokens
    n_done, n_errors = run(llm, source, target, params.as_dict())
    seconds, n_tokens = time.perf_counter() - started, llm.stats().generated_tokens - before
    return f"{n_done} lines, {n_errors} of them errors, in {seconds:.1f} s: {n_tokens / seconds:.0f} tokens/s"
