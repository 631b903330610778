"""What a command that examines has found, as rows of a table or as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from rich.table import Table
from rich.text import Text

from dsv32_plugin.console import stdout

MARKS = {"ok": "[green]✓[/]", "note": "[dim]·[/]", "warning": "[yellow]![/]", "wrong": "[red]✗[/]"}


@dataclass(frozen=True)
class Finding:
    """One row: what was looked at, what was found, how it is, and, where it is not well, what to do."""

    section: str
    name: str
    found: str
    level: str = "note"
    advice: str = ""


def is_well(findings: Sequence[Finding]) -> bool:
    return all(finding.level != "wrong" for finding in findings)


def show(title: str, findings: Sequence[Finding], *, verdict: str, as_json: bool) -> int:
    """Print the findings; returns the exit status of the command, 1 where something is wrong.

    Args:
        title: of the table.
        findings: in the order of their sections.
        verdict: the last line where all is well.
        as_json: print one JSON object instead.
    """
    well = is_well(findings)
    if as_json:
        print(json.dumps({"well": well, "findings": [asdict(finding) for finding in findings]}, indent=2))
        return 0 if well else 1
    table = Table(title=title, title_justify="left", header_style="bold")
    for heading in ("", "what", "found", "remark"):
        table.add_column(heading, overflow="fold")
    section = ""
    for finding in findings:
        if finding.section != section:
            section = finding.section
            table.add_section()
            table.add_row("", Text(section, style="bold"), "", "")
        table.add_row(MARKS[finding.level], Text(finding.name), Text(finding.found), Text(finding.advice))
    stdout.print(table)
    wrong = sum(finding.level == "wrong" for finding in findings)
    stdout.print(verdict if well else f"{wrong} found wrong: see ✗", style="bold", soft_wrap=True, markup=False)
    return 0 if well else 1
