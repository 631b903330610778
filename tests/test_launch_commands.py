"""What the engines' pages of DeepSeek-V3.2 and GLM-5 say to start on eight GPUs is taken by the engine and the plugin.

Pages: docs.sglang.io/docs/basic_usage/deepseek_v32 and the recipes of docs.vllm.ai, of November 2026. `dsv32 plan`
makes commands of the same kinds.
"""

from __future__ import annotations

import shlex
from types import SimpleNamespace
from typing import Any

import pytest

from dsv32_plugin.core.config import DsaConfig
from dsv32_plugin.tools.plan import CHIPS, MODELS, ways

SGLANG = (
    "--model deepseek-ai/DeepSeek-V3.2 --tp 8 --dp 8 --enable-dp-attention",
    "--model deepseek-ai/DeepSeek-V3.2 --tp 8 --ep 8",
    "--model deepseek-ai/DeepSeek-V3.2 --tp 8 --dp 8 --enable-dp-attention --speculative-algorithm EAGLE "
    "--speculative-num-steps 3 --speculative-eagle-topk 1 --speculative-num-draft-tokens 4",
    "--model deepseek-ai/DeepSeek-V3.2 --tp 8 --dp 8 --enable-dp-attention --tool-call-parser deepseekv32 "
    "--reasoning-parser deepseek-v3 --moe-a2a-backend deepep --enable-dp-lm-head --moe-dense-tp-size 1",
    "--model-path zai-org/GLM-5-FP8 --tp 8 --tool-call-parser glm47 --reasoning-parser glm45 "
    "--speculative-algorithm EAGLE --speculative-num-steps 3 --speculative-eagle-topk 1 "
    "--speculative-num-draft-tokens 4 --mem-fraction-static 0.85",
    "--model-path zai-org/GLM-5-FP8 --tp 16 --pp-size 2 --nnodes 4 --node-rank 0 --dist-init-addr 10.0.0.1:5000",
)
VLLM = (
    "deepseek-ai/DeepSeek-V3.2 --tensor-parallel-size 8 --enable-expert-parallel",
    "deepseek-ai/DeepSeek-V3.2 --data-parallel-size 8 --enable-expert-parallel",
    "deepseek-ai/DeepSeek-V3.2 -tp 8 --tokenizer-mode deepseek_v32 --tool-call-parser dsv32 --reasoning-parser dsv32 "
    "--enable-auto-tool-choice",
    "deepseek-ai/DeepSeek-V3.2 -tp 8 -pp 2",
    "zai-org/GLM-5-FP8 -tp 8 --tool-call-parser glm47 --reasoning-parser glm45 --enable-auto-tool-choice "
    "--speculative-config.method mtp --speculative-config.num_speculative_tokens 1",
)


def planned(engine: str) -> list[str]:
    """What `dsv32 plan` says to start, after the name of the command."""
    heads = {"vllm": "vllm serve ", "sglang": "python -m sglang.launch_server "}
    found = []
    for name, sizes in MODELS.values():
        for place in ((1, 8), (2, 8)):
            chosen = ways(DsaConfig.from_hf(sizes), name, CHIPS["H200"], *place, 65536, fp8=True)
            found += [way.command.removeprefix(heads[engine]) for way in chosen if way.engine == engine]
    return [command.replace("RANK", "0").replace("HOST", "10.0.0.1") for command in found]


@pytest.mark.parametrize("command", [*SGLANG, *planned("sglang")])
def test_sglang_takes_it(command: str) -> None:
    pytest.importorskip("sglang")
    import argparse
    import inspect

    from sglang.srt.server_args import ServerArgs

    from dsv32_plugin.sglang_adapter import guard

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    given = vars(parser.parse_args(shlex.split(command)))
    declared = inspect.signature(ServerArgs).parameters
    left_out: dict[str, Any] = {name: option.default for name, option in declared.items() if name not in given}
    guard.check_given(SimpleNamespace(**left_out, **given))


@pytest.mark.parametrize("command", [*VLLM, *planned("vllm")])
def test_vllm_takes_it(command: str) -> None:
    pytest.importorskip("vllm")
    from vllm.entrypoints.openai.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from dsv32_plugin.vllm_adapter.options import OPTIONS

    parser = make_arg_parser(FlexibleArgumentParser())
    found, nothing = parser.parse_args(shlex.split(command)), parser.parse_args([])
    refused = {name for judged in OPTIONS.values() if not judged.flag for name in judged.refused.split()}
    changed = {name for name, value in vars(found).items() if value != getattr(nothing, name)}
    assert len(changed) >= 2
    assert not changed & refused
