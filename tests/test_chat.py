"""Chat templates: the same text as transformers' `apply_chat_template`; refusals in one line; no second BOS."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from pronghorn.errors import CheckpointError, PromptError
from pronghorn.text import open_tokenizer
from pronghorn.text.chat import encode_chat, render
from pronghorn.weights import TokenizerSource, open_checkpoint

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}

# Written for these tests, in the manner of the models' own.
CHATML = """\
{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You help.<|im_end|>
' }}{% endif %}{{ '<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""

LLAMA2 = """\
{%- if messages[0]['role'] == 'system' %}
    {%- set system = '<<SYS>>\\n' + messages[0]['content'] | trim + '\\n<</SYS>>\\n\\n' %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = '' %}
{%- endif %}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate user/assistant/user/assistant') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- bos_token + '[INST] ' + (system if loop.first else '') + message['content'].strip() + ' [/INST]' }}
    {%- elif message['role'] == 'assistant' %}
        {{- ' ' ~ message['content'].strip() ~ ' ' ~ eos_token }}
    {%- endif %}
{%- endfor %}
"""

LLAMA3 = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant', 'tool'] %}
        {{- raise_exception("No such role: " ~ message.role) }}
    {%- endif %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
    {%- if loop.first and message.role == 'system' %}
        {{- 'Today is ' + date_string + '\\n\\n' }}
    {%- endif %}
    {{- message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

QWEN = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- tools | tojson(indent=2) }}
    {{- "<|im_end|>\\n" }}
{%- endif %}
{%- set ns = namespace(last=messages | length - 1, seen=false) %}
{%- for message in messages[::-1] %}
    {%- if message.role == "user" %}{% set ns.last = loop.revindex0 %}{% set ns.seen = true %}{% break %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "skip" %}{% continue %}{% endif %}
    {{- '<|im_start|>' + message.role }}
    {%- if message.content is string %}
        {{- '\\n' + message.content }}
    {%- else %}
        {%- for part in message.content if part.type == 'text' %}{{ part.text }}{% endfor %}
    {%- endif %}
    {%- if message.tool_calls %}
        {%- for call in message.tool_calls %}
            {%- set call = call.function if call.function else call %}
            {{- '\\n<tool_call>\\n{"name": "' + call.name + '", "arguments": ' + call.arguments | tojson + '}' }}
        {%- endfor %}
    {%- endif %}
    {%- if loop.index0 == ns.last and ns.seen %}{{ ' (last)' }}{% endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}
"""

GENERATION = """\
{% set mark = 'outer' %}
{% for message in messages %}
  {% if message.role == 'assistant' %}
{% generation %}
{% set mark = 'inner' %}
A: {{ message.content }} {{ mark }} {{ eos_token }}
{% endgeneration %}
  {% else %}
U: {{ message.content }} {{ mark }}
  {% endif %}
{% endfor %}
{{ mark }}{{ dict(a=1) | tojson }}{{ range(3) | list }}{{ undefined_name }}|"""

TEMPLATES = {"chatml": CHATML, "llama2": LLAMA2, "llama3": LLAMA3, "qwen": QWEN, "generation": GENERATION}

CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hi"}],
    [
        {"role": "system", "content": " Be brief. "},
        {"role": "user", "content": "naïve <b>&amp;</b> 'q' \"q\"\n世界 😀"},
    ],
    [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2\n"},
        {"role": "user", "content": "  and\t3? </s> {{ x }} "},
    ],
]
TOOLS = [{
    "type": "function",
    "function": {"name": "weather", "description": "Weather <now> & 'here' é", "parameters": {
        "type": "object", "properties": {"city": {"type": "string", "enum": ["Köln", "서울"]}}, "required": ["city"],
    }},
}]  # fmt: skip
CALLS: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]},
    {"role": "skip", "content": "x"},
    {"role": "assistant", "content": "", "tool_calls": [
        {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln", "days": 2.5, "x": None}}},
    ]},
    {"role": "tool", "content": "{\"sun\": true}"},
]  # fmt: skip


@pytest.fixture(scope="module")
def reference() -> Any:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)


@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_same_text_as_transformers(name: str, add_generation_prompt: bool, reference: Any) -> None:
    options: dict[str, Any]
    for options in ({}, {"tools": TOOLS}, {"enable_thinking": False}, {"date_string": "1 Jan 2025"}):
        for messages in [*CHATS, *([CALLS] if name == "qwen" else [])]:
            expected = reference.apply_chat_template(
                messages, chat_template=TEMPLATES[name], tokenize=False, add_generation_prompt=add_generation_prompt,
                **options,
            )  # fmt: skip
            ours = render(
                TEMPLATES[name], messages, add_generation_prompt=add_generation_prompt, special_tokens=SPECIAL,
                **options,
            )  # fmt: skip
            assert ours == expected


def test_what_the_templates_write() -> None:
    """The comparison above would not notice two equal wrongs."""
    text = render(LLAMA2, CHATS[1], add_generation_prompt=True, special_tokens=SPECIAL)
    assert text.startswith("<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nnaïve <b>&amp;</b>")
    text = render(QWEN, CALLS, add_generation_prompt=True, special_tokens=SPECIAL, tools=TOOLS, enable_thinking=False)
    assert "Weather <now> & 'here' é" in text
    assert '{"name": "weather", "arguments": {"city": "Köln", "days": 2.5, "x": null}}' in text
    assert "<|im_start|>userab (last)<|im_end|>" in text
    assert text.endswith("assistant\n<think>\n\n</think>\n\n")
    assert "skip" not in text
    text = render(LLAMA3, CHATS[1], add_generation_prompt=False, special_tokens=SPECIAL)
    today = datetime.now().strftime("%d %b %Y")
    assert text.startswith(f"<s><|start_header_id|>system<|end_header_id|>\n\nToday is {today}\n\nBe brief.<|eot_id|>")


def test_the_default_model(default_model: Path) -> None:
    tokenizer = open_tokenizer(open_checkpoint(default_model).tokenizer)
    auto = transformers.AutoTokenizer.from_pretrained(default_model.parent, gguf_file=default_model.name)
    for messages in CHATS:
        ids = encode_chat(tokenizer, messages)
        assert ids == auto.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert tokenizer.decode(ids, skip_special=False).endswith("<|im_start|>assistant\n")


def test_bos_comes_once(tmp_path: Path) -> None:
    """A template writes BOS itself, so encoding adds none."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({"<s>": 0, "</s>": 1, "x": 2}, []))
    (tmp_path / "tokenizer.json").write_text(backend.to_str())
    config = {**SPECIAL, "add_bos_token": True, "chat_template": [
        {"name": "default", "template": "{{ bos_token }}x"}, {"name": "tool_use", "template": "{{ bos_token }}xx"},
    ]}  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = open_tokenizer(TokenizerSource(folder=tmp_path))
    assert tokenizer.encode("x") == [0, 2]
    assert encode_chat(tokenizer, CHATS[0]) == [0, 2]
    assert encode_chat(tokenizer, CHATS[0], tools=TOOLS) == [0, 2, 2]


def _fails(template: str | None, messages: Any = CHATS[0], **options: Any) -> str:
    with pytest.raises((PromptError, CheckpointError)) as caught:
        render(template, messages, add_generation_prompt=True, special_tokens=SPECIAL, **options)
    message = str(caught.value)
    assert "\n" not in message
    return f"{type(caught.value).__name__}: {message}"


def test_errors_are_one_line() -> None:
    assert "no chat template" in _fails(None)
    assert _fails("a\n{{ x").startswith("CheckpointError: the chat template is broken at line 2: ")
    assert _fails("{% endfor %}").startswith("CheckpointError: the chat template is broken at line 1")
    assert _fails("{{ x | nosuchfilter }}").startswith("CheckpointError: the chat template is broken at line 1")
    assert _fails("{{ raise_exception('two\nlines') }}") == (
        "PromptError: the chat template refuses these messages: two lines"
    )
    assert "Roles must alternate" in _fails(LLAMA2, [CHATS[0][0], CHATS[0][0]])
    assert _fails("{{ messages[0].nothing.more }}").startswith("PromptError: the chat template refuses")
    assert _fails(CHATML, [{"role": "user", "content": None}]).startswith("PromptError: the chat template fails")
    assert _fails("{{ 1 / 0 }}").startswith("PromptError")
    assert _fails("{{ messages | tojson }}", [{"role": object()}]).startswith("PromptError")
    assert _fails("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}").startswith("PromptError")


@pytest.mark.parametrize("template", [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='x') }}",
    "{{ raise_exception.__globals__.os }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{{ range(1000000000) | list }}",
    "{{ '%s' | format(messages.__class__.__base__) }}{{ messages.__class__.__base__.x }}",
])  # fmt: skip
def test_a_hostile_template_cannot_leave_its_sandbox(template: str) -> None:
    messages = [{"role": "user", "content": "x"}]
    _fails(template, messages)
    assert messages == [{"role": "user", "content": "x"}]
