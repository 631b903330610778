"""`dsv32 bench report`: every measured table and picture of the documentation, from the records in benchmarks/results.

A document has blocks between `<!-- NAME -->` and `<!-- end -->`; only they are written. Records lie in one folder a
GPU, `benchmarks/results/h100/layer.json`, with their pictures beside them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

from dsv32_plugin.benchmarks import compile_matrix, plots, records, views
from dsv32_plugin.benchmarks.records import Record
from dsv32_plugin.benchmarks.views import View
from dsv32_plugin.console import CommandError

DOCUMENTS = ("docs/benchmarks.md", "docs/notes/kernels.md", "docs/parsing.md", "README.md")
NOT_MEASURED = "Not measured yet."
PICTURE_TEXTS = {
    "layer-operations": "One attention layer: where the time goes",
    "layer": "One attention layer: time against context",
    "kernels": "Speed over the best peer, case by case",
    "cost": "Dollars a million tokens against the position",
    "serve-vllm": "vLLM's server: latencies and throughput",
    "serve-sglang": "SGLang's server: latencies and throughput",
    "whole": "All layers: first token and time per token",
}
"""How the name of a picture begins -> what it shows."""


def write(root: Path, *, check: bool) -> list[Path]:
    """Rewrite the documents of the checkout `root`; with `check` only say which are out of date.

    Raises:
        CommandError: a document shows a picture that does not exist.
    """
    stale = []
    for name in DOCUMENTS:
        path = root / name
        if not path.exists():
            continue
        old = path.read_text(encoding="utf-8")
        new = rewritten(old, root / "benchmarks" / "results", path.parent)
        for picture in re.findall(r"!\[[^]]*\]\(([^):]+\.png)\)", new):
            if not (path.parent / picture).exists():
                raise CommandError(f"{name}: {picture} is missing; run `dsv32 bench plot` on its record")
        if new != old:
            stale.append(path)
            if not check:
                path.write_text(new, encoding="utf-8")
    return stale


def rewritten(text: str, results: Path, folder: Path) -> str:
    """`text` with its blocks written anew; pictures are linked as seen from `folder`."""
    for name, render in blocks(results, folder).items():
        if f"<!-- {name} -->" in text:
            block = f"<!-- {name} -->\n{render() or NOT_MEASURED}\n<!-- end -->"
            head, _, rest = text.partition(f"<!-- {name} -->\n")
            text = head + block + rest.partition("<!-- end -->")[2]
    return text


def blocks(results: Path, folder: Path) -> dict[str, Callable[[], str]]:
    """Name of a block -> what stands in it; nothing without a record."""

    def alone(
        kind: str, view: View | None = None, *, pictures: bool = False, sources: bool = True
    ) -> Callable[[], str]:
        """A section for each GPU."""

        def section(path: Path, record: Record) -> str:
            drawn = [link(picture, folder) for picture in plots.paths(record, path)] if pictures else []
            about = [source(record)] if sources else []
            return "\n\n".join([*about, *drawn, views.markdown((view or views.VIEWS[kind])([record]))])

        return lambda: "\n\n".join(section(*found) for found in load(results, kind).items())

    def together(kind: str, view: View) -> Callable[[], str]:
        """The GPUs side by side: where the records are from, the pictures, the tables."""

        def section() -> str:
            found = load(results, kind)
            if not found:
                return ""
            sources = "\\\n".join(source(record) for record in found.values())
            own = [picture for path, record in found.items() for picture in plots.paths(record, path)]
            shared = [results / f"{kind}.png"] if any(map(plots.has_results, found.values())) else []
            drawn = [link(picture, folder) for picture in (*shared, *own)]
            return "\n\n".join([sources, *drawn, views.markdown(view([*found.values()]))])

        return section

    def matrix() -> str:
        path = results / "compile_matrix.json"
        return compile_matrix.markdown(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else ""

    def headline() -> str:
        found = [*load(results, "layer").values()]
        return views.markdown([*views.headline(found), link(results / "layer.png", folder)]) if found else ""

    return {
        "compile matrix": matrix,
        "recall": alone("recall", sources=False),
        "parsers": alone("parsers", sources=False),
        "engine speed": alone("engine", sources=False),
        "speed": alone("kernels"),
        "kernels": together("kernels", views.kernels_summary),
        "layer": together("layer", views.layers),
        "cost": together("cost", views.costs),
        # What few layers are extended to is only worth a look while nothing else is known.
        "serve": alone("serve", views.served if load(results, "whole") else None, pictures=True),
        "whole": alone("whole", pictures=True),
        "repeat": lambda: views.markdown(views.repeats([*load(results, "compare").values()])),
        "headline": headline,
    }


def load(results: Path, kind: str) -> dict[Path, Record]:
    """The records of a kind: one that needs no GPU, then those of each GPU."""
    paths = [*results.glob(f"{kind}.json"), *sorted(results.glob(f"*/{kind}*.json"))]
    return {path: records.read(path, kind) for path in paths}


def draw_all(results: Path) -> list[Path]:
    """The pictures of every record, beside it, and those of several GPUs, beside their folders."""
    found = [picture for path in sorted(results.glob("*/*.json")) for picture in plots.draw(records.read(path), path)]
    for kind in plots.TOGETHER:
        found += plots.draw_together(list(load(results, kind).values()), results / f"{kind}.png")
    return found


def link(picture: Path, folder: Path) -> str:
    place = Path(os.path.relpath(picture, folder)).as_posix()
    text = next((text for name, text in PICTURE_TEXTS.items() if picture.stem.startswith(name)), picture.stem)
    return f"![{text}]({place})"


def source(record: Record) -> str:
    """Where a record comes from, in one line."""
    command = f", `{record['command']}`" if "command" in record else ""
    seconds = f", {record['seconds']} s" if "seconds" in record else ""
    warning = f" **{record['meaningless']}**" if "meaningless" in record else ""
    return f"{record['gpu']}, commit {record['commit']}, {record['date']}{command}{seconds}.{warning}"
