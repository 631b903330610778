"""Requests that SGLang would hand on as they are, and by which a process of the model would end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from dsv32_plugin.sglang_adapter import arguments, gateway
from dsv32_plugin.sglang_adapter.names import MODELS

if TYPE_CHECKING:
    from dsv32_plugin.sglang_adapter.upstream import GenerateReqInput, TokenizerManager

RETURNED = ("return_indexer_topk", "return_routed_experts")
"""What a request may ask for where the server was started to keep it. SGLang returns nothing where it was not."""
CHECKED = "dsv32_checked_sampling"
"""Attribute of a request whose parameters are right."""


def validate_around(
    original: Callable[..., None], manager: TokenizerManager, request: GenerateReqInput, input_ids: list[int] | None
) -> None:
    """Raise ValueError, which SGLang answers with status 400, where it does so itself or a check of ours fails."""
    try:
        original(manager, request, input_ids)
        _check(manager, request, input_ids)
    except ValueError as error:
        gateway.refuse(error)
        raise


def _check(manager: TokenizerManager, request: GenerateReqInput, input_ids: list[int] | None) -> None:
    if arguments.architecture(manager.model_config) not in MODELS:
        return
    size = manager.model_config.vocab_size
    if input_ids is not None:
        if not input_ids:
            raise ValueError("input_ids: expected at least one token id, got none")
        _check_tokens("input_ids", input_ids, size)
    stop_ids = request.sampling_params.get("stop_token_ids") or []
    if not isinstance(stop_ids, list) or not all(isinstance(token, int) for token in stop_ids):
        raise ValueError(f"stop_token_ids: expected a list of token ids, got {stop_ids!r}")
    _check_tokens("stop_token_ids", stop_ids, size)
    if (request.top_logprobs_num or 0) > size:
        raise ValueError(f"top_logprobs_num: expected at most {size}, got {request.top_logprobs_num}")
    check_sampling(manager, request)
    for field in RETURNED:
        if getattr(request, field, False) and not getattr(manager.server_args, f"enable_{field}"):
            option = f"--enable-{field.replace('_', '-')}"
            raise ValueError(f"{field}: expected false, got true; start the server with {option}")
    overrides = request.positional_embed_overrides
    if overrides is not None and not hasattr(overrides, "positions"):
        raise ValueError(f"positional_embed_overrides: expected SGLang's own object, got {type(overrides).__name__}")


def check_sampling(manager: TokenizerManager, request: GenerateReqInput) -> None:
    """Raise ValueError as SGLang does later, when a stream has begun with status 200. A request is looked at once."""
    if getattr(request, CHECKED, False):
        return
    parameters = {**(manager.preferred_sampling_params or {}), **request.sampling_params}
    sampling = manager.sampling_params_class(**parameters)
    sampling.normalize(manager.tokenizer)
    sampling.verify(manager.model_config.vocab_size)
    setattr(request, CHECKED, True)


def _check_tokens(name: str, ids: Sequence[int], size: int) -> None:
    for extreme in (min(ids), max(ids)) if ids else ():
        if not 0 <= extreme < size:
            raise ValueError(f"{name}: expected token ids from 0 to {size - 1}, got {extreme}")
