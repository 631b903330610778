"""Device functions that several kernels share: e4m3fn by bits, power-of-two scales, rope without shuffles, rotation.

fp8 is converted in integer arithmetic where the chip has no such type or another rounding, and under Triton's
interpreter: nearest even everywhere.
"""

import triton
import triton.language as tl

from ..cache_layout import AMAX_FLOOR

FLOOR = tl.constexpr(AMAX_FLOOR)


@triton.jit
def e4m3_from_float32(x):
    """Code of the e4m3fn value nearest to x, ties to even, saturating at 448; NaN stays NaN."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # Normal results: drop 20 mantissa bits, rounding to even; the exponent's bias goes from 127 to 7.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 codes are multiples of 2^-9, which is the spacing of float32 at 2^14: the addition rounds.
    shifted = tl.abs(x) + 16384.0
    subnormal = shifted.to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(magnitude < (121 << 23), subnormal, normal)
    code = tl.where(magnitude > 0x43E00000, 0x7E, code)
    code = tl.where(magnitude > 0x7F800000, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def e4m3_code(x, NATIVE: tl.constexpr):
    """e4m3_from_float32 by the chip's own conversion where it has one (`launch.native_e4m3`)."""
    if NATIVE:
        code = x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        code = e4m3_from_float32(x)
    return code


@triton.jit
def float32_from_e4m3(code):
    """Value of e4m3fn codes given as uint8."""
    bits = code.to(tl.int32)
    low = bits & 0x7F
    normal = ((low << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    magnitude = tl.where(low < 8, low.to(tl.float32) * 0.001953125, normal)
    magnitude = tl.where(low == 0x7F, float("nan"), magnitude)
    return tl.where(bits >= 0x80, -magnitude, magnitude)


@triton.jit
def power_of_two_scale(amax):
    """(2^n, 2^-n) for the smallest n with max(amax, AMAX_FLOOR) <= 448 * 2^n, from the exponent's bits."""
    bits = tl.maximum(amax, FLOOR).to(tl.int32, bitcast=True)
    # 448 = 1.75 * 2^8: the mantissa decides whether the exponent less 8 is enough.
    exponent = (bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    return scale, inverse


@triton.jit
def rope_partner(offs, ROPE: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Index of the element that each of the first ROPE elements is rotated with (itself past them)."""
    if INTERLEAVED:
        partner = offs ^ 1
    else:
        partner = offs ^ (ROPE // 2)
    return tl.where(offs < ROPE, partner, offs)


@triton.jit
def rope_terms(table_row_ptr, offs, ROPE: tl.constexpr, INTERLEAVED: tl.constexpr):
    """(cos, signed sin) for each element, so that rope is x * cos + x[partner] * sin; (1, 0) past the first ROPE."""
    half: tl.constexpr = ROPE // 2
    inside = offs < ROPE
    if INTERLEAVED:
        frequency = offs // 2
        first = (offs & 1) == 0
    else:
        frequency = offs % half
        first = offs < half
    cos = tl.load(table_row_ptr + frequency, mask=inside, other=1.0)
    sin = tl.load(table_row_ptr + half + frequency, mask=inside, other=0.0)
    return cos, tl.where(first, -sin, sin)


@triton.jit
def hadamard_rotate(x, ROWS: tl.constexpr, DIM: tl.constexpr, STEPS: tl.constexpr):
    """Each row of x [ROWS, DIM = 2^STEPS] times the Sylvester-order Hadamard matrix times DIM^-0.5, in float32.

    The butterflies run from the widest to the narrowest; every step splits the leading bit of the index off and puts it
    last, so that after STEPS steps the order is the original one.
    """
    half: tl.constexpr = DIM // 2
    for _ in tl.static_range(STEPS):
        a, b = tl.split(tl.permute(tl.reshape(x, (ROWS, 2, half)), (0, 2, 1)))
        x = tl.reshape(tl.join(a + b, a - b), (ROWS, DIM))
    return x * (DIM**-0.5)
