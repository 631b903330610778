"""`dsv32 bench serve` with a server that is none: what is measured, what a record keeps, what is refused."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("httpx")

from dsv32_plugin.benchmarks import records, serve, serve_client
from dsv32_plugin.benchmarks.serve_client import Answer
from dsv32_plugin.tools import serving


class Server:
    """Starts at once. Its log says whose code serves; it may end by itself."""

    url = "http://nowhere"
    lives = math.inf
    """Loads that it outlives."""
    says: str | None = None

    def __init__(self, model: Path, options: list[str], *, log_path: Path, env: dict[str, str]) -> None:
        self.command = ["python", "-m", "server", *options]
        self.env = env

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def wait_until_ready(self, timeout_s: float, on_wait: Any) -> float:
        return 1.5

    def log(self) -> str:
        return "dsv32: serving with these kernels" if self.env["DSV32_PLUGIN"] == "1" else self.says or "nothing"

    def log_tail(self) -> str:
        return "the end of the log"

    def check_running(self) -> None:
        self.lives -= 1
        if self.lives < 0:
            raise serving.ServerError("the server ended")


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[int, ...], ...]]:
    """The prompts of every load; each layer of the model adds 10 ms to the first token and 1 ms to the others."""
    seen: list[tuple[tuple[int, ...], ...]] = []
    layers = 0

    def drive(url: str, model: str, plan: Any, **options: Any) -> tuple[list[Answer], float]:
        seen.append(tuple(request.prompt for request in plan))
        first = 0.1 + 0.01 * layers
        return [Answer(len(r.prompt), 11, first, first + 10 * 0.001 * layers) for r in plan], 2.0

    def write_model(folder: Path, plan: serve.Plan, backend: str, depth: int) -> None:
        nonlocal layers
        layers = depth

    monkeypatch.setattr(serve_client, "drive", drive)
    monkeypatch.setattr(serve, "write_model", write_model)
    monkeypatch.setattr(serve, "check", lambda plan: None)
    monkeypatch.setitem(serving.SERVERS, "vllm", type("Fresh", (Server,), {}))
    return seen


PLAN = serve.Plan(workloads=("chat", "agent"), layers=(2, 4), rates=(0.0, math.inf), requests=3, longest=256)


def loads(record: dict[str, Any]) -> list[tuple[Any, ...]]:
    keys = ("layers", "workload", "load")
    return [(row["side"], *(row["case"][key] for key in keys)) for row in record["rows"]]


def test_a_plan_gives_a_row_for_each_load_and_extends_what_was_alone(
    sent: list[tuple[tuple[int, ...], ...]], tmp_path: Path
) -> None:
    record = serve.run(PLAN, tmp_path / "serve.json")
    assert record == records.read(tmp_path / "serve.json", "serve")
    each = [("chat", "alone"), ("chat", "burst"), ("agent", "alone"), ("agent", "burst")]
    assert loads(record) == [("plugin", layers, *load) for layers in (2, 4) for load in each]
    extended = [row for row in record["rows"] if "extrapolated" in row]
    assert {(row["case"]["layers"], row["case"]["load"]) for row in extended} == {(4, "alone")}
    assert extended[0]["extrapolated"]["ttft_ms"] == pytest.approx(100 + 61 * 10)
    assert extended[0]["extrapolated"]["tpot_ms"] == pytest.approx(61 * 1)
    # Both depths get the same requests; no other load has a prompt that the server has seen.
    half = len(sent) // 2
    assert sent[:half] == sent[half:]
    first_tokens = [load[0][:8] for load in sent[:half]]
    assert len(set(first_tokens)) == half == 6, "two warm-ups and four loads"


def test_servers_together_take_turns(sent: Any, tmp_path: Path) -> None:
    plan = dataclasses.replace(PLAN, backends=("plugin", "dense"), layers=(2,), workloads=("chat",), together=True)
    record = serve.run(plan, tmp_path / "serve.json")
    turns = [("alone", "plugin"), ("alone", "dense"), ("burst", "plugin"), ("burst", "dense")]
    assert [(row["case"]["load"], row["side"]) for row in record["rows"]] == turns
    assert "took turns" in record["method"]


def test_a_record_is_added_to(sent: Any, tmp_path: Path) -> None:
    path = tmp_path / "serve.json"
    small = serve.Plan(workloads=("chat",), rates=(0.0,), requests=3, longest=256)
    serve.run(small, path)
    record = serve.run(dataclasses.replace(small, backends=("dense",)), path)
    assert loads(record) == [("plugin", 2, "chat", "alone"), ("dense", 2, "chat", "alone")]
    serving.SERVERS["vllm"].lives = 0  # type: ignore[attr-defined]
    record = serve.run(small, path)
    assert loads(record) == [("plugin", 2, "chat", "alone"), ("dense", 2, "chat", "alone")]
    assert "error" in record["rows"][0], "what is measured again replaces what was there"
    record = serve.run(dataclasses.replace(small, experts=8), path)
    assert loads(record) == [("plugin", 2, "chat", "alone")], "another model begins a new record"


def test_a_server_that_ends_keeps_what_was_measured(sent: Any, tmp_path: Path) -> None:
    serving.SERVERS["vllm"].lives = 1  # type: ignore[attr-defined]
    rows = serve.run(dataclasses.replace(PLAN, layers=(2,)), tmp_path / "serve.json")["rows"]
    assert ["error" in row for row in rows] == [False, True, True, True]
    assert "the server ended" in rows[-1]["error"]


def test_another_backend_than_asked_for_is_refused(sent: Any, tmp_path: Path) -> None:
    serving.SERVERS["vllm"].says = "dsv32: serving all the same"  # type: ignore[attr-defined]
    rows = serve.run(dataclasses.replace(PLAN, backends=("dense",)), tmp_path / "serve.json")["rows"]
    assert all("another backend serves than dense" in row["error"] for row in rows)
