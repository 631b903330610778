"""The open-loop client against a small server of its own: what it sends, when, and what it makes of the answers."""

from __future__ import annotations

import itertools
import json
import math
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

pytest.importorskip("httpx")

from dsv32_plugin.benchmarks import serve, serve_client
from dsv32_plugin.benchmarks.serve_client import WORKLOADS, Request, Workload

FIRST_S, GAP_S = 0.5, 0.05


class Handler(BaseHTTPRequestHandler):
    """Answers a streamed completion: the first token after FIRST_S, the others GAP_S apart."""

    seen: list[tuple[float, dict[str, Any]]]
    status = 200
    missing_tokens = 0

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append((time.perf_counter(), body))
        self.send_response(self.status)
        self.end_headers()
        if self.status != 200:
            self.wfile.write(b"too many")
            return
        count = body["max_tokens"] - self.missing_tokens
        for i in range(count):
            time.sleep(GAP_S if i else FIRST_S)
            self._event({"choices": [{"text": "a"}]})
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": count}
        self._event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, content: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(content)}\n\n".encode())
        self.wfile.flush()

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[tuple[str, type[Handler]]]:
    handler = type("Fresh", (Handler,), {"seen": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}", handler
        running.shutdown()


def test_requests_leave_at_their_times_whatever_the_server_does(server: tuple[str, type[Handler]]) -> None:
    url, handler = server
    plan = [Request(at_s, (7, 8, 9), 3) for at_s in (0.0, 0.1, 0.2)]
    answers, seconds = serve_client.drive(url, "m", plan, timeout_s=30)
    sent = [at for at, _ in handler.seen]
    # An answer takes 0.6 s: a closed loop would send the third request after 1.2.
    assert sent[2] - sent[0] < 0.6
    assert all(answer.error == "" and answer.tokens == answer.prompt_tokens == 3 for answer in answers)
    assert all(answer.first_s >= FIRST_S for answer in answers)
    figures = serve_client.summary(answers, seconds)
    assert figures["completed"] == 3
    median = {name: figure["median"] for name, figure in figures["figures"].items()}
    assert median["ttft_ms"] >= 1e3 * FIRST_S
    assert median["tpot_ms"] >= 1e3 * GAP_S * 0.9
    assert median["output_tokens_per_s"] == median["input_tokens_per_s"] == pytest.approx(9 / seconds, abs=0.1)
    assert median["tokens_per_s"] == pytest.approx(18 / seconds, abs=0.1)
    body = handler.seen[0][1]
    assert (body["prompt"], body["max_tokens"], body["ignore_eos"]) == ([7, 8, 9], 3, True)


def test_alone_waits_for_each_answer(server: tuple[str, type[Handler]]) -> None:
    url, handler = server
    plan = serve_client.requests(Workload("short", (4, 0.1, 8), (3, 0.1, 3)), 3, 0.0, "0", longest=100)
    serve_client.drive(url, "m", plan, timeout_s=30, alone=True)
    gaps = [after - before for (before, _), (after, _) in itertools.pairwise(handler.seen)]
    assert len(gaps) == 2
    assert min(gaps) >= FIRST_S + GAP_S


def test_a_burst_sends_all_at_once() -> None:
    assert {request.at_s for request in serve_client.requests(WORKLOADS["chat"], 9, math.inf, "0", longest=9999)} == {0}


def test_a_refusal_is_counted_and_named(server: tuple[str, type[Handler]]) -> None:
    url, handler = server
    handler.status = 503
    figures = serve_client.summary(*serve_client.drive(url, "m", [Request(0.0, (7,), 3)], timeout_s=30))
    assert figures["completed"] == 0
    assert "503" in figures["error"]


def test_a_short_answer_is_an_error(server: tuple[str, type[Handler]]) -> None:
    url, handler = server
    handler.missing_tokens = 1
    (answer,), _ = serve_client.drive(url, "m", [Request(0.0, (7,), 3)], timeout_s=30)
    assert answer.error == "2 tokens where 3 were asked for"


def test_no_server_is_an_error() -> None:
    (answer,), _ = serve_client.drive("http://127.0.0.1:9", "m", [Request(0.0, (7,), 3)], timeout_s=5)
    assert "ConnectError" in answer.error


@pytest.mark.parametrize("name", WORKLOADS)
def test_the_same_seed_gives_the_same_load(name: str) -> None:
    one, two, other = (
        serve_client.requests(WORKLOADS[name], 20, 2.0, seed, longest=131072) for seed in ("1", "1", "2")
    )  # fmt: skip
    assert one == two != other
    assert all(len(request.prompt) + request.answer_tokens <= 131072 for request in one)


def test_arrivals_are_poisson() -> None:
    plan = serve_client.requests(Workload("short", (4, 0.1, 8), (4, 0.1, 8)), 4000, 5.0, "0", longest=100)
    gaps = [b.at_s - a.at_s for a, b in itertools.pairwise(plan)]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert mean == pytest.approx(1 / 5.0, rel=0.05)
    assert variance == pytest.approx(mean**2, rel=0.15)


def test_agents_share_a_prefix_and_long_prompts_shrink() -> None:
    plan = serve_client.requests(WORKLOADS["agent"], 8, 2.0, "0", longest=4160)
    shared = int(4096 * 4160 / (65536 + 1024))
    assert len({request.prompt[:shared] for request in plan}) == 1
    assert len({request.prompt[: shared + 1] for request in plan}) > 1
    assert all(len(request.prompt) + request.answer_tokens <= 4160 for request in plan)


def test_two_depths_extend_to_the_whole_model_with_the_method() -> None:
    def row(layers: int, first: float, token: float) -> dict[str, Any]:
        case = {"engine": "vllm", "workload": "chat", "load": "alone", "layers": layers}
        token_ms = {"median": token, "low": token - 0.1, "high": token + 0.2}
        return {"case": case, "side": "plugin", "figures": {"ttft_ms": {"median": first}, "tpot_ms": token_ms}}

    queued = [row(layers, 20.0 * layers, 4.0) for layers in (2, 3)]
    for each in queued:
        each["case"]["load"] = "2/s"
    rows = [row(2, 20.0, 4.0), row(3, 25.0, 5.0), {**row(3, 1.0, 1.0), "side": "dense"}, *queued]
    serve.extrapolate(rows)
    assert [i for i, found in enumerate(rows) if "extrapolated" in found] == [1]
    found = rows[1]["extrapolated"]
    assert (found["layers"], found["ttft_ms"], found["tpot_ms"]) == (61, 25 + 58 * 5, 5 + 58 * 1)
    assert found["tpot_ms_range"] == pytest.approx([4.9 + 58 * (4.9 - 4.2), 5.2 + 58 * (5.2 - 3.9)])
    assert "2 and 3 layers" in found["method"]
