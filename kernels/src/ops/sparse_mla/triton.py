"""sparse_mla on every GPU that Triton compiles for: one program attends one token's heads to one chunk of its keys.

The heads are the rows of every product: 16 fill an mma.sync or MFMA tile exactly, 64 a wgmma. Fewer programs than the
chip holds are avoided by splitting the keys into chunks; a second kernel adds the chunks' results in ascending order.
dense_mla runs the same kernel with the block table in place of a list of slots.
"""

# Triton's tuples grow in static loops; to mypy each length is a type of its own.
# mypy: disable-error-code="assignment, misc"

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from dsv32_plugin.cache_layout import (
    LATENT_BYTES_FP8,
    LATENT_RANK,
    LATENT_ROPE_OFFSET,
    LATENT_SCALES_OFFSET,
    LATENT_TILES,
    LATENT_WIDTH,
    PAGE_SIZE,
    ROPE_DIM,
)
from dsv32_plugin.settings import batch_invariant

from ...runtime.aot import TARGETS, AotCase, Target, target_of_device
from ...runtime.launch import dependent_launch_on

BATCH_INVARIANT = batch_invariant()
"""Split every row at the same keys whatever else is in the batch."""

INVARIANT_CHUNK = 512
"""Keys a chunk in the batch-invariant mode."""

WORKSPACE_BYTES = 256 << 20
"""Most that the results of the chunks may take; more tokens are attended in several launches."""

RANK = tl.constexpr(LATENT_RANK)
ROPE = tl.constexpr(ROPE_DIM)
WIDTH = tl.constexpr(LATENT_WIDTH)
FP8_BYTES = tl.constexpr(LATENT_BYTES_FP8)
FP8_SCALES = tl.constexpr(LATENT_SCALES_OFFSET)
FP8_ROPE = tl.constexpr(LATENT_ROPE_OFFSET)
SCALE_BYTES = tl.constexpr(4)
LN2 = tl.constexpr(0.6931471805599453)
LOG2E = 1.4426950408889634

# The bits of an e4m3fn code, moved under a bfloat16's exponent, are the value times 2^-120. Half of the way back is put
# on the query and half on the tile's scale, so that neither product comes near float32's subnormal numbers.
LIFT = tl.constexpr(2.0**60)


SPILL_BYTES = {64: 80}
"""Bytes a thread that were looked at and accepted, by heads a program; 16 where not named."""


class Config(NamedTuple):
    """One way to run the kernel."""

    block_h: int
    block_n: int
    tiles: int
    """Parts into which the 512 latents are cut; an fp8 row has a scale for each of its four."""
    num_warps: int
    num_stages: int


