"""`kv_b_proj`: what leads from the latents to the keys and the values of every head."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn

from dsv32_plugin.core.config import DsaConfig

EXPANDED_BYTES = 320 << 20
"""Most that keys and values expanded at a time may take, unless one head takes more: 4096 latents with 128 heads."""


class LatentUpProjection(nn.Module):
    """`kv_b_proj` cut in two: W_UK makes keys of latents, W_UV values.

    Attention runs on the latents where it can: there W_UK is applied to the queries and W_UV to the results.
    """

    def __init__(self, config: DsaConfig, num_heads: int, tp_rank: int) -> None:
        super().__init__()
        self.first_head = tp_rank * num_heads
        self.w_uk_hdc = nn.Parameter(torch.empty(num_heads, config.qk_nope_head_dim, config.kv_lora_rank))
        self.w_uv_hcv = nn.Parameter(torch.empty(num_heads, config.kv_lora_rank, config.v_head_dim))
        self.num_heads, self.nope = num_heads, config.qk_nope_head_dim
        self.rope, self.value_dim = config.qk_rope_head_dim, config.v_head_dim
        self.requires_grad_(False)
        # By these names and this form vLLM knows loaders, which it wraps when it loads a model again.
        self.w_uk_hdc.weight_loader = self._load_keys  # type: ignore[attr-defined]
        self.w_uv_hcv.weight_loader = self._load_values  # type: ignore[attr-defined]

    def _load_keys(self, param: nn.Parameter, weight_nc: torch.Tensor) -> None:
        param.data.copy_(self._own_heads(weight_nc)[:, : -self.value_dim])

    def _load_values(self, param: nn.Parameter, weight_nc: torch.Tensor) -> None:
        param.data.copy_(self._own_heads(weight_nc)[:, -self.value_dim :].transpose(1, 2))

    def _own_heads(self, weight_nc: torch.Tensor) -> torch.Tensor:
        """This rank's heads of the whole `kv_b_proj.weight`, [all heads * (nope + v), C]."""
        weight_hnc = weight_nc.unflatten(0, (-1, self.nope + self.value_dim))
        return weight_hnc[self.first_head : self.first_head + self.num_heads]

    def absorb(self, q_thd: torch.Tensor) -> torch.Tensor:
        """[T, H, nope] -> [T, H, C]."""
        return torch.bmm(q_thd.transpose(0, 1), self.w_uk_hdc).transpose(0, 1)

    def values(self, out_thc: torch.Tensor) -> torch.Tensor:
        """[T, H, C] -> [T, H, v], contiguous, as the output projection takes it."""
        values_thv = out_thc.new_empty(*out_thc.shape[:2], self.value_dim)
        torch.bmm(out_thc.transpose(0, 1), self.w_uv_hcv, out=values_thv.transpose(0, 1))
        return values_thv

    def expand(self, rows_sc: torch.Tensor, heads: slice = slice(None)) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents with their rope keys, [S, C + R] -> keys [S, H, nope + R] and values [S, H, v] of some heads."""
        w_uk_hdc, w_uv_hcv = self.w_uk_hdc[heads], self.w_uv_hcv[heads]
        num_heads, nope, latent = w_uk_hdc.shape
        latent_sc, rope_sr = rows_sc.split([latent, self.rope], dim=-1)
        k_shd = rows_sc.new_empty(rows_sc.shape[0], num_heads, nope + self.rope)
        latent_hsc = latent_sc.expand(num_heads, -1, -1)
        torch.bmm(latent_hsc, w_uk_hdc.transpose(1, 2), out=k_shd[..., :nope].transpose(0, 1))
        k_shd[..., nope:] = rope_sr.unsqueeze(1)
        v_shv = torch.bmm(latent_hsc, w_uv_hcv).transpose(0, 1)
        return k_shd, v_shv

    def head_parts(self, keys: int, item_bytes: int) -> list[slice]:
        """As few parts of the heads as keep the keys and values of so many latents within EXPANDED_BYTES."""
        head_bytes = keys * (self.nope + self.rope + self.value_dim) * item_bytes
        parts = -(-self.num_heads // max(1, EXPANDED_BYTES // max(1, head_bytes)))
        bounds = [self.num_heads * part // parts for part in range(parts + 1)]
        return [slice(*pair) for pair in pairwise(bounds)]
