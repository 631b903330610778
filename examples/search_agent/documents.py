"""Tools over the text files of a folder: full-text search by SQLite's FTS5, and reading on from a place."""

from __future__ import annotations

import re
import sqlite3
import time
from pathlib import Path
from threading import Lock

from toolbox import Tool, parameters

KINDS = {".txt", ".md", ".rst", ".html", ".csv", ".json", ".py"}
PASSAGE_CHARS = 1200
PAGE_CHARS = 6000
LARGEST_FILE = 16 << 20
SECONDS = 5.0
"""Of a query: a longer one is broken off."""


class Documents:
    """The files of a folder, cut into passages."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()
        # Every trajectory asks from threads of its own, one at a time.
        self._lock = Lock()
        self._index = sqlite3.connect(":memory:", check_same_thread=False)
        self._index.execute("CREATE VIRTUAL TABLE passages USING fts5(path, start UNINDEXED, text)")
        self.files = 0
        for path in sorted(self._folder.rglob("*")):
            if path.suffix in KINDS and path.is_file() and path.stat().st_size <= LARGEST_FILE:
                self._add(path)
        if not self.files:
            raise SystemExit(f"{folder}: expected text files ({', '.join(sorted(KINDS))}), found none")

    def tools(self) -> list[Tool]:
        return [
            Tool(
                "search",
                "Search the documents. Returns the ten best passages, each with its file and its place in it.",
                parameters(query="Words to look for."),
                self.search,
            ),
            Tool(
                "read",
                f"Read {PAGE_CHARS} characters of a file, from a place in it.",
                {
                    "type": "object",
                    "properties": {"path": {"type": "string"}, "start": {"type": "integer", "minimum": 0}},
                    "required": ["path"],
                },
                self.read,
            ),
        ]

    def search(self, query: str) -> str:
        words = re.findall(r"\w+", query)
        if not words:
            return "error: the query has no words"
        asked = " OR ".join(f'"{word}"' for word in words)
        with self._lock:
            deadline = time.monotonic() + SECONDS
            self._index.set_progress_handler(lambda: time.monotonic() > deadline, 10_000)
            rows = self._index.execute(
                "SELECT path, start, text FROM passages WHERE passages MATCH ? ORDER BY rank LIMIT 10", (asked,)
            ).fetchall()
        return "\n\n".join(f"{path} from {start}:\n{text}" for path, start, text in rows) or "nothing found"

    def read(self, path: str, start: int = 0) -> str:
        whole = (self._folder / path).resolve()
        if not whole.is_relative_to(self._folder) or whole.suffix not in KINDS or not whole.is_file():
            return f"error: there is no document {path!r}"
        text = whole.read_text(encoding="utf-8", errors="replace")
        page = text[start : start + PAGE_CHARS]
        left = len(text) - start - len(page)
        return page + (f"\n[{left} characters follow, from {start + len(page)}]" if left > 0 else "")

    def _add(self, path: Path) -> None:
        text = path.read_text(encoding="utf-8", errors="replace")
        name = str(path.relative_to(self._folder))
        pieces = [(name, i, text[i : i + PASSAGE_CHARS]) for i in range(0, len(text), PASSAGE_CHARS)]
        self._index.executemany("INSERT INTO passages VALUES (?, ?, ?)", pieces)
        self.files += 1
