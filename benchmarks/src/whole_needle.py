"""The trained tiny model behind the options of a real launch: only right answers show that ranks compute together."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from random import Random

from dsv32_plugin.benchmarks import serve
from dsv32_plugin.benchmarks.serve import MODEL
from dsv32_plugin.tools import demo, serving
from dsv32_plugin.training import tasks

CONTEXT = 8192
TOKENS = 1000
"""Of a question; the model selects 64 of them."""


def ask(engine: str, side: str, options: list[str], ranks: int, start_s: float) -> int:
    """How many questions were right, two for each rank: all. Raises ServerError with what went wrong."""
    import httpx

    from dsv32_plugin.training import tokenizer

    with tempfile.TemporaryDirectory(prefix="dsv32-needle-") as folder:
        model = Path(folder, "model")
        widened(demo.TRAINED, model, ranks)
        switch = {"DSV32_PLUGIN": str(int(side == "plugin"))}
        server = serving.SERVERS[engine](
            model, options, log_path=Path(folder, "server.log"), env={**serve.ENVIRONMENT, **switch}
        )
        with server, httpx.Client(base_url=server.url, timeout=300) as client:
            server.wait_until_ready(start_s)
            serve.served_by(server, engine, side)
            for number in range(2 * ranks):
                question, answer = tasks.needles_of(Random(number), TOKENS, 1, thinking=0).cut(0)
                expected = answer.partition("<")[0]
                body = {"model": MODEL, "prompt": tokenizer.encode(question), "max_tokens": 16, "temperature": 0}
                try:
                    got = client.post("/v1/completions", json=body).raise_for_status().json()["choices"][0]["text"]
                except (httpx.HTTPError, ValueError, LookupError) as error:
                    server.check_running()
                    raise serving.ServerError(f"no answer: {error!r}\n{server.log_tail()}") from error
                if got.strip() != expected:
                    raise serving.ServerError(f"expected {expected}, got {got!r} to question {number}")
    return 2 * ranks


def widened(source: Path, out: Path, ranks: int) -> None:
    """The same model with each head as often as so many ranks need, its output as much smaller."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, out)
    config = json.loads((source / "config.json").read_text())
    heads = config["num_attention_heads"]
    times = -(-ranks // heads)
    if times == 1:
        return
    config |= {"num_attention_heads": times * heads, "num_key_value_heads": times * heads}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for path in out.glob("*.safetensors"):
        tensors = load_file(path)
        for name, weight in tensors.items():
            if name.endswith((".self_attn.q_b_proj.weight", ".self_attn.kv_b_proj.weight")):
                tensors[name] = weight.repeat(times, 1)
            elif name.endswith(".self_attn.o_proj.weight"):
                tensors[name] = weight.repeat(1, times) / times
        save_file(tensors, path, metadata={"format": "pt"})
