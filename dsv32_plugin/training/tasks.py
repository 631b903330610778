"""What the tiny model learns, generated: codes in a long context, copying, sums, tool calls and their results.

Every conversation is OpenAI-shaped and becomes text through this package's own encoder, so that the model reads in
training what the engines render when they serve.
"""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from dsv32_plugin.parsers import encode_messages
from dsv32_plugin.parsers.encoding import ThinkingMode

Message = dict[str, Any]
KEY_LETTERS, VALUE_DIGITS = 4, 4
QUESTIONS = ("{}?", "What is {}?", "Find {}.")
LINE_TOKENS = KEY_LETTERS + VALUE_DIGITS + 2
TURN_TOKENS = 2 * KEY_LETTERS + VALUE_DIGITS + 9
"""About what one more question costs, its marks included."""
CODES_HEAD = "Remember these codes.\n"


@dataclass(frozen=True)
class Conversation:
    messages: list[Message]
    mode: ThinkingMode = "chat"
    tools: list[Message] = field(default_factory=list)

    def text(self) -> str:
        return encode_messages(self.messages, thinking_mode=self.mode, tools=self.tools or None)

    def cut(self, turns: int) -> tuple[str, str]:
        """(prompt, answer): the text before the assistant's turn number `turns`, and that turn with its EOS."""
        at = [i for i, message in enumerate(self.messages) if message["role"] == "assistant"][turns]
        options: dict[str, Any] = {"thinking_mode": self.mode, "tools": self.tools or None}
        prompt = encode_messages(self.messages[:at], **options)
        return prompt, encode_messages(self.messages[: at + 1], **options).removeprefix(prompt)


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str, reasoning: str = "") -> Message:
    return {"role": "assistant", "content": text, "reasoning_content": reasoning}


def mode(random: Random, thinking: float = 0.5) -> ThinkingMode:
    return "thinking" if random.random() < thinking else "chat"


def codes(random: Random, count: int) -> dict[str, str]:
    """`count` different keys, each with its value."""
    made: dict[str, str] = {}
    while len(made) < count:
        key = "".join(random.choices(string.ascii_lowercase, k=KEY_LETTERS))
        made[key] = "".join(random.choices(string.digits, k=VALUE_DIGITS))
    return made


def needles(random: Random, pairs: int, questions: int, *, thinking: float = 0.25) -> Conversation:
    """A list of codes, then questions about some of them, no code twice while there are others."""
    made = codes(random, pairs)
    asked: list[str] = []
    while len(asked) < questions:
        asked += random.sample(list(made), min(questions - len(asked), pairs))
    head = CODES_HEAD + "".join(f"{key}={value}\n" for key, value in made.items())
    messages = []
    for number, key in enumerate(asked):
        question = random.choices(QUESTIONS, (8, 1, 1))[0].format(key)
        messages.append(user(question if number else head + question))
        messages.append(assistant(f"{key}={made[key]}", f"Look up {key}."))
    return Conversation(messages, mode(random, thinking))


