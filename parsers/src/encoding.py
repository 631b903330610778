"""Messages to prompt: the text that DeepSeek-V3.2 was trained on, byte for byte."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from . import protocol
from .markup import Markup
from .messages import Call, EncodingError, Turn, match_results, read_tools, read_turns

ThinkingMode = Literal["thinking", "chat"]
Variant = Literal["v3.2", "speciale"]
_LINE = Markup("\n")


def encode_messages(
    messages: Sequence[Mapping[str, Any]],
    *,
    thinking_mode: ThinkingMode = "thinking",
    drop_thinking: bool = True,
    add_default_bos_token: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    response_format: Any = None,
    context: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    always_answer: bool = False,
    variant: Variant = "v3.2",
    allow_developer: bool = True,
) -> Markup:
    """Render a conversation as DeepSeek's `encoding_dsv32.encode_messages` does.

    Args:
        messages: OpenAI-shaped messages. Roles: system, user, assistant, tool and developer. `content` is text, None
            (not for user and developer) or a list of text parts, which are joined with nothing between them.
            Assistant messages take `reasoning_content` or `reasoning`, and `tool_calls` with or without the
            `function` wrapper, their `arguments` a JSON object or its text. Tool results are matched to the calls by
            `tool_call_id`, by position where one of the two has none. System and developer messages take `tools` and
            `response_format` of their own.
        thinking_mode: "thinking" opens the answer with `<think>`, "chat" with `</think>`.
        drop_thinking: accepted for compatibility. A new user message drops the reasoning before it either way:
            DeepSeek's code renders no reasoning before the last user message whatever this says.
        add_default_bos_token: begin with the BOS text, unless there is a `context`.
        tools: tools of the request, wrapped (`{"type": "function", "function": {...}}`) or bare. They follow the text
            of the first system message; without one, an empty system message is put in front. The request is
            refused if that message has tools of its own. The same holds for `response_format`.
        response_format: a schema, rendered as it is after the tools.
        context: messages that were rendered before. They count (for the last user message, for tool results, for the
            place of `tools` and `response_format`) but are not rendered again, and neither is what belongs to them.
        add_generation_prompt: end a final user message or results block with the mark that opens the answer. As in
            DeepSeek's code nothing is added after a final system or assistant message; see `always_answer`.
        continue_final_message: leave the final assistant message open: no EOS; and if it holds reasoning only, no
            `</think>` either, so that the reasoning goes on. A final message with `prefix: true` asks for the same.
        always_answer: the model is to answer whatever the conversation ends with, as a server's must. Where
            `add_generation_prompt` asks for the mark, it follows final system messages (and not what is before them)
            and a final assistant message that isn't continued. An assistant message without reasoning is one that
            didn't think, where DeepSeek's code refuses it. Calls without any result, where the conversation goes on,
            are refused, as DeepSeek's, OpenAI's and Anthropic's servers do; DeepSeek's code renders them.
        variant: "speciale" refuses tools, tool calls and tool results: DeepSeek-V3.2-Speciale was not trained on them.
        allow_developer: False refuses the search agent's messages. A developer message is one if it has `tools` or a
            `response_format` of its own, or if no message is a user's; any other is a system message.

    Returns:
        The prompt. Encode it without special tokens added: BOS is in the text. Content is rendered raw, as by
        DeepSeek: a plain tokenizer makes a control token of text that spells one. The prompt's `spans` are what the
        template wrote; a tokenizer that reads control tokens only there can't be lied to.

    Raises:
        EncodingError: the conversation has no faithful rendering; names the message's index and the reason.
    """
    _check_choice("thinking_mode", thinking_mode, ("thinking", "chat"))
    _check_choice("variant", variant, ("v3.2", "speciale"))
    earlier = read_turns(context, "context") if context else []
    turns = settle_developers(earlier + read_turns(messages))
    skipped = len(earlier)
    if tools or response_format:
        if not any(turn.role == "system" for turn in turns):
            turns.insert(0, Turn("system", where="context" if earlier else "messages"))
            skipped += bool(earlier)
        turns = _with_request_options(turns, read_tools(tools), response_format)
    _check_roles(turns, variant, allow_developer)
    turns, results_left = _match_results(turns, skipped, always_answer)

    thinking = thinking_mode == "thinking"
    last_user = max((i for i, turn in enumerate(turns) if turn.role in ("user", "developer")), default=-1)
    final = len(turns) - 1
    open_final = _check_final(turns, results_left, add_generation_prompt, continue_final_message)
    answers_late = always_answer and add_generation_prompt and bool(turns) and not open_final
    # The first of the final system messages: the mark for the answer follows them, not what is before them.
    closing = len(turns)
    while answers_late and closing and turns[closing - 1].role == "system":
        closing -= 1
    if answers_late and (missing := _awaited(turns[final].calls, [])):
        raise turns[final].error(f"results are missing: {missing} before the model can answer")

    prompt: list[str] = [protocol.BOS] if add_default_bos_token and not earlier else []
    for i in range(skipped, len(turns)):
        turn = turns[i]
        mark = protocol.THINK_START if thinking and i >= last_user else protocol.THINK_END
        answer = "" if (i == final and not add_generation_prompt) or i == closing - 1 < final else mark
        try:
            if turn.role == "assistant":
                has_reasoning = thinking and i > last_user
                is_open = open_final and i == final
                prompt.append(_render_assistant(turn, has_reasoning, is_open, always_answer))
            elif turn.role == "tool":
                prompt.append(_render_result(turn, turns[i - 1].role == "assistant", not results_left[i], answer))
            else:
                prompt.append(_render_input(turn, answer))
        except EncodingError as error:
            raise turn.error(error.reason) from error.__cause__
        if i == closing - 1 < final and turn.role == "tool":
            prompt.append("\n\n")
    if answers_late and turns[final].role in ("system", "assistant"):
        prompt.append(protocol.ASSISTANT + (protocol.THINK_START if thinking else protocol.THINK_END))
    return Markup().join(prompt)


def render_tools(functions: Sequence[Mapping[str, Any]]) -> Markup:
    """The tools block of a system or developer message, with the blank line before it."""
    return protocol.TOOLS_HEAD + _LINE.join(to_json(function) for function in functions) + protocol.TOOLS_TAIL


def render_calls(calls: Sequence[Call]) -> Markup:
    """The calls block of an assistant message, without the blank line before it."""
    invokes = []
    for call in calls:
        arguments = [
            protocol.parameter_start(str(name), is_string=isinstance(value, str))
            + (str(value) if isinstance(value, str) else to_json(value))
            + protocol.PARAMETER_END
            for name, value in call.arguments.items()
        ]
        invokes.append(_LINE.join([protocol.invoke_start(call.name), _LINE.join(arguments), protocol.INVOKE_END]))
    return _LINE.join([protocol.CALLS_START, *invokes, protocol.CALLS_END])


def to_json(value: Any) -> str:
    """JSON as the model was trained on it: default separators, no ASCII escapes."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise EncodingError(f"not JSON: {error}") from error


