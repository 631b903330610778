"""SGLang's linear layers and norms, as `core.layers.Layers` asks for them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from dsv32_plugin.core.layers import Ranks
from dsv32_plugin.sglang_adapter.upstream import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QuantizationConfig,
    ReplicatedLinear,
    RMSNorm,
    RowParallelLinear,
    SiluAndMul,
    get_parallel,
    tensor_model_parallel_all_gather,
)


class PackedLinear(ReplicatedLinear):
    """Several matrices over one input, whole on every rank.

    SGLang's merged linear layer refuses block-fp8 matrices whose height is no multiple of a block, even as the last.
    """

    def __init__(
        self, inputs: int, widths: Sequence[int], quant_config: QuantizationConfig | None, prefix: str
    ) -> None:
        super().__init__(inputs, sum(widths), bias=False, quant_config=quant_config, prefix=prefix)
        self.widths = list(widths)

    def load_part(self, parameter: Any, tensor: torch.Tensor, index: int) -> None:
        """Copy one matrix, or its block scales, to its rows."""
        is_scale = parameter.shape[0] != self.output_size
        rows_per_scale = self.quant_config.weight_block_size[0] if is_scale else 1
        starts = [sum(self.widths[:part]) for part in range(index + 1)]
        if any(start % rows_per_scale for start in starts):
            raise ValueError(f"widths {self.widths} do not begin at multiples of the scale block {rows_per_scale}")
        rows = -(-self.widths[index] // rows_per_scale)
        first = starts[index] // rows_per_scale
        if tuple(tensor.shape) != (rows, *parameter.shape[1:]):
            raise ValueError(f"expected {(rows, *parameter.shape[1:])}")
        parameter.data[first : first + rows].copy_(tensor)


class Float32Norm(RMSNorm):
    """SGLang's kernels of it take 16 bits only."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward_native(*args, **kwargs)


class SglangLayers:
    """Builds the layers of one model."""

    def __init__(self, quant_config: QuantizationConfig | None) -> None:
        self.quant_config = quant_config
        parallel = get_parallel()
        self.tp_rank, self.tp_size = parallel.tp_rank, parallel.tp_size
        self.ranks = None
        if self.tp_size > 1:
            self.ranks = Ranks(self.tp_rank, self.tp_size, partial(tensor_model_parallel_all_gather, dim=0))

    def replicated(self, inputs: int, outputs: int, prefix: str, *, quantised: bool = True) -> ReplicatedLinear:
        quant_config = self.quant_config if quantised else None
        return ReplicatedLinear(inputs, outputs, bias=False, quant_config=quant_config, prefix=prefix)

    def merged(self, inputs: int, widths: Sequence[int], prefix: str, *, quantised: bool = True) -> PackedLinear:
        return PackedLinear(inputs, widths, self.quant_config if quantised else None, prefix)

    def column(self, inputs: int, outputs: int, prefix: str) -> ColumnParallelLinear:
        return ColumnParallelLinear(inputs, outputs, bias=False, quant_config=self.quant_config, prefix=prefix)

    def gate_up(self, inputs: int, width: int, prefix: str) -> MergedColumnParallelLinear:
        return MergedColumnParallelLinear(
            inputs, [width, width], bias=False, quant_config=self.quant_config, prefix=prefix
        )

    def row(self, inputs: int, outputs: int, prefix: str, *, reduce: bool = True) -> RowParallelLinear:
        return RowParallelLinear(
            inputs, outputs, bias=False, quant_config=self.quant_config, prefix=prefix, reduce_results=reduce
        )

    def silu_and_mul(self) -> SiluAndMul:
        return SiluAndMul()

    def norm(self, size: int, eps: float) -> RMSNorm:
        return (Float32Norm if torch.get_default_dtype() == torch.float32 else RMSNorm)(size, eps=eps)
