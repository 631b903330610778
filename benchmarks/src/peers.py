"""The kernels of vLLM, called as its own DeepSeek-V3.2 layer calls them on Hopper.

`load()` gives None and the reason where vLLM is absent. Every function returns a launch that can be captured.
"""

from __future__ import annotations

import functools
import inspect
import os
import pkgutil
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from dsv32_plugin.surface import first_of

Launch = Callable[[], Any]
RANK, ROPE = 512, 64
MIXED_BATCH_BELOW_HEADS = 32
"""Below it FlashMLASparseImpl runs all tokens as one sequence, from it on a sequence each."""
MAX_LOGITS_BYTES = 512 << 20
"""Its default for the scores of one prefill chunk (VLLM_SPARSE_INDEXER_MAX_LOGITS_MB)."""


def most_cooperative_rows() -> int:
    """Up to how many rows its layer takes the cooperative selection. Newer releases name it; before it is 32."""
    try:
        return int(pkgutil.resolve_name("vllm.model_executor.layers.indexer_topk:AUTO_COOPERATIVE_MAX_ROWS"))
    except (ImportError, AttributeError):
        return 32


@functools.cache
def load() -> tuple[Vllm | None, str]:
    """(the kernels, "") or (None, why not)."""
    if not torch.cuda.is_available():
        return None, "no GPU"
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
        from vllm.utils import deep_gemm
        from vllm.v1.attention.backends.mla import sparse_utils
        from vllm.v1.attention.ops import flashmla

        self.ops = _custom_ops
        self.layer: ModuleType = pkgutil.resolve_name(
            first_of("vllm.models.deepseek_v32.common.kernels", "vllm.models.deepseek_v32.nvidia.kernels")
        )
        self.deep_gemm: ModuleType = deep_gemm
        self.sparse_utils: ModuleType = sparse_utils
        self.flashmla: ModuleType = flashmla
        self.multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
        self._most_cooperative_rows = most_cooperative_rows()
        # Older releases ask whether to clear what is not visible.
        asks = "clean_logits" in inspect.signature(deep_gemm.fp8_fp4_paged_mqa_logits).parameters
        self._uncleared = {"clean_logits": False} if asks else {}

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
                (q, None), cache, weights, lengths, table, schedule, max_model_len=longest, **self._uncleared
            )

        return launch

    def ragged_logits(
        self, q: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor, scale: torch.Tensor, begin: torch.Tensor,
        end: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """DeepGEMM's logits of one sequence's prefill: every token sees the keys from the first on, `begin` is 0."""
        longest = {} if self._uncleared else {"max_seqlen_k": len(keys)}
        return self.deep_gemm.fp8_fp4_mqa_logits(
            (q, None), (keys, scale), weights, begin, end, **longest, **self._uncleared
        )

    def selections(self, rows: int) -> list[str]:
        """Those of its selections that take a decode of this many rows, its layer's choice first."""
        return [*(["cooperative"] if rows <= self._most_cooperative_rows else []), "persistent", "per_row"]

    def select(self, rows: int, topk: int, longest: int, name: str = "") -> Callable[..., torch.Tensor]:
        """One of its selections for a decode, by its name; its layer's choice where none is given."""
        out = torch.full((rows, topk), -1, dtype=torch.int32, device="cuda")
        workspace = torch.empty(1 << 20, dtype=torch.uint8, device="cuda")
        name = name or self.selections(rows)[0]

        def per_row(logits: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
            self.ops.top_k_per_row_decode(logits, 1, lengths, out, rows, *logits.stride(), topk)
            return out

        def launch(logits: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
            operation(logits, lengths, out, workspace, topk, longest)
            return out

        if name == "per_row":
            return per_row
        operation = getattr(torch.ops._C, f"{name}_topk")
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

    def ragged_select(
        self, table: torch.Tensor, lengths: torch.Tensor, index_cache: torch.Tensor, begin: torch.Tensor,
        end: torch.Tensor, total: int,
    ) -> Callable[..., torch.Tensor]:  # fmt: skip
        """A prefill's selection: gathered keys, then scores and top-k in chunks of queries that bound the scores."""
        keys = torch.empty(total, 128, dtype=torch.float8_e4m3fn, device=table.device)
        scale = torch.empty(total, 4, dtype=torch.uint8, device=table.device)
        sums = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        step = max(1, MAX_LOGITS_BYTES // 4 // total)

        def launch(q: torch.Tensor, weights: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
            self.ops.cp_gather_indexer_k_quant_cache(index_cache, keys, scale, table, sums)
            scales = scale.view(torch.float32).squeeze(-1)
            for first in range(0, len(q), step):
                rows = slice(first, min(first + step, len(q)))
                logits = self.ragged_logits(q[rows], weights[rows], keys, scales, begin[rows], end[rows])
                self.ops.top_k_per_row_prefill(
                    logits, begin[rows], end[rows], out[rows], len(logits), *logits.stride(), out.shape[1]
                )
            return out

        return launch

    def sparse_prefill(self, heads: int, scale: float, table: torch.Tensor, total: int) -> Callable[..., torch.Tensor]:
        """Attention of one sequence's prefill over an fp8 cache.

        With many heads its backend widens the whole context to bfloat16 first; with few it pads the heads to 64 and
        uses the decode kernel.
        """
        if heads < MIXED_BATCH_BELOW_HEADS:
            decode = self.sparse_decode(heads, scale)

            def few(
                q_latent: torch.Tensor, q_rope: torch.Tensor, cache: torch.Tensor, positions: torch.Tensor
            ) -> torch.Tensor:
                sequence = torch.zeros(len(positions), dtype=torch.int32, device=positions.device)
                slots = self.sparse_utils.triton_convert_req_index_to_global_index(
                    sequence, table, positions, NUM_TOPK_TOKENS=positions.shape[1]
                )
                return decode(q_latent, q_rope, cache, slots)

            return few
        wide = torch.empty(total, RANK + ROPE, dtype=torch.bfloat16, device=table.device)
        starts = torch.zeros(1, dtype=torch.int32, device=table.device)

        def many(
            q_latent: torch.Tensor, q_rope: torch.Tensor, cache: torch.Tensor, positions: torch.Tensor
        ) -> torch.Tensor:
            sequence = torch.zeros(len(positions), dtype=torch.int32, device=positions.device)
            rows, counts = self.sparse_utils.triton_convert_req_index_to_global_index(
                sequence, table, positions, NUM_TOPK_TOKENS=positions.shape[1], HAS_PREFILL_WORKSPACE=True,
                prefill_workspace_request_ids=sequence, prefill_workspace_starts=starts, return_valid_counts=True,
            )  # fmt: skip
            q = torch.empty(len(positions), heads, RANK + ROPE, dtype=q_latent.dtype, device=q_latent.device)
            self.ops.concat_mla_q(q_latent, q_rope, q)
            self.ops.cp_gather_and_upconvert_fp8_kv_cache(cache, wide, table, starts, 1)
            return self.flashmla.flash_mla_sparse_fwd(
                q, wide.unsqueeze(1), rows.unsqueeze(1), scale, topk_length=counts
            )[0]

        return many

    def dense_norm_rope(
        self, q_a: torch.Tensor, kv_a: torch.Tensor, k_pe: torch.Tensor, q_rope: torch.Tensor, positions: torch.Tensor,
        slots: torch.Tensor, table: torch.Tensor, weights: tuple[torch.Tensor, torch.Tensor], cache: torch.Tensor,
    ) -> Launch:  # fmt: skip
        """The dense model's two norms, rope of q (in place) and k, and the cache write, in three launches."""
        scale = torch.ones(1, device=q_a.device)
        q_out = torch.empty(q_a.shape, dtype=q_a.dtype, device=q_a.device)
        kv_out, table16 = torch.empty(kv_a.shape, dtype=kv_a.dtype, device=kv_a.device), table.to(q_a.dtype)

        def launch() -> None:
            self.ops.rms_norm(q_out, q_a, weights[0], 1e-6)
            self.ops.rms_norm(kv_out, kv_a, weights[1], 1e-6)
            self.ops.concat_and_cache_mla_rope_fused(
                positions, q_rope, k_pe, kv_out, table16, False, slots, cache, "auto", scale
            )

        return launch

    def dense_decode(self, table: torch.Tensor, lengths: torch.Tensor, scale: float) -> Callable[..., torch.Tensor]:
        """FlashMLA over a bfloat16 cache."""
        metadata, _ = self.flashmla.get_mla_metadata()

        def launch(q_latent: torch.Tensor, q_rope: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
            q = torch.cat((q_latent, q_rope), -1).unsqueeze(1)
            return self.flashmla.flash_mla_with_kvcache(
                q, cache.unsqueeze(2), table, lengths, RANK, metadata, softmax_scale=scale, causal=True
            )[0].squeeze(1)

        return launch

    def dense_prefill(self, tokens: int, total: int, scale: float) -> Callable[..., torch.Tensor]:
        """FlashAttention-3 over keys and values of full width, causal from the end; one sequence."""
        from vllm.vllm_flash_attn.flash_attn_interface import flash_attn_varlen_func

        def starts(n: int) -> torch.Tensor:
            return torch.tensor([0, n], dtype=torch.int32, device="cuda")

        cu_q, cu_k = starts(tokens), starts(total)
        return lambda q, k, v: flash_attn_varlen_func(
            q=q, k=k, v=v, max_seqlen_q=tokens, cu_seqlens_q=cu_q, max_seqlen_k=total, cu_seqlens_k=cu_k,
            softmax_scale=scale, causal=True, fa_version=3,
        )  # fmt: skip

    def dense_decode_fa3(
        self, table: torch.Tensor, lengths: torch.Tensor, longest: int, scale: float
    ) -> Callable[..., torch.Tensor]:
        """FlashAttention-3 with absorbed queries over a bfloat16 cache."""
        from vllm.vllm_flash_attn.flash_attn_interface import flash_attn_varlen_func

        starts = torch.arange(len(lengths) + 1, dtype=torch.int32, device=lengths.device)
        return lambda q_latent, q_rope, cache: flash_attn_varlen_func(
            q=q_rope, k=cache[..., RANK:].unsqueeze(2), v=cache[..., :RANK].unsqueeze(2), q_v=q_latent, max_seqlen_q=1,
            cu_seqlens_q=starts, max_seqlen_k=longest, seqused_k=lengths, block_table=table, softmax_scale=scale,
            causal=True, fa_version=3,
        )  # fmt: skip
