"""The plugin's own layer, `core.attention.DsaAttention` on torch's linear layers, as a side of a measurement."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch

from dsv32_plugin import kernels
from dsv32_plugin.benchmarks.clock import DEVICE, Launch
from dsv32_plugin.benchmarks.layer_inputs import (
    ATTENTION_ERROR,
    PAGE,
    TOPK,
    Inputs,
    Side,
    attend_exactly,
    check_close,
    check_selection,
    index_cache_fp8,
    latent_cache_bf16,
    latent_cache_fp8,
    slots_of,
)
from dsv32_plugin.benchmarks.layer_record import ATTENTION, INDEXER, NORMS, PROJECTIONS, UP
from dsv32_plugin.benchmarks.sizes import REAL
from dsv32_plugin.core.attention import DsaAttention, Shared
from dsv32_plugin.core.config import DsaConfig
from dsv32_plugin.core.latent_up import LatentUpProjection
from dsv32_plugin.core.layers import Ranks, TorchLayers
from dsv32_plugin.core.planner import Planner
from dsv32_plugin.core.plans import Dense, Expanded, Masked, Plan, Staged, expanded
from dsv32_plugin.core.policy import Policy
from dsv32_plugin.core.step import LayerCaches, Step
from dsv32_plugin.kernels.formulas import from_mask
from dsv32_plugin.kernels.limits import mask_words
from dsv32_plugin.kernels.ops.select_topk.reference import positions_to_slots
from dsv32_plugin.kernels.runtime.dispatch import force

FP8_STEP = 2.0**-3
"""Relative: as far apart are two neighbours of e4m3 at most, where a value is rounded to one or to the other."""
Module = TypeVar("Module", bound=torch.nn.Module)


@dataclass
class Seen:
    """What went into the operations of a run and came out of them, and how far it goes."""

    last: str = ATTENTION
    q_thd: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    index_q_tid: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    index_weights_ti: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    values_thv: torch.Tensor = field(default_factory=lambda: torch.empty(0))


@dataclass(frozen=True)
class Until(Plan):
    """A plan whose operations after `seen.last` are left out; the products around them are not."""

    plan: Plan
    seen: Seen

    @property
    def selects(self) -> bool:  # type: ignore[override]
        return self.plan.selects

    def select(
        self,
        q_tid: torch.Tensor,
        weights_ti: torch.Tensor,
        index_cache: torch.Tensor,
        slots_tk: torch.Tensor,
        ranks: Ranks | None = None,
    ) -> None:
        self.seen.index_q_tid, self.seen.index_weights_ti = q_tid, weights_ti
        if self.seen.last != NORMS:
            self.plan.select(q_tid, weights_ti, index_cache, slots_tk, ranks)

    def values(
        self,
        up: LatentUpProjection,
        q_thd: torch.Tensor,
        latent_cache: torch.Tensor,
        slots_tk: torch.Tensor | None,
        scale: float,
        ready: Callable[[], None],
    ) -> torch.Tensor:
        self.seen.q_thd = q_thd
        if self.seen.last == ATTENTION:
            self.seen.values_thv = self.plan.values(up, q_thd, latent_cache, slots_tk, scale, ready)
            return self.seen.values_thv
        ready()
        if isinstance(self.plan, Expanded | Masked):
            if self.seen.last == UP:
                for chunk in self.step.prefill_chunks:
                    for _ in expanded(up, chunk, latent_cache, q_thd.dtype):
                        pass
            return q_thd.new_empty(*q_thd.shape[:2], up.value_dim)
        return up.values(up.absorb(q_thd[..., : up.nope]))


class UntilPlanner(Planner):
    """Plans as the model does, and leaves out what comes after `seen.last`."""

    def __init__(self, heads: int, seen: Seen, *, dense: bool) -> None:
        super().__init__(TOPK, heads, Policy.from_settings())
        self.seen, self._dense = seen, dense

    def _choose(self, step: Step, latents: torch.dtype, dtype: torch.dtype) -> Plan:
        plan = Dense(step, self.policy) if self._dense else super()._choose(step, latents, dtype)
        return Until(step, self.policy, plan, self.seen)


class GivenUp(LatentUpProjection):
    """The products around the attention, given; keeps what was attended to."""

    def __init__(self, config: DsaConfig, heads: int, tokens: int) -> None:
        super().__init__(config, heads, 0)
        self.q_latent_thc = torch.randn(tokens, heads, config.kv_lora_rank)
        self.out_thc = torch.empty(0)
        self._values_thv = torch.randn(tokens, heads, config.v_head_dim)

    def absorb(self, q_thd: torch.Tensor) -> torch.Tensor:
        return self.q_latent_thc

    def values(self, out_thc: torch.Tensor) -> torch.Tensor:
        self.out_thc = out_thc
        return self._values_thv


class Given:
    """The projections of a layer, given."""

    def __init__(self, layer: DsaAttention, hidden_th: torch.Tensor) -> None:
        self._weights_ti, self._projected = layer.index_weights(hidden_th), layer.project(hidden_th)
        q_a_tl = self._projected[0].contiguous()
        self._index_query_tx, self._query_tx = layer.index_query(q_a_tl), layer.query(q_a_tl)
        self._unrotated_tx = self._query_tx.clone()
        self.q_a_tl = q_a_tl

    def restore(self) -> None:
        """The layer rotates the query where it is."""
        self._query_tx.copy_(self._unrotated_tx)

    def index_weights(self, hidden_th: torch.Tensor) -> torch.Tensor:
        return self._weights_ti

    def project(self, hidden_th: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        return self._projected

    def index_query(self, q_a_tl: torch.Tensor) -> torch.Tensor:
        return self._index_query_tx

    def query(self, q_a_tl: torch.Tensor) -> torch.Tensor:
        self.q_a_tl = q_a_tl
        return self._query_tx

    def output(self, values_tv: torch.Tensor) -> torch.Tensor:
        return values_tv


class OurLayer(Side):
    """The layer as it serves, to its end or as far as an operation.

    Args:
        inputs: the step. What the layer computes with is projected from its hidden states.
        products: run the layer's projections; else they are given.
    """

    whose = "dsv32-plugin"
    dense = False

    def __init__(self, inputs: Inputs, *, products: bool = True) -> None:
        self.inputs, step = inputs, inputs.step
        self.seen = Seen()
        self.batch, self.caches = inputs.batch(), self._make_caches(step.sequences * step.length // PAGE)
        self._planner = UntilPlanner(step.heads, self.seen, dense=self.dense)
        self.layer = self._make_layer()
        self.slots_tk = torch.full((step.tokens, TOPK), -1, dtype=torch.int32, device=DEVICE)
        planned = self._planner.plan(self.batch, self.caches.latents.dtype, torch.bfloat16)
        assert isinstance(planned, Until)
        self.plan = planned.plan
        self._given: Given | None = None
        if not products:
            assert not isinstance(self.plan, Expanded | Masked), "latents are expanded by a product"
            self._given = Given(self.layer, inputs.hidden)
            self.layer.kv_up = self._built(lambda config: GivenUp(config, step.heads, step.tokens))

    def _make_caches(self, pages: int) -> LayerCaches:
        return LayerCaches(latent_cache_fp8(pages), index_cache_fp8(pages))

    def _make_layer(self) -> DsaAttention:
        shared = Shared(self.inputs.rope_table, self._planner, self)
        number = 1 if self.dense else 0
        layer = self._built(lambda config: DsaAttention(config, TorchLayers(), number, shared, "layer"))
        for parameter in layer.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
        return layer

    def _built(self, build: Callable[[DsaConfig], Module]) -> Module:
        """In bfloat16, of a model whose first layer selects and whose second shares that selection."""
        step = self.inputs.step
        sizes = replace(REAL, hidden_size=step.hidden, num_attention_heads=step.heads, index_topk_pattern="FS")
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device(DEVICE):
                return build(DsaConfig.from_hf(sizes.config())).requires_grad_(False)
        finally:
            torch.set_default_dtype(before)

    def current(self, layer: int) -> tuple[Step, LayerCaches]:
        return self.batch, self.caches

    def done(self, layer: int) -> None:
        """Nothing is kept for anyone."""

    @property
    def operations(self) -> list[str]:
        first = [] if self._given else [PROJECTIONS]
        selects = [INDEXER] if self.plan.selects else []
        expands = [UP] if isinstance(self.plan, Expanded | Masked) else []
        return [*first, NORMS, *selects, *expands, ATTENTION]

    def through(self, last: int) -> Launch:
        operation = self.operations[last]
        if operation == PROJECTIONS:
            return self._project

        def run() -> None:
            self.seen.last = operation
            self._attend()

        return run

    def _attend(self) -> None:
        inputs, layer = self.inputs, self.layer
        if self._given is None:
            layer(inputs.positions, inputs.hidden, self.slots_tk)
        else:
            layer.attend(self.batch, inputs.positions, inputs.hidden, self.slots_tk, self.caches, self._given)

    def _project(self) -> None:
        """The products of the layer alone."""
        layer, hidden_th, up = self.layer, self.inputs.hidden, self.layer.kv_up
        if self.plan.selects:
            layer.index_weights(hidden_th)
        q_a_tl = layer.project(hidden_th)[0].contiguous()
        if self.plan.selects:
            layer.index_query(q_a_tl)
        q_thd = layer.query(q_a_tl).unflatten(-1, (layer.num_heads, -1))
        values_thv = q_thd[..., : up.value_dim].contiguous()
        if not isinstance(self.plan, Expanded | Masked):
            values_thv = up.values(up.absorb(q_thd[..., : up.nope]))
        layer.output(values_thv.flatten(1))

    def check(self) -> None:
        self._check_norms()
        super().check()

    def _check_norms(self) -> None:
        """All that is normalised, rotated and written, against the references."""
        run = self.through(self.operations.index(NORMS))
        got = self._normed(run)
        with force("reference"):
            want = self._normed(run)
        for name, value in want.items():
            check_close(got[name], value, name, FP8_STEP if value.dtype is torch.float64 else ATTENTION_ERROR)

    def _normed(self, run: Launch) -> dict[str, torch.Tensor]:
        """What is there after a run, by name; what is rounded to fp8 in float64, all else in float32."""
        if self._given is not None:
            self._given.restore()
        run()
        seen, inputs, caches = self.seen, self.inputs, self.caches
        pages, page_t = (inputs.slots // PAGE).unique(return_inverse=True)
        rows_t = page_t * PAGE + inputs.slots % PAGE
        table, count = pages.int()[None], len(pages) * PAGE
        lengths = torch.tensor([0, count], dtype=torch.int32, device=DEVICE)
        with force("reference"):
            latents = kernels.gather_latents(caches.latents, table, lengths, count, dtype=torch.float32)[rows_t]
        values, rope_keys = latents.split([self.layer.latent, self.layer.rope], 1)
        found = {"queries": seen.q_thd.float(), "rope keys": rope_keys, "latents": values.double()}
        if self._given is not None:
            found["normalised queries"] = self._given.q_a_tl.float()
        if self.plan.selects:
            found["index queries"] = seen.index_q_tid.double() * seen.index_weights_ti.double()[..., None]
        if caches.index_keys is not None:
            with force("reference"):
                keys, scale = kernels.gather_index_keys(caches.index_keys, table, lengths, count)
            assert scale is not None
            found["index keys"] = (keys.view(torch.float8_e4m3fn).double() * scale.double()[:, None])[rows_t]
        return {name: value.clone() for name, value in found.items()}

    def check_token(self, token: int, table: torch.Tensor, visible: int) -> None:
        """The selection, and what was attended to: in float32 from the query and the cache, absorbed."""
        seen, up = self.seen, self.layer.kv_up
        slots = slots_of(table, visible)
        if self.plan.selects:
            slots = self._slots(token)
            query = seen.index_q_tid[token], seen.index_weights_ti[token]
            assert self.caches.index_keys is not None
            check_selection(f"token {token}", self.caches.index_keys, *query, table, visible, slots)
        q_nope_hd, q_rope_hr = seen.q_thd[token].float().split([up.nope, up.rope], -1)
        if isinstance(up, GivenUp):
            q_latent_hc = up.q_latent_thc[token]
        else:
            q_latent_hc = torch.einsum("hd,hdc->hc", q_nope_hd, up.w_uk_hdc.float())
        query = q_latent_hc[None].float(), q_rope_hr[None]
        out_thc, _ = attend_exactly(*query, self.caches.latents, slots[None].int(), self.layer.scale)
        if isinstance(up, GivenUp):
            check_close(up.out_thc[token], out_thc[0])
        else:
            check_close(seen.values_thv[token], torch.einsum("hc,hcv->hv", out_thc[0], up.w_uv_hcv.float()))

    def _slots(self, token: int) -> torch.Tensor:
        """What the token selected, in the cache."""
        slots_tk = self.slots_tk
        if isinstance(self.plan, Masked):
            positions = from_mask(slots_tk[token, : mask_words(self.inputs.step.length)][None])[0].nonzero()
            table = self.inputs.block_table[int(self.batch.seq_t[token])]
            return (table[positions // PAGE] * PAGE + positions % PAGE).squeeze(1)
        if isinstance(self.plan, Staged):
            (chunk,) = self.batch.prefill_chunks
            # One sequence: a slot of the copy is a position.
            slots_tk = positions_to_slots(slots_tk, self.inputs.block_table, chunk.seq_t, PAGE)
        return slots_tk[token][slots_tk[token] >= 0]


class DenseLayer(OurLayer):
    """The same without an indexer, over every key of a cache in bfloat16."""

    whose = "dsv32-plugin's dense_mla"
    dense = True

    def _make_caches(self, pages: int) -> LayerCaches:
        return LayerCaches(latent_cache_bf16(pages), None)