def _render_options(turn: Turn) -> str:
    text = render_tools(turn.tools) if turn.tools else ""
    if turn.response_format:
        text += protocol.RESPONSE_FORMAT_HEAD + to_json(turn.response_format)
    return text


def _render_input(turn: Turn, answer: str) -> str:
    """A system, user or developer message; `answer` is the mark that opens the answer, empty for none."""
    if turn.role == "system":
        return turn.text + _render_options(turn)
    text = turn.text if turn.role == "user" else _render_options(turn) + protocol.DEVELOPER_HEAD + turn.text
    return protocol.USER + text + (answer and protocol.ASSISTANT + answer)


def _render_result(turn: Turn, is_first: bool, is_last: bool, answer: str) -> str:
    text = (protocol.RESULTS_START if is_first else "") + protocol.result(turn.text)
    return text + protocol.RESULTS_END + (answer and "\n\n" + answer) if is_last else text


def _render_assistant(turn: Turn, has_reasoning: bool, is_open: bool, may_lack_reasoning: bool) -> str:
    if is_open and has_reasoning and not turn.text:
        return turn.reasoning
    if has_reasoning and not (turn.reasoning or turn.calls or is_open or may_lack_reasoning):
        raise turn.error(
            "an assistant message after the last user message needs reasoning or tool calls in thinking mode; "
            "keep the reasoning of this turn, or render with thinking_mode='chat'"
        )
    text = turn.reasoning + protocol.THINK_END if has_reasoning else ""
    text += turn.text
    if turn.calls:
        text += "\n\n" + render_calls(turn.calls)
    return text if is_open else text + protocol.EOS


def settle_developers(turns: list[Turn]) -> list[Turn]:
    """A developer message is the search agent's, or else what today's clients call a system message."""
    has_user = any(turn.role == "user" for turn in turns)
    return [
        replace(turn, role="system")
        if turn.role == "developer" and has_user and not (turn.tools or turn.response_format)
        else turn
        for turn in turns
    ]


def _with_request_options(turns: list[Turn], tools: tuple[Mapping[str, Any], ...], response_format: Any) -> list[Turn]:
    """The turns with the request's tools and response format on the first system message."""
    at = next(i for i, turn in enumerate(turns) if turn.role == "system")
    turn = turns[at]
    for name, given, own in (("tools", tools, turn.tools), ("response_format", response_format, turn.response_format)):
        if given and own:
            raise turn.error(f"has {name} of its own and the request has {name} too; give them in one place")
    turns[at] = replace(turn, tools=tools or turn.tools, response_format=response_format or turn.response_format)
    return turns


