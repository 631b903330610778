"""Exact top K on every GPU: a sampled pivot thins a long row to a short list, and the list is searched in registers.

The pivot only decides how long the list is, never what is selected: a list that cannot hold the answer (counts say so)
is dropped and the row is searched in memory. Every decision rests on integer counts, so no order of execution can
change it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from ....limits import mask_words
from ....runtime.launch import dependent_launch_on
from ....runtime.target import Target, chip_of
from .kernels import collect_kernel, select_lists_kernel, select_rows_kernel

PROGRAMS_PER_SM = 4
MAX_SPLITS = 32
TILE = 4096
INTERPRETED_SMS = 2
"""Under Triton's interpreter."""


class Config(NamedTuple):
    """How one launch runs. `block` bounds what is searched in registers, `tile` what is read at a time."""

    long: bool
    splits: int
    block: int
    tile: int
    sample: int
    num_warps: int
    max_registers: int | None = None
    """On NVIDIA: what a thread may use, so that more programs fit on a multiprocessor."""


def choose(num_rows: int, width: int, topk: int, num_sms: int) -> Config:
    """The configuration for a shape: rows that would leave the GPU half empty are split."""
    block = max(4096, 2 * triton.next_power_of_2(topk))
    if width <= 2 * block:
        return Config(False, 1, 2 * block, TILE, 0, 2 * block // 512)
    sample = min(max(triton.next_power_of_2(width) // 16, 2048), 16384)
    if width > 1 << 18:
        # So few of so many, that the pivot stays coarse: the list needs room.
        block = 2 * block
    shortest = TILE if num_rows >= 8 else TILE // 2
    splits = 1
    while 2 * splits * num_rows <= num_sms and 2 * splits * shortest <= width and splits < MAX_SPLITS:
        splits *= 2
    if splits == 1:
        return Config(True, 1, block, TILE, sample, block // 512, max_registers=128)
    tile = min(TILE, max(shortest, triton.next_power_of_2(width) // splits))
    return Config(True, splits, block, tile, sample, 16)


def _options(
    target: Target | None, warps: int, max_registers: int | None = None
) -> tuple[dict[str, int], dict[str, bool]]:
    """(options of a launch, constexprs that follow from the chip); no target under the interpreter."""
    cuda = target is not None and target.is_cuda
    dependent = target is not None and dependent_launch_on(target)
    options = {"num_warps": warps}
    if cuda and max_registers:
        options["maxnreg"] = max_registers
    if dependent:
        options["launch_pdl"] = True
    return options, {"SHARED": cuda, "PDL": dependent}


def supports(target: Target) -> bool:
    return True


def select_topk(
    logits_ts: torch.Tensor,
    start_t: torch.Tensor | None,
    end_t: torch.Tensor,
    topk: int,
    *,
    block_table_bp: torch.Tensor | None = None,
    seq_t: torch.Tensor | None = None,
    page_size: int | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    num_rows = logits_ts.shape[0]
    if out is None:
        out = torch.empty((num_rows, topk), dtype=torch.int32, device=logits_ts.device)
    rows_per_sequence = 1
    if block_table_bp is not None:
        rows_per_sequence = max(1, num_rows // max(1, block_table_bp.shape[0]))
    launch(logits_ts, start_t, end_t, topk, block_table_bp, seq_t, page_size, rows_per_sequence, 0, out)
    return out


def select_mask(
    logits_ts: torch.Tensor,
    start_t: torch.Tensor | None,
    end_t: torch.Tensor,
    topk: int,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    num_rows, width = logits_ts.shape
    if out is None:
        out = torch.empty((num_rows, mask_words(width)), dtype=torch.int32, device=logits_ts.device)
    launch(logits_ts, start_t, end_t, topk, None, None, None, 1, 0, out.zero_(), bits=True)
    return out


def _vector_loads(logits_ts: torch.Tensor) -> bool:
    """Whether every row is aligned to 16 bytes and may be read up to the next multiple of 16 bytes."""
    rows, width = logits_ts.shape
    read = logits_ts.storage_offset() + (rows - 1) * logits_ts.stride(0) + triton.cdiv(width, 4) * 4
    aligned = logits_ts.stride(0) % 4 == 0 and logits_ts.data_ptr() % 16 == 0
    return aligned and 4 * read <= logits_ts.untyped_storage().nbytes()


def launch(
    logits_ts: torch.Tensor,
    start_t: torch.Tensor | None,
    end_t: torch.Tensor,
    topk: int,
    block_table_bp: torch.Tensor | None,
    seq_t: torch.Tensor | None,
    page_size: int | None,
    rows_per_sequence: int,
    first_row: int,
    out: torch.Tensor,
    config: Config | None = None,
    *,
    bits: bool = False,
) -> None:
    """Select for rows that are rows first_row, first_row + 1, ... of a larger problem (seq_t is indexed by those).

    With `bits` no list is written to `out`, but the bits of the selected are set in it, where all are 0.
    """
    num_rows, width = logits_ts.shape
    if num_rows == 0:
        return
    device = logits_ts.device
    chip = chip_of(device)
    num_sms = INTERPRETED_SMS if chip is None else chip.processors
    if config is None:
        config = choose(num_rows, width, topk, num_sms)
    table_stride, table_width = (
        (0, 0) if block_table_bp is None else (block_table_bp.stride(0), block_table_bp.shape[1])
    )
    row_stride = logits_ts.stride(0)
    vector = 4 if _vector_loads(logits_ts) else 1
    output = (out.stride(0), table_stride, table_width, rows_per_sequence)
    shape = {"BLOCK": config.block, "VECTOR": vector}
    options, constexprs = _options(None if chip is None else chip.target, config.num_warps, config.max_registers)
    if config.splits == 1:
        programs = min(num_rows, PROGRAMS_PER_SM * num_sms)
        lists = torch.empty((programs if config.long else 1, config.block), dtype=torch.int64, device=device)
        select_rows_kernel[(programs,)](
            logits_ts, start_t, end_t, block_table_bp, seq_t, lists, out,
            first_row, num_rows, width, row_stride, topk, *output,
            LONG=config.long, PAGE_SIZE=page_size or 0, TILE=config.tile, SAMPLE=config.sample, WARPS=config.num_warps,
            BITS=bits, **options, **constexprs, **shape,
        )  # fmt: skip
        return
    lists = torch.empty((num_rows * (config.splits + 1), config.block), dtype=torch.int64, device=device)
    listed = torch.empty((num_rows, config.splits), dtype=torch.int32, device=device)
    collect_kernel[(num_rows * config.splits,)](
        logits_ts, start_t, end_t, lists, listed, width, row_stride, topk,
        SPLITS=config.splits, TILE=config.tile, SAMPLE=config.sample, WARPS=config.num_warps,
        **options, **constexprs, **shape,
    )  # fmt: skip
    select_lists_kernel[(num_rows,)](
        logits_ts, start_t, end_t, block_table_bp, seq_t, lists, listed, lists[num_rows * config.splits :], out,
        first_row, width, row_stride, topk, *output,
        SPLITS=config.splits, PAGE_SIZE=page_size or 0, TILE=2 * TILE, WARPS=config.num_warps, BITS=bits,
        **options, **constexprs, **shape,
    )  # fmt: skip
