"""vLLM's linear layers and norms, as `core.layers.Layers` asks for them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from dsv32_plugin.core.layers import Ranks
from dsv32_plugin.vllm_adapter.upstream import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    ReplicatedLinear,
    RMSNorm,
    RowParallelLinear,
    SiluAndMul,
    VllmConfig,
    get_tp_group,
)


class VllmLayers:
    """Builds the layers of one model."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        self.quant_config = vllm_config.quant_config
        group = get_tp_group()
        self.tp_rank, self.tp_size = group.rank_in_group, group.world_size
        self.ranks = None
        if self.tp_size > 1:
            self.ranks = Ranks(self.tp_rank, self.tp_size, partial(group.all_gather, dim=0))

    def replicated(self, inputs: int, outputs: int, prefix: str, *, quantised: bool = True) -> ReplicatedLinear:
        quant_config = self.quant_config if quantised else None
        return ReplicatedLinear(inputs, outputs, bias=False, quant_config=quant_config, prefix=prefix)

    def merged(
        self, inputs: int, widths: Sequence[int], prefix: str, *, quantised: bool = True
    ) -> MergedColumnParallelLinear:
        quant_config = self.quant_config if quantised else None
        return MergedColumnParallelLinear(
            inputs, list(widths), bias=False, quant_config=quant_config, prefix=prefix, disable_tp=True
        )

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
        return RMSNorm(size, eps=eps)
