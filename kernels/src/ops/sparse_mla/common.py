"""What the implementations of sparse_mla and dense_mla for GPUs share: chunks of keys, and the sum over them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from ...cache_layout import LATENT_RANK, ROPE_DIM
from ...runtime.launch import dependent_launch_on
from ...runtime.target import TARGETS, Chip, Target, chip_of

INVARIANT_CHUNK = 512
"""Keys a chunk where every row is split at the same keys whatever else is in the batch."""

WORKSPACE_BYTES = 256 << 20
"""Most that the results of the chunks may take; more tokens are attended in several launches."""

LOG2E = 1.4426950408889634
RANK = tl.constexpr(LATENT_RANK)

INTERPRETED = Chip(TARGETS["gfx942"], 1)
"""Under Triton's interpreter, whose tensors are on the CPU: a chip without inline assembly."""


class Attention(NamedTuple):
    """One call: absorbed queries, and the keys that they attend to.

    These are the slots `index_tx` [T, K] or, with `seq_t`, the first visible_t positions of the block table that it is.
    """

    q_latent_thc: torch.Tensor
    q_rope_thr: torch.Tensor
    latent_cache: torch.Tensor
    index_tx: torch.Tensor
    scale: float
    num_keys: int
    """At most, of a token."""
    batch_invariant: bool = False
    seq_t: torch.Tensor | None = None
    visible_t: torch.Tensor | None = None

    @property
    def fp8(self) -> bool:
        return self.latent_cache.dtype is torch.uint8

    @property
    def paged(self) -> bool:
        return self.seq_t is not None

    @property
    def page_size(self) -> int:
        return self.latent_cache.shape[1]

    def arguments(self, rows: slice, part: torch.Tensor, part_lse: torch.Tensor, chunk: int) -> tuple[Any, ...]:
        """What a launch for these tokens begins with, which is the same for all kernels."""
        return (
            self.q_latent_thc[rows],
            self.q_rope_thr[rows],
            self.latent_cache,
            self.index_tx if self.paged else self.index_tx[rows],
            None if self.seq_t is None else self.seq_t[rows],
            None if self.visible_t is None else self.visible_t[rows],
            part,
            part_lse,
            *self.q_latent_thc.stride()[:2],
            *self.q_rope_thr.stride()[:2],
            self.latent_cache.stride(0),
            self.index_tx.stride(0),
            *part.stride()[:2],
            self.latent_cache.shape[0] * self.page_size,
            self.num_keys,
            chunk,
            self.q_latent_thc.shape[1],
            self.index_tx.shape[1],
        )


Attend = Callable[[Attention, torch.Tensor | None, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]]
"""An attention into `out` and `lse`, made where they are None; NotImplemented for what it does not take."""


