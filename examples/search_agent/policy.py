"""A policy in the place of a model, behind an HTTP server with a small context: for tests, and to compare strategies.

The policy is honest: it knows what is in its prompt and nothing else. It reads the lists of one city after the other,
notes what matters, and submits the first plan within the budget. What a discard takes away it has forgotten; its notes
it can read again. The server does with a request what dsv32-plugin's does, but for the engine: a prompt is rendered and
counted, four characters a token, and refused where it is longer than the context.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any

from itinerary import DAYS, GOOD, KINDS, faults, solve

from dsv32_plugin.apis import Refusal, chat
from dsv32_plugin.apis.exchange import Server
from dsv32_plugin.parsers.context import SUMMARISE, SUMMARY_HEAD

Message = Mapping[str, Any]
CHARS_PER_TOKEN = 4
_FIELDS = {**{what: ("name", *fields) for what, fields in KINDS.items()}, "trains": ("destination", "price")}
LISTS = tuple(_FIELDS)
_BUDGET = re.compile(r"together cost at most (\d+)")
_FACT = re.compile(r"^(?:cities|\w+ of \w+): \S.*$", re.MULTILINE)


def act(messages: Sequence[Message], seed: int) -> dict[str, Any]:
    """The next message of the assistant's, from what is in the prompt."""
    if messages[-1].get("content") == SUMMARISE:
        return {"content": "\n".join(_noted(messages)) or "Nothing is known yet."}
    noted, read = _noted(messages), _read(messages)
    fresh = [fact for fact in read if fact not in noted]
    world, cities = _world([*noted, *fresh])
    budget = int(_BUDGET.search(messages[1]["content"])[1])  # type: ignore[index]
    if _result_of(messages, "submit"):
        return {"reasoning_content": "It is handed in.", "content": "The plan is submitted."}
    is_summarised = SUMMARY_HEAD.strip() in messages[1]["content"]
    if not is_summarised and _result_of(messages, "read_notes") is None:
        return _calls("I may have begun before: what did I note?", ("read_notes", {}))
    notes = [("note", {"text": fact}) for fact in fresh]
    if not cities:
        return _calls("I need the cities first.", *notes, ("cities", {}))
    whole = {name: city for name, city in world.items() if len(city) == len(LISTS)}
    plan = solve(whole, budget) if len(whole) >= DAYS else None
    if plan and not faults(whole, plan, budget):
        return _calls("This keeps every rule and the budget.", *notes, ("submit", {"plan": plan}))
    order = random.Random(seed).sample(cities, len(cities))
    missing = [(what, name) for name in order for what in LISTS if what not in world.get(name, {})]
    if not missing:
        return {"reasoning_content": "I know all lists.", "content": "There is no plan within the budget."}
    what, name = missing[0]
    return _calls(
        f"I know {len(whole)} cities in full. Next I need the {what} of {name}.", *notes, (what, {"city": name})
    )