@triton.jit
def _widen(raw, DTYPE: tl.constexpr, LIFTED: tl.constexpr):
    """e4m3fn bytes -> DTYPE by their bits; times 2^-120 where LIFTED."""
    if LIFTED:
        value = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 low, high, low_shifted, high_shifted;
            prmt.b32 low, 0, $2, 0x5040;
            prmt.b32 high, 0, $2, 0x7060;
            shr.u32 low_shifted, low, 4;
            shr.u32 high_shifted, high, 4;
            and.b32 low_shifted, low_shifted, 0x07f007f0;
            and.b32 high_shifted, high_shifted, 0x07f007f0;
            lop3.b32 $0, low, 0x80008000, low_shifted, 0xea;
            lop3.b32 $1, high, 0x80008000, high_shifted, 0xea;
            }
            """,
            "=r,=r,r",
            [raw],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=4,
        )
    else:
        bits = raw.to(tl.uint32)
        bits = ((bits & 0x80) << 24) | ((bits & 0x7F) << 20)
        value = (bits.to(tl.float32, bitcast=True) * (2.0**120)).to(DTYPE)
    return value


@triton.jit(do_not_specialize=["num_slots", "num_keys", "chunk", "heads", "table_pages"])
def _attend_kernel(
    q_latent_ptr,
    q_rope_ptr,
    cache_ptr,
    index_ptr,
    seq_ptr,
    visible_ptr,
    out_ptr,
    lse_ptr,
    stride_q_latent_t,
    stride_q_latent_h,
    stride_q_rope_t,
    stride_q_rope_h,
    stride_page,
    stride_index,
    stride_out_t,
    stride_out_h,
    num_slots,
    num_keys,
    chunk,
    heads,
    table_pages,
    scale,
    SPLITS: tl.constexpr,
    HEAD_BLOCKS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILES: tl.constexpr,
    SCAN: tl.constexpr,
    FP8: tl.constexpr,
    PAGED: tl.constexpr,
    PAGE: tl.constexpr,
    LIFTED: tl.constexpr,
    DTYPE: tl.constexpr,
    STAGES: tl.constexpr,
):
    TILE: tl.constexpr = RANK // TILES
    Q_LIFT: tl.constexpr = LIFT if LIFTED else 1.0
    pid = tl.program_id(0)
    head_block = pid % HEAD_BLOCKS
    split = (pid // HEAD_BLOCKS) % SPLITS
    t = (pid // (HEAD_BLOCKS * SPLITS)).to(tl.int64)
    offs_h = head_block * BLOCK_H + tl.arange(0, BLOCK_H)
    mask_h = offs_h < heads
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, TILE)
    offs_r = tl.arange(0, ROPE)

    begin = split * chunk
    end = tl.minimum(begin + chunk, num_keys)
    if PAGED:
        index_ptr += tl.load(seq_ptr + t).to(tl.int64) * stride_index
        end = tl.minimum(end, tl.load(visible_ptr + t).to(tl.int32))
    else:
        # Absent slots at the end of the chunk are no work: most lists end with them.
        index_ptr += t * stride_index
        offs_scan = begin + tl.arange(0, SCAN)
        scan = tl.load(index_ptr + offs_scan, mask=offs_scan < end, other=-1)
        end = tl.max(tl.where((scan >= 0) & (scan < num_slots), offs_scan + 1, begin), 0)

    # q [BLOCK_H, TILE] and acc [BLOCK_H, TILE], once for each tile
    qs = ()
    accs = ()
    q_rows = q_latent_ptr + t * stride_q_latent_t + offs_h[:, None].to(tl.int64) * stride_q_latent_h
    for j in tl.static_range(TILES):
        q = tl.load(q_rows + (j * TILE + offs_d[None, :]), mask=mask_h[:, None], other=0.0)
        qs += ((q * Q_LIFT).to(DTYPE),)
        accs += (tl.zeros((BLOCK_H, TILE), tl.float32),)
    q_rope_rows = q_rope_ptr + t * stride_q_rope_t + offs_h[:, None].to(tl.int64) * stride_q_rope_h
    q_rope = tl.load(q_rope_rows + offs_r[None, :], mask=mask_h[:, None], other=0.0).to(DTYPE)

    highest = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        offs_k = start + offs_n
        mask_k = offs_k < end
        if PAGED:
            page_index = offs_k // PAGE
            page = tl.load(index_ptr + page_index, mask=mask_k & (page_index < table_pages), other=-1)
            present = (page >= 0) & (page < num_slots // PAGE)
            offset = offs_k % PAGE
        else:
            slot = tl.load(index_ptr + offs_k, mask=mask_k, other=-1)
            present = (slot >= 0) & (slot < num_slots)
            page = slot // PAGE
            offset = slot % PAGE
        page = tl.where(present, page, 0).to(tl.int64)
        offset = tl.where(present, offset, 0)
        mask_row = present[:, None]

        # k [BLOCK_N, TILE], once for each tile
        ks = ()
        k_scales = ()
        if FP8:
            row = cache_ptr + page * stride_page + offset * FP8_BYTES
            k_rope_ptr = (row + FP8_ROPE).to(tl.pointer_type(tl.bfloat16))
            scale_ptr = (row + FP8_SCALES).to(tl.pointer_type(tl.float32))
            for j in tl.static_range(TILES):
                raw = tl.load(row[:, None] + (j * TILE + offs_d[None, :]), mask=mask_row, other=0)
                ks += (_widen(raw, DTYPE, LIFTED),)
                k_scales += (tl.load(scale_ptr + j, mask=present, other=0.0) * Q_LIFT,)
        else:
            row = cache_ptr + page * stride_page + offset * WIDTH
            k_rope_ptr = row + RANK
            for j in tl.static_range(TILES):
                k = tl.load(row[:, None] + (j * TILE + offs_d[None, :]), mask=mask_row, other=0.0)
                ks += (k.to(DTYPE),)
        k_rope = tl.load(k_rope_ptr[:, None] + offs_r[None, :], mask=mask_row, other=0.0).to(DTYPE)

        scores = tl.dot(q_rope, tl.trans(k_rope), input_precision="ieee")
        for j in tl.static_range(TILES):
            if FP8:
                scores += tl.dot(qs[j], tl.trans(ks[j]), input_precision="ieee") * k_scales[j][None, :]
            else:
                scores = tl.dot(qs[j], tl.trans(ks[j]), scores, input_precision="ieee")
        scores = tl.where(present[None, :], scores * scale, float("-inf"))

        higher = tl.maximum(highest, tl.max(scores, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(scores - shift[:, None])
        decay = tl.exp2(highest - shift)
        highest = higher
        total = total * decay + tl.sum(p, 1)
        updated = ()
        for j in tl.static_range(TILES):
            if FP8:
                weights = (p * k_scales[j][None, :]).to(DTYPE)
            else:
                weights = p.to(DTYPE)
            updated += (tl.dot(weights, ks[j], accs[j] * decay[:, None], input_precision="ieee"),)
        accs = updated

    norm = Q_LIFT / tl.where(total == 0.0, 1.0, total)
    out_rows = out_ptr + t * stride_out_t + offs_h[:, None].to(tl.int64) * stride_out_h + split * RANK
    for j in tl.static_range(TILES):
        result = (accs[j] * norm[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_rows + (j * TILE + offs_d[None, :]), result, mask=mask_h[:, None])
    lse = tl.where(total == 0.0, float("-inf"), (highest + tl.log2(total)) * LN2)
    tl.store(lse_ptr + (t * heads + offs_h) * SPLITS + split, lse, mask=mask_h)


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
    # parts [BLOCK_S, RANK]
    lse_s = tl.load(part_lse_ptr + row * SPLITS + offs_s, mask=offs_s < SPLITS, other=float("-inf"))
    part_ptrs = part_ptr + (row * SPLITS + offs_s[:, None]) * RANK + offs_d[None, :]
    parts = tl.load(part_ptrs, mask=(lse_s != float("-inf"))[:, None], other=0.0)
    highest = tl.max(lse_s, 0)
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    weight_s = tl.exp(lse_s - shift)
    total = tl.sum(weight_s, 0)
    result = tl.sum(parts * weight_s[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    out_row = out_ptr + row // heads * stride_out_t + row % heads * stride_out_h
    tl.store(out_row + offs_d, result.to(out_ptr.dtype.element_ty))
    tl.store(lse_ptr + row, tl.where(total == 0.0, float("-inf"), shift + tl.log(total)))


def sparse_mla(
    q_latent_thc: torch.Tensor,
    q_rope_thr: torch.Tensor,
    latent_cache: torch.Tensor,
    slots_tk: torch.Tensor,
    scale: float,
    *,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return attend(q_latent_thc, q_rope_thr, latent_cache, slots_tk, scale, num_keys=slots_tk.shape[1], out=out, lse=lse)


def attend(
    q_latent_thc: torch.Tensor,
    q_rope_thr: torch.Tensor,
    latent_cache: torch.Tensor,
    index: torch.Tensor,
    scale: float,
    *,
    num_keys: int,
    seq_t: torch.Tensor | None = None,
    visible_t: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to the slots `index` [T, K] or, with `seq_t`, to the first visible_t positions of the table `index`."""
    out, lse = results(q_latent_thc, q_rope_thr, out, lse)
    tokens, heads, _ = q_latent_thc.shape
    target, processors = chip(q_latent_thc.device)
    fp8 = latent_cache.dtype is torch.uint8
    wide = torch.float32 in (q_latent_thc.dtype, latent_cache.dtype)
    dtype = tl.float32 if wide else tl.float16 if q_latent_thc.dtype is torch.float16 else tl.bfloat16
    config = choose_config(target, heads, fp8, wide)
    head_blocks = triton.cdiv(heads, config.block_h)
    chunk = choose_chunk(tokens * head_blocks, num_keys, 2 * processors)
    page_size, paged = latent_cache.shape[1], seq_t is not None

    def launch(rows: slice, part: torch.Tensor, part_lse: torch.Tensor, splits: int) -> None:
        _attend_kernel[((rows.stop - rows.start) * splits * head_blocks,)](
            q_latent_thc[rows],
            q_rope_thr[rows],
            latent_cache,
            index if paged else index[rows],
            None if seq_t is None else seq_t[rows],
            None if visible_t is None else visible_t[rows],
            part,
            part_lse,
            *q_latent_thc.stride()[:2],
            *q_rope_thr.stride()[:2],
            latent_cache.stride(0),
            index.stride(0),
            *part.stride()[:2],
            latent_cache.shape[0] * page_size,
            num_keys,
            chunk,
            heads,
            index.shape[1],
            scale * LOG2E,
            SPLITS=splits,
            HEAD_BLOCKS=head_blocks,
            BLOCK_H=config.block_h,
            BLOCK_N=config.block_n,
            TILES=config.tiles,
            SCAN=0 if paged else scan_width(chunk, num_keys),
            FP8=fp8,
            PAGED=paged,
            PAGE=page_size,
            LIFTED=_lifted(target, fp8, dtype),
            DTYPE=dtype,
            STAGES=config.num_stages,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )

    splits = triton.cdiv(num_keys, chunk)
    # Lengths vary freely: powers of two keep the compiled variants few, and what lies past the end costs little.
    in_chunks(launch, out, lse, triton.next_power_of_2(splits) if paged else splits)
    return out, lse


