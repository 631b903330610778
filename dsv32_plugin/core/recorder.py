"""What the layers of a model select in a step, kept for who asks for it afterwards."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class Recorder:
    """The slots that layers select for the tokens of the step that runs.

    It copies into one tensor and waits for nothing, so that a graph holds it. In steps that do not select, where no
    token sees more keys than it may select, nothing is written.
    """

    def __init__(self, layers: Sequence[int], topk: int, max_tokens: int, device: torch.device) -> None:
        """`layers`: those that select."""
        self.layers = tuple(layers)
        self._number = {layer: number for number, layer in enumerate(layers)}
        self.slots_tlk = torch.full((max_tokens, len(layers), topk), -1, dtype=torch.int32, device=device)

    def record(self, layer: int, slots_tk: torch.Tensor) -> None:
        """Keep what a layer has selected, [T, K] int32: slots in ascending position, then -1."""
        self.slots_tlk[: len(slots_tk), self._number[layer]] = slots_tk
