"""Whether the installed engine answers right through the plugin: `python -m dsv32_plugin.tools.parity vllm`.

It serves the trained tiny model and asks twice. A continuation must have the log-probabilities of Hugging Face's model
(`greedy.json` beside the checkpoint), which every mistake changes; a chat with tools must become the call that the
model was trained to make. Exit status 0 means that both were right.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import httpx

from dsv32_plugin.engines import ENGINES
from dsv32_plugin.tools import demo, serving
from dsv32_plugin.training import tasks

EXPECTED = "greedy.json"
"""A prompt in token ids, and the log-probabilities of its greedy continuation."""
TOLERANCE = 1e-3
"""Of log-probabilities in float32, whose sums have other orders; the parity tests of the engines have the same."""
ANSWER_SECONDS = 300


def wrong(engine: str, log_path: Path) -> list[str]:
    """What the engine answers otherwise than it should; raises ServerError where it does not serve at all."""
    given = [*demo.COMMON_OPTIONS, *ENGINES[engine].demo_options]
    with (
        serving.stopping_on_sigterm(),
        serving.SERVERS[engine](demo.TRAINED, given, log_path=log_path, env=demo.ENVIRONMENT) as server,
    ):
        server.wait_until_ready(demo.START_SECONDS)
        try:
            found = [*_continuation(server.url), *_call(server.url)]
        except (httpx.HTTPError, LookupError, TypeError, ValueError) as error:
            server.check_running()
            found = [f"{type(error).__name__}: {error}"]
        return found if "dsv32: serving" in server.log() else ["it was not served by the plugin", *found]


def _continuation(url: str) -> list[str]:
    expected = json.loads((demo.TRAINED / EXPECTED).read_text(encoding="utf-8"))
    steps = len(expected["logprobs"])
    choice = _ask(f"{url}/v1/completions", prompt=expected["prompt"], max_tokens=steps, logprobs=1, ignore_eos=True)
    found = choice["logprobs"]["token_logprobs"]
    if len(found) == steps and all(abs(a - b) < TOLERANCE for a, b in zip(found, expected["logprobs"], strict=True)):
        return []
    return [f"expected log-probabilities {_shown(expected['logprobs'])}, got {_shown(found)}"]


def _call(url: str) -> list[str]:
    choice = _ask(
        f"{url}/v1/chat/completions",
        messages=[tasks.user(demo.WEATHER_QUESTION)],
        tools=[definition for definition, _ in tasks.TOOLS],
        chat_template_kwargs={"thinking": True},
        max_tokens=160,
    )
    calls = choice["message"].get("tool_calls") or []
    found = [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls]
    expected = [("get_weather", demo.WEATHER_ARGUMENTS)]
    return [] if found == expected else [f"expected the call {expected}, got {found or choice['message']}"]


def _ask(url: str, **request: Any) -> dict[str, Any]:
    response = httpx.post(url, json={"model": demo.NAME, "temperature": 0.0, **request}, timeout=ANSWER_SECONDS)
    if response.status_code != httpx.codes.OK:
        raise ValueError(f"status {response.status_code}: {response.text}")
    choice: dict[str, Any] = response.json()["choices"][0]
    return choice


def _shown(logprobs: list[float]) -> str:
    return " ".join(f"{value:.3f}" for value in logprobs)


def main(engine: str) -> int:
    folder = Path(tempfile.mkdtemp(prefix="dsv32-"))
    try:
        found = wrong(engine, folder / "server.log")
    except serving.ServerError as error:
        found = [str(error)]
    if not found:
        shutil.rmtree(folder)
        return 0
    # The reason of a failed start is seldom among the last lines.
    print("\n".join([*found, f"the server's whole log is {folder / 'server.log'}"]))
    return 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
