"""Stands between the agent and an MCP server: a message that is too long never reaches the agent.

python mcp_relay.py MOST_BYTES PROGRAM ARGUMENT...
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from typing import BinaryIO

_ID = re.compile(rb'"id"\s*:\s*(\d+|"[^"]*")')
_HEAD_BYTES = 4096
_PIECE_BYTES = 1 << 16


def relay(source: BinaryIO, sink: BinaryIO, most: int) -> None:
    """Lines; one with more bytes becomes an error to the request that it answers."""
    while line := source.readline(most):
        if not line.endswith(b"\n") and len(line) == most:
            length = most
            while (piece := source.readline(_PIECE_BYTES)) and not piece.endswith(b"\n"):
                length += len(piece)
            line = refusal(line[:_HEAD_BYTES], length + len(piece), most)
        sink.write(line)
        sink.flush()


def refusal(head: bytes, length: int, most: int) -> bytes:
    asked = _ID.search(head)
    if asked is None:
        return b""  # what it answers is not known: the call runs into its time limit
    error = {"code": -32603, "message": f"the answer has {length} bytes, more than {most}; ask for less"}
    return json.dumps({"jsonrpc": "2.0", "id": json.loads(asked[1]), "error": error}).encode() + b"\n"


def main(most: int, command: list[str]) -> int:
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert server.stdin is not None
    assert server.stdout is not None
    stdin = server.stdin

    def forward() -> None:
        try:
            while line := sys.stdin.buffer.readline():
                stdin.write(line)
                stdin.flush()
            stdin.close()
        except OSError:
            pass  # the server has ended, as the other direction notices

    threading.Thread(target=forward, daemon=True).start()
    try:
        relay(server.stdout, sys.stdout.buffer, most)
    finally:
        server.kill()
    return server.wait()


if __name__ == "__main__":
    # At once: the other thread still reads.
    os._exit(main(int(sys.argv[1]), sys.argv[2:]) & 0xFF)