def needles_of(random: Random, tokens: int, questions: int | None = None, *, thinking: float = 0.25) -> Conversation:
    """Codes and questions of about `tokens` tokens together, never more; a random share are questions by default."""
    room = tokens - len(CODES_HEAD) - 40
    if questions is None:
        questions = max(1, int(room * random.uniform(0.1, 0.7) / TURN_TOKENS))
    room -= questions * TURN_TOKENS
    return needles(random, max(1, room // LINE_TOKENS), questions, thinking=thinking)


def few_codes(random: Random) -> Conversation:
    return needles(random, random.randint(1, 20), random.randint(1, 3), thinking=0.5)


def word(random: Random, shortest: int = 3, longest: int = 8) -> str:
    """A made-up word that can be spoken."""
    length = random.randint(shortest, longest)
    start = random.randrange(2)
    return "".join(random.choice("aeiou" if (start + i) % 2 else "bcdfghjklmnprstvwz") for i in range(length))


def name(random: Random) -> str:
    """A name as of a place or a person; real ones too, so that letters come in all orders."""
    if random.random() < 0.3:
        return "".join(random.choices(string.ascii_lowercase, k=random.randint(3, 9))).capitalize()
    return word(random).capitalize()


def copying(random: Random) -> Conversation:
    messages = []
    for _ in range(random.randint(1, 4)):
        text = " ".join(
            random.choice((word(random), name(random), str(random.randrange(10000))))
            for _ in range(random.randint(1, 6))
        )
        messages += [user(f"Repeat: {text}"), assistant(text, "Copy it.")]
    return Conversation(messages, mode(random))


def held_out(a: int, b: int) -> bool:
    """Whether this sum is kept for the evaluation."""
    return (31 * a + b) % 11 == 0


def steps(a: int, b: int) -> str:
    """The column-by-column addition, from the right."""
    written: list[str] = []
    carry = 0
    while a or b or not written:
        (a, x), (b, y) = divmod(a, 10), divmod(b, 10)
        total = x + y + carry
        written.append(f"{x}+{y}+{carry}={total}")
        carry = total // 10
    return ", ".join(written)


def addition(random: Random, *, evaluation: bool = False) -> Conversation:
    while True:
        a, b = (random.randrange(10 ** random.randint(1, 3)) for _ in range(2))
        if held_out(a, b) == evaluation:
            break
    return Conversation([user(f"{a}+{b}"), assistant(str(a + b), steps(a, b))], "thinking")


def greeting(random: Random) -> Conversation:
    said = random.choice(("Hello", "Hi", "Hello!", "Good morning"))
    reply = "Hello! Give me codes to remember, numbers to add, or tools to call."
    return Conversation([user(said), assistant(reply, "A greeting.")], mode(random))


@dataclass(frozen=True)
class Use:
    """One use of a tool: what the user says, the arguments in it, what the tool returns, what the model then says."""

    said: str
    arguments: dict[str, Any]
    returned: Any
    reply: str


def tool(name: str, description: str, **properties: str) -> Message:
    """An OpenAI tool whose parameters are all required; `properties` maps each to its JSON type."""
    schema = {key: {"type": kind} for key, kind in properties.items()}
    parameters = {"type": "object", "properties": schema, "required": list(properties)}
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": parameters},
    }


def _weather(random: Random) -> Use:
    city, days = name(random), random.randint(1, 14)
    sky, degrees = random.choice(("rain", "sun", "snow", "clouds", "wind")), random.randint(-20, 40)
    said = random.choice(("What is the weather in {} in {} days?", "Weather in {} in {} days")).format(city, days)
    returned = {"sky": sky, "celsius": degrees}
    return Use(said, {"city": city, "days": days}, returned, f"In {city}: {sky}, {degrees} degrees.")


def _event(random: Random) -> Use:
    title, hour, urgent = (
        " ".join(word(random) for _ in range(random.randint(1, 3))),
        random.randint(0, 23),
        random.random() < 0.5,
    )
    said = f"Add {title} at {hour}" + (", it is urgent." if urgent else ".")
    number = random.randrange(1000)
    return Use(
        said, {"title": title, "hour": hour, "urgent": urgent}, {"id": number}, f"Added {title} as number {number}."
    )


def _convert(random: Random) -> Use:
    amount = random.choice((random.randint(1, 999), random.randint(1, 999) / 10))
    source, target = random.sample(("km", "miles", "kg", "pounds", "litres", "gallons", "metres", "feet"), 2)
    result = random.randint(1, 9999) / 10
    arguments = {"amount": amount, "source": source, "target": target}
    return Use(
        f"Convert {amount} {source} to {target}.",
        arguments,
        {"amount": result},
        f"{amount} {source} are {result} {target}.",
    )


def _message(random: Random) -> Use:
    people = [name(random) for _ in range(random.randint(1, 3))]
    text = " ".join(word(random) for _ in range(random.randint(1, 5)))
    arguments = {"to": people, "text": text}
    return Use(f"Tell {' and '.join(people)}: {text}", arguments, "sent", f"Sent to {' and '.join(people)}.")


def _light(random: Random) -> Use:
    room, level = word(random), random.randint(0, 100)
    was = random.randint(0, 100)
    return Use(
        f"Set the {room} light to {level}.",
        {"room": room, "level": level},
        {"was": was},
        f"The {room} light went from {was} to {level}.",
    )


TOOLS: tuple[tuple[Message, Callable[[Random], Use]], ...] = (
    (tool("get_weather", "Get the weather of a city", city="string", days="integer"), _weather),
    (tool("add_event", "Add an event", title="string", hour="integer", urgent="boolean"), _event),
    (tool("convert", "Convert units", amount="number", source="string", target="string"), _convert),
    (tool("send_message", "Send a message", to="array", text="string"), _message),
    (tool("set_light", "Set a light", room="string", level="integer"), _light),
)


def tool_use(random: Random, turns: int | None = None) -> Conversation:
    """Turns with one call each: question, call, result, answer; some of the offered tools are never used."""
    offered = random.sample(TOOLS, random.choice((1, 2, 3, 5)))
    messages: list[Message] = []
    if random.random() < 0.5:
        messages.append({"role": "system", "content": "You are a helpful assistant."})
    for number in range(turns or random.randint(1, 4)):
        definition, make = random.choice(offered)
        function, use = definition["function"]["name"], make(random)
        call = {"id": f"call_{number}", "type": "function", "function": {"name": function, "arguments": use.arguments}}
        returned = use.returned if isinstance(use.returned, str) else json.dumps(use.returned)
        messages += [
            user(use.said),
            {**assistant("", f"Call {function}."), "tool_calls": [call]},
            {"role": "tool", "tool_call_id": call["id"], "content": returned},
            assistant(use.reply, "Say it."),
        ]
    return Conversation(messages, mode(random), [definition for definition, _ in offered])


def chat(random: Random) -> Conversation:
    """One short conversation of any kind."""
    kinds: Sequence[Callable[[Random], Conversation]] = (tool_use, addition, few_codes, copying, greeting)
    return random.choices(kinds, (45, 25, 15, 13, 2))[0](random)
