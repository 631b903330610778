"""A KV connector for vLLM that works layer by layer: a prompt's whole pages go to files, and come back from them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata

from dsv32_plugin.kernels.cache_layout import PAGE_SIZE


@dataclass
class Transfers(KVConnectorMetadata):
    """Of one step: folders, and the pages on the device that belong to them."""

    loads: list[tuple[Path, list[int]]] = field(default_factory=list)
    saves: list[tuple[Path, list[int]]] = field(default_factory=list)


class PageStore(KVConnectorBase_V1):
    """Extra config: `folder`. Prompts must be prefilled in one step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.folder = Path(self._kv_transfer_config.get_from_extra_config("folder", None))
        self.kv_caches: dict[str, torch.Tensor] = {}
        self.loading: set[str] = set()

    # In the scheduler:

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        prompt = request.prompt_token_ids
        found = _whole_pages(prompt) * PAGE_SIZE if self._place(prompt).exists() else 0
        return max(0, found - num_computed_tokens), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if num_external_tokens:
            self.loading.add(request.request_id)

    def build_connector_meta(self, scheduler_output: Any) -> Transfers:
        transfers = Transfers()
        for request in scheduler_output.scheduled_new_reqs:
            kind = transfers.loads if request.req_id in self.loading else transfers.saves
            prompt = request.prompt_token_ids
            kind.append((self._place(prompt), request.block_ids[0][: _whole_pages(prompt)]))
        return transfers

    # In the worker:

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self.kv_caches = kv_caches

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None: ...

    def wait_for_layer_load(self, layer_name: str) -> None:
        for place, pages in self._get_connector_metadata().loads:
            self.kv_caches[layer_name][pages] = torch.load(place / layer_name)

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        for place, pages in self._get_connector_metadata().saves:
            place.mkdir(exist_ok=True)
            torch.save(kv_layer[pages].clone(), place / layer_name)

    def wait_for_save(self) -> None: ...

    def _place(self, prompt: Sequence[int]) -> Path:
        return self.folder / hashlib.sha256(repr(list(prompt)).encode()).hexdigest()


def _whole_pages(prompt: Sequence[int]) -> int:
    """Without the last token, which is computed in any case."""
    return (len(prompt) - 1) // PAGE_SIZE