def results(
    q_latent_thc: torch.Tensor, q_rope_thr: torch.Tensor, out: torch.Tensor | None, lse: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tensors for the results, after a check of the widths that the kernels are written for."""
    tokens, heads, rank = q_latent_thc.shape
    rope_dim = q_rope_thr.shape[2]
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
    launch: Callable[[slice, torch.Tensor, torch.Tensor, int], None], out: torch.Tensor, lse: torch.Tensor, splits: int
) -> None:
    """Launch for the tokens of `out`, straight into it or, split, into a bounded workspace that is then combined."""
    tokens, heads, rank = out.shape
    if tokens == 0:
        return
    if not lse.is_contiguous():
        packed = torch.empty((tokens, heads), dtype=torch.float32, device=lse.device)
        in_chunks(launch, out, packed, splits)
        lse.copy_(packed)
        return
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


@cache
def chip(device: torch.device) -> tuple[Target, int]:
    """Target and number of multiprocessors; under the interpreter, whose tensors are on the CPU, any."""
    if device.type == "cpu":
        return TARGETS["gfx942"], 1
    index = torch.cuda.current_device() if device.index is None else device.index
    return target_of_device(index), torch.cuda.get_device_properties(index).multi_processor_count


def _lifted(target: Target, fp8: bool, dtype: Any) -> bool:
    return fp8 and dtype == tl.bfloat16 and target.is_cuda


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
    if BATCH_INVARIANT:
        return INVARIANT_CHUNK
    chunk = max(64, triton.next_power_of_2(num_keys))
    while chunk > 64 and 2 * programs * triton.cdiv(num_keys, chunk) <= slots:
        chunk //= 2
    return chunk


def choose_config(target: Target, heads: int, fp8: bool, wide: bool) -> Config:
    """The configuration for a chip, a number of heads and a cache; `wide` computes in float32.

    sm90, T = 4096, 128 heads, bf16, us: 64 heads x 64 keys 10460, 64 x 32 14440, 32 x 64 12930. Fewer heads a program
    elsewhere keep the accumulator in registers and the rows in the shared memory that the chip has.
    """
    if wide:
        return Config(block_h=16, block_n=16, tiles=LATENT_TILES, num_warps=4, num_stages=1)
    tiles = LATENT_TILES if fp8 else 1
    stages = 1 if fp8 or not target.is_cuda else 2
    if heads <= 16 or not target.is_cuda or target.shared_bytes < 160 << 10:
        block_n = 16 if fp8 and target.is_cuda else 32
        return Config(block_h=16, block_n=block_n, tiles=tiles, num_warps=4, num_stages=stages)
    if heads <= 32 or fp8 or target.name != "sm90":
        return Config(block_h=32, block_n=32, tiles=tiles, num_warps=8, num_stages=stages)
    return Config(block_h=64, block_n=64, tiles=tiles, num_warps=8, num_stages=stages)


def aot_cases(target: Target, *, paged: bool = False) -> list[AotCase]:
    """Every configuration that can be chosen on `target`, at the sizes of DeepSeek-V3.2."""
    cases: dict[tuple[Any, ...], AotCase] = {}
    for heads in (16, 32, 64, 128):
        for cache_type in ("fp8", "bf16", "fp32"):
            fp8 = cache_type == "fp8"
            dtype = tl.float32 if cache_type == "fp32" else tl.bfloat16
            config = choose_config(target, heads, fp8, cache_type == "fp32")
            head_blocks = triton.cdiv(heads, config.block_h)
            for splits, chunk in ((1, 2048), (4, 512), (32, 64)):
                key = (config, cache_type, head_blocks, splits)
                if key not in cases:
                    cases[key] = _aot_case(target, config, cache_type, heads, splits, chunk, paged, dtype)
    found = list(cases.values())
    return found if paged else found + [_aot_combine(target, splits) for splits in (2, 4, 8, 16, 32)]


def _aot_case(
    target: Target, config: Config, cache_type: str, heads: int, splits: int, chunk: int, paged: bool, dtype: Any
) -> AotCase:
    fp8 = cache_type == "fp8"
    element = "fp32" if cache_type == "fp32" else "bf16"
    signature = {
        "q_latent_ptr": f"*{element}:16",
        "q_rope_ptr": f"*{element}:16",
        "cache_ptr": "*u8:16" if fp8 else f"*{element}:16",
        "index_ptr": "*i32:16",
        "out_ptr": f"*{element}:16" if splits == 1 else "*fp32:16",
        "lse_ptr": "*fp32:16",
        **{name: "i32:16" for name in _attend_kernel.arg_names if name.startswith("stride_")},
        "num_slots": "i32",
        "num_keys": "i32",
        "chunk": "i32",
        "heads": "i32",
        "table_pages": "i32",
        "scale": "fp32",
    }
    constexprs = {
        "SPLITS": splits,
        "HEAD_BLOCKS": triton.cdiv(heads, config.block_h),
        "BLOCK_H": config.block_h,
        "BLOCK_N": config.block_n,
        "TILES": config.tiles,
        "SCAN": 0 if paged else chunk,
        "FP8": fp8,
        "PAGED": paged,
        "PAGE": PAGE_SIZE,
        "LIFTED": _lifted(target, fp8, dtype),
        "DTYPE": dtype,
        "STAGES": config.num_stages,
    }
    optional = {"seq_ptr": "*i32:16", "visible_ptr": "*i32:16"}
    if paged:
        signature |= optional
    else:
        constexprs |= dict.fromkeys(optional)
    name = f"{'dense' if paged else 'sparse'}-{cache_type}-{heads}heads-{splits}splits"
    return AotCase(
        name,
        _attend_kernel,
        signature,
        constexprs,
        config.num_warps,
        config.num_stages,
        spill_bytes=SPILL_BYTES.get(config.block_h, 16),
        spill_reason="a few addresses, reloaded once a step; the accumulator fills half of the registers",
    )


def _aot_combine(target: Target, splits: int) -> AotCase:
    signature = {
        "part_ptr": "*fp32:16",
        "part_lse_ptr": "*fp32:16",
        "out_ptr": "*bf16:16",
        "lse_ptr": "*fp32:16",
        "stride_out_t": "i32:16",
        "stride_out_h": "i32:16",
        "heads": "i32",
    }
    options, constexprs = _combine_options(target, splits)
    num_warps = options.pop("num_warps")
    constexprs |= {"SPLITS": splits, "BLOCK_S": splits}
    return AotCase(f"combine-{splits}splits", _combine_kernel, signature, constexprs, num_warps, options=options)
