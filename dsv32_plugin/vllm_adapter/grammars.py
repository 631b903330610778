"""Grammars of answers in vLLM: one backend for all of them, whatever the first request asks for.

vLLM's `auto` chooses a backend by what a request's schema says, and keeps that of the first request for all others,
which it may then be unable to serve. Ours is xgrammar; a schema beyond it is enforced but for what is beyond it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dsv32_plugin.core.chat import json_grammar
from dsv32_plugin.core.config import ARCHITECTURES
from dsv32_plugin.vllm_adapter import hooks
from dsv32_plugin.vllm_adapter.upstream import init_logger

if TYPE_CHECKING:
    from dsv32_plugin.vllm_adapter.upstream import (
        ChatCompletionRequest,
        ModelConfig,
        ResponsesRequest,
        SamplingParams,
        StructuredOutputsParams,
        VllmConfig,
    )

logger = init_logger("vllm.dsv32_plugin")
OPTION = "--structured-outputs-config.backend"


def choose_backend(vllm_config: VllmConfig) -> None:
    """xgrammar, unless the user has chosen another."""
    config = vllm_config.structured_outputs_config
    if config.backend == "auto":
        config.backend = "xgrammar"
    elif config.backend != "xgrammar":
        logger.warning(
            "dsv32: %s %s: forced calls, strict tools and response_format beside tools will be refused; "
            "they need xgrammar, which is the default",
            OPTION,
            config.backend,
        )


def hook() -> None:
    """Raises HookError where vLLM checks the grammars of requests otherwise than expected."""
    hooks.at("SamplingParams._validate_structured_outputs", _validate_around)


def _validate_around(
    original: Callable[..., None],
    params: SamplingParams,
    model_config: ModelConfig,
    structured_outputs_config: Any,
    *args: Any,
    **kwargs: Any,
) -> None:
    """Raise ValueError, which vLLM answers with status 400, for a grammar that the server's backend can't read."""
    wanted = params.structured_outputs
    ours = not set(ARCHITECTURES.values()).isdisjoint(model_config.architectures)
    if ours and wanted is not None and structured_outputs_config is not None:
        backend = structured_outputs_config.backend
        if backend != "xgrammar" and wanted.structural_tag is not None and "structures" not in wanted.structural_tag:
            raise ValueError(
                f"tool_choice, strict tools, response_format beside tools: expected {OPTION} xgrammar (the default), "
                f"which alone reads their grammar; this server was started with {backend}"
            )
        if backend == "xgrammar":
            _express(wanted)
    original(params, model_config, structured_outputs_config, *args, **kwargs)


def _express(wanted: StructuredOutputsParams) -> None:
    """Replace a schema that vLLM would not give xgrammar by a grammar of what it says otherwise."""
    from xgrammar import Grammar

    from dsv32_plugin.vllm_adapter.upstream import has_xgrammar_unsupported_json_features

    if wanted.json is None:
        return
    try:
        schema = json.loads(wanted.json) if isinstance(wanted.json, str) else wanted.json
        if not has_xgrammar_unsupported_json_features(schema):
            Grammar.from_json_schema(json.dumps(schema))
            return
    except json.JSONDecodeError:
        return  # vLLM's to refuse
    except (RuntimeError, RecursionError):
        pass
    wanted.grammar, wanted.json = json_grammar(schema).ebnf, None


def wanted_json(request: ChatCompletionRequest | ResponsesRequest) -> Any:
    """The JSON schema that the text of an answer must follow; None where it need not be JSON."""
    wanted = request.extract_structured_outputs()
    if wanted is None:
        return None
    if wanted.json is not None:
        return json.loads(wanted.json) if isinstance(wanted.json, str) else wanted.json
    return {"type": "object"} if wanted.json_object else None


def has_other_grammar(request: ChatCompletionRequest | ResponsesRequest) -> bool:
    """The request brings a grammar that is no schema: a regular expression, a choice, one of its own."""
    wanted = request.extract_structured_outputs()
    return wanted is not None and wanted.json is None and not wanted.json_object
