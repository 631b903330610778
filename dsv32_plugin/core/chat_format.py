"""Which chat encoding a checkpoint speaks, and the parsers of each engine that read its answers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv32_plugin.core.config import ENCODED

OURS = "dsv32"
TEMPLATE = "chat_template.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"


@dataclass(frozen=True)
class ChatFormat:
    """How conversations are written, and calls in answers."""

    name: str
    marks: tuple[str, ...]
    """What a chat template that writes it holds."""
    parsers: Mapping[str, tuple[str, str]]
    """Engine -> the names of its tool-call and its reasoning parser. Ours have the same name in both."""


FORMATS = (
    ChatFormat("DeepSeek-V3.2's", ("｜DSML｜",), {"vllm": (OURS, OURS), "sglang": (OURS, OURS)}),
    ChatFormat(
        "DeepSeek-V3.1's",
        ("<｜tool▁calls▁begin｜>", "<｜tool▁sep｜>"),
        {"vllm": ("deepseek_v31", "deepseek_v3"), "sglang": ("deepseekv31", "deepseek-v3")},
    ),
    ChatFormat(
        "GLM-4.7's",
        ("[gMASK]<sop>", "<tool_call>", "<arg_key>", "<arg_value>"),
        {"vllm": ("glm47", "glm45"), "sglang": ("glm47", "glm45")},
    ),
)


def of(architecture: str, template: str | None) -> tuple[ChatFormat | None, str]:
    """The format of a checkpoint's conversations, None for one that is not known, and why it is this.

    Args:
        architecture: of the checkpoint.
        template: its chat template, None where it brings none.
    """
    if template is None:
        if architecture in ENCODED:
            return FORMATS[0], "no chat template: the plugin's encoder, which is DeepSeek's"
        return None, f"{architecture} without a chat template: completions only"
    found = next((known for known in FORMATS if all(mark in template for mark in known.marks)), None)
    if found is None:
        return None, "its own chat template, whose calls no format here describes; its model card names the parsers"
    return found, f"its own chat template, which writes {found.marks[-1]}"


def template_of(folder: Path) -> str | None:
    """The chat template in a checkpoint's folder, as Transformers looks for it.

    Raises:
        ValueError: tokenizer_config.json is no JSON.
    """
    if (folder / TEMPLATE).exists():
        return (folder / TEMPLATE).read_text(encoding="utf-8")
    if not (folder / TOKENIZER_CONFIG).exists():
        return None
    template: Any = json.loads((folder / TOKENIZER_CONFIG).read_text(encoding="utf-8")).get("chat_template")
    if isinstance(template, list):  # several, by name
        template = next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    return template


def complaint(folder: Path, engine: str, tool: str | None, reasoning: str | None) -> str | None:
    """What is wrong with the parsers that a server was told to use, for its log; None where they fit or none is ours.

    Args:
        folder: of the checkpoint; of one that is not there nothing is said.
        engine: "vllm" or "sglang".
        tool: name of the tool-call parser.
        reasoning: name of the reasoning parser.
    """
    path = folder / "config.json"
    if OURS not in (tool, reasoning) or not path.exists():
        return None
    config = json.loads(path.read_text(encoding="utf-8"))
    spoken, why = of(str((config.get("architectures") or [""])[0]), template_of(folder))
    if spoken is None or OURS in spoken.parsers[engine]:
        return None
    expected = spoken.parsers[engine]
    return (
        f"parsers: expected --tool-call-parser {expected[0]} --reasoning-parser {expected[1]} for {why}, got {OURS}, "
        "which finds no calls in it"
    )
