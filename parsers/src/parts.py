"""Reading the content of a message: text, or a list of parts, of which the model reads those that are text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

_TEXT_KINDS = ("text", "input_text", "output_text")
_REASONING_KINDS = ("thinking", "reasoning", "reasoning_text", "summary_text", "text")
_MEDIA = {
    "image": "image",
    "image_url": "image",
    "input_image": "image",
    "computer_screenshot": "image",
    "document": "document",
    "file": "file",
    "input_file": "file",
    "audio": "audio",
    "input_audio": "audio",
    "video_url": "video",
}
_OPAQUE = {"type", "data", "file_data", "encrypted_content", "encrypted_stdout", "cache_control", "citations"}
"""Fields of a part that say nothing to a reader."""
_SURROGATE = re.compile("[\ud800-\udfff]")


class PartError(ValueError):
    """A content that can't be read."""


class NestingError(ValueError):
    """JSON values within values, more than can be read."""


def well_formed(value: Any) -> Any:
    """A copy of a JSON value in which every half of a surrogate pair without its other half is U+FFFD.

    JSON can spell such halves (a client that cuts an emoji sends them), Unicode text can't hold them.

    Raises:
        NestingError: the value is nested too deeply.
    """
    try:
        return _well_formed(value)
    except RecursionError as error:
        raise NestingError("the request is nested too deeply") from error


def _well_formed(value: Any) -> Any:
    if isinstance(value, str):
        if not _SURROGATE.search(value):
            return value
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if isinstance(value, Mapping):
        return {_well_formed(key): _well_formed(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_well_formed(item) for item in value]
    return value


def read_content(content: Any, role: str) -> tuple[str | None, str]:
    """The text of a message's content, None where it has none, and the reasoning among its parts.

    Texts are joined with nothing between them, so that no token is invented. In a tool's result other parts become
    lines that say what they are; elsewhere they are refused.

    Raises:
        PartError: names the part.
    """
    if content is None or isinstance(content, str):
        return content, ""
    if isinstance(content, (bytes, Mapping)) or not isinstance(content, Sequence):
        raise PartError(f"content must be text or a list of text parts, got {type(content).__name__}")
    texts: list[str] = []
    reasoning: list[str] = []
    after_line = False
    for position, part in enumerate(content):
        kind = part.get("type", "text") if isinstance(part, Mapping) else None
        if kind is not None and not isinstance(kind, str):
            raise PartError(f"content part {position}: type: expected text, got {type(kind).__name__}")
        if role == "assistant" and kind in ("thinking", "reasoning"):
            reasoning.append(_reasoning_of(part))
            continue
        text, is_line = _text_of(part, role), False
        if text is None and kind in _TEXT_KINDS:
            raise PartError(f"content part {position}: text: expected text, got {type(part.get('text')).__name__}")
        if text is None and role == "tool" and isinstance(part, Mapping):
            text, is_line = describe(part), True
        if text is None:
            shown = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise PartError(f"content part {position} is {shown!r}; the model reads text only")
        if texts and (is_line or after_line) and not texts[-1].endswith("\n"):
            texts.append("\n")
        texts.append(text)
        after_line = is_line
    return "".join(texts), "".join(reasoning)


def read_reasoning(value: Any) -> str:
    """The reasoning of an assistant's message: text, or a list of texts and parts.

    Raises:
        PartError: it is neither.
    """
    if value is None or isinstance(value, str):
        return str(value or "")
    if isinstance(value, (bytes, Mapping)) or not isinstance(value, Sequence):
        raise PartError(f"must be text or a list of text parts, got {type(value).__name__}")
    return "".join(part if isinstance(part, str) else _reasoning_of(part) for part in value)


def describe(part: Mapping[str, Any]) -> str:
    """A line for a part of a tool's result that is no text, or the text that is in it."""
    kind = part.get("type")
    if kind == "tool_reference":
        return f"[the tool {part.get('tool_name') or part.get('name')} is available]"
    text = nested_text(part)
    if text is not None:
        named = (part.get(key) for key in ("title", "url", "source"))
        return "\n".join([*(name for name in named if isinstance(name, str) and name), text])
    if kind in _MEDIA:
        return f"[{_MEDIA[kind]}{_origin(part)}: not shown, this model reads text only]"
    fields = {key: item for key, item in part.items() if key not in _OPAQUE and item is not None}
    return f"[{kind}: {json.dumps(fields, ensure_ascii=False, default=str)}]"


def _text_of(part: Any, role: str) -> str | None:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        return None
    kind = part.get("type", "text")
    if role == "assistant" and kind == "refusal":
        kind, part = "text", {"text": part.get("refusal")}
    text = part.get("text")
    return text if kind in _TEXT_KINDS and isinstance(text, str) else None


def _reasoning_of(part: Any) -> str:
    """Of a part `{"type": "thinking", "thinking": …}` or `{"type": "reasoning_text", "text": …}`."""
    kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
    if kind not in _REASONING_KINDS:
        raise PartError(f"has a part {kind!r}; expected text")
    text = part.get("thinking", part.get("text"))
    if text is None:
        text = part.get("content") or part.get("summary") or ""
    return read_reasoning(text)


def nested_text(part: Mapping[str, Any]) -> str | None:
    """The text inside a document, a search result or the result of a server's tool, None where there is none."""
    source = part.get("source")
    if isinstance(source, Mapping) and source.get("type") in ("text", "content"):
        inner = source.get("data", source.get("content"))
    else:
        inner = part.get("content", part.get("text"))
    if isinstance(inner, str):
        return inner
    if isinstance(inner, Mapping):
        inner = [inner]
    if not isinstance(inner, (list, tuple)) or not inner:
        return None
    return read_content(inner, "tool")[0]


def _origin(part: Mapping[str, Any]) -> str:
    """Where a picture or file came from, as far as a reader can use it."""
    source = part.get("source") or part.get("image_url") or part.get("file") or part
    if isinstance(source, str):
        source = {"url": source}
    if not isinstance(source, Mapping):
        return ""
    url = next((source[key] for key in ("url", "image_url", "file_url") if isinstance(source.get(key), str)), "")
    name = source.get("filename") or part.get("title")
    kind, data = source.get("media_type"), source.get("data") or source.get("file_data")
    if url.startswith("data:"):
        head, _, data = url.partition(",")
        kind = head[len("data:") :].partition(";")[0]
    elif url:
        name = url
    shown = [str(name)] if name else []
    if kind:
        shown.append(str(kind))
    if isinstance(data, str) and data:
        shown.append(f"{len(data) * 3 // 4} bytes")
    return f" ({', '.join(shown)})" if shown else ""
