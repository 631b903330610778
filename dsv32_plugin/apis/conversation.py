"""One conversation, whatever API it came by."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from dsv32_plugin.core import chat
from dsv32_plugin.parsers import EncodingError, Markup
from dsv32_plugin.parsers.context import ContextError, Memory
from dsv32_plugin.parsers.encoding import Variant

from .context import Outcome, Plan

UNSEEN = "This conversation is rendered by dsv32-plugin."
"""What stands in an engine's request for messages that it need not see. To render it would be an error of ours."""

IN_SCOPE = "dsv32_conversation"
"""Where the ASGI scope of a request has its conversation, for an engine that reads the request in another thread."""

_serving: ContextVar[Conversation | None] = ContextVar("dsv32_conversation", default=None)


@dataclass
class Conversation:
    """What a request says to the model.

    Attributes:
        messages: as `encode_messages` reads them.
        labels: what the client calls each of them, such as "input[3]".
        tools: the functions in the prompt, bare.
        thinking: whether the model is asked to think.
        continues: the final message is the assistant's and goes on.
        add_generation_prompt: end with the mark for the answer.
        answer_format: of the answer, as Messages has it; not every engine's class does.
        plan: what is done with it where it is long.
        memory: what was done with it in earlier turns.
        context_tokens: tokens of its prompt and the answer; None where it is only counted.
        outcome: what was done; None before the prompt is made.
        refusal: why the engine could not serve it, told by the engine's hooks.
    """

    messages: list[Mapping[str, Any]]
    labels: list[str]
    tools: list[dict[str, Any]] = field(default_factory=list)
    thinking: bool = False
    continues: bool = False
    add_generation_prompt: bool = True
    answer_format: Mapping[str, Any] | None = None
    plan: Plan | None = None
    memory: Memory | None = None
    context_tokens: int | None = None
    outcome: Outcome | None = None
    refusal: str | None = None

    @property
    def answer_thinks(self) -> bool:
        """Whether the answer begins inside the reasoning. A message that goes on is past it once it has content."""
        return self.thinking and not (self.continues and bool(self.messages[-1].get("content")))

    @property
    def options(self) -> dict[str, Any]:
        """For `dsv32_plugin.core.chat.render`."""
        return {
            "tools": self.tools,
            "thinking": self.thinking,
            "continue_final_message": self.continues,
            "add_generation_prompt": self.add_generation_prompt,
        }

    def prompt(self, options: Mapping[str, Any], variant: Variant, count: Callable[[Markup], int]) -> Markup:
        """The prompt, of what the plan leaves.

        Args:
            options: of the engine; those of the request precede them.
            variant: of the model.
            count: the tokens of a prompt.

        Raises:
            EncodingError: there is none.
            ContextError: what the plan leaves is too long.
        """
        if self.plan is None:
            messages = self.messages
        else:
            messages = (self.outcome or self.manage(options, variant, count)).managed.messages
        return chat.render(messages, {**options, **self.options}, variant)

    def manage(self, options: Mapping[str, Any], variant: Variant, count: Callable[[Markup], int]) -> Outcome:
        """Carry the plan out, which takes seconds where a history is long and new; arguments as for `prompt`."""
        assert self.plan is not None
        options = {**options, **self.options}

        def tokens(messages: Sequence[Mapping[str, Any]], **others: Any) -> int:
            goes_on = self.continues and bool(messages) and messages[-1] is self.messages[-1]
            asks = {"continue_final_message": goes_on, "add_generation_prompt": not goes_on}
            return count(chat.render(messages, {**options, **asks, **others}, variant))

        about = json.dumps([options, variant], sort_keys=True, default=str)
        count_parts = partial(tokens, tools=None, response_format=None)
        self.outcome = self.plan.apply(self.messages, tokens, self.memory, about, count_parts)
        if self.context_tokens is not None and self.outcome.managed.tokens >= self.context_tokens:
            # Here, as SGLang does so in a stream of Responses that has begun.
            raise ContextError(
                f"{self.plan.name}: the conversation still has {self.outcome.managed.tokens} tokens, and the context "
                f"of {self.context_tokens} has no room for an answer"
            )
        return self.outcome

    def refuse(self, error: Exception) -> None:
        """Keep the reason of an error for the gateway, by the client's own name of the message at fault."""
        self.refusal = self.explain(error) if isinstance(error, EncodingError) else str(error)

    def explain(self, error: EncodingError) -> str:
        if error.index is None or error.where != "messages":
            return str(error)
        return f"{self.labels[error.index]}: {error.reason}"


def rendered(
    conversation: Conversation | None,
    messages: Sequence[Mapping[str, Any]],
    options: Mapping[str, Any],
    variant: Variant,
    count: Callable[[Markup], int],
) -> Markup:
    """The prompt of a conversation that a gateway read, or else of an engine's own messages and options.

    Raises:
        EncodingError: there is none; a conversation knows why.
    """
    if conversation is None:
        if messages and messages[-1].get("content") == UNSEEN:
            raise RuntimeError("the conversation of this request was lost between the gateway and the encoder")
        return chat.render(messages, options, variant)
    try:
        return conversation.prompt(options, variant, count)
    except ValueError as error:
        conversation.refuse(error)
        raise


def current() -> Conversation | None:
    """That of the HTTP request being served; None where the engine is called in another way."""
    return _serving.get()


def serve(conversation: Conversation | None) -> None:
    """Make it the current one of this task and of those it starts."""
    _serving.set(conversation)
