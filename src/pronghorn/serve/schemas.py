"""What requests may say and what answers look like: checked at the door, and told in /openapi.json.

The names are OpenAI's; those that are SamplingParams' own (top_k, min_p, ...) mean what they mean there. What is not
named here is refused, and null is as if left out.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, RootModel

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Whole = Field(min_length=1, fail_fast=True)  # a long list of faults is not made
Tokens = Annotated[list[TokenId], Whole]
Texts = Annotated[list[str], Whole]
Prompts = str | Texts | Tokens | Annotated[list[Tokens], Whole]


class Body(BaseModel):
    """A JSON object of these names and types, and no others."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Body):
    include_usage: bool | None = None


class Sampling(Body):
    """What all generations may ask for."""

    model: str | None = Field(None, description="May be left out where one model is served.")
    max_tokens: int | None = Field(None, ge=0, lt=2**31)
    temperature: float | None = Field(None, ge=0, le=100, description="1 if left out; 0 is greedy.")
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1, le=128)
    stop: str | list[str] | None = None
    seed: int | None = Field(None, ge=0, lt=2**64, description="The answer names the one that was used.")
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="Accepted; it changes nothing.")
    safety_identifier: str | None = Field(None, description="Accepted; it changes nothing.")
    prompt_cache_key: str | None = Field(None, description="Accepted; it changes nothing.")
    # Beyond OpenAI's:
    top_k: int | None = Field(None, ge=0, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    min_tokens: int | None = Field(None, ge=0, lt=2**31)
    ignore_eos: bool | None = None
    stop_token_ids: list[TokenId] | None = None
    json_schema: dict[str, Any] | None = None
    regex: str | None = Field(None, min_length=1)
    grammar: str | None = Field(None, min_length=1, description="In Lark's language.")
    choice: list[str] | None = Field(None, min_length=1)


class CompletionRequest(Sampling):
    prompt: Prompts
    best_of: int | None = Field(None, ge=1, le=128)
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=100)


class TextPart(Body):
    type: Literal["text"]
    text: str


class CalledFunction(Body):
    name: str
    arguments: str = Field(description="JSON.")


class ToolCall(Body):
    id: str
    type: Literal["function"]
    function: CalledFunction


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    # What clients send back of an answer, empty:
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None


class Function(Body):
    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class FunctionName(Body):
    name: str


class ToolChoice(Body):
    type: Literal["function"]
    function: FunctionName


class JsonSchema(Body):
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = Field(None, description="Accepted; the schema always holds.")


class TextFormat(Body):
    type: Literal["text"]


class JsonFormat(Body):
    type: Literal["json_object"]


class SchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: JsonSchema


class ChatRequest(Sampling):
    messages: list[Message] = Field(min_length=1, fail_fast=True)
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=100)
    response_format: Annotated[TextFormat | JsonFormat | SchemaFormat, Field(discriminator="type")] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="The template's own variables.")


class EmbeddingRequest(Body):
    input: Prompts
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    user: str | None = None


class TokenizeRequest(Body):
    content: str
    model: str | None = None
    add_special: bool | None = Field(None, description="False if left out, as llama.cpp has it.")
    with_pieces: bool | None = None


class DetokenizeRequest(Body):
    tokens: list[TokenId] = Field(fail_fast=True)
    model: str | None = None


class InputsRequest(Body):
    inputs: str


# Answers ------------------------------------------------------------------------------------------------------


class PromptDetails(Body):
    cached_tokens: int


class Usage(Body):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class Timings(Body):
    """Of the first sample. An extension."""

    ttft_s: float
    decode_tok_s: float | None
    draft_proposed: int
    draft_accepted: int


class LegacyLogprobs(Body):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(Body):
    index: int
    text: str
    logprobs: LegacyLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class Completion(Body):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    seed: int | None = None
    timings: Timings | None = None


class TopLogprob(Body):
    token: str
    logprob: float
    bytes: list[int] | None = Field(description="None for a special token, which is not in the text.")


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Body):
    content: list[TokenLogprob]
    refusal: None


class Answer(Body):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(Body):
    index: int
    message: Answer
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(Body):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    seed: int
    timings: Timings


class Embedding(Body):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(Body):
    prompt_tokens: int
    total_tokens: int


class Embeddings(Body):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class ModelCard(Body):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    context: int


class Models(Body):
    object: Literal["list"]
    data: list[ModelCard]


class Piece(Body):
    id: int
    piece: str | list[int] = Field(description="Its text, or its bytes where they are not UTF-8.")


class Tokenized(Body):
    tokens: list[int | Piece]


class Detokenized(Body):
    content: str


class GeneratedText(Body):
    generated_text: str


class Generated(RootModel[list[GeneratedText]]):
    """fast_gpt2's form."""


class Health(Body):
    status: Literal["ok", "loading", "draining"]


class Fault(Body):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(Body):
    """What every refusal looks like."""

    error: Fault