def sparse_mla(
    attend: Attend,
    q_latent_thc: torch.Tensor,
    q_rope_thr: torch.Tensor,
    latent_cache: torch.Tensor,
    slots_tk: torch.Tensor,
    scale: float,
    *,
    batch_invariant: bool = False,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    num_keys = slots_tk.shape[1]
    return attend(
        Attention(q_latent_thc, q_rope_thr, latent_cache, slots_tk, scale, num_keys, batch_invariant), out, lse
    )


@triton.jit(do_not_specialize=["heads"])
def _combine_kernel(
    part_ptr,
    part_lse_ptr,
    out_ptr,
    lse_ptr,
    stride_out_t,
    stride_out_h,
    heads,
    SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Add the chunks of one head of one token, in ascending order of the keys."""
    row = tl.program_id(0).to(tl.int64)
    offs_s = tl.arange(0, BLOCK_S)
    offs_d = tl.arange(0, RANK)
    if DEPENDENT:
        gdc_wait()
    # lse_s, weight_s [BLOCK_S]; parts [BLOCK_S, RANK], each normalised by its own sum
    lse_s = tl.load(part_lse_ptr + row * SPLITS + offs_s, mask=offs_s < SPLITS, other=float("-inf"))
    part_ptrs = part_ptr + (row * SPLITS + offs_s[:, None]) * RANK + offs_d[None, :]
    parts = tl.load(part_ptrs, mask=(lse_s != float("-inf"))[:, None], other=0.0)
    lse_max = tl.max(lse_s, 0)
    shift = tl.where(lse_max == float("-inf"), 0.0, lse_max)
    weight_s = tl.exp(lse_s - shift)
    weight_sum = tl.sum(weight_s, 0)
    result = tl.sum(parts * weight_s[:, None], 0) / tl.where(weight_sum == 0.0, 1.0, weight_sum)
    out_row = out_ptr + row // heads * stride_out_t + row % heads * stride_out_h
    tl.store(out_row + offs_d, result.to(out_ptr.dtype.element_ty))
    tl.store(lse_ptr + row, tl.where(weight_sum == 0.0, float("-inf"), shift + tl.log(weight_sum)))


def results(call: Attention, out: torch.Tensor | None, lse: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Tensors for the results, after a check of the widths that the kernels are written for."""
    q_latent_thc = call.q_latent_thc
    tokens, heads, rank = q_latent_thc.shape
    rope_dim = call.q_rope_thr.shape[2]
    if (rank, rope_dim) != (LATENT_RANK, ROPE_DIM):
        raise ValueError(
            f"q_latent_thc, q_rope_thr: the GPU kernels take widths {LATENT_RANK} and {ROPE_DIM}, got {rank} and "
            f"{rope_dim}; set DSV32_KERNELS=reference for other models"
        )
    if out is None:
        out = torch.empty((tokens, heads, rank), dtype=q_latent_thc.dtype, device=q_latent_thc.device)
    if lse is None:
        lse = torch.empty((tokens, heads), dtype=torch.float32, device=q_latent_thc.device)
    return out, lse


def in_chunks(
    call: Attention,
    chunk: int,
    launch: Callable[[slice, torch.Tensor, torch.Tensor, int], None],
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Launch for the tokens of `out`, straight into it or, split, into a bounded workspace that is then combined."""
    tokens, heads, rank = out.shape
    if tokens == 0:
        return
    if not lse.is_contiguous():
        packed = torch.empty((tokens, heads), dtype=torch.float32, device=lse.device)
        in_chunks(call, chunk, launch, out, packed)
        lse.copy_(packed)
        return
    splits = triton.cdiv(call.num_keys, chunk)
    if call.paged:
        # Lengths vary freely: powers of two keep the compiled variants few, and what lies past the end costs little.
        splits = triton.next_power_of_2(splits)
    if splits <= 1:
        launch(slice(0, tokens), out, lse, 1)
        return
    step = max(1, min(tokens, WORKSPACE_BYTES // (heads * splits * rank * 4)))
    part = torch.empty((step, heads, splits, rank), dtype=torch.float32, device=out.device)
    part_lse = torch.empty((step, heads, splits), dtype=torch.float32, device=out.device)
    for first in range(0, tokens, step):
        rows = slice(first, min(first + step, tokens))
        launch(rows, part, part_lse, splits)
        _combine(part, part_lse, out[rows], lse[rows])


def _combine(part: torch.Tensor, part_lse: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> None:
    """Add the chunks' results [.., H, splits, 512], each normalised, by their log-sum-exp into out [T, H, 512]."""
    tokens, heads, _ = out.shape
    splits = part.shape[2]
    block_s = triton.next_power_of_2(splits)
    options, constexprs = _combine_options(chip(out.device)[0], splits)
    _combine_kernel[(tokens * heads,)](
        part,
        part_lse,
        out,
        lse,
        *out.stride()[:2],
        heads,
        SPLITS=splits,
        BLOCK_S=block_s,
        **constexprs,
        **options,
    )


def chip(device: torch.device) -> Chip:
    return chip_of(device) or INTERPRETED


def _combine_options(target: Target, splits: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """(options of a launch, constexprs that follow from the chip)."""
    dependent = dependent_launch_on(target)
    options: dict[str, Any] = {"num_warps": 4 if splits <= 8 else 8}
    if dependent:
        options["launch_pdl"] = True
    return options, {"DEPENDENT": dependent}


def scan_width(chunk: int, num_keys: int) -> int:
    """Slots that a program looks at to find the last one present."""
    return triton.next_power_of_2(max(16, min(chunk, num_keys)))


def choose_chunk(programs: int, num_keys: int, slots: int) -> int:
    """Keys a chunk, a power of two, from shapes alone: the fewest chunks that fill the chip's program `slots`."""
    chunk = max(64, triton.next_power_of_2(num_keys))
    while chunk > 64 and 2 * programs * triton.cdiv(num_keys, chunk) <= slots:
        chunk //= 2
    return chunk
