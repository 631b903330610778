"""Which way a step is attended to: decided once a step, for all layers of a model."""

from __future__ import annotations

import torch

from dsv32_plugin.core.plans import Dense, Expanded, Plan, Sparse, Staged
from dsv32_plugin.core.policy import Policy
from dsv32_plugin.core.step import MAX_GATHERED_KEYS, Step

MAX_EXPANDED_KEYS = 4096
"""Latents that a prefill expands at a time: 4096 are 320 MiB of keys and values with 128 heads in bfloat16."""


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


def gathered_keys(max_visible: int, topk: int) -> int:
    """Keys that a prefill chunk of a step gathers at most, unless one sequence is longer."""
    return MAX_EXPANDED_KEYS if max_visible <= topk else MAX_GATHERED_KEYS


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
        way: type[Plan]
        if step.max_visible <= self.topk:
            way = Expanded if self._expands(step) else Dense
        else:
            way = Staged if self._stages(step, latents, dtype) else Sparse
        return way(step, self.policy)

    def _expands(self, step: Step) -> bool:
        """Whether prefills have so many pairs that expanding the keys to every head pays.

        Never in the batch-invariant mode: what a token gets would depend on the others.
        """
        pairs = sum(chunk.pairs for chunk in step.prefill_chunks)
        return not self.policy.batch_invariant and self.heads * pairs >= EXPANDED_PAIRS

    def _stages(self, step: Step, latents: torch.dtype, dtype: torch.dtype) -> bool:
        """Whether prefills attend to a copy of their latents in `dtype`: that is faster over bfloat16 than over fp8.

        It must, for all heads and tokens, make up for one read and one write of every latent. Never in the
        batch-invariant mode: what a token gets would depend on the others.
        """
        if latents is not torch.uint8 or dtype is not torch.bfloat16 or self.policy.batch_invariant:
            return False
        tokens = sum(chunk.tokens.stop - chunk.tokens.start for chunk in step.prefill_chunks)
        keys = sum(chunk.total_keys for chunk in step.prefill_chunks)
        most = max((chunk.total_keys for chunk in step.prefill_chunks), default=0)
        return tokens >= LEAST_STAGED_TOKENS and keys <= STAGED_KEYS * self.heads * tokens and most <= MAX_GATHERED_KEYS
