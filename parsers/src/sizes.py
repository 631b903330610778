"""What each part of a conversation adds to its prompt, by counting prompts of that part alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]
Count = Callable[[Sequence[Message]], int]
"""The tokens of the prompt that asks for the next answer of such a conversation."""
_QUESTION: Message = {"role": "user", "content": ""}
_ANSWER: Message = {"role": "assistant", "content": ""}


class Sizes:
    """
    Args:
        count: of whole prompts.
        count_parts: the same, and may leave out what a prompt has whatever it says, such as the tools.
    """

    def __init__(self, count: Count, count_parts: Count) -> None:
        self._count = count_parts
        self._question, self._questions = count_parts([_QUESTION]), count_parts([_QUESTION, _QUESTION])
        self._answered = count_parts([_QUESTION, _ANSWER])
        self.empty = count([_QUESTION]) - (self._questions - self._question)
        """What a prompt of nothing has."""

    def of_question(self, message: Message) -> int:
        """Of a user's or developer's message, with the mark for the answer."""
        return self._count([message, message]) - self._count([message])

    def of(self, part: Sequence[Message]) -> int:
        """Of an answer, of calls and their results, or of a system message: before a later question."""
        return self._count([_QUESTION, *part, _QUESTION]) - self._questions

    def of_thoughts(self, part: Sequence[Message]) -> int:
        """The same while no question has followed: with what was thought."""
        return self._count([_QUESTION, *part, _ANSWER]) - self._answered

    def of_end(self, part: Sequence[Message]) -> int:
        """Of the last messages of a prompt, where that is no question and no result."""
        return self._count([_QUESTION, *part]) - self._question
