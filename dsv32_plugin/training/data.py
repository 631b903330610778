"""Batches of generated conversations, made ahead in worker processes."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from dsv32_plugin.training import tasks
from dsv32_plugin.training.tokenizer import (
    BOS_ID,
    EOS_ID,
    PAD_ID,
    THINK_END_ID,
    THINK_START_ID,
    USER_ID,
    encode,
)

SINGLE_SHARE = 0.15
"""Of the long lists of codes, how many are followed by one question only, as in the evaluation."""


def row(random: Random, tokens: int, needle_share: float) -> list[int]:
    """`tokens` ids: one conversation about a list of codes, or short ones after each other; then padding."""
    ids: list[int] = []
    if random.random() < needle_share:
        questions = 1 if random.random() < SINGLE_SHARE else None
        ids = encode(tasks.needles_of(random, tokens, questions).text())
    misses = 0
    while misses < 3:
        more = encode(tasks.chat(random).text())
        if len(ids) + len(more) > tokens:
            misses += 1
        else:
            ids += more
    return ids[:tokens] + [PAD_ID] * (tokens - len(ids))


def answer_mask(tokens_bt: torch.Tensor) -> torch.Tensor:
    """[B, T] bool: the tokens that the assistant says, its EOS included; False at prompts and padding.

    An answer begins after a think mark and ends with EOS; a mark inside it (the end of its reasoning) changes nothing,
    and neither do those in the tools block, which precedes the first user.
    """
    position = torch.arange(tokens_bt.shape[1], device=tokens_bt.device).expand_as(tokens_bt)

    def last(marks_bt: torch.Tensor) -> torch.Tensor:
        return torch.where(marks_bt, position, -1).cummax(1).values

    asked = last(tokens_bt == USER_ID) > last(tokens_bt == BOS_ID)
    opens = asked & ((tokens_bt == THINK_START_ID) | (tokens_bt == THINK_END_ID))
    last_mark = last(opens | (tokens_bt == EOS_ID))
    before = torch.cat((last_mark.new_full((len(tokens_bt), 1), -1), last_mark[:, :-1]), 1)
    return (before >= 0) & opens.gather(1, before.clamp(min=0))


class Rows(IterableDataset):
    """Endless batches [B, length], from number `first` on; each is seeded by its number, so a run can be repeated."""

    def __init__(self, seed: int | str, batch: int, length: int, needle_share: float, first: int = 0) -> None:
        self.seed, self.batch, self.length, self.needle_share, self.first = seed, batch, length, needle_share, first

    def __iter__(self) -> Iterator[torch.Tensor]:
        info = get_worker_info()
        number, step = (info.id, info.num_workers) if info else (0, 1)
        number += self.first
        while True:
            random = Random(f"{self.seed}/{self.length}/{number}")
            yield torch.tensor([row(random, self.length, self.needle_share) for _ in range(self.batch)])
            number += step


def batches(rows: Rows, workers: int) -> Iterator[torch.Tensor]:
    """The same batches in the same order whatever the number of workers."""
    loader = DataLoader(rows, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None)
    return iter(loader)
