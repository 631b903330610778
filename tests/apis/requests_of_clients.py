"""Requests as clients send them, filler in place of their texts; an engine's own classes refuse or change each."""

from __future__ import annotations

from typing import Any

SCHEMA: dict[str, Any] = {"type": "object", "properties": {"x": {"type": "string", "enum": ["a"]}}, "required": ["x"]}
USER: dict[str, Any] = {"role": "user", "content": "hi"}
FUNCTION: dict[str, Any] = {
    "type": "function",
    "name": "get",
    "description": "d",
    "strict": False,
    "parameters": SCHEMA,
}
CUSTOM: dict[str, Any] = {
    "type": "custom",
    "name": "apply_patch",
    "description": "d",
    "format": {"type": "grammar", "syntax": "lark", "definition": "start: /.+/"},
}
NAMESPACE: dict[str, Any] = {
    "type": "namespace",
    "name": "fs",
    "description": "d",
    "tools": [{**FUNCTION, "name": "write_file"}],
}
CALL: dict[str, Any] = {"type": "function_call", "call_id": "a", "name": "get", "arguments": '{"x": "a"}'}
OUTPUT: dict[str, Any] = {"type": "function_call_output", "call_id": "a", "output": "ok"}
LONG = 12345678901234567890123

RESPONSES: list[dict[str, Any]] = [
    # Codex CLI in its default configuration.
    {
        "model": "tiny",
        "instructions": "You are an agent.",
        "input": [
            {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Sandbox: on."}]},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        ],
        "tools": [FUNCTION, CUSTOM, {"type": "web_search", "external_web_access": False}, {"type": "local_shell"}],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "reasoning": {"effort": "medium", "summary": "auto"},
        "store": False,
        "include": ["reasoning.encrypted_content", "web_search_call.action.sources"],
        "prompt_cache_key": "key",
    },
    {"model": "tiny", "input": "hi", "tools": [{"type": "web_search"}]},
    {"model": "tiny", "input": "hi", "tools": [NAMESPACE]},
    {"model": "tiny", "input": "hi", "tools": [FUNCTION], "tool_choice": {"type": "function", "name": "get"}},
    {"model": "tiny", "input": "hi", "reasoning": {"effort": "none"}},
    {"model": "tiny", "input": "hi", "reasoning": {"effort": "xhigh"}},
    {"model": "tiny", "input": [USER, CALL, {"role": "developer", "content": "hint"}, OUTPUT]},
    {
        "model": "tiny",
        "input": [
            USER,
            {"type": "custom_tool_call", "call_id": "a", "name": "p", "input": "x"},
            {**OUTPUT, "type": "custom_tool_call_output"},
        ],
    },
    {
        "model": "tiny",
        "input": [
            USER,
            {**CALL, "arguments": f'{{"x": {LONG}}}'},
            {**OUTPUT, "output": [{"type": "input_image", "image_url": "data:image/png;base64,AA"}]},
        ],
    },
    {
        "model": "tiny",
        "input": [
            USER,
            {"type": "reasoning", "id": "r", "summary": [], "encrypted_content": "x"},
            {"role": "assistant", "content": "a"},
            USER,
        ],
    },
]
CHAT_CALL: dict[str, Any] = {
    "role": "assistant",
    "tool_calls": [{"id": "a", "type": "function", "function": {"name": "get", "arguments": f'{{"x": {LONG}}}'}}],
}
CHATS: list[dict[str, Any]] = [
    {"model": "tiny", "messages": [USER, {"role": "system", "content": "late"}]},
    {"model": "tiny", "messages": [{"role": "system", "content": "only"}]},
    {"model": "tiny", "messages": [USER, {"role": "assistant", "content": "Hel"}]},
    {
        "model": "tiny",
        "messages": [USER, {"role": "assistant", "content": "Hel", "prefix": True}],
        "thinking": {"type": "enabled"},
    },
    {
        "model": "tiny",
        "messages": [{"role": "developer", "content": "Be brief."}, USER],
        "thinking": {"type": "disabled"},
    },
    {
        "model": "tiny",
        "messages": [
            USER,
            CHAT_CALL,
            {
                "role": "tool",
                "tool_call_id": "a",
                "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}],
            },
        ],
    },
    {
        "model": "tiny",
        "messages": [USER, {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}, USER],
    },
    {
        "model": "tiny",
        "messages": [
            USER,
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "t"}, {"type": "text", "text": "a"}]},
            USER,
        ],
    },
    {
        "model": "tiny",
        "messages": [
            USER,
            {"role": "assistant", "reasoning_content": [{"type": "text", "text": "t"}], "content": "a"},
            USER,
        ],
    },
    {"model": "tiny", "messages": [USER], "reasoning_effort": "minimal"},
    {
        "model": "tiny",
        "messages": [USER],
        "tools": [{"type": "custom", "custom": {"name": "p"}}],
        "tool_choice": {"type": "custom", "custom": {"name": "p"}},
    },
    {"model": "tiny", "messages": [USER], "tools": [{"type": "web_search"}], "tool_choice": "auto"},
]
TOOL_USE: dict[str, Any] = {
    "role": "assistant",
    "content": [
        {"type": "thinking", "thinking": "t", "signature": "s"},
        {"type": "tool_use", "id": "a", "name": "get", "input": {"x": LONG}},
    ],
}
IMAGE: dict[str, Any] = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA"}}
MESSAGES: list[dict[str, Any]] = [
    # Claude Code.
    {
        "model": "tiny",
        "system": [{"type": "text", "text": "You are an agent.", "cache_control": {"type": "ephemeral"}}],
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
        "tools": [
            {"name": "Bash", "description": "d", "input_schema": SCHEMA},
            {"type": "web_search_20250305", "name": "web_search", "max_uses": 8},
        ],
        "thinking": {"type": "enabled", "budget_tokens": 31999},
        "metadata": {"user_id": "x"},
        "output_config": {"effort": "high"},
    },
    {
        "model": "tiny",
        "messages": [
            USER,
            TOOL_USE,
            {
                "role": "user",
                "content": [
                    {
                        "type": "tool_result",
                        "tool_use_id": "a",
                        "content": [IMAGE, {"type": "tool_reference", "tool_name": "get"}],
                    }
                ],
            },
        ],
    },
    {"model": "tiny", "messages": [USER, {"role": "assistant", "content": "Hel"}]},
    {"model": "tiny", "messages": [USER, {"role": "system", "content": "late"}]},
    {
        "model": "tiny",
        "messages": [USER],
        "tools": [
            {"type": "bash_20250124", "name": "bash"},
            {"type": "text_editor_20250728", "name": "str_replace_based_edit_tool"},
        ],
    },
    {
        "model": "tiny",
        "messages": [USER],
        "tools": [{"type": "bash_20250124", "name": "bash"}],
        "tool_choice": {"type": "tool", "name": "bash"},
    },
    {"model": "tiny", "messages": [USER], "thinking": {"type": "adaptive"}},
    {"model": "tiny", "messages": [USER], "thinking": {"type": "disabled"}},
]
