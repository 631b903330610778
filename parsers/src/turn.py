"""What the machines of the parser share: what the model has said in its turn, and whether the turn is over."""

from .events import Event, Note
from .protocol import ASSISTANT, BOS, EOS, PAD, USER

LEAKED = (BOS, PAD)
"""Tokens that say nothing in an answer."""
NEXT_TURN = (USER, ASSISTANT)
"""Tokens that open another turn: the model is past its answer."""


def special_tokens(repair: bool) -> tuple[str, ...]:
    """Those that mean something wherever no value stands."""
    return (EOS, *LEAKED, *NEXT_TURN) if repair else (EOS,)


class Turn:
    """One turn of the model, as far as it was read.

    Attributes:
        events: what it says, not yet handed out.
        notes: the departures seen.
        offset: index in the output of the first character of the text that is read.
        position: index in the output of the markup that notes are about.
        waiting: what follows decides how to read on.
        ended: the model ended the turn itself.
        over: the model went on with another turn: nothing that follows counts.
        after_eos: EOS came, so that there should be no more text.
    """

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.notes: list[Note] = []
        self.offset = 0
        self.position = 0
        self.waiting = False
        self.ended = False
        self.over = False
        self.after_eos = False

    def wait(self, i: int) -> int:
        """Ask for more text, to read on from `i`."""
        self.waiting = True
        return i

    def note(self, code: str, detail: str = "") -> None:
        self.notes.append(Note(code, self.position, detail))
