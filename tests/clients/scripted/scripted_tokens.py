"""From the rules' text to tokens, for either engine's sampler."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import scripted_rules
import torch
from tokenizers import Tokenizer

EOS_ID = 1
logger = logging.getLogger(__name__)


class Writer:
    """Writes scripts with a checkpoint's tokenizer."""

    def __init__(self, model: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        # What ends a value of JSON soonest.
        self._endings = [EOS_ID, *map(self._tokenizer.token_to_id, ["}", "]", '"', ",", ":", "1"])]

    def script(self, prompt: list[int]) -> Script:
        text = self._tokenizer.decode(prompt, skip_special_tokens=False)
        ids = self._tokenizer.encode(scripted_rules.answer(text), add_special_tokens=False).ids
        return Script([*ids, EOS_ID], self._endings)


@dataclass
class Script:
    """The tokens of one answer."""

    ids: list[int]
    endings: list[int]
    left: bool = False
    """A grammar forbade a token: the answer goes on as the grammar wants, and ends as soon as it may."""

    def force(self, logits: torch.Tensor, position: int) -> None:
        """Leave only this position's token in a row of logits, in place."""
        tokens = self.endings if self.left else [self.ids[position]] if position < len(self.ids) else [EOS_ID]
        allowed = [token for token in tokens if logits[token] != -torch.inf]
        if allowed:
            logits.fill_(-torch.inf)
            logits[allowed[0]] = 0
        elif not self.left:
            logger.warning("the script ends at token %d: the grammar forbids %d", position, tokens[0])
            self.left = True
            self.force(logits, position)
