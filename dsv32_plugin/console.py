"""What the commands share: how they talk and how they fail."""

from __future__ import annotations

from rich.console import Console

stdout = Console(highlight=False)
stderr = Console(stderr=True, highlight=False)


class CommandError(Exception):
    """A command cannot do what was asked; the message says what to do, and the user sees no traceback."""
