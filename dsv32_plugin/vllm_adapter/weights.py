"""Where each tensor of a checkpoint goes in our models for vLLM, at the start and in updates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from dsv32_plugin.core import weights
from dsv32_plugin.core.checkpoint import PACKED_MODULES
from dsv32_plugin.core.config import DsaConfig
from dsv32_plugin.core.latent_up import LatentUpProjection
from dsv32_plugin.vllm_adapter.upstream import (
    MergedColumnParallelLinear,
    RoutedExperts,
    VllmConfig,
    default_weight_loader,
    finalize_layerwise_reload,
    get_layerwise_info,
)


class Loader:
    """`dsv32_plugin.core.weights.Loader` of a model of ours, made once the model is built.

    vLLM loads a model again layer by layer: it puts tensors without storage in the place of the parameters, loads a
    layer once all of its tensors have come, and copies the result to where the parameters were.
    """

    def __init__(self, model: nn.Module, config: DsaConfig, vllm_config: VllmConfig) -> None:
        self.checkpoint = weights.Loader(config, _targets(model))
        self._model_config = vllm_config.model_config
        self._update: object = None
        """What vLLM has kept of the model for the update that is under way."""

    def load(self, model: nn.Module, tensors: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the whole model at its start, then parts of it; returns the names of the loaded parameters.

        Raises:
            ValueError: see `core.weights.Loader`. An update that is refused is over, its parameters are back.
        """
        update = get_layerwise_info(model).kernel_tensors
        if update is not self._update:
            self._update = update
            self.checkpoint.forget_parts()
        try:
            # vLLM calls `eval` on a model that it has started.
            return self.checkpoint.load(tensors, whole=model.training)
        except BaseException:
            if update is not None:
                _give_up_update(model, self._model_config)
            raise


def _give_up_update(model: nn.Module, model_config: object) -> None:
    """Put the parameters of all layers that are not complete back, as they were."""
    for layer in model.modules():
        info = get_layerwise_info(layer)
        if info.can_load():
            info.load_numel, info.load_numel_total, info.loaded_weights = 0, 0, []
    finalize_layerwise_reload(model, model_config)


def _targets(model: nn.Module) -> Iterator[tuple[str, weights.Target]]:
    for prefix, module in model.named_modules():
        if isinstance(module, LatentUpProjection):
            yield from weights.latent_up_targets(prefix, module)
        elif isinstance(module, RoutedExperts):
            experts = prefix.removesuffix(".routed_experts")
            yield from weights.expert_targets(experts, module, module.global_num_experts, path=prefix)
        elif isinstance(module, MergedColumnParallelLinear):
            parts = PACKED_MODULES[prefix.rpartition(".")[2]]
            yield from weights.packed_targets(prefix, module, parts, _load_part)
        else:
            yield from weights.parameter_targets(prefix, module, default_weight_loader)


def _load_part(parameter: Any, tensor: torch.Tensor, index: int) -> None:
    parameter.weight_loader(parameter, tensor, index)
