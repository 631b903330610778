"""The kernels of vLLM 0.26.0, called as its own DeepSeek-V3.2 layer calls them on Hopper.

`load()` gives None and the reason where vLLM is absent. Every function returns a launch that can be captured.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

Launch = Callable[[], Any]
RANK, ROPE = 512, 64
MIXED_BATCH_BELOW_HEADS = 32
"""Below it FlashMLASparseImpl runs all tokens as one sequence, from it on a sequence each."""


@functools.cache
def load() -> tuple[Vllm | None, str]:
    """(the kernels, "") or (None, why not)."""
    # The kernels alone are wanted: vLLM must not load the plugins installed beside it, ours among them.
    os.environ.setdefault("VLLM_PLUGINS", "")
    try:
        return Vllm(), ""
    except Exception as error:
        return None, f"{type(error).__name__}: {str(error)[:200]}"


class Vllm:
    """Launches of the in-tree path."""

    def __init__(self) -> None:
        from vllm import _custom_ops
        from vllm.models.deepseek_v32.nvidia import kernels
        from vllm.utils import deep_gemm
        from vllm.v1.attention.backends.mla import sparse_utils
        from vllm.v1.attention.ops import flashmla

        self.ops = _custom_ops
        self.layer: ModuleType = kernels
        self.deep_gemm: ModuleType = deep_gemm
        self.sparse_utils: ModuleType = sparse_utils
        self.flashmla: ModuleType = flashmla
        self.multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count

    def norm_rope(
        self,
        q_a: torch.Tensor,
        kv_a: torch.Tensor,
        k_pe: torch.Tensor,
        index_k: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        table: torch.Tensor,
        weights: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
        latent_cache: torch.Tensor,
        index_cache: torch.Tensor,
        topk_buffer: torch.Tensor,
        out: torch.Tensor,
    ) -> Launch:
        """Norms, ropes, both cache writes and the -1 fill of the selection, in one launch."""
        scale = torch.ones(1, device=q_a.device)
        q_weight, kv_weight, index_weight, index_bias = weights
        return lambda: self.layer.fused_norm_rope(
            positions, q_a, q_weight, 1e-6, kv_a, kv_weight, 1e-6, k_pe, table, index_k, index_weight, index_bias, 1e-6,
            table, topk_buffer, slot_mapping=slots, indexer_k_cache=index_cache, mla_kv_cache=latent_cache,
            mla_kv_cache_dtype="fp8_ds_mla", mla_k_scale=scale, q_c_out=out,
        )  # fmt: skip

    def queries(
        self,
        index_q: torch.Tensor,
        index_weights: torch.Tensor,
        q_latent: torch.Tensor,
        q_rope: torch.Tensor,
        positions: torch.Tensor,
        table: torch.Tensor,
    ) -> Callable[[], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """(index query in fp8, folded weights, rotated rope part of the attention's query), in one launch."""
        scale = torch.ones(1, device=index_q.device)
        heads = index_q.shape[1]
        return lambda: self.layer.fused_q(
            positions, q_rope, table, index_q, table, q_latent, scale, index_weights, 128**-0.5, heads**-0.5,
            quantize_mqa=False,
        )  # fmt: skip

    def paged_logits(self, lengths: torch.Tensor, table: torch.Tensor, longest: int) -> Callable[..., torch.Tensor]:
        """DeepGEMM's logits of q [B, N, I, 128]; its schedule is built here, once a step, outside the layer."""
        lengths = lengths.view(len(table), -1)
        schedule = self.deep_gemm.get_paged_mqa_logits_metadata(lengths, 64, self.multiprocessors)

        def launch(q: torch.Tensor, weights: torch.Tensor, index_cache: torch.Tensor) -> torch.Tensor:
            cache = index_cache.unsqueeze(2)
            return self.deep_gemm.fp8_fp4_paged_mqa_logits(
                (q, None), cache, weights, lengths, table, schedule, max_model_len=longest, clean_logits=False
            )

        return launch

    def select(self, rows: int, topk: int, longest: int) -> Callable[..., torch.Tensor]:
        """The faster of its two selections for this number of rows, as its layer chooses."""
        out = torch.full((rows, topk), -1, dtype=torch.int32, device="cuda")
        workspace = torch.empty(1 << 20, dtype=torch.uint8, device="cuda")
        operation = torch.ops._C.cooperative_topk if rows <= 32 else torch.ops._C.persistent_topk

        def launch(logits: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
            operation(logits, lengths, out, workspace, topk, longest)
            return out

        return launch

    def slots(self, sequence: torch.Tensor, table: torch.Tensor, heads: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """Positions to slots of the cache; with many heads its backend also counts the valid ones."""
        count = heads >= MIXED_BATCH_BELOW_HEADS

        def launch(positions: torch.Tensor) -> torch.Tensor:
            found = self.sparse_utils.triton_convert_req_index_to_global_index(
                sequence, table, positions, NUM_TOPK_TOKENS=positions.shape[1], return_valid_counts=count
            )
            return found[0] if count else found

        return launch

    def sparse_decode(self, heads: int, scale: float) -> Callable[..., torch.Tensor]:
        """Concatenation and padding of the query, then FlashMLA over an fp8 cache."""
        metadata, _ = self.flashmla.get_mla_metadata()
        padded = 64 if heads <= 64 else 128

        def launch(
            q_latent: torch.Tensor, q_rope: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor
        ) -> torch.Tensor:
            tokens = len(q_latent)
            batch = 1 if heads < MIXED_BATCH_BELOW_HEADS else tokens
            q = torch.empty(tokens, heads, RANK + ROPE, dtype=q_latent.dtype, device=q_latent.device)
            self.ops.concat_mla_q(q_latent, q_rope, q)
            q = q.view(batch, -1, heads, RANK + ROPE)
            if heads < padded:
                wide = q.new_zeros(batch, q.shape[1], padded, RANK + ROPE)
                wide[:, :, :heads] = q
                q = wide
            out, _ = self.flashmla.flash_mla_with_kvcache(
                q, cache.unsqueeze(2), None, None, RANK, metadata, softmax_scale=scale, is_fp8_kvcache=True,
                indices=slots.view(batch, -1, slots.shape[1]),
            )  # fmt: skip
            return out.flatten(0, 1)[:, :heads]

        return launch
