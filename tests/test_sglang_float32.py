"""float32 models are float32 with SGLang, too: what its kernels for a GPU round, as far as a CPU can show it."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest

pytest.importorskip("sglang")

import torch
import triton.language as tl
from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32MoE

from dsv32_plugin.core.config import DsaConfig
from dsv32_plugin.sglang_adapter import float32, upstream
from dsv32_plugin.sglang_adapter.names import BACKEND_NAME
from dsv32_plugin.surface import first_of
from dsv32_plugin.tools.tiny import TinySpec

pytestmark = pytest.mark.engine

TOKENS = 200
SPECS = {"grouped": TinySpec(), "ungrouped": TinySpec(n_group=1, topk_group=1)}


@pytest.mark.parametrize(
    ("device", "dtype", "expected"),
    [("cuda", torch.float32, "ieee"), ("cuda", torch.bfloat16, None), ("cpu", torch.float32, None)],
)
def test_triton_multiplies_float32(device: str, dtype: torch.dtype, expected: str | None) -> None:
    with patch.dict(os.environ):
        os.environ.pop("TRITON_F32_DEFAULT", None)
        multiply_exactly(device, dtype)
        assert os.environ.get("TRITON_F32_DEFAULT") == expected


def test_the_user_may_want_tf32() -> None:
    with patch.dict(os.environ, TRITON_F32_DEFAULT="tf32"):
        multiply_exactly("cuda", torch.float32)
        assert os.environ["TRITON_F32_DEFAULT"] == "tf32"


def multiply_exactly(device: str, dtype: torch.dtype) -> None:
    with patch.object(float32, "model_config", lambda options: SimpleNamespace(dtype=dtype)):
        float32.multiply_exactly(SimpleNamespace(device=device))


@pytest.mark.skipif(
    not hasattr(DeepseekV32MoE, "route_tokens_to_experts"), reason="a newer Transformers routes in another module"
)
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("name", SPECS)
def test_experts_are_those_of_hugging_face(name: str, renormalize: bool) -> None:
    config = DsaConfig.from_hf(SPECS[name].config())
    logits_te = torch.randn(TOKENS, config.n_routed_experts)
    bias_e = torch.randn(config.n_routed_experts) * 0.1
    weights_tk, experts_tk = float32.routing(config, bias_e)(
        torch.empty(TOKENS, 1), logits_te, config.num_experts_per_tok, renormalize
    )
    router = SimpleNamespace(
        gate=SimpleNamespace(e_score_correction_bias=bias_e),
        n_group=config.n_group,
        n_routed_experts=config.n_routed_experts,
        topk_group=config.topk_group,
        top_k=config.num_experts_per_tok,
        norm_topk_prob=renormalize,
        routed_scaling_factor=1.0,
    )
    truth_tk, true_weights_tk = DeepseekV32MoE.route_tokens_to_experts(router, logits_te)
    order, true_order = experts_tk.argsort(-1), truth_tk.argsort(-1)
    assert torch.equal(experts_tk.gather(-1, order).long(), truth_tk.gather(-1, true_order))
    torch.testing.assert_close(weights_tk.gather(-1, order), true_weights_tk.gather(-1, true_order), atol=0, rtol=1e-6)
    assert (weights_tk.dtype, experts_tk.dtype) == (torch.float32, torch.int32), "what SGLang's kernels read"


@pytest.mark.parametrize(
    ("dtype", "backend", "expected"),
    [
        pytest.param(torch.float32, BACKEND_NAME, tl.float32, id="float32"),
        pytest.param(torch.bfloat16, BACKEND_NAME, tl.bfloat16, id="bfloat16"),
        pytest.param(torch.float32, "triton", tl.float16, id="another-model"),
    ],
)
def test_products_of_experts_are_stored_as_they_are(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, backend: str, expected: Any
) -> None:
    monkeypatch.setattr(float32, "of_process", lambda: None)
    monkeypatch.setattr(float32, "attention_backends", lambda options: {backend})
    seen = []

    def launch(*args: Any, compute_type: Any, **kwargs: Any) -> None:
        seen.append(compute_type)

    sglang_says = tl.bfloat16 if dtype == torch.bfloat16 else tl.float16
    float32.store_exactly(launch, torch.empty(1, dtype=dtype), compute_type=sglang_says)
    assert seen == [expected]


def test_sglang_stores_float32_as_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once this fails the hook can go. From 0.5.16 on what is called has more parameters, and is read."""
    from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe

    if hasattr(fused_moe, "get_global_server_args"):
        assert stored_by_sglang(monkeypatch, torch.float32) == tl.float16
    else:
        said = "compute_type = tl.bfloat16 if hidden_states.dtype == torch.bfloat16 else tl.float16"
        assert said in inspect.getsource(fused_moe)


