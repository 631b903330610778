"""What every client is asked to do, and how it is watched. `make test-clients` runs these tests; see serve.py."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import recording
from proxy import Proxy


@dataclass
class Tools:
    """The tools that the client runs, and what came in."""

    added: list[tuple[int, int]] = field(default_factory=list)
    noted: list[str] = field(default_factory=list)

    def add(self, a: int, b: int) -> str:
        """The sum of two integers."""
        self.added.append((a, b))
        return f"The sum is {a + b}."

    def note(self, text: str) -> str:
        """Keep a text."""
        self.noted.append(text)
        return "Kept."


@pytest.fixture
def proxy(request: pytest.FixtureRequest) -> Iterator[Proxy]:
    """In front of the server; with CLIENTS_RECORD set, what passed a test marked `recorded` is written down."""
    failed = request.session.testsfailed
    with Proxy(os.environ["CLIENTS_URL"]) as proxy:
        yield proxy
    # A whole answer's request has nothing that a streamed one's has not.
    marked = request.node.get_closest_marker("recorded") and "whole" not in request.node.name
    if marked and os.environ.get("CLIENTS_RECORD") and request.session.testsfailed == failed:
        recording.record(f"{request.path.stem}-{request.node.name}", proxy)


@pytest.fixture
def tools() -> Tools:
    return Tools()
