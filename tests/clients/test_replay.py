"""A loop of each client, as it was recorded, against the real server of the installed engine.

The model keeps to the marks in the requests (scripted/scripted_rules.py): it makes the calls, and repeats the result.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import answers
import filler
import httpx
import pytest
import serve
from engines import installed

from dsv32_plugin.tools import tiny

installed()  # or skip


def _replayed(path: Path) -> bool:
    """Loops, and those whose answer has a schema; test_recordings.py has the others."""
    return "with-tools" in path.stem or ("-loop" in path.stem and "parallel" not in path.stem)


RECORDED = [path for path in sorted((Path(__file__).parent / "recorded").glob("*.json")) if _replayed(path)]

# Of a text in a request, in characters: an agent's instructions have 10,000 and more, which only take time.
LONGEST = 200

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("replay")
    tiny.write(serve.SPEC, folder / "model")
    with serve.scripted_server(folder / "model", folder / "server.log") as server:
        yield server.url
        server.check_running()


@pytest.fixture(scope="module")
def answered(url: str) -> dict[Path, list[httpx.Response]]:
    """The answers to the requests of each recording; the recordings run beside each other, as clients do."""
    with ThreadPoolExecutor(8) as pool:
        return dict(zip(RECORDED, pool.map(lambda path: replay(url, path), RECORDED), strict=True))


def replay(url: str, path: Path) -> list[httpx.Response]:
    return [
        httpx.post(f"{url}{request['path']}", json=filler.fill(request["body"], LONGEST), timeout=400)
        for request in recorded(path)
    ]


def recorded(path: Path) -> list[dict[str, Any]]:
    """The request that is answered with a call, and the one after it, with its result."""
    requests = json.loads(path.read_text(encoding="utf-8"))
    first = next(place for place, request in enumerate(requests) if request["calls"])
    return requests[first : first + 2]


@pytest.mark.parametrize("path", RECORDED, ids=[path.stem for path in RECORDED])
def test_a_recorded_loop_is_answered(answered: dict[Path, list[httpx.Response]], path: Path) -> None:
    for request, response in zip(recorded(path), answered[path], strict=True):
        assert response.status_code == httpx.codes.OK, response.text
        answer = answers.read(response.text)
        assert answer.calls == request["calls"]
        assert answer.text.startswith(request["says"])
