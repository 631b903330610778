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


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(503 if MODE == "never-ready" else 200)
        self.end_headers()

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if os.environ.get("FAKE_VLLM_REQUEST"):
            Path(os.environ["FAKE_VLLM_REQUEST"]).write_text(json.dumps(request))
        if MODE == "refuses":
            self.send_response(400)
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        call = {"index": 0, "id": "1", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}}
        for delta in ({"role": "assistant"}, {"reasoning": "hm"}, {"content": "rain\x1b[31m"}, {"tool_calls": [call]}):
            if MODE != "no-token":
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
        print("INFO dsv32: serving DeepseekV32ForCausalLM with dsv32-plugin 0.1.0; kernels: all=reference", flush=True)
    port = int(sys.argv[sys.argv.index("--port") + 1])
    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    time.sleep(0.2)
    server.serve_forever()


main()
