"""From the parts of a stored matrix to its numbers, in float32; `core.quantisation` has the formats."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import singledispatch

import torch

from dsv32_plugin.core import block_fp8, quantisation
from dsv32_plugin.core.checkpoint import Matrix
from dsv32_plugin.core.quantisation import FLOAT, FP8, INT8, PACKED, POWER, SIZES, WEIGHT, Scheme

Parts = Mapping[str, torch.Tensor]
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where value i of eight is found among the bits of an int32."""

_KINDS = {
    **dict.fromkeys((torch.float64, torch.float32, torch.bfloat16, torch.float16), FLOAT),
    torch.float8_e8m0fnu: POWER,
    torch.float8_e4m3fn: FP8,
    torch.float8_e4m3fnuz: FP8,
    torch.int8: INT8,
    torch.int32: PACKED,
    torch.int64: SIZES,
}


def kind_of(dtype: torch.dtype) -> str:
    """What the elements are; its own name for a type that no tensor of a checkpoint has."""
    return _KINDS.get(dtype, str(dtype))


@singledispatch
def dequantise(scheme: Scheme, parts: Parts, rows: int, columns: int) -> torch.Tensor:
    """The matrix [rows, columns] in float32, by the formula of its scheme."""
    raise NotImplementedError(f"{type(scheme).__name__}: expected a scheme with a formula here")


@dequantise.register
def _block_fp8(scheme: quantisation.BlockFp8, parts: Parts, rows: int, columns: int) -> torch.Tensor:
    return block_fp8.dequantise(parts["weight"], parts[scheme.scale], scheme.block)


@dequantise.register
def _rows(scheme: quantisation.Rows, parts: Parts, rows: int, columns: int) -> torch.Tensor:
    return parts["weight"].float() * parts["weight_scale"].float()


@dequantise.register
def _packed(scheme: quantisation.Packed, parts: Parts, rows: int, columns: int) -> torch.Tensor:
    value_nk = _unpack(parts["weight_packed"], scheme.bits)[:, :columns].float()
    if scheme.symmetric:
        zero_ng = torch.full((rows, 1), float(1 << (scheme.bits - 1)), device=value_nk.device)
    else:
        zero_ng = _unpack(parts["weight_zero_point"].T, scheme.bits).T[:rows].float()
    scale_ng = parts["weight_scale"].float()
    groups_k = parts["weight_g_idx"].long() if scheme.ordered else _group_of(columns, scheme.group, value_nk.device)
    zero_nk = zero_ng if scheme.symmetric else zero_ng[:, groups_k]
    return (value_nk - zero_nk) * scale_ng[:, groups_k]


@dequantise.register
def _awq(scheme: quantisation.Awq, parts: Parts, rows: int, columns: int) -> torch.Tensor:
    value_kn = _unpack(parts["qweight"], scheme.bits, AWQ_ORDER).float()
    zero_gn = _unpack(parts["qzeros"], scheme.bits, AWQ_ORDER).float()
    groups_k = _group_of(columns, scheme.group, value_kn.device)
    return ((value_kn - zero_gn[groups_k]) * parts["scales"].float()[groups_k]).T.contiguous()


@dequantise.register
def _gptq(scheme: quantisation.Gptq, parts: Parts, rows: int, columns: int) -> torch.Tensor:
    value_kn = _unpack(parts["qweight"].T, scheme.bits).T.float()
    zero_gn = _unpack(parts["qzeros"], scheme.bits).float() + scheme.offset
    groups_k = parts["g_idx"].long()
    return ((value_kn - zero_gn[groups_k]) * parts["scales"].float()[groups_k]).T.contiguous()


def _group_of(columns: int, group: int, device: torch.device) -> torch.Tensor:
    return torch.arange(columns, device=device) // (group or columns)


def _unpack(packed_rx: torch.Tensor, bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """[R, X] int32 -> [R, X * 32 / bits], unsigned, the lowest bits first or in the given order."""
    shifts_f = torch.arange(0, 32, bits, device=packed_rx.device)
    if order is not None:
        shifts_f = shifts_f[list(order)]
    return ((packed_rx.unsqueeze(-1).long() >> shifts_f) & ((1 << bits) - 1)).flatten(1)


class Gatherer:
    """The matrices that are dequantised: their parts, whichever comes first, together or one by one.

    At the start all come, and nothing is kept. An update that comes in parts may be given up and begun again: the
    latest of each part is kept, on the host, so that what is in effect is what came last, whatever the order.

    Args:
        wanted: module -> its matrix.
    """

    def __init__(self, wanted: Mapping[str, Matrix]) -> None:
        self._wanted = wanted
        self._latest: dict[str, torch.Tensor] = {}

    def __contains__(self, module: str) -> bool:
        return module in self._wanted

    def forget(self) -> None:
        """Drop what an earlier update has left."""
        self._latest.clear()

    def dequantised(
        self, tensors: Iterable[tuple[str, torch.Tensor]], *, keep: bool
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Pass tensors on, with a wanted weight in place of its parts; all other tensors pass at once."""
        for name, tensor in tensors:
            module, _, suffix = name.rpartition(".")
            matrix = self._wanted.get(module)
            names = {} if matrix is None else matrix.parts(module)
            if matrix is None or name not in names or (suffix == WEIGHT and kind_of(tensor.dtype) == FLOAT):
                yield name, tensor
                continue
            # A bucket's memory may be written again once the call returns.
            self._latest[name] = tensor.to("cpu", copy=True) if keep else tensor
            if names.keys() <= self._latest.keys():
                take = self._latest.get if keep else self._latest.pop
                parts = {part.rpartition(".")[2]: take(part).to(tensor.device) for part in names}  # type: ignore[union-attr]
                yield f"{module}.{WEIGHT}", dequantise(matrix.scheme, parts, matrix.rows, matrix.columns)

    def incomplete(self) -> list[str]:
        """Names of the parts that are missing where others have come."""
        modules = {name.rpartition(".")[0] for name in self._latest}
        needed = {name for module in modules for name in self._wanted[module].parts(module)}
        return sorted(needed - self._latest.keys())
