"""The grammar of calls, for engines that can constrain what a model writes (xgrammar's structural tags).

The format is the official one to the byte: no white space where DeepSeek puts none, since white space inside a string
parameter belongs to its value.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from .messages import EncodingError, read_tools
from .protocol import CALLS_END, CALLS_START, INVOKE_END, PARAMETER_END, invoke_start, parameter_start
from .schema import Tools

Format = dict[str, Any]


def forced_calls(tools: Sequence[Mapping[str, Any]], *, parallel: bool = True) -> Format:
    """The structural tag of an answer that is nothing but calls of `tools`, one or (if `parallel`) more.

    Arguments come in the order of the schema, required ones always, optional ones or not. Raw strings are not
    constrained but for `enum` and `const`; all other values follow their JSON schema. Where a schema mixes strings with
    other types by other means than a list of types, only the types are enforced.

    Args:
        tools: wrapped (`{"type": "function", "function": {...}}`) or bare.
        parallel: allow more than one call.
    """
    begin, end = f"\n\n{CALLS_START}\n", f"\n{CALLS_END}"
    calls = _calls(tools, parallel)
    return _structural_tag({"type": "sequence", "elements": [_text(begin), calls, _text(end)]})


def optional_calls(tools: Sequence[Mapping[str, Any]], *, parallel: bool = True) -> Format:
    """The structural tag of an answer in free text whose calls, if it makes any, are well-formed calls of `tools`."""
    block = _tag(f"{CALLS_START}\n", _calls(tools, parallel), f"\n{CALLS_END}")
    return _structural_tag({"type": "triggered_tags", "triggers": [str(CALLS_START)], "tags": [block]})


def _calls(tools: Sequence[Mapping[str, Any]], parallel: bool) -> Format:
    types = Tools(tools)
    return {
        "type": "tags_with_separator",
        "tags": [_invoke(function, types) for function in read_tools(tools)],
        "separator": "\n",
        "at_least_one": True,
        "stop_after_first": not parallel,
    }


def _invoke(function: Mapping[str, Any], types: Tools) -> Format:
    name = function["name"]
    schema = _member(function, "parameters", Mapping, {}, name)
    properties = _member(schema, "properties", Mapping, {}, name)
    required = _member(schema, "required", Sequence, (), name)
    definitions = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    elements = []
    for parameter, declared in properties.items():
        value_schema = dict(declared) if isinstance(declared, Mapping) else {}
        argument = _parameter(parameter, {**value_schema, **definitions}, types.types(name, parameter), name)
        elements.append(argument if parameter in required else {"type": "optional", "content": argument})
    # Without parameters an empty line stays.
    return _tag(f"{invoke_start(name)}\n", {"type": "sequence", "elements": elements or [_text("\n")]}, INVOKE_END)


def _member(schema: Mapping[str, Any], key: str, kind: type[Any], absent: Any, function: str) -> Any:
    """Raises EncodingError where a part of the schema that the grammar is made of is no such thing."""
    value = schema.get(key) or absent
    if not isinstance(value, kind) or isinstance(value, str):
        expected = "an object" if kind is Mapping else "a list"
        raise EncodingError(f"tool {function}: {key}: expected {expected}, got {type(value).__name__}")
    return value


def _parameter(name: str, schema: Mapping[str, Any], types: frozenset[str] | None, function: str) -> Format:
    variants = []
    end = f"{PARAMETER_END}\n"
    if types is None or "string" in types:
        listed = _member(schema, "enum", Sequence, [schema.get("const")], function)
        allowed = [value for value in listed if isinstance(value, str)]
        any_text: Format = {"type": "any_text"}
        value = {"type": "or", "elements": [_text(text) for text in allowed]} if allowed else any_text
        variants.append(_tag(parameter_start(name, is_string=True), value, end))
    if types is None or types != {"string"}:
        # Of a type that includes strings only the rest is written as JSON.
        mixed = types is not None and "string" in types
        json_schema = {**schema, "type": sorted(types - {"string"})} if types is not None and mixed else dict(schema)
        value = {"type": "json_schema", "json_schema": json_schema, "max_whitespace_cnt": 1}
        variants.append(_tag(parameter_start(name, is_string=False), value, end))
    return variants[0] if len(variants) == 1 else {"type": "or", "elements": variants}


def _structural_tag(content: Format) -> Format:
    return {"type": "structural_tag", "format": content}


def _tag(begin: str, content: Format, end: str) -> Format:
    return {"type": "tag", "begin": str(begin), "content": content, "end": str(end)}


def _text(value: str) -> Format:
    return {"type": "const_string", "value": value}
