"""The documentation is short, and what it points to is there."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TRACKED = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
FILES = [ROOT / name for name in TRACKED.split("\0") if name and (ROOT / name).is_file()]
PAGES = [path for path in FILES if path.suffix == ".md"]
COUNTED = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
"""Not docs/notes, which is for maintainers."""
TEXTS = [path for path in FILES if path.suffix in {".py", ".md", ".toml", ".sh", ".txt"} or path.name == "Makefile"]
MOST_WORDS = 8500

_FENCED = re.compile(r"^(```|~~~).*?^\1[ \t]*$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
_NAMED = re.compile(r"\b(?:README|CONTRIBUTING|CHANGELOG|docs/[\w/.-]+)\.md(?:#[\w-]+)?")


def prose(text: str) -> str:
    """What remains without code blocks, tables and the marks of generated blocks."""
    lines = _FENCED.sub("", text).splitlines()
    return "\n".join(line for line in lines if not line.lstrip().startswith(("|", "<!--")))


def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", _FENCED.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def missing(target: str, folder: Path) -> str | None:
    """Why a link seen from `folder` leads nowhere, or None."""
    name, _, anchor = target.partition("#")
    path = folder / name if name else None
    if path is not None and not path.exists():
        return f"{target}: no such file"
    if anchor and path is not None and anchor not in anchors(path.read_text(encoding="utf-8")):
        return f"{target}: no such heading"
    return None


def test_the_words_are_few() -> None:
    words = {path.name: len(prose(path.read_text(encoding="utf-8")).split()) for path in COUNTED}
    assert sum(words.values()) <= MOST_WORDS, words


def test_prose_leaves_out_tables_and_code() -> None:
    text = "One two.\n\n| a | b |\n|---|---|\n\n```bash\nthree\n```\n\n<!-- kernels -->\nfour\n<!-- end -->\n"
    assert prose(text).split() == ["One", "two.", "four"]


def test_a_broken_link_is_found() -> None:
    assert missing("README.md", ROOT) is None
    assert missing("no-such-page.md", ROOT) is not None
    assert missing("README.md#no-such-heading", ROOT) is not None


@pytest.mark.parametrize("page", PAGES, ids=[str(path.relative_to(ROOT)) for path in PAGES])
def test_every_link_and_anchor_resolves(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    found = [one or other for one, other in _LINK.findall(_FENCED.sub("", text))]
    targets = [target if not target.startswith("#") else page.name + target for target in found if "://" not in target]
    assert [why for target in targets if (why := missing(target, page.parent))] == []


def test_every_page_that_a_file_names_is_there() -> None:
    """In code, messages, tests and the changelog; the paths are those of the checkout."""
    wrong = []
    for path in TEXTS:
        if path == Path(__file__):
            continue
        # A link is seen from its page, and is another test's.
        text = _LINK.sub("", path.read_text(encoding="utf-8"))
        wrong += [f"{path.relative_to(ROOT)}: {why}" for name in _NAMED.findall(text) if (why := missing(name, ROOT))]
    assert wrong == []
