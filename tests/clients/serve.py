"""Run a command in front of the real server of the installed engine, with the scripted model behind it.

    .venv/bin/python tests/clients/serve.py COMMAND...

The command finds the server's address in CLIENTS_URL.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from dsv32_plugin.tools import tiny
from dsv32_plugin.tools.serving import Server, SglangServer, VllmServer, stopping_on_sigterm
from dsv32_plugin.tools.tiny import TinySpec

SCRIPTED = Path(__file__).parent / "scripted"
# The prompt of an agent is 10,000 tokens and more.
CONTEXT = 49152
SPEC = TinySpec(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    q_lora_rank=64,
    index_n_heads=2,
    n_routed_experts=4,
    n_group=1,
    topk_group=1,
    rope_original=CONTEXT // 40 + 1,
)
"""The real vocabulary and tiny widths: a prompt of 10,000 tokens takes seconds on a CPU."""
PARSERS = ("--tool-call-parser", "dsv32", "--reasoning-parser", "dsv32", "--served-model-name", "tiny")
ENGINES: dict[str, tuple[type[Server], tuple[str, ...]]] = {
    "vllm": (
        VllmServer,
        (
            *PARSERS,
            "--enable-auto-tool-choice",
            *("--dtype", "float32"),
            *("--max-model-len", str(CONTEXT)),
            *("--max-num-batched-tokens", "2048"),
            *("--max-num-seqs", "16"),
            *("--kv-cache-memory-bytes", str(1 << 29)),
        ),
    ),
    "sglang": (
        SglangServer,
        (
            *PARSERS,
            "--enable-custom-logit-processor",
            *("--dtype", "float32"),
            *("--context-length", str(CONTEXT)),
            *("--chunked-prefill-size", "2048"),
            *("--max-running-requests", "16"),
            *("--max-total-tokens", str(2 * CONTEXT)),
            "--skip-server-warmup",
            "--sleep-on-idle",
        ),
    ),
}


def installed() -> str:
    """The name of the engine in this environment."""
    return next(name for name in ENGINES if find_spec(name) is not None)


@contextmanager
def scripted_server(model: Path, log_path: Path, *options: str) -> Iterator[Server]:
    """The server of the installed engine, ready, whose model keeps to `scripted_rules`."""
    server, own_options = ENGINES[installed()]
    # The entry points lie apart: no other process may find them.
    paths = [str(SCRIPTED), str(SCRIPTED / "installed"), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {"PYTHONPATH": os.pathsep.join(paths), "VLLM_ENABLE_RESPONSES_API_STORE": "1"}
    with server(model, [*own_options, *options], log_path=log_path, env=env) as running:
        running.wait_until_ready(600)
        yield running


def main(command: list[str]) -> int:
    log_path = Path(os.environ.get("CLIENTS_LOG", "build/clients-server.log"))
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with stopping_on_sigterm(), tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "tiny"
        tiny.write(SPEC, model)
        with scripted_server(model, log_path) as server:
            env = {**os.environ, "CLIENTS_URL": server.url}
            return subprocess.run(command, env=env).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
