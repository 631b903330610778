"""One layer's attention in SGLang: where its caches are, and which batch it runs."""

from __future__ import annotations

import torch
from sglang.srt.model_executor.forward_context import get_attn_backend

from dsv32_plugin.core import attention


class DsaAttention(attention.DsaAttention):
    """`dsv32_plugin.core.attention` with the caches of SGLang's pool."""

    def forward(self, positions_t: torch.Tensor, hidden_th: torch.Tensor, slots_tk: torch.Tensor) -> torch.Tensor:
        """Attend, and leave this layer's selection in `slots_tk` [T, K] for the layers that share it."""
        backend = get_attn_backend()
        caches = backend.token_to_kv_pool.layer_caches(self.layer, self.indexer is not None)
        return self.attend(backend.forward_metadata, positions_t, hidden_th, slots_tk, caches)
