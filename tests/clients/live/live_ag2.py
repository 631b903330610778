"""AG2's agents: a tool loop of two, and a GroupChat, whose speaker is chosen by a last message of role system."""

from __future__ import annotations

import pytest
from asks import ADD, CUT, CUT_AT, SAID, SAY, SUM
from autogen import AssistantAgent, GroupChat, GroupChatManager, LLMConfig, UserProxyAgent


def config(proxy, **options) -> LLMConfig:
    entry = {
        "api_type": "openai",
        "model": "tiny",
        "base_url": f"{proxy.url}/v1",
        "api_key": "none",
        "price": [0, 0],
        "timeout": 120,
        "stream": True,
        **options,
    }
    return LLMConfig(entry, cache_seed=None)


def pair(proxy, tools, **options) -> tuple[AssistantAgent, UserProxyAgent]:
    helper = AssistantAgent("helper", system_message="Be brief.", llm_config=config(proxy, **options))
    user = UserProxyAgent(
        "user",
        human_input_mode="NEVER",
        code_execution_config=False,
        max_consecutive_auto_reply=2,
        is_termination_msg=lambda message: not message.get("tool_calls"),
    )

    # It takes functions, not methods.
    def add(a: int, b: int) -> str:
        return tools.add(a, b)

    def note(text: str) -> str:
        return tools.note(text)

    for tool in (add, note):
        helper.register_for_llm(description=tool.__name__)(tool)
        user.register_for_execution()(tool)
    return helper, user


@pytest.mark.recorded
def test_streamed_loop(proxy, tools) -> None:
    helper, user = pair(proxy, tools)
    chat = user.initiate_chat(helper, message=ADD, silent=True)
    assert tools.added == [(2, 3)]
    assert chat.chat_history[-1]["content"] == SUM


@pytest.mark.recorded
def test_group_chat(proxy) -> None:
    """Each speaker is told from a system message that comes last: the answer must follow it as an answer."""
    agents = [
        AssistantAgent(name, system_message=f"You are {name}.", llm_config=config(proxy), description=name)
        for name in ("planner", "writer")
    ]
    group = GroupChat(agents, messages=[], max_round=3, speaker_selection_method="auto", allow_repeat_speaker=False)
    manager = GroupChatManager(group, llm_config=config(proxy))
    user = UserProxyAgent("user", human_input_mode="NEVER", code_execution_config=False)
    user.initiate_chat(manager, message="[[say writer]]", silent=True)
    assert set(proxy.statuses()) == {200}
    assert [message["name"] for message in group.messages] == ["user", "writer", "planner"]
    selections = [exchange for exchange in proxy.exchanges if exchange.body["messages"][-1]["role"] == "system"]
    assert selections
    assert all("writer" in exchange.answer for exchange in selections)


def test_cut_call_is_not_run(proxy, tools) -> None:
    helper, user = pair(proxy, tools, max_tokens=CUT_AT)
    user.initiate_chat(helper, message=CUT, silent=True, max_turns=2)
    assert tools.noted == []


def test_refusal_and_on(proxy, tools) -> None:
    helper, user = pair(proxy, tools)
    proxy.change = lambda path, body: body.update(top_p=-1)
    with pytest.raises(Exception, match="400"):
        user.initiate_chat(helper, message=SAY, silent=True)
    assert proxy.statuses() == [400]
    proxy.change = lambda path, body: None
    chat = user.initiate_chat(helper, message=SAY, silent=True, clear_history=False)
    assert chat.chat_history[-1]["content"] == SAID