class Launched(Exception):
    """Ends a call of SGLang where the kernel would be launched."""


def stored_by_sglang(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> Any:
    """The type in which SGLang lets the products of experts be stored."""
    from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe

    def launch(*args: Any, compute_type: Any, **kwargs: Any) -> None:
        raise Launched(compute_type)

    args = SimpleNamespace(enable_fused_moe_sum_all_reduce=False)
    monkeypatch.setattr(fused_moe, "get_global_server_args", lambda: args)
    monkeypatch.setattr(fused_moe, "invoke_fused_moe_kernel", launch)
    x, up, down = torch.empty(1, 8, dtype=dtype), torch.empty(2, 8, 8, dtype=dtype), torch.empty(2, 8, 4, dtype=dtype)
    options: dict[str, Any] = dict.fromkeys(
        ("b1", "b2", "w1_scale", "w2_scale", "w1_zp", "w2_zp", "a1_scale", "a2_scale", "block_shape")
    )
    options |= dict.fromkeys(("routed_scaling_factor", "gemm1_alpha", "gemm1_limit"))
    options |= dict.fromkeys(("use_fp8_w8a8", "use_int8_w8a8", "use_int8_w8a16", "use_int4_w4a16"), False)
    options |= dict.fromkeys(("per_channel_quant", "no_combine", "inplace", "apply_router_weight_on_input"), False)
    ids = torch.zeros(1, 2, dtype=torch.int32)
    with pytest.raises(Launched) as launched:
        fused_moe._fused_moe_kernel_sequence(
            *(x, up, down, torch.empty(1, 2), ids, ids, ids, ids, {"BLOCK_SIZE_M": 16}, None, False),
            **options,
            activation="silu",
            is_gated=True,
            filter_expert=False,
        )
    return launched.value.args[0]


PRODUCT = """
import json
import torch
import triton.language as tl
from {module} import invoke_fused_moe_kernel as launch

torch.manual_seed(0)
tokens, width, outputs, rows = 5, 32, 64, 16
x, experts, weights = torch.randn(tokens, width), torch.randn(2, outputs, width), torch.rand(tokens, 2)
ids = torch.tensor([[0, 1]] * tokens, dtype=torch.int32)
order = torch.full((2, rows), 2 * tokens, dtype=torch.int32)
order[:, :tokens] = torch.arange(2 * tokens).view(tokens, 2).T
truth = torch.einsum("tk,enk->ten", x.double(), experts.double()) * weights[:, :, None]
errors = {}
for compute_type in (tl.float16, tl.float32):
    found = torch.empty(tokens, 2, outputs)
    launch(
        *(x, experts, None, found, None, None, None, weights, ids, order.flatten()),
        *(torch.tensor([0, 1], dtype=torch.int32), torch.tensor([2 * rows], dtype=torch.int32), True, 2),
        {"BLOCK_SIZE_M": rows, "BLOCK_SIZE_N": 32, "BLOCK_SIZE_K": 16, "GROUP_SIZE_M": 1},
        compute_type=compute_type,
        **dict.fromkeys(("use_fp8_w8a8", "use_int8_w8a8", "use_int8_w8a16", "use_int4_w4a16"), False),
        per_channel_quant=False,
    )
    errors[str(compute_type)] = ((found - truth).abs().max() / truth.abs().max()).item()
print(json.dumps(errors))
"""


def test_the_kernel_can_store_float32() -> None:
    """SGLang's kernel itself, in Triton's interpreter: it is the type that it is given which costs 13 bits."""
    module = first_of(*upstream.PLACES["invoke_fused_moe_kernel"].targets).rpartition(".")[0]
    program = PRODUCT.replace("{module}", module)
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout.splitlines()[-1])
    assert errors["fp32"] < 1e-6 < 1e-5 < errors["fp16"], errors
