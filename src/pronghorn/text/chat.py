"""Chat messages to a prompt, by the model's own Jinja template.

The templates are written for transformers' `apply_chat_template`, so what that offers them is offered here: a
sandbox in which values cannot be changed, `raise_exception`, `strftime_now`, `tojson` without HTML escapes, `break`
and `continue`, and the `{% generation %}` tag, which only marks text for training.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from pronghorn.errors import CheckpointError, PromptError
from pronghorn.weights.files import shown

if TYPE_CHECKING:
    import jinja2

    from pronghorn.text.tokenizer import Tokenizer


def render(
    template: str | None,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool,
    special_tokens: Mapping[str, str],
    tools: Sequence[Mapping[str, Any]] | None = None,
    **options: Any,
) -> str:
    """The prompt's text for `messages` (each a mapping with `role` and `content`).

    `add_generation_prompt` ends it where the assistant's answer begins. `tools` are JSON schemas of functions.
    `options` are the template's own variables, such as Qwen's `enable_thinking`. The text holds its BOS where the
    template writes one, so encode it with `add_special=False`. PromptError if the template refuses the messages or
    if there is no template; CheckpointError if the template itself is broken.
    """
    if template is None:
        raise PromptError("the model has no chat template: give it a plain prompt instead of messages")
    from jinja2 import TemplateError

    try:
        return _compile(template).render(
            messages=list(messages),
            tools=None if tools is None else list(tools),
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **{**special_tokens, **options},
        )
    except TemplateError as error:
        raise PromptError(f"the chat template refuses these messages: {_line(error)}") from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError, MemoryError) as error:
        raise PromptError(f"the chat template fails on these messages: {_line(error)}") from None


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    **options: Any,
) -> list[int]:
    """Messages to token ids by the tokenizer's template; with tools, by the one named `tool_use` where there is one.

    Nothing is added around the template's text: a template that wants BOS writes it, and a second one would change
    the answer.
    """
    template = tokenizer.chat_templates.get("tool_use") if tools else None
    text = render(
        template or tokenizer.chat_template,
        messages,
        add_generation_prompt=add_generation_prompt,
        special_tokens=tokenizer.special_tokens,
        tools=tools,
        **options,
    )
    return tokenizer.encode(text, add_special=False)


@lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    try:
        return environment.from_string(template)
    except TemplateError as error:
        line = getattr(error, "lineno", None)
        where = "" if line is None else f" at line {line}"
        raise CheckpointError(f"the chat template is broken{where}: {_line(error)}") from None
    except (RecursionError, SyntaxError, ValueError, OverflowError, MemoryError) as error:
        raise CheckpointError(f"the chat template is broken: {_line(error)}") from None


def _raise_exception(message: object) -> None:
    from jinja2 import TemplateError

    raise TemplateError(str(message))


def _strftime_now(form: str) -> str:
    from datetime import datetime

    return datetime.now().strftime(form)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _line(error: BaseException) -> str:
    return shown(" ".join(str(error).split()) or type(error).__name__, 300)
