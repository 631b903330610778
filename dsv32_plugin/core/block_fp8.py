"""The block-fp8 checkpoint format: e4m3 weights with one float32 scale for every block of rows and columns."""

from __future__ import annotations

import torch

from dsv32_plugin.core.quantisation import scale_shape

SCALE_SUFFIX = "_scale_inv"
"""The scale of `name.weight` is stored as `name.weight_scale_inv`; despite its name it multiplies."""

E4M3_MAX = 448.0


def quantise(weight_nk: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """scale[r, c] = 2 ** ceil(log2(max |block r, c| / 448)),  value = weight / scale, rounded to the nearest even.

    Args:
        weight_nk: [N, K], any float dtype.
        block: rows and columns that share a scale; the last blocks may be partial.

    Returns:
        The values, [N, K] float8_e4m3fn, and the scales, [ceil(N / block[0]), ceil(K / block[1])] float32: powers of
        two, as `scale_fmt: ue8m0` promises. A block of zeros has scale 1.
    """
    n, k = weight_nk.shape
    rows, columns = scale_shape((n, k), block)
    padded = weight_nk.new_zeros(rows * block[0], columns * block[1], dtype=torch.float32)
    padded[:n, :k] = weight_nk
    amax_rc = padded.view(rows, block[0], columns, block[1]).abs().amax(dim=(1, 3))
    fraction_rc, exponent_rc = torch.frexp(amax_rc / E4M3_MAX)  # fraction * 2**exponent, fraction in [0.5, 1)
    scale_rc = torch.ldexp(torch.ones_like(amax_rc), exponent_rc - (fraction_rc == 0.5).int())
    scale_rc = scale_rc.masked_fill(amax_rc == 0, 1.0)
    return (weight_nk.float() / _spread(scale_rc, n, k, block)).to(torch.float8_e4m3fn), scale_rc


def dequantise(weight_nk: torch.Tensor, scale_rc: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """w[n, k] = weight[n, k] * scale[n // block[0], k // block[1]], in float32.

    Args:
        weight_nk: [N, K] float8_e4m3fn.
        scale_rc: [ceil(N / block[0]), ceil(K / block[1])] float32.
        block: rows and columns that share a scale.

    Raises:
        ValueError: when the scale has another shape than the weight asks for.
    """
    n, k = weight_nk.shape
    expected = scale_shape((n, k), block)
    if tuple(scale_rc.shape) != expected:
        raise ValueError(
            f"scale: expected {expected} for a weight {(n, k)} in blocks {block}, got {tuple(scale_rc.shape)}"
        )
    return weight_nk.float() * _spread(scale_rc, n, k, block)


def _spread(scale_rc: torch.Tensor, n: int, k: int, block: tuple[int, int]) -> torch.Tensor:
    return scale_rc.float().repeat_interleave(block[0], 0)[:n].repeat_interleave(block[1], 1)[:, :k]
