"""The K-th of a set of keys in registers: counted by digits, from the leading one on.

A search counts keys by their leading 12 bits, then those that share the wanted digit by the next 12, then by the last
8: at most three rounds, whatever the scores are. On NVIDIA the counters are in shared memory, elsewhere in registers
(four rounds of 8 bits).
"""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(0x007FFFFF)
"""Order key of -inf; 0 is kept for elements outside a row."""
HIGHEST = tl.constexpr(0xFF800000)
"""Order key of +inf."""


@triton.jit
def order_key(score):
    """uint32 whose unsigned order is the order of the scores; NaN counts as -inf and -0.0 as 0.0."""
    # The sum makes a positive zero of a negative one.
    bits = (tl.where(score == score, score, float("-inf")) + 0.0).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | -0x80000000)).to(tl.uint32, bitcast=True)


@triton.jit
def score_of(key):
    """The score of an order key."""
    bits = tl.where(key >> 31 == 1, key ^ 0x80000000, key ^ 0xFFFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _shared_load(at):
    return tl.inline_asm_elementwise("ld.shared.b32 $0, [$1];", "=r,r", [at], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _shared_take(at):
    """Load and set to zero."""
    return tl.inline_asm_elementwise(
        "{ ld.shared.b32 $0, [$1]; st.shared.b32 [$1], 0; }", "=r,r", [at], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _shared_store(at, value, mask):
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.b32 p, $3, 0; mov.b32 $0, 0; @p st.shared.b32 [$1], $2; }",
        "=r,r,r,r", [at, value, mask.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _shared_increment(at, offset, span):
    """Add one at each address whose offset is not beyond the span.

    For tensors of at least as many elements as there are threads: a smaller one has copies, which would count too.
    """
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.le.u32 p, $2, $3; mov.b32 $0, 0; @p red.shared.add.u32 [$1], 1; }",
        "=r,r,r,r", [at, offset, span], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def new_bins(seed, SHARED: tl.constexpr):
    """Address of 4096 counters in shared memory, all zero, with room for 128 and 32 words behind them.

    Triton itself cannot add to shared memory. One statement of the program is one array of the kernel, which lives as
    long as the kernel does.
    """
    bins = seed * 0
    if SHARED:
        bins = tl.inline_asm_elementwise(
            "{ .shared .align 16 .b32 bins[4256]; mov.u32 $0, bins; }",
            "=r,r", [bins], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
        _shared_take(bins + 4 * tl.arange(0, 4096))
        tl.debug_barrier()
    return bins


@triton.jit
def tally(counts, key, low, span, shift, bins, SHARED: tl.constexpr):
    """Count the keys in low .. low + span by their next digit, the highest first."""
    offset = key - low
    digit = (offset >> shift.to(tl.uint32)).to(tl.int32)
    if SHARED:
        _shared_increment((bins + 4 * 4095) - 4 * digit, offset, span)
    else:
        inside = tl.ravel(offset <= span)
        counts += tl.histogram(tl.where(inside, 255 - tl.ravel(digit), 0), 256, mask=inside)
    return counts


@triton.jit
def _reach(count, above, wanted):
    """(how many of the counts are passed before `wanted` is reached, above with those)."""
    passed = above + tl.cumsum(count, axis=0) < wanted
    return tl.sum(passed.to(tl.int32), axis=0), above + tl.sum(tl.where(passed, count, 0), axis=0)


@triton.jit
def descend(counts, low, shift, above, wanted, bins, SHARED: tl.constexpr):
    """(low, span, above, at_least) of the digit that holds the wanted-th key from the top; the counters are zero."""
    DIGIT: tl.constexpr = 12 if SHARED else 8
    if SHARED:
        # 128 rows of 32 counters: a row is one warp's, and every warp has each vector of 32, so three barriers will do.
        sums = bins + 4 * 4096
        fine = sums + 4 * 128
        lane = tl.arange(0, 32)
        row = tl.arange(0, 128)[:, None]
        column = tl.arange(0, 32)[None, :]
        tl.debug_barrier()
        table = _shared_take(bins + 4 * (32 * row + column))
        _shared_store(sums + 4 * row, tl.sum(table, axis=1, keep_dims=True), row >= 0)
        tl.debug_barrier()
        a, b, c, d = tl.inline_asm_elementwise(
            "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,r", [sums + 16 * lane],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False, pack=1,
        )  # fmt: skip
        four, above = _reach(a + b + c + d, above, wanted)
        # A row is passed if `wanted` is not reached with it.
        a = tl.where(lane == four, a, 0)
        b = tl.where(lane == four, b, 0)
        c = tl.where(lane == four, c, 0)
        first = above + tl.sum(a, axis=0)
        second = first + tl.sum(b, axis=0)
        third = second + tl.sum(c, axis=0)
        above = tl.where(
            third < wanted, third, tl.where(second < wanted, second, tl.where(first < wanted, first, above))
        )
        index = (
            4 * four + (first < wanted).to(tl.int32) + (second < wanted).to(tl.int32) + (third < wanted).to(tl.int32)
        )
        _shared_store(fine + 4 * column + 0 * row, table, (row == index) & (column >= 0))
        tl.debug_barrier()
        counts = _shared_load(fine + 4 * lane)
        bin, above = _reach(counts, above, wanted)
        at_least = above + tl.sum(tl.where(lane == bin, counts, 0), axis=0)
        bin += 32 * index
    else:
        bin, above = _reach(counts, above, wanted)
        at_least = above + tl.sum(tl.where(tl.arange(0, 1 << DIGIT) == bin, counts, 0), axis=0)
    digit = ((1 << DIGIT) - 1 - bin).to(tl.uint32)
    low += digit << shift.to(tl.uint32)
    span = tl.minimum((tl.full((), 1, tl.uint32) << shift.to(tl.uint32)) - 1, tl.full((), HIGHEST, tl.uint32) - low)
    return low, span, above, at_least


@triton.jit
def first_shift(n, SHARED: tl.constexpr):
    """How far a key is shifted for its first digit; the next ones are DIGIT bits each, as far as there are any."""
    DIGIT: tl.constexpr = 12 if SHARED else 8
    return n * 0 + 32 - DIGIT


@triton.jit
def next_shift(shift, SHARED: tl.constexpr):
    DIGIT: tl.constexpr = 12 if SHARED else 8
    return tl.maximum(shift - DIGIT, 0)


@triton.jit
def narrow(key_0, key_1, key_2, key_3, count, wanted, slack, bins, SHARED: tl.constexpr):
    """(low, last, above): at least `wanted` of `count` keys are >= low and above < wanted are > last.

    At most wanted + slack keys are >= low, or all those from low to last are equal.
    """
    low = tl.full((), LOWEST, tl.uint32)
    span = tl.full((), HIGHEST - LOWEST, tl.uint32)
    shift = first_shift(count, SHARED)
    above = count * 0
    at_least = count
    while (span > 0) & (at_least > wanted + slack):
        counts = tl.zeros((256,), tl.int32)
        counts = tally(counts, key_0, low, span, shift, bins, SHARED)
        counts = tally(counts, key_1, low, span, shift, bins, SHARED)
        counts = tally(counts, key_2, low, span, shift, bins, SHARED)
        counts = tally(counts, key_3, low, span, shift, bins, SHARED)
        low, span, above, at_least = descend(counts, low, shift, above, wanted, bins, SHARED)
        shift = next_shift(shift, SHARED)
    return low, low + span, above
