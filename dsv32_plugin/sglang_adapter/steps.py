"""Which step SGLang runs, and where a layer's caches are."""

from __future__ import annotations

from dsv32_plugin.core.config import DsaConfig
from dsv32_plugin.core.step import LayerCaches, Step
from dsv32_plugin.sglang_adapter.upstream import get_attn_backend


class SglangSteps:
    """The `StepSource` of one model: the attention backend in use describes the step and holds the pool."""

    def __init__(self, config: DsaConfig) -> None:
        self._config = config

    def current(self, layer: int) -> tuple[Step, LayerCaches]:
        backend = get_attn_backend()
        caches = backend.token_to_kv_pool.layer_caches(layer, self._config.selects(layer))
        return backend.forward_metadata, caches

    def done(self, layer: int) -> None:
        """The pool waits before, and transfers whole pages between steps."""
