"""Which way a step is attended to: decided once a step, for all layers of a model."""

from __future__ import annotations

import torch

from dsv32_plugin.core.plans import Dense, Expanded, Masked, Parts, Plan, Sparse, Staged
from dsv32_plugin.core.policy import Policy
from dsv32_plugin.core.step import MAX_GATHERED_KEYS, PrefillChunk, Step, parts_of
from dsv32_plugin.kernels.limits import mask_words
from dsv32_plugin.kernels.runtime.dispatch import implementation_for

MAX_EXPANDED_KEYS = 4096
"""Latents of a chunk of which every key is selected."""

EXPANDED_PAIRS = 1 << 27
"""Pairs of a query and a key, over all heads, from which on latents are expanded. H100, us with what launching takes,
latents against expanded: 128 heads, T = L: 512 844 1276, 1024 1308 1207, 2048 2359 1516; L = 2048: T = 256 910 1027,
T = 512 1246 1134; 16 heads, L = 2048: T = 2048 974 1044, four of them 2463 1234."""


LEAST_STAGED_TOKENS = 256
"""Prefill tokens from which on a copy of the latents may pay; then a program attends to all keys of its token."""

STAGED_KEYS = 4
"""Keys for each head of each prefill token up to which a copy of the latents pays. H200, attention over fp8 against
the copy and attention over bfloat16, T = 256, 1024, 4096: 16 heads, L = 32K 1.05 1.25 1.30 times as fast, L = 128K 0.65
1.02 1.19; 32 heads, L = 128K 0.94 1.29 1.42; 128 heads, L = 8K 1.23 1.24 1.25, L = 128K 1.14 1.37 1.45. By the kernels
of every GPU, T = 1024, L = 32K: 16 heads 2.08, 128 heads 3.70."""


EXPAND_US, EXPAND_HEAD_US = 20.0, 6.6e-4
"""To expand any latents, and to expand one to a head."""

PAIR_US, KEY_US = 1.11e-6, 0.0188
"""Attention of a head's query to a key that it sees: while all multiprocessors are busy, and in one program."""

FEW_HEADS = 16
SLOT_US, SLOT_BLOCK_US = 1.6e-4, 2.8e-4
"""Attention of a token to a selected latent: of up to FEW_HEADS, and of each block of up to 64."""


