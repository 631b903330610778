"""The block-fp8 checkpoint format: e4m3 weights with one float32 scale for every block of rows and columns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch

SCALE_SUFFIX = "_scale_inv"
"""The scale of `name.weight` is stored as `name.weight_scale_inv`; despite its name it multiplies."""

E4M3_MAX = 448.0


def is_fp8(dtype: torch.dtype | str) -> bool:
    """Whether values of this type take a scale; float8_e8m0fnu is a scale itself."""
    return dtype in (torch.float8_e4m3fn, torch.float8_e4m3fnuz)


def scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int]:
    """Of the scales of a matrix [N, K]: the last blocks may be partial."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


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


class Halves:
    """The fp8 weights that are dequantised, and their scales: whichever comes first, together or in parts.

    At the start both come, and nothing is kept. An update that comes in parts may be given up and begun again: the
    latest of each half is kept, on the host, so that what is in effect is what came last, whatever the order.
    """

    def __init__(self, block: tuple[int, int], wanted: Callable[[str], bool]) -> None:
        self._block, self.wants = block, wanted
        self._latest: dict[str, torch.Tensor] = {}

    def forget(self) -> None:
        """Drop what an earlier update has left."""
        self._latest.clear()

    def dequantised(
        self, tensors: Iterable[tuple[str, torch.Tensor]], *, keep: bool
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Pass tensors on, with a wanted weight in place of its halves; all other tensors pass at once."""
        for name, tensor in tensors:
            is_scale = name.endswith(SCALE_SUFFIX)
            weight_name = name.removesuffix(SCALE_SUFFIX)
            if not self.wants(weight_name) or not (is_scale or is_fp8(tensor.dtype)):
                yield name, tensor
                continue
            partner_name = weight_name if is_scale else name + SCALE_SUFFIX
            partner = self._latest.get(partner_name) if keep else self._latest.pop(partner_name, None)
            if keep or partner is None:
                # A bucket's memory may be written again once the call returns.
                self._latest[name] = tensor.to("cpu", copy=True) if keep else tensor
            if partner is not None:
                partner = partner.to(tensor.device)
                weight, scale = (partner, tensor) if is_scale else (tensor, partner)
                yield weight_name, dequantise(weight, scale, self._block)

    def without_partner(self) -> list[str]:
        """Names of the halves that are missing."""
        names = self._latest.keys()
        partners = [
            name.removesuffix(SCALE_SUFFIX) if name.endswith(SCALE_SUFFIX) else name + SCALE_SUFFIX for name in names
        ]
        return sorted(set(partners) - names)
