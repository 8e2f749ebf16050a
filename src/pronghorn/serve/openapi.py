"""/openapi.json, made of the routes and of the schemas that check them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from pronghorn import __version__
from pronghorn.serve import schemas as s

POST_FAULTS = (400, 401, 403, 404, 408, 413, 429, 500, 503, 504)
MEANINGS = {
    200: "The answer.",
    400: "The request cannot be run; `message` says why, `param` where.",
    401: "The API key is missing or wrong.",
    403: "A page of elsewhere asks, or asks by a name that is not this server's.",
    404: "There is no such model.",
    408: "The body did not come.",
    413: "The body is too long.",
    429: "Too many requests wait or run: again after Retry-After seconds.",
    500: "A fault of the server.",
    503: "The models are being loaded, or the server is shutting down.",
    504: "The request took longer than it may.",
}


class Operation(NamedTuple):
    """A route. `answer` is the schema of its JSON, or a media type."""

    method: str
    path: str
    name: str  # of the handler
    summary: str
    answer: type[BaseModel] | str
    body: type[BaseModel] | None = None
    faults: Sequence[int] = ()
    takes_text: bool = False
    streams: bool = False


OPERATIONS = (
    Operation("POST", "/v1/completions", "completions", "Goes on from prompts.", s.Completion, s.CompletionRequest,
              POST_FAULTS, streams=True),
    Operation("POST", "/v1/chat/completions", "chat_completions", "The next message of a conversation.",
              s.ChatCompletion, s.ChatRequest, POST_FAULTS, streams=True),
    Operation("POST", "/v1/embeddings", "embeddings", "Texts as vectors of length 1.", s.Embeddings,
              s.EmbeddingRequest, POST_FAULTS),
    Operation("GET", "/v1/models", "list_models", "What is served.", s.Models, faults=(401, 403)),
    Operation("GET", "/v1/models/{model}", "model", "One of them.", s.ModelCard, faults=(401, 403, 404, 503)),
    Operation("POST", "/tokenize", "tokenize", "Text to token ids.", s.Tokenized, s.TokenizeRequest, POST_FAULTS),
    Operation("POST", "/detokenize", "detokenize", "Token ids to text.", s.Detokenized, s.DetokenizeRequest,
              POST_FAULTS),
    Operation("POST", "/", "inputs", "A text and the likeliest 20 tokens after it, as fast_gpt2 has it.",
              s.Generated, s.InputsRequest, POST_FAULTS, takes_text=True),
    Operation("GET", "/health", "health", "Whether requests are taken.", s.Health),
    Operation("GET", "/metrics", "metrics_text", "For Prometheus.", "text/plain", faults=(401, 403)),
)  # fmt: skip


def document() -> dict[str, Any]:
    """The OpenAPI document."""
    kinds = {kind for o in OPERATIONS for kind in (o.body, o.answer) if isinstance(kind, type)} | {s.Error}
    ordered = sorted(kinds, key=lambda kind: kind.__name__)
    _, schemas = models_json_schema([(kind, "validation") for kind in ordered], ref_template=REF)
    paths: dict[str, Any] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method.lower()] = described(operation)
    return {
        "openapi": "3.1.0",
        "info": {"title": "pronghorn", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": schemas["$defs"],
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],
    }


REF = "#/components/schemas/{model}"


def reference(kind: type[BaseModel]) -> dict[str, Any]:
    """A schema, by its name."""
    return {"schema": {"$ref": REF.format(model=kind.__name__)}}


def described(operation: Operation) -> dict[str, Any]:
    """One operation."""
    answer, text = operation.answer, {"schema": {"type": "string"}}
    content: dict[str, Any] = {answer: text} if isinstance(answer, str) else {"application/json": reference(answer)}
    if operation.streams:
        content["text/event-stream"] = text
    error = {"application/json": reference(s.Error)}
    if operation.name == "health":
        faults: dict[str, Any] = {"503": {"description": MEANINGS[503], "content": content}}
    else:
        faults = {str(code): {"description": MEANINGS[code], "content": error} for code in operation.faults}
    found: dict[str, Any] = {
        "operationId": operation.name,
        "summary": operation.summary,
        "responses": {"200": {"description": MEANINGS[200], "content": content}, **faults},
    }
    if operation.body:
        bodies = {"application/json": reference(operation.body)}
        found["requestBody"] = {"required": True, "content": bodies}
        if operation.takes_text:
            bodies["text/plain"] = text
    if "{model}" in operation.path:
        found["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]
    return found
