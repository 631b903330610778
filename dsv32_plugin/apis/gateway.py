"""The gateway: an ASGI middleware in front of an engine's own endpoints.

It reads the request of a chat API, keeps its conversation for the engine's encoder hook, hands the engine a request
that its classes take as it is, and brings the answer into the client's form. All else passes through untouched.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from dsv32_plugin.parsers.context import Memory
from dsv32_plugin.parsers.parts import NestingError, PartError, well_formed

from . import anthropic, chat, responses
from .context import HEADER
from .conversation import IN_SCOPE, Conversation, serve
from .exchange import Answer, Exchange, JsonObject, Server, openai_error
from .refusal import Refusal

logger = logging.getLogger("dsv32_plugin.apis")
_MISREAD = (AttributeError, IndexError, KeyError, OverflowError, PartError, TypeError)

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

_BATCH = "/v1/chat/completions/batch"
_CHAT = (_BATCH, "/v1/chat/completions", "/v1/chat/completions/render", "/tokenize", "/v1/tokenize", "/invocations")
_MESSAGES = ("/v1/messages", "/v1/messages/count_tokens")
_RESPONSES = "/v1/responses"
_COUNTS = ("/tokenize", "/count_tokens", "/render")
"""Of these: no answer follows."""


class Gateway:
    """The middleware.

    Args:
        app: the engine's application.
        server: what it serves, asked with every request; None where the model, or its template, is not ours.
    """

    def __init__(self, app: App, server: Callable[[], Server | None]) -> None:
        self._app = app
        self._server = server
        self._store = responses.Store()
        self._memory = Memory()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        path = scope["path"] if scope["type"] == "http" else ""
        server = self._server() if path else None
        if server is None:
            await self._app(scope, receive, send)
        elif scope["method"] == "POST" and path.endswith((*_CHAT, *_MESSAGES, _RESPONSES)):
            await self._exchange(server, path, scope, receive, send)
        elif (kept := self._asked_again(path)) is not None:
            await self._app(scope, receive, _Reply(send, kept.answer, None, is_messages=False))
        else:
            await self._app(scope, receive, send)

    async def _exchange(self, server: Server, path: str, scope: Message, receive: Receive, send: Send) -> None:
        is_messages = path.endswith(_MESSAGES)
        given = await _read_body(receive)
        if given is None:
            return
        try:
            exchange = self._read(given, path, server, scope)
        except Refusal as refusal:
            body = (
                anthropic.error(refusal.status, str(refusal), refusal.details) if is_messages else openai_error(refusal)
            )
            await _send_json(send, refusal.status, body)
            return
        if exchange is None:
            # Not for us to read: the engine says what is wrong with it.
            reply = _Reply(send, Answer(), None, is_messages=True) if is_messages else send
            await self._app(scope, _replay(given, receive), reply)
            return
        exchange.conversation.memory = self._memory
        exchange.conversation.context_tokens = None if path.endswith(_COUNTS) else server.context_tokens
        conversation = None if exchange.is_batch else exchange.conversation
        if conversation is not None and conversation.plan is not None and server.count is not None:
            kwargs = exchange.body["chat_template_kwargs"]
            try:
                # In a thread: others are answered meanwhile.
                await asyncio.to_thread(conversation.manage, kwargs, server.variant, server.count)
            except ValueError as error:
                conversation.refuse(error)
                await _Reply(send, exchange.answer, conversation, is_messages=is_messages).refuse()
                return
        serve(conversation)
        body_bytes = json.dumps(exchange.body).encode()
        headers = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
        headers.append((b"content-length", b"%d" % len(body_bytes)))
        scope = {**scope, "headers": headers, IN_SCOPE: conversation}
        reply = _Reply(send, exchange.answer, conversation, is_messages=is_messages)
        try:
            await self._app(scope, _replay(body_bytes, receive), reply)
        except ValueError:
            if not await reply.refuse():
                raise
        finally:
            serve(None)

    def _read(self, given: bytes, path: str, server: Server, scope: Message) -> Exchange | None:
        headers = dict(scope["headers"])
        if b"json" not in headers.get(b"content-type", b"").lower() or headers.get(b"content-encoding"):
            return None
        try:
            body = json.loads(given)
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
            return None
        except ValueError as error:
            raise Refusal(f"a number in the request has too many digits: {error}") from error
        if not isinstance(body, dict) or body.get("chat_template"):
            return None
        try:
            if path.endswith(_MESSAGES):
                return anthropic.read(body, server)
            if path.endswith(_RESPONSES):
                return responses.read(body, server, self._store)
            if "messages" not in body:
                return None
            return chat.read_batch(body, server) if path.endswith(_BATCH) else chat.read(body, server)
        except NestingError as error:
            raise Refusal(str(error)) from error
        except _MISREAD as error:
            # A value of a type that nothing above expects: the client's mistake, and the log says where.
            logger.warning("a request to %s could not be read", path, exc_info=True)
            raise Refusal(f"the request has a value of the wrong type: {error}") from error

    def _asked_again(self, path: str) -> responses.Kept | None:
        """Of `/v1/responses/{id}`."""
        head, _, response_id = path.rpartition("/")
        return self._store.get(response_id) if head.endswith(_RESPONSES) else None


class _Reply:
    """`send` for an engine: what it says passes through `answer`, and its refusals get their true reason and form."""

    def __init__(self, send: Send, answer: Answer, conversation: Conversation | None, *, is_messages: bool) -> None:
        self._send = send
        self._answer = answer
        self._conversation = conversation
        self._is_messages = is_messages
        self._start: Message | None = None
        self._is_stream = self._is_error = self._passes = self._begun = False
        self._held = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            # Held until something follows: by then an engine that streams has said whether it refuses.
            self._start = message
            kind = dict(message["headers"]).get(b"content-type", b"")
            self._is_stream = kind.startswith(b"text/event-stream")
            self._is_error = message["status"] >= 400
            is_json = kind.startswith(b"application/json")
            self._passes = not (self._answer.changes and (self._is_stream or is_json)) and not self._is_error
        elif message["type"] != "http.response.body":
            await self._send(message)
        elif await self.refuse() or await self._refuse_stream(message.get("body", b"")):
            pass
        elif self._passes:
            await self._begin()
            await self._send(message)
        elif self._is_stream and not self._is_error:
            await self._stream(message)
        else:
            await self._whole(message)

    async def _begin(self, body: bytes | None = None) -> None:
        """Send the start; with the length of `body` where that is all of it, without one where it isn't known."""
        if self._begun or self._start is None:
            return
        self._begun, start = True, self._start
        outcome = None if self._conversation is None else self._conversation.outcome
        if outcome is not None:
            start = {**start, "headers": [*start["headers"], (HEADER, json.dumps(outcome.report).encode())]}
        if not self._passes:
            headers = [(name, value) for name, value in start["headers"] if name.lower() != b"content-length"]
            if body is not None:
                headers.append((b"content-length", b"%d" % len(body)))
            start = {**start, "headers": headers}
        await self._send(start)

    async def _refuse_stream(self, body: bytes) -> bool:
        """A stream of the Messages API that begins with an error is a refusal, of which the status is its own."""
        if self._begun or not (self._is_messages and self._is_stream and body.startswith(b"event: error\n")):
            return False
        data = body.partition(b"data:")[2].partition(b"\n")[0]
        try:
            status = anthropic.status_of(json.loads(data)["error"]["type"])
        except (ValueError, KeyError, TypeError):
            return False
        await self._replace(status, json.loads(data))
        return True

    async def refuse(self) -> bool:
        """Where a hook of ours refused the request: say so, whatever the engine made of it. Returns whether it did."""
        reason = None if self._conversation is None else self._conversation.refusal
        if reason is None or self._begun:
            return False
        body = anthropic.error(400, reason) if self._is_messages else openai_error(Refusal(reason))
        await self._replace(400, body)
        return True

    async def _replace(self, status: int, body: JsonObject) -> None:
        """Answer this, and let the engine's own answer go nowhere."""
        send, self._send, self._begun, self._passes = self._send, _nowhere, True, True
        await _send_json(send, status, body)

    async def _whole(self, message: Message) -> None:
        self._held += message.get("body", b"")
        if message.get("more_body"):
            return
        body = self._held
        try:
            read = json.loads(body)
            if self._is_error and self._is_messages:
                assert self._start is not None
                read = anthropic.error(self._start["status"], _reason_in(read))
            elif not self._is_error and isinstance(read, dict):
                read = self._answer.whole(read)
            body = json.dumps(read, ensure_ascii=False).encode()
        except ValueError:
            logger.debug("an answer that is no JSON is passed on as it is")
        await self._begin(body)
        await self._send({"type": "http.response.body", "body": body})

    async def _stream(self, message: Message) -> None:
        await self._begin()
        self._held += message.get("body", b"")
        *events, self._held = self._held.split(b"\n\n")
        more = message.get("more_body", False)
        if not more and self._held:
            events.append(self._held)
        sent = b"".join(self._event(event) for event in events)
        await self._send({"type": "http.response.body", "body": sent, "more_body": more})

    def _event(self, event: bytes) -> bytes:
        name, data = None, []
        for line in event.split(b"\n"):
            field, _, value = line.partition(b":")
            if field == b"event":
                name = value
            elif field == b"data":
                data.append(value.removeprefix(b" "))
        try:
            read = json.loads(b"\n".join(data))
        except ValueError:
            return event + b"\n\n"
        if not isinstance(read, dict):
            return event + b"\n\n"
        return b"".join(_sse(made, named=name is not None) for made in self._answer.event(read))


def _sse(event: JsonObject, *, named: bool) -> bytes:
    head = f"event: {event['type']}\n" if named and "type" in event else ""
    return f"{head}data: {json.dumps(event, ensure_ascii=False)}\n\n".encode()


def _reason_in(error: Any) -> str:
    """The message of an engine's error, in whatever form."""
    for key in ("error", "message", "detail"):
        if isinstance(error, dict) and key in error:
            return _reason_in(error[key])
    return error if isinstance(error, str) else json.dumps(error)


async def _read_body(receive: Receive) -> bytes | None:
    """All of the request's body; None where the client has gone."""
    parts = []
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives this body first, and then what the client's gives: that it has gone."""
    unsent = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return unsent.pop() if unsent else await receive()

    return replay


async def _send_json(send: Send, status: int, body: JsonObject) -> None:
    content = json.dumps(well_formed(body), ensure_ascii=False).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(content))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})


async def _nowhere(message: Message) -> None:
    """What an engine says after its answer was replaced."""