def _match_results(turns: list[Turn], skipped: int, always_answer: bool) -> tuple[list[Turn], dict[int, int]]:
    """Put the results of every call block into the order of its calls.

    Returns the turns, and for each result the number of results still missing after it. Results that were rendered
    with the context stay where they are.
    """
    ordered = list(turns)
    left: dict[int, int] = {}
    for start, turn in enumerate(turns):
        if turn.role == "tool" and (start == 0 or turns[start - 1].role not in ("assistant", "tool")):
            raise turn.error("a tool result must follow the assistant message that made the call")
        if turn.role != "assistant":
            continue
        end = start + 1
        while end < len(turns) and turns[end].role == "tool":
            end += 1
        results = turns[start + 1 : end]
        if len(results) > len(turn.calls):
            extra = results[len(turn.calls)]
            raise extra.error(f"tool result without a call: the assistant message before it made {len(turn.calls)}")
        awaited = _awaited(turn.calls, results)
        if (results or always_answer) and len(results) < awaited and end < len(turns):
            answered = match_results([call.id for call in turn.calls], [result.call_id for result in results])
            lacking = turn.calls[min(set(range(len(turn.calls))).difference(answered))]
            raise turns[end].error(
                f"comes before all results: {len(results)} of {len(turn.calls)} tool calls have one, and the call "
                f"{lacking.id or lacking.name!r} has none; send it, if only to say that it was not run"
            )
        if not start < skipped - 1 < end - 1:
            ordered[start + 1 : end] = _in_call_order(turn.calls, results)
        left.update((i, awaited - (i - start)) for i in range(start + 1, end))
    return ordered, left


def _awaited(calls: tuple[Call, ...], results: Sequence[Turn]) -> int:
    """How many results belong to the calls: none to one that the model was stopped in, unless it has one all the same.

    Nobody can run such a call, and a message has nothing after it. Agents that give its turn up send no result at all.
    """
    stopped = bool(calls) and calls[-1].unfinished
    if stopped and not results:
        return 0
    answered = stopped and any(result.call_id == calls[-1].id is not None for result in results)
    return max(len(results), len(calls) - (stopped and not answered))


def _in_call_order(calls: tuple[Call, ...], results: list[Turn]) -> list[Turn]:
    """Those without an id take what calls are left. An id of no call, or of one that has its result, is a mistake."""
    unanswered = Counter(call.id for call in calls)
    for result in results:
        call_id = result.call_id if result.call_id in unanswered else None
        if unanswered[call_id]:
            unanswered[call_id] -= 1
        elif call_id is not None:
            raise result.error(f"tool_call_id: a second result of the call {call_id!r}")
        elif result.call_id is not None:
            raise result.error(
                f"tool_call_id: expected that of a call of the assistant message before it, got {result.call_id!r}"
            )
    slots = match_results([call.id for call in calls], [result.call_id for result in results])
    return [result for _, result in sorted(zip(slots, results, strict=True), key=lambda pair: pair[0])]


def _check_final(
    turns: list[Turn], results_left: dict[int, int], add_generation_prompt: bool, continue_final_message: bool
) -> bool:
    """Whether the final message stays open; refuses what can't end a prompt."""
    for turn in turns[:-1]:
        if turn.prefix:
            raise turn.error("prefix is only for the final message")
    final = turns[-1] if turns else None
    if final is None or final.role != "assistant":
        if continue_final_message:
            reason = "continue_final_message needs a final assistant message"
            raise final.error(reason) if final else EncodingError(reason)
        if final and add_generation_prompt and results_left.get(len(turns) - 1):
            raise final.error(f"results are missing: {results_left[len(turns) - 1]} more before the model can answer")
        return False
    is_open = continue_final_message or final.prefix
    if is_open and final.calls:
        raise final.error("a message with tool calls can't be continued: the calls end the turn")
    return is_open


def _check_roles(turns: list[Turn], variant: str, allow_developer: bool) -> None:
    for turn in turns:
        if turn.role == "developer" and not turn.text:
            raise turn.error("a developer message needs content")
        if turn.role == "developer" and not allow_developer:
            raise turn.error(
                "the search agent's developer messages are switched off: those with tools or a response_format of "
                "their own, and all where no message is a user's; use system or user"
            )
        if variant == "speciale" and (turn.tools or turn.calls or turn.role == "tool"):
            raise turn.error("DeepSeek-V3.2-Speciale takes no tools; drop them, or use DeepSeek-V3.2")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise EncodingError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
