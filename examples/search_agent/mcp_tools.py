"""The tools of an MCP server that is started as a command, by the `mcp` package."""

from __future__ import annotations

import asyncio
import shlex
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from toolbox import TIMEOUT_S, Tool

MOST_BYTES = 1 << 20
"""Of a message of the server's."""


@contextmanager
def tools_of(command: str) -> Iterator[list[Tool]]:
    """Start the server, and stop it at the end."""
    try:
        from mcp import ClientSession, StdioServerParameters
        from mcp.client.stdio import stdio_client
    except ImportError as error:
        raise SystemExit(f"--mcp: expected the mcp package, found none: {error}; pip install mcp") from error

    relay = [str(Path(__file__).with_name("mcp_relay.py")), str(MOST_BYTES), *shlex.split(command)]
    loop = asyncio.new_event_loop()
    ready: Future[Any] = Future()
    done = asyncio.Event()

    async def serve() -> None:
        # All in one task: the package asks for it.
        try:
            server = StdioServerParameters(command=sys.executable, args=relay)
            async with stdio_client(server) as streams, ClientSession(*streams) as session:
                await asyncio.wait_for(session.initialize(), TIMEOUT_S)
                ready.set_result((session, await session.list_tools()))
                await done.wait()
        except BaseException as error:
            if ready.done():
                raise
            ready.set_exception(error)

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), daemon=True)
    thread.start()

    try:
        session, listed = ready.result(TIMEOUT_S)
    except Exception as error:
        raise SystemExit(f"--mcp: {command!r} does not answer as an MCP server: {error!r}") from error

    def calling(name: str) -> Any:
        def call(**arguments: Any) -> str:
            asked = asyncio.wait_for(session.call_tool(name, arguments), TIMEOUT_S)
            result = asyncio.run_coroutine_threadsafe(asked, loop).result()
            return "\n".join(getattr(part, "text", f"[{part.type}]") for part in result.content)

        return call

    try:
        yield [Tool(tool.name, tool.description or "", _schema_of(tool), calling(tool.name)) for tool in listed.tools]
    finally:
        loop.call_soon_threadsafe(done.set)
        thread.join(5)


def _schema_of(tool: Any) -> dict[str, Any]:
    """`inputSchema`, or `input_schema` since mcp 2."""
    schema: dict[str, Any] = getattr(tool, "inputSchema", None) or tool.input_schema
    return schema
