"""Tool calls: which form of them a chat template teaches the model, and how they are read back from its text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from pronghorn.errors import ParameterError
from pronghorn.generation import beginning_at_end


class Form(NamedTuple):
    """How calls stand in a text: JSON objects, each after a mark (or the text's beginning), up to an end."""

    mark: str
    end: str
    arguments: str  # the key beside "name"


HERMES = Form("<tool_call>", "</tool_call>", "arguments")  # Hermes 2 and 3, Qwen 2.5 and 3
LLAMA3 = Form("{", ";", "parameters")  # Llama 3.1 and 3.2; its <|python_tag|> is special, and not in the text
FORCED = Form("{", "", "arguments")  # what `schema_of` asks for


def form_of(template: str | None) -> Form:
    """The form that a template shows the model. Raises ParameterError where it shows none that is known."""
    if template and HERMES.mark in template and '"arguments"' in template.replace("\\", ""):
        return HERMES
    if template and '"parameters"' in template.replace("\\", "") and "<|start_header_id|>" in template:
        return LLAMA3
    known = "Hermes's and Qwen's <tool_call>, Llama 3's JSON"
    raise ParameterError(f"tools: the model's chat template has no form of calls that is known ({known})")


def schema_of(functions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The JSON schema of a call of one of these functions."""
    calls = []
    for function in functions:
        parameters = function.get("parameters") or {"type": "object"}
        properties = {"name": {"const": function["name"]}, "arguments": parameters}
        call = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
        calls.append(call)
    return calls[0] if len(calls) == 1 else {"anyOf": calls}


class CallReader:
    """Takes an answer's text as it comes; what may be a call is held back to the end."""

    def __init__(self, form: Form) -> None:
        self.form = form
        self.held = ""
        self.shown = False  # whether any text has been
        self.calling = False

    def push(self, text: str) -> str:
        """The text that is certainly no call."""
        self.held += text
        if self.calling:
            return ""
        mark = self.form.mark
        if self.form is HERMES:
            at = self.held.find(mark)
            self.calling = at >= 0
            n_shown = at if self.calling else len(self.held) - beginning_at_end(self.held, mark)
        else:  # at the beginning or not at all
            start = self.held.lstrip()[:1]
            self.calling = start == mark and not self.shown
            n_shown = 0 if self.calling or not start else len(self.held)
        text, self.held = self.held[:n_shown], self.held[n_shown:]
        self.shown = self.shown or bool(text)
        return text

    def finish(self) -> tuple[str, list[dict[str, str]]]:
        """The rest: the calls, each a name and its arguments as JSON; or text, where it has none in good form."""
        calls: list[dict[str, str]] = []
        rest = self.held.strip() if self.calling else ""
        while rest:
            if self.form is HERMES:
                rest = rest.removeprefix(HERMES.mark).lstrip()
            try:
                call, end = json.JSONDecoder().raw_decode(rest)
                arguments = call.get(self.form.arguments, {})
                arguments = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
                calls.append({"name": str(call["name"]), "arguments": arguments})
            except (ValueError, KeyError, AttributeError, RecursionError):
                return self.held, []
            rest = rest[end:].lstrip().removeprefix(self.form.end).lstrip()
        return ("", calls) if calls else (self.held, [])