def _calls(thoughts: str, *calls: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    made = [
        {"id": f"call_{i}", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
        for i, (name, arguments) in enumerate(calls)
    ]
    return {"reasoning_content": thoughts, "content": None, "tool_calls": made}


def _uses(messages: Sequence[Message]) -> list[tuple[str, dict[str, Any], str]]:
    """Calls with their arguments and results, as far as they are in the prompt."""
    uses = []
    for place, message in enumerate(messages):
        for number, call in enumerate(message.get("tool_calls") or ()):
            arguments = call["function"]["arguments"]
            result = messages[place + 1 + number]["content"] if place + 1 + number < len(messages) else ""
            uses.append((call["function"]["name"], json.loads(arguments) if isinstance(arguments, str) else {}, result))
    return uses


def _result_of(messages: Sequence[Message], name: str) -> str | None:
    return next((result for called, _, result in _uses(messages) if called == name), None)


def _noted(messages: Sequence[Message]) -> list[str]:
    """Facts in notes that were written or read, or in a summary."""
    texts = [message["content"] for message in messages if message["role"] == "user"]
    for name, arguments, result in _uses(messages):
        texts.append(arguments.get("text", "") if name == "note" else result if name == "read_notes" else "")
    return list(dict.fromkeys(fact for text in texts for fact in _FACT.findall(text)))


def _read(messages: Sequence[Message]) -> list[str]:
    """Facts in lists, without what does not matter."""
    facts = []
    for name, _, result in _uses(messages):
        if name == "cities" and result.startswith("{"):
            facts.append(f"cities: {', '.join(json.loads(result)[name])}")
        elif name in LISTS and result.startswith("{"):
            listed = json.loads(result)
            entries = [[entry[field] for field in _FIELDS[name]] for entry in listed[name]]
            entries = [entry for entry in entries if name != "hotels" or entry[2] >= GOOD]
            facts.append(f"{name} of {listed['city']}: " + "; ".join(",".join(map(str, entry)) for entry in entries))
    return facts


def _world(facts: Sequence[str]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    world: dict[str, dict[str, Any]] = {}
    cities: list[str] = []
    for fact in facts:
        head, _, listed = fact.partition(": ")
        what, _, name = head.partition(" of ")
        if what == "cities":
            cities = listed.split(", ")
        else:
            rows = [row.split(",") for row in listed.split("; ")]
            entries = [dict(zip(_FIELDS[what], map(_value, row), strict=True)) for row in rows]
            world.setdefault(name, {})[what] = entries
    return world, cities


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


class Small:
    """The server's part without HTTP: a request to an answer. It remembers prompts as a prefix cache does."""

    def __init__(self, context: int) -> None:
        self._server = Server(context_tokens=context)
        self._cache: list[str] = []
        self._lock = Lock()

    def answer(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        try:
            exchange = chat.read(body, self._server)
            conversation = exchange.conversation
            prompt = str(conversation.prompt({}, "v3.2", lambda text: len(text) // CHARS_PER_TOKEN))
        except (Refusal, ValueError) as error:
            return 400, {"error": {"message": str(error), "type": "invalid_request_error"}}
        tokens, most = len(prompt) // CHARS_PER_TOKEN, self._server.context_tokens
        if tokens + (body.get("max_tokens") or 1) > most:
            said = f"the prompt has {tokens} tokens, with {body.get('max_tokens')} more; the context has {most}"
            return 400, {"error": {"message": said, "type": "invalid_request_error"}}
        outcome = conversation.outcome
        seen = conversation.messages if outcome is None else outcome.managed.messages
        message = {"role": "assistant", **act(seen, body.get("seed") or 0)}
        written = len(json.dumps(message)) // CHARS_PER_TOKEN
        usage: dict[str, Any] = {
            "prompt_tokens": tokens,
            "completion_tokens": written,
            "total_tokens": tokens + written,
            "prompt_tokens_details": {"cached_tokens": self._cached(prompt)},
        }
        finish = "tool_calls" if message.get("tool_calls") else "stop"
        answer = {
            "id": "scripted",
            "object": "chat.completion",
            "created": 0,
            "model": "scripted",
            "choices": [{"index": 0, "message": message, "finish_reason": finish, "logprobs": None}],
            "usage": usage,
        }
        return 200, exchange.answer.whole(answer)

    def _cached(self, prompt: str) -> int:
        """The tokens that the prompt has in common with an earlier one."""
        with self._lock:
            shared = max((_shared(prompt, earlier) for earlier in self._cache), default=0)
            self._cache.append(prompt)
        return shared // CHARS_PER_TOKEN


def _shared(text: str, other: str) -> int:
    low, high = 0, min(len(text), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if text[:middle] == other[:middle] else (low, middle - 1)
    return low


@contextmanager
def serving(context: int) -> Iterator[str]:
    """The address of such a server, at a free port of this machine."""
    small = Small(context)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(200, {"object": "list", "data": [{"id": "scripted", "object": "model"}]})

        def do_POST(self) -> None:
            self._send(*small.answer(json.loads(self.rfile.read(int(self.headers["content-length"])))))

        def log_message(self, *_: Any) -> None:
            pass

        def _send(self, status: int, body: Any) -> None:
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
