"""SGLang's linear layers and norms, as `core.layers.Layers` asks for them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from dsv32_plugin.core.layers import Ranks
from dsv32_plugin.sglang_adapter import upstream
from dsv32_plugin.sglang_adapter.upstream import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QuantizationConfig,
    ReplicatedLinear,
    RMSNorm,
    RowParallelLinear,
    SiluAndMul,
    get_parallel,
    is_dp_attention_enabled,
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
    """Builds the layers of one model, cut over all ranks."""

    group = "tp"

    def __init__(self, quant_config: QuantizationConfig | None) -> None:
        self.quant_config = quant_config
        self.tp_rank, self.tp_size = self._place()
        self._cut: dict[str, Any] = {"tp_rank": self.tp_rank, "tp_size": self.tp_size}
        if upstream.names_groups():
            self._cut = {"parallel_group": self.group}
        self.ranks: Ranks | None = None

    def _place(self) -> tuple[int, int]:
        parallel = get_parallel()
        return parallel.tp_rank, parallel.tp_size

    def replicated(self, inputs: int, outputs: int, prefix: str, *, quantised: bool = True) -> ReplicatedLinear:
        quant_config = self.quant_config if quantised else None
        return ReplicatedLinear(inputs, outputs, bias=False, quant_config=quant_config, prefix=prefix)

    def merged(self, inputs: int, widths: Sequence[int], prefix: str, *, quantised: bool = True) -> PackedLinear:
        return PackedLinear(inputs, widths, self.quant_config if quantised else None, prefix)

    def column(self, inputs: int, outputs: int, prefix: str) -> ColumnParallelLinear:
        return ColumnParallelLinear(
            inputs, outputs, bias=False, quant_config=self.quant_config, prefix=prefix, **self._cut
        )

    def gate_up(self, inputs: int, width: int, prefix: str) -> MergedColumnParallelLinear:
        return MergedColumnParallelLinear(
            inputs, [width, width], bias=False, quant_config=self.quant_config, prefix=prefix, **self._cut
        )

    def row(self, inputs: int, outputs: int, prefix: str, *, reduce: bool = True) -> RowParallelLinear:
        return RowParallelLinear(
            inputs,
            outputs,
            bias=False,
            quant_config=self.quant_config,
            prefix=prefix,
            reduce_results=reduce,
            **self._cut,
        )

    def silu_and_mul(self) -> SiluAndMul:
        return SiluAndMul()

    def norm(self, size: int, eps: float) -> RMSNorm:
        return (Float32Norm if torch.get_default_dtype() == torch.float32 else RMSNorm)(size, eps=eps)


class AttentionLayers(SglangLayers):
    """Cut over the ranks that share sequences: all, or with data-parallel attention those of one share of the batch."""

    group = "attn_tp"

    def __init__(self, quant_config: QuantizationConfig | None) -> None:
        super().__init__(quant_config)
        if self.tp_size > 1:
            gather = partial(get_parallel().attn_tp_group.all_gather, dim=0)
            self.ranks = Ranks(self.tp_rank, self.tp_size, gather)

    def _place(self) -> tuple[int, int]:
        parallel = get_parallel()
        return parallel.attn_tp_rank, parallel.attn_tp_size

    def row(self, inputs: int, outputs: int, prefix: str, *, reduce: bool = True) -> RowParallelLinear:
        layer = super().row(inputs, outputs, prefix, reduce=reduce)
        layer.use_dp_attention_reduce = is_dp_attention_enabled()
        return layer


class WholeLayers(SglangLayers):
    """Whole on every rank."""

    group = "replicated"

    def _place(self) -> tuple[int, int]:
        return 0, 1
