"""float32 models in float32: what SGLang computes with fewer bits on a GPU, put right for ours.

A float32 model is for comparisons, token by token, and an index score or an expert that changes sides changes the
answer. Three places keep 10 or 11 bits of 24: Triton multiplies float32 as tf32; SGLang's experts round to float16 what
they multiply; FlashInfer's router takes its sigmoid from a tanh that the GPU approximates.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from dsv32_plugin.sglang_adapter.arguments import attention_backends, model_config, of_process
from dsv32_plugin.sglang_adapter.names import BACKEND_NAME

if TYPE_CHECKING:
    from dsv32_plugin.core.config import DsaConfig


def multiply_exactly(options: Any) -> None:
    """Make Triton's products float32 in the processes that compute, which inherit the environment."""
    if options.device != "cpu" and model_config(options).dtype == torch.float32:
        os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")


def store_exactly(original: Callable[..., None], *args: Any, compute_type: Any, **kwargs: Any) -> None:
    """Goes around the launch of the experts' products, for which SGLang knows bfloat16 and else says float16."""
    import triton.language as tl

    multiplied = args[0]
    if multiplied.dtype == torch.float32 and BACKEND_NAME in attention_backends(of_process()):
        compute_type = tl.float32
    original(*args, compute_type=compute_type, **kwargs)


def routing(config: DsaConfig, bias_e: torch.Tensor) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """The router after its product, as SGLang calls one of a model's own (DeepSeek-V3 technical report, 12 to 16).

    Args:
        bias_e: [E] float32, takes part in the choice and not in the weights.

    Returns:
        A function of `gating_output` [T, E], `topk` and `renormalize` that gives the weights [T, K] float32 and the
        experts [T, K] int32. It runs on every device and can be captured in a graph.
    """

    def choose(
        hidden_states: torch.Tensor, gating_output: torch.Tensor, topk: int, renormalize: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scores_te = gating_output.float().sigmoid()
        ranked_tge = (scores_te + bias_e).unflatten(-1, (config.n_group, -1))
        best_tg = ranked_tge.topk(2).values.sum(-1)
        kept_tg = best_tg.topk(config.topk_group).indices
        dropped_tg = torch.ones_like(best_tg, dtype=torch.bool).scatter_(-1, kept_tg, False)
        experts_tk = ranked_tge.masked_fill(dropped_tg[..., None], -torch.inf).flatten(-2).topk(topk).indices
        weights_tk = scores_te.gather(-1, experts_tk)
        if renormalize:
            weights_tk = weights_tk / weights_tk.sum(-1, keepdim=True)
        return weights_tk, experts_tk.int()

    return choose
