"""DeepSeek's published test cases of its encoding, which are not part of this repository."""

import json
import os
from pathlib import Path
from typing import Any

import pytest


def find_goldens() -> Path | None:
    """`$DSV32_GOLDENS`, or `shared/goldens` beside the repository or above it."""
    if "DSV32_GOLDENS" in os.environ:
        return Path(os.environ["DSV32_GOLDENS"])
    for folder in Path(__file__).resolve().parents:
        if (folder / "shared" / "goldens" / "test_input.json").is_file():
            return folder / "shared" / "goldens"
    return None


GOLDENS = find_goldens()


def read_golden(name: str) -> tuple[list[dict[str, Any]], Any, str]:
    if GOLDENS is None:
        pytest.skip("DeepSeek's test cases not found: put them in ../shared/goldens or set DSV32_GOLDENS")
    data = json.loads((GOLDENS / f"test_input{name}.json").read_text(encoding="utf-8"))
    prompt = (GOLDENS / f"test_output{name}.txt").read_text(encoding="utf-8").strip()
    return data["messages"], data.get("tools"), prompt
