"""GLM-5 as a client meets it: a tokenizer with its marks, a template that writes its prompt, answers in its format."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from dsv32_plugin.tools import tiny
from dsv32_plugin.tools.tiny import TinySpec

MARKS = (
    *("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    *("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
)
TEMPLATE = (
    "[gMASK]<sop>"
    "{% if tools %}<|system|>\n# Tools\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}{% endif %}"
    "{% for m in messages %}"
    "{% if m.role == 'tool' %}<|observation|><tool_response>{{ m.content }}</tool_response>"
    "{% else %}<|{{ m.role }}|>{{ m.content or '' }}"
    "{% for tc in m.tool_calls or [] %}{{ '<tool_call>' + tc.function.name }}"
    "{% for k, v in tc.function.arguments.items() %}<arg_key>{{ k }}</arg_key>"
    "<arg_value>{{ v if v is string else v | tojson }}</arg_value>{% endfor %}</tool_call>{% endfor %}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>"
    "{{ '</think>' if enable_thinking is defined and not enable_thinking else '<think>' }}{% endif %}"
)
"""What GLM-5's template does, in short; its own is not here. GLM-5 thinks unless `enable_thinking` is false."""


def write(folder: Path) -> Path:
    """Config, tokenizer and template, without weights. The vocabulary is DeepSeek's, with GLM's marks."""
    tiny.write_without_weights(replace(TinySpec.glm_defaults(), rope_original=512).config(), folder)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    spare = [token for token in tokenizer["added_tokens"] if "place" in token["content"]]
    for token, mark in zip(spare, MARKS, strict=False):
        token["content"], token["special"] = mark, False
    path.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return folder


def call(name: str, **arguments: str) -> str:
    """One call, as the model writes it."""
    pairs = "".join(f"<arg_key>{key}</arg_key><arg_value>{value}</arg_value>" for key, value in arguments.items())
    return f"<tool_call>{name}{pairs}</tool_call>"
