"""An agent that goes on when its context is full: thinks, calls tools, reads their results, until it has an answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import openai
from toolbox import Toolbox

from dsv32_plugin.parsers.context import SHARE_OF_CONTEXT, manage, plan_summary, read_strategy

Message = dict[str, Any]
End = Literal["answer", "steps", "context", "length", "error"]
SYSTEM = """You solve a task with tools.
Before every call, think: what do you know, what is missing, and which call brings it? Then call.
After every result, think about what it says before you go on. Do not guess what a tool can tell.
When you are sure, answer in plain text without a call."""
CHARS_PER_TOKEN = 3
"""An estimate on the safe side, where the client does without the server's help."""
CUT = "error: the call was cut off at the length limit, so nothing was run; make it shorter"


@dataclass(frozen=True)
class Settings:
    """
    Attributes:
        strategy: none, discard-all, discard-75, keep-last-N or summary.
        by: who carries a strategy out: the server (dsv32-plugin's), or the client, for any other. A summary is always
            the client's.
        context: tokens that the server takes.
        trigger: of them, from where on the strategy acts.
        steps: as many answers the model may give.
        answer_tokens: as long each may be.
    """

    model: str
    strategy: str = "none"
    by: Literal["server", "client"] = "server"
    context: int = 131_072
    trigger: int | None = None
    steps: int = 200
    answer_tokens: int = 8192
    temperature: float = 1.0

    @property
    def trigger_tokens(self) -> int:
        return self.trigger or int(SHARE_OF_CONTEXT * self.context)


@dataclass
class Trajectory:
    """What an agent did.

    Attributes:
        messages: all of it, also what the model no longer sees.
        answer: the last words; empty where it came to none.
        end: why it ended.
        prompt_tokens: of all prompts together; `cached_tokens` of them the server had.
        last_prompt, longest_prompt: tokens of one.
        whole_tokens: of the last prompt, had nothing been taken out.
        resets: how often something was.
    """

    task: str
    strategy: str
    number: int = 0
    messages: list[Message] = field(default_factory=list)
    answer: str = ""
    end: End = "answer"
    why: str = ""
    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    answer_tokens: int = 0
    last_prompt: int = 0
    longest_prompt: int = 0
    whole_tokens: int = 0
    resets: int = 0

    def as_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False, indent=1)

    def as_markdown(self) -> str:
        lines = [
            f"# {self.strategy}, trajectory {self.number}",
            f"{self.steps} steps, {self.resets} resets, {self.prompt_tokens} tokens read ({self.cached_tokens} of them "
            f"from the cache), {self.answer_tokens} written; ended by: {self.end} {self.why}".rstrip(),
        ]
        for message in self.messages:
            lines.append(f"## {message['role']}")
            if thoughts := message.get("reasoning") or message.get("reasoning_content"):
                lines.append("\n".join(f"> {line}" for line in thoughts.splitlines()))
            if message.get("content"):
                lines.append(_fenced(message["content"]) if message["role"] == "tool" else message["content"])
            for call in message.get("tool_calls") or ():
                lines.append(_fenced(f"{call['function']['name']}({call['function']['arguments']})"))
        return "\n\n".join(lines) + "\n"


