"""Write what a client has asked to tests/clients/recorded, for the replay that needs no client."""

from __future__ import annotations

import json
import re
from pathlib import Path

import answers
import filler
from proxy import Exchange, Proxy

FOLDER = Path(__file__).parents[1] / "recorded"


def record(test: str, proxy: Proxy) -> None:
    """Keep the requests for answers: of each, what it called, or the beginning of what it said."""
    asked = [exchange for exchange in proxy.exchanges if exchange.status == 200 and exchange.answer]
    requests = [_kept(exchange) for exchange in asked if {"messages", "input"} & set(exchange.body)]
    if not requests:
        return
    name = re.sub(r"\W+", "-", test.removeprefix("live_").replace("test_", "").replace("_", "-")).strip("-")
    FOLDER.mkdir(exist_ok=True)
    text = json.dumps(requests, ensure_ascii=False, separators=(",", ":"))
    # A line a request: a change of the client's shows as one of these.
    (FOLDER / f"{name}.json").write_text(text.replace('{"path":', '\n{"path":') + "\n", encoding="utf-8")


def _kept(exchange: Exchange) -> dict[str, object]:
    answer = answers.read(exchange.answer)
    says = answer.text.partition(":")[0]
    return {"path": exchange.path, "calls": answer.calls, "says": says, "body": filler.blank(exchange.body)}
