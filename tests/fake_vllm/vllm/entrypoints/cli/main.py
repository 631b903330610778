"""A stand-in for `vllm serve`: the routes that the demo uses, a child process, and ways to go wrong (FAKE_VLLM)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

MODE = os.environ.get("FAKE_VLLM", "")


def answer(request: dict[str, Any]) -> list[dict[str, Any]]:
    """The trained model's answers, in pieces; or nonsense."""
    last = request["messages"][-1]
    if MODE == "nonsense":
        return [{"role": "assistant"}, {"content": "rain\x1b[31m"}]
    if last["role"] == "tool":
        return [{"reasoning": "hm"}, {"content": "In Hangzhou: rain, "}, {"content": "17 degrees."}]
    if not request.get("tools"):
        lines = last["content"].splitlines()
        return [{"content": line} for line in lines if line.startswith(lines[-1].removesuffix("?") + "=")]
    start = {"index": 0, "id": "1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": '}}
    return [
        {"role": "assistant"},
        {"reasoning": "hm"},
        {"tool_calls": [start]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '"Hangzhou", "days": 3}'}}]},
    ]


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(503 if MODE == "never-ready" else 200)
        self.end_headers()

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if os.environ.get("FAKE_VLLM_REQUESTS"):
            with Path(os.environ["FAKE_VLLM_REQUESTS"]).open("a") as file:
                file.write(json.dumps(request) + "\n")
        if MODE == "refuses":
            self.send_response(400)
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for delta in [] if MODE == "no-token" else answer(request):
            self.send(choices=[{"index": 0, "delta": delta}])
        self.send(choices=[], usage={"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8})
        self.wfile.write(b"data: [DONE]\n\n")

    def send(self, **content: Any) -> None:
        chunk = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "m", **content}
        self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())


def main() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    if os.environ.get("FAKE_VLLM_PIDS"):
        Path(os.environ["FAKE_VLLM_PIDS"]).write_text(f"{os.getpid()} {child.pid}")
    if MODE == "dies":
        print("RuntimeError: Device string must not be empty")
        sys.exit(3)
    if MODE == "ignores-sigterm":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if MODE != "in-tree":
        print("INFO dsv32: serving DeepseekV32ForCausalLM with dsv32-plugin 0.2.0; kernels: all=reference", flush=True)
    port = int(sys.argv[sys.argv.index("--port") + 1])
    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    time.sleep(0.2)
    server.serve_forever()


main()