class Agent:
    """
    Args:
        client: of any OpenAI-compatible server.
        progress: is told of every step.
    """

    def __init__(
        self, client: openai.OpenAI, settings: Settings, progress: Callable[[Trajectory, str], None] = lambda *_: None
    ) -> None:
        self._client = client
        self._settings = settings
        self._progress = progress
        named = settings.strategy not in ("none", "summary")
        self._strategy = read_strategy({"strategy": settings.strategy}) if named else None

    def run(self, task: str, toolbox: Toolbox, number: int = 0, system: str = SYSTEM) -> Trajectory:
        """Ends in every case: with an answer, or with the reason why there is none."""
        done = Trajectory(task, self._settings.strategy, number)
        # What the model is sent; only a summary makes another conversation of it.
        sent: list[Message] = [{"role": "system", "content": system}, {"role": "user", "content": task}]
        done.messages = list(sent)
        cleared = 0
        while done.steps < self._settings.steps:
            try:
                if (shorter := self._summarised(sent, toolbox, done)) is not None:
                    sent, done.resets = shorter, done.resets + 1
                message, finish, now_cleared = self._ask(sent, toolbox, done)
            except openai.BadRequestError as error:
                return self._ended(done, "context" if "context" in str(error) else "error", str(error))
            except openai.OpenAIError as error:
                return self._ended(done, "error", str(error))
            done.resets += now_cleared > cleared
            cleared = now_cleared
            new = [message]
            calls = message.get("tool_calls") or []
            for place, call in enumerate(calls):
                function = call["function"]
                is_cut = finish == "length" and place == len(calls) - 1
                result = CUT if is_cut else toolbox.call(function["name"], function["arguments"])
                new.append({"role": "tool", "tool_call_id": call["id"], "content": result})
            sent += new
            done.messages += new
            said = ", ".join(f"{call['function']['name']}({call['function']['arguments'][:60]})" for call in calls)
            self._progress(done, said or "answers")
            if not calls:
                done.answer = message.get("content") or ""
                return self._ended(done, "length" if finish == "length" else "answer", "")
        return self._ended(done, "steps", f"the budget of {self._settings.steps} steps is spent")

    def run_parallel(self, task: str, toolboxes: Sequence[Toolbox], system: str = SYSTEM) -> list[Trajectory]:
        """DeepSeek's parallel baseline: one trajectory with each toolbox, the one with the fewest steps first.

        One without an answer is behind all that have one.
        """
        with ThreadPoolExecutor(len(toolboxes)) as pool:
            numbers = range(len(toolboxes))
            done = list(pool.map(lambda number: self.run(task, toolboxes[number], number, system), numbers))
        return sorted(done, key=lambda trajectory: (trajectory.end != "answer", trajectory.steps))

    def _ask(self, sent: list[Message], toolbox: Toolbox, done: Trajectory) -> tuple[Message, str, int]:
        """The next message, why it ended, and how many calls were taken out of its prompt."""
        settings = self._settings
        kwargs: dict[str, Any] = {"thinking": True}
        messages, cleared = sent, 0
        if self._strategy is not None and settings.by == "server":
            kwargs["context"] = {"strategy": settings.strategy, "trigger_tokens": settings.trigger_tokens}
        elif self._strategy is not None:
            strategy = read_strategy({"strategy": settings.strategy, "trigger_tokens": settings.trigger_tokens})
            assert strategy is not None
            managed = manage(sent, strategy, lambda part: _estimate(part, toolbox))
            messages, cleared = [dict(message) for message in managed.messages], managed.cleared_tool_uses
        completion = self._complete(messages, toolbox, done, kwargs)
        choice = completion.choices[0]
        report = getattr(completion.usage, "context_management", None) or {}
        done.whole_tokens = report.get("original_input_tokens") or done.whole_tokens
        cleared += sum(edit["cleared_tool_uses"] for edit in report.get("applied_edits", ()))
        done.steps += 1
        # Whole, with its reasoning: until the next question the model reads what it thought before a call.
        return choice.message.model_dump(exclude_none=True), choice.finish_reason, cleared

    def _complete(self, messages: list[Message], toolbox: Toolbox, done: Trajectory, kwargs: Any, **more: Any) -> Any:
        settings = self._settings
        completion = self._client.chat.completions.create(
            model=settings.model,
            messages=messages,  # type: ignore[arg-type]
            tools=toolbox.schemas,  # type: ignore[arg-type]
            temperature=settings.temperature,
            top_p=0.95,
            max_tokens=settings.answer_tokens,
            seed=done.number,
            extra_body={"chat_template_kwargs": kwargs},
            **more,
        )
        usage = completion.usage
        if usage is not None:
            done.prompt_tokens += usage.prompt_tokens
            done.answer_tokens += usage.completion_tokens
            done.last_prompt = done.whole_tokens = usage.prompt_tokens
            done.longest_prompt = max(done.longest_prompt, usage.prompt_tokens)
            details = usage.prompt_tokens_details
            done.cached_tokens += (details and details.cached_tokens) or 0
        return completion

    def _summarised(self, sent: list[Message], toolbox: Toolbox, done: Trajectory) -> list[Message] | None:
        """The conversation with a summary in the place of its calls, once these have become too many."""
        if self._settings.strategy != "summary":
            return None
        plan = plan_summary(sent, self._settings.trigger_tokens, lambda part: _estimate(part, toolbox))
        if plan is None:
            return None
        request = [dict(message) for message in plan.request]
        completion = self._complete(request, toolbox, done, {"thinking": False}, tool_choice="none")
        summary = completion.choices[0].message.content or ""
        self._progress(done, f"summarises {len(plan.summarised)} messages")
        return [dict(message) for message in plan.continued(summary)] if summary.strip() else None

    def _ended(self, done: Trajectory, end: End, why: str) -> Trajectory:
        done.end, done.why = end, why
        self._progress(done, f"ends: {end} {why}".rstrip())
        return done


def _estimate(messages: Sequence[Any], toolbox: Toolbox) -> int:
    return (len(json.dumps(list(messages))) + len(json.dumps(toolbox.schemas))) // CHARS_PER_TOKEN


def _fenced(text: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}\n{text}\n{fence}"