def masked_pays(heads: int, tokens: int, keys: int, seen: int, selected: int) -> bool:
    """Whether attention under a mask to all keys that tokens see is faster than to the latents of those selected.

    H200, attention with what is expanded or absorbed, us, over selected latents and under a mask:

        heads  T, L and both times
        8      3072 3K 677 109; 4096 6K 1291 270, 12K 1288 460, 24K 1346 941, 32K 1587 1311, 48K 1432 2036
               512 12K 173 290; 256 8K 89 195
        16     3072 3K 691 170; 4096 6K 1308 395, 12K 1294 847, 24K 1485 1833; 1024 16K 345 475; 256 4K 90 127
        64     3072 3K 1177 530; 4096 6K 2375 1456, 8K 2136 2128; 512 8K 293 622
        128    4096 4K 3602 1628, 8K 4698 4078; 512 4K 568 589

    Args:
        seen: keys that the tokens see, summed over the tokens.
        selected: of these those selected.
    """
    expand_us = EXPAND_US + EXPAND_HEAD_US * heads * keys
    attend_us = max(PAIR_US * heads * seen, KEY_US * seen / tokens)
    slot_us = SLOT_US if heads <= FEW_HEADS else SLOT_BLOCK_US * -(-heads // 64)
    return expand_us + attend_us < slot_us * selected


def measured(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels of `masked_pays` run on this device, for a model of this type."""
    return dtype is torch.bfloat16 and implementation_for("masked_mha", device).name != "triton"


def gathered_keys(max_visible: int, topk: int) -> int:
    """Keys that a prefill chunk of a step gathers at most, unless one sequence is longer."""
    if max_visible <= topk:
        return MAX_EXPANDED_KEYS
    # While they are no more than a mask in place of slots has bits.
    return 32 * topk if max_visible <= 32 * topk else MAX_GATHERED_KEYS


class Planner:
    """Plans the steps of one model.

    Args:
        topk: keys that a token may select.
        heads: of this rank.
    """

    def __init__(self, topk: int, heads: int, policy: Policy) -> None:
        self.topk, self.heads, self.policy = topk, heads, policy
        self._last: Plan | None = None

    def plan(self, step: Step, latents: torch.dtype, dtype: torch.dtype) -> Plan:
        """The way of a step, which all layers ask for one after the other.

        Args:
            latents: type of the latent cache.
            dtype: of the model.
        """
        if self._last is None or self._last.step is not step:
            self._last = self._choose(step, latents, dtype)
        return self._last

    def _choose(self, step: Step, latents: torch.dtype, dtype: torch.dtype) -> Plan:
        # Where no token may see more keys than it may select, every key is selected and scoring is skipped.
        if step.max_visible <= self.topk:
            return Expanded(step, self.policy) if self._expands(step) else Dense(step, self.policy)
        masked = [self._masks(chunk, step.slots_t.device, dtype) for chunk in step.prefill_chunks]
        if not any(masked):
            return self._over_latents(step, latents, dtype)
        if all(masked) and step.decodes is None:
            return Masked(step, self.policy)
        made: list[tuple[slice, Plan]] = []
        for rows, part in parts_of(step):
            under_mask = part.decodes is None and self._masks(part.prefill_chunks[0], step.slots_t.device, dtype)
            made.append((rows, Masked(part, self.policy) if under_mask else self._over_latents(part, latents, dtype)))
        return Parts(step, self.policy, tuple(made))

    def _over_latents(self, step: Step, latents: torch.dtype, dtype: torch.dtype) -> Plan:
        return (Staged if self._stages(step, latents, dtype) else Sparse)(step, self.policy)

    def _masks(self, chunk: PrefillChunk, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether a prefill chunk is attended to under a mask: where it fits in place of slots, and pays.

        By kernels that were measured, unless the user wants it; never in the batch-invariant mode, where what a token
        gets would depend on others, nor where slots are told.
        """
        if self.policy.keeps_slots or mask_words(chunk.total_keys) > self.topk:
            return False
        if self.policy.masked_prefill is not None:
            return self.policy.masked_prefill
        tokens = chunk.tokens.stop - chunk.tokens.start
        seen, selected = chunk.seen(chunk.longest), chunk.seen(self.topk)
        return measured(device, dtype) and masked_pays(self.heads, tokens, chunk.total_keys, seen, selected)

    def _expands(self, step: Step) -> bool:
        """Whether prefills have so many pairs that expanding the keys to every head pays.

        Never in the batch-invariant mode: what a token gets would depend on the others.
        """
        pairs = sum(chunk.pairs for chunk in step.prefill_chunks)
        return not self.policy.batch_invariant and self.heads * pairs >= EXPANDED_PAIRS

    def _stages(self, step: Step, latents: torch.dtype, dtype: torch.dtype) -> bool:
        """Whether prefills attend to a copy of their latents in `dtype`: that is faster over bfloat16 than over fp8.

        It must, for all heads and tokens, make up for one read and one write of every latent. Never in the
        batch-invariant mode, where what a token gets would depend on the others, nor where slots are told.
        """
        if latents is not torch.uint8 or dtype is not torch.bfloat16 or self.policy.keeps_slots:
            return False
        tokens = sum(chunk.tokens.stop - chunk.tokens.start for chunk in step.prefill_chunks)
        keys = sum(chunk.total_keys for chunk in step.prefill_chunks)
        most = max((chunk.total_keys for chunk in step.prefill_chunks), default=0)
        return tokens >= LEAST_STAGED_TOKENS and keys <= STAGED_KEYS * self.heads * tokens and most <= MAX_GATHERED_KEYS
