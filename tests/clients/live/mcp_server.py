"""An MCP server on its standard streams with the tests' tools; it notes their calls in the file that it is given."""

import sys
from pathlib import Path

from mcp.server.mcpserver import MCPServer

CALLS = Path(sys.argv[1])
server = MCPServer("sums")


@server.tool()
def add(a: int, b: int) -> str:
    """The sum of two integers."""
    with CALLS.open("a") as calls:
        calls.write(f"add {a} {b}\n")
    return f"The sum is {a + b}."


@server.tool()
def note(text: str) -> str:
    """Keep a text."""
    with CALLS.open("a") as calls:
        calls.write(f"note {text}\n")
    return "Kept."


server.run()
