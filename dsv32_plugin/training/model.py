"""DeepSeek-V3.2's architecture as a readable torch model that trains: MLA, indexer, experts, one MTP layer.

In float32 it computes what Hugging Face's `DeepseekV32ForCausalLM` does, and it has what training needs: attention may
be dense, the selection can be exchanged, selection and routing of a rollout can be replayed, and a layer can report its
attention and its index scores for chosen queries.

Shapes: B sequences, T tokens (queries), S keys (S = T), H heads, I index heads, D index width, Q probed queries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from dsv32_plugin.core.config import DsaConfig
from dsv32_plugin.core.rope import rope_table, softmax_scale
from dsv32_plugin.training.replay import Replay

CHUNK_ELEMENTS = 1 << 29
"""How many products of query, key and index head may exist at once."""


class IndexInputs(NamedTuple):
    """What the indexer computes of a layer's tokens: scores are sum_i w[t, i] relu(q[t, i] . k[s])."""

    q_btid: torch.Tensor
    k_bsd: torch.Tensor
    w_bti: torch.Tensor


Select = Callable[[IndexInputs], torch.Tensor]
"""From a layer's index inputs to the keys that each query attends to: [B, T, S] bool, within the causal ones."""


@dataclass(frozen=True)
class Probe:
    """What one layer did for the probed queries."""

    attention_bhqs: torch.Tensor
    """float32 weights of the attention that ran (dense, or over the selected keys), without a gradient."""
    scores_bqs: torch.Tensor
    """float32 index scores, with a gradient to the indexer only."""
    visible_bqs: torch.Tensor
    """Which keys the attention could see."""


@dataclass(frozen=True)
class Output:
    hidden: torch.Tensor
    """[B, T, hidden] after the last norm: `model.head(hidden[i])` predicts token i + 1."""
    mtp_hidden: torch.Tensor | None
    """[B, T - 1, hidden]: `model.head(mtp_hidden[i])` predicts token i + 2 from hidden[i] and token i + 1."""
    probes: list[Probe]
    """One for each layer, the MTP layer last, if queries were probed."""


class RmsNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps).to(x.dtype)


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


def rope(x: torch.Tensor, cos_sin: torch.Tensor, *, interleaved: bool) -> torch.Tensor:
    """Rotate the last dimension (R wide) by cos | sin [..., R]."""
    cos, sin = cos_sin.to(x.dtype).chunk(2, -1)
    if interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class Indexer(nn.Module):
    """The lightning indexer (equation 1)."""

    def __init__(self, config: DsaConfig) -> None:
        super().__init__()
        self.heads, self.dim = config.index_n_heads, config.index_head_dim
        self.rope_dim = config.qk_rope_head_dim
        self.wq_b = linear(config.q_lora_rank, self.heads * self.dim)
        self.wk = linear(config.hidden_size, self.dim)
        self.k_norm = nn.LayerNorm(self.dim, eps=1e-6)
        self.weights_proj = linear(config.hidden_size, self.heads)

    def forward(self, x: torch.Tensor, q_latent: torch.Tensor, cos_sin: torch.Tensor) -> IndexInputs:
        """The input is detached: the language model's loss never reaches the indexer, nor the indexer's the model."""
        x, q_latent = x.detach(), q_latent.detach()
        q = self.wq_b(q_latent).unflatten(-1, (self.heads, self.dim))
        k = self.k_norm(self.wk(x).float()).to(q.dtype)
        q = self._rope(q, cos_sin.unsqueeze(1))
        k = self._rope(k, cos_sin)
        w = self.weights_proj(x).float() * (self.dim**-0.5 * self.heads**-0.5)
        return IndexInputs(q, k, w)

    def _rope(self, x: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
        turned = rope(x[..., : self.rope_dim], cos_sin, interleaved=False)
        return torch.cat((turned, x[..., self.rope_dim :]), -1)


def index_scores(q_btid: torch.Tensor, k_bsd: torch.Tensor, w_bti: torch.Tensor) -> torch.Tensor:
    """[B, T, S] float32: sum_i w[t, i] relu(q[t, i] . k[s]) (equation 1)."""
    dots = torch.einsum("btid,bsd->btis", q_btid, k_bsd).relu()
    return torch.einsum("bti,btis->bts", w_bti.to(dots.dtype), dots).float()


def causal(tokens: int, device: torch.device) -> torch.Tensor:
    return torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()


@torch.no_grad()
def top_k(index: IndexInputs, k: int) -> torch.Tensor:
    """The selection that is served: the k best-scored earlier keys; all of them while there are no more than k."""
    batch, tokens, heads, _ = index.q_btid.shape
    chosen = causal(tokens, index.q_btid.device).repeat(batch, 1, 1)
    step = max(64, CHUNK_ELEMENTS // (batch * heads * tokens))
    for begin in range(k, tokens, step):
        end = min(begin + step, tokens)
        keys = slice(0, end)
        rows = slice(begin, end)
        scores = index_scores(index.q_btid[:, rows], index.k_bsd[:, keys], index.w_bti[:, rows])
        scores.masked_fill_(~chosen[:, rows, keys], float("-inf"))
        best = scores.topk(k, dim=-1).indices
        chosen[:, rows, keys] = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)
    return chosen


def _replayed(keys_bts: torch.Tensor, index: IndexInputs) -> torch.Tensor:
    return keys_bts


class Attention(nn.Module):
    """Multi-head latent attention, expanded to keys and values per head, dense or over selected keys."""

    def __init__(self, config: DsaConfig) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.nope, self.rope_dim, self.v_dim = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.latent = config.kv_lora_rank
        self.scale = softmax_scale(config.qk_head_dim, config.rope)
        self.q_a_proj = linear(config.hidden_size, config.q_lora_rank)
        self.q_a_layernorm = RmsNorm(config.q_lora_rank, config.rms_norm_eps)
        self.q_b_proj = linear(config.q_lora_rank, self.heads * config.qk_head_dim)
        self.kv_a_proj_with_mqa = linear(config.hidden_size, self.latent + self.rope_dim)
        self.kv_a_layernorm = RmsNorm(self.latent, config.rms_norm_eps)
        self.kv_b_proj = linear(self.latent, self.heads * (self.nope + self.v_dim))
        self.o_proj = linear(self.heads * self.v_dim, config.hidden_size)
        self.indexer = Indexer(config)

    def forward(
        self, x: torch.Tensor, cos_sin: torch.Tensor, select: Select | None, probed_bq: torch.Tensor | None
    ) -> tuple[torch.Tensor, Probe | None]:
        q_latent = self.q_a_layernorm(self.q_a_proj(x))
        q_nope, q_rope = (
            self.q_b_proj(q_latent).unflatten(-1, (self.heads, -1)).split((self.nope, self.rope_dim), dim=-1)
        )
        latent, k_rope = self.kv_a_proj_with_mqa(x).split((self.latent, self.rope_dim), dim=-1)
        expanded = self.kv_b_proj(self.kv_a_layernorm(latent)).unflatten(-1, (self.heads, -1))
        k_nope, v = expanded.split((self.nope, self.v_dim), dim=-1)
        q_rope = rope(q_rope, cos_sin.unsqueeze(1), interleaved=True)
        k_rope = rope(k_rope, cos_sin, interleaved=True).unsqueeze(2).expand_as(q_rope)
        q, k, v = (
            part.transpose(1, 2) for part in (torch.cat((q_nope, q_rope), -1), torch.cat((k_nope, k_rope), -1), v)
        )

        index = self.indexer(x, q_latent, cos_sin) if select or probed_bq is not None else None
        chosen = select(index) if select and index else None
        out = attend(q, k, v, self.scale, chosen)
        probe = None
        if probed_bq is not None:
            assert index is not None
            probe = self._probe(q, k, index, chosen, probed_bq)
        return self.o_proj(out.transpose(1, 2).flatten(2)), probe

    def _probe(
        self, q: torch.Tensor, k: torch.Tensor, index: IndexInputs, chosen: torch.Tensor | None, probed_bq: torch.Tensor
    ) -> Probe:
        rows = torch.arange(len(probed_bq), device=probed_bq.device).unsqueeze(1)
        keys = torch.arange(k.shape[2], device=probed_bq.device)
        visible = keys <= probed_bq.unsqueeze(2) if chosen is None else chosen[rows, probed_bq]
        with torch.no_grad():
            q_bqhd = q.transpose(1, 2)[rows, probed_bq]
            logits = torch.einsum("bqhd,bhsd->bhqs", q_bqhd, k).float() * self.scale
            attention = logits.masked_fill(~visible.unsqueeze(1), float("-inf")).softmax(-1)
        scores = index_scores(index.q_btid[rows, probed_bq], index.k_bsd, index.w_bti[rows, probed_bq])
        return Probe(attention, scores, visible)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, chosen: torch.Tensor | None
) -> torch.Tensor:
    """[B, H, T, V] softmax attention, causal, or over the chosen keys [B, T, S]."""
    if chosen is not None:
        bias = torch.zeros_like(chosen, dtype=q.dtype).masked_fill_(~chosen, float("-inf"))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.unsqueeze(1), scale=scale)
    if q.is_cuda:  # the flash kernel wants values as wide as keys
        width = v.shape[-1]
        v = F.pad(v, (0, k.shape[-1] - width))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)[..., :width]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)


class Mlp(nn.Module):
    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = linear(hidden, intermediate)
        self.up_proj = linear(hidden, intermediate)
        self.down_proj = linear(intermediate, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """Mixture of experts with DeepSeek's router: sigmoid scores, a correction bias that only chooses, expert groups.

    Every expert is computed for every token and weighted, most with 0: for a few narrow experts that is faster than to
    sort tokens, and it is the same sum.
    """

    def __init__(self, config: DsaConfig) -> None:
        super().__init__()
        self.config = config
        experts, hidden, inner = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate = linear(hidden, experts)
        self.bias: torch.Tensor
        self.load: torch.Tensor
        """How many tokens chose each expert since the last `balance`."""
        self.register_buffer("bias", torch.zeros(experts))
        self.register_buffer("load", torch.zeros(experts), persistent=False)
        self.gate_proj = nn.Parameter(torch.empty(experts, inner, hidden))
        self.up_proj = nn.Parameter(torch.empty(experts, inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, inner))
        self.shared_experts = Mlp(hidden, inner * config.n_shared_experts)

    def forward(self, x: torch.Tensor, experts_btn: torch.Tensor | None = None) -> torch.Tensor:
        weights = self.route(x, experts_btn)
        gate = torch.einsum("btd,eid->btei", x, self.gate_proj)
        up = torch.einsum("btd,eid->btei", x, self.up_proj)
        inner = F.silu(gate) * up * weights.to(gate.dtype).unsqueeze(-1)
        return torch.einsum("btei,edi->btd", inner, self.down_proj) + self.shared_experts(x)

    def route(self, x: torch.Tensor, experts_btn: torch.Tensor | None = None) -> torch.Tensor:
        """[B, T, E] float32 weights, zero for the experts that a token does not visit.

        `experts_btn` are those that it visits, where these are given; their weights are this model's all the same.
        """
        config = self.config
        with torch.autocast(x.device.type, enabled=False):
            scores = self.gate(x.float()).sigmoid()
        with torch.no_grad():
            if experts_btn is None:
                ranked = (scores + self.bias).unflatten(-1, (config.n_group, -1))
                groups = ranked.topk(2, -1).values.sum(-1).topk(config.topk_group, -1).indices
                allowed = torch.zeros_like(ranked[..., 0], dtype=torch.bool).scatter_(-1, groups, True)
                ranked = ranked.masked_fill(~allowed.unsqueeze(-1), float("-inf")).flatten(-2)
                experts_btn = ranked.topk(config.num_experts_per_tok, -1).indices
            visited = torch.zeros_like(scores).scatter_(-1, experts_btn, 1.0)
            if self.training:
                self.load += visited.sum((0, 1))
        weights = scores * visited
        if config.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * config.routed_scaling_factor

    @torch.no_grad()
    def balance(self, speed: float) -> None:
        """Move the bias of every expert towards an even load (DeepSeek-V3, auxiliary-loss-free balancing)."""
        self.bias += speed * (self.load.mean() - self.load).sign()
        self.load.zero_()


class Layer(nn.Module):
    def __init__(self, config: DsaConfig, number: int) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp: nn.Module = (
            Experts(config) if config.is_moe(number) else Mlp(config.hidden_size, config.intermediate_size)
        )

    def forward(
        self,
        x: torch.Tensor,
        cos_sin: torch.Tensor,
        select: Select | None,
        probed_bq: torch.Tensor | None,
        experts_btn: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, Probe | None]:
        attended, probe = self.self_attn(self.input_layernorm(x), cos_sin, select, probed_bq)
        x = x + attended
        normed = self.post_attention_layernorm(x)
        return x + (self.mlp(normed) if experts_btn is None else self.mlp(normed, experts_btn)), probe


class MtpLayer(Layer):
    """Multi-token prediction (DeepSeek-V3): a layer on the hidden state of token i beside the embedding of i + 1."""

    def __init__(self, config: DsaConfig, number: int) -> None:
        super().__init__(config, number)
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.enorm, self.hnorm, self.norm = (RmsNorm(hidden, eps) for _ in range(3))
        self.eh_proj = linear(2 * hidden, hidden)

    def combine(self, embedded: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        return self.eh_proj(torch.cat((self.enorm(embedded), self.hnorm(hidden)), -1))


class DsaModel(nn.Module):
    """The whole model. `embed` and `head` also serve the MTP layer, as in the published checkpoints."""

    def __init__(self, config: DsaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, number) for number in range(config.num_layers))
        self.norm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.head = linear(config.hidden_size, config.vocab_size)
        self.mtp = MtpLayer(config, config.num_layers)
        table = rope_table(config.qk_rope_head_dim, config.max_position_embeddings, None, config.rope)
        self.rope: torch.Tensor
        self.register_buffer("rope", table, persistent=False)

    def forward(
        self,
        tokens: torch.Tensor,
        *,
        select: Select | None = None,
        probed_bq: torch.Tensor | None = None,
        mtp: bool = False,
        replay: Replay | None = None,
    ) -> Output:
        """Run [B, T] tokens from position 0.

        Args:
            tokens: [B, T] int64.
            select: chooses the keys of every layer, see `top_k`; None attends to all.
            probed_bq: [B, Q] positions of queries to report on, smaller than T - 1 with `mtp`.
            mtp: run the MTP layer too, which chooses by itself.
            replay: choices of a rollout, which stand in for those of the layers that it has some of.

        Raises:
            ValueError: T exceeds max_position_embeddings, or a replay is of other tokens or another model.
        """
        length = tokens.shape[1]
        if length > len(self.rope):
            raise ValueError(f"tokens: expected at most max_position_embeddings ({len(self.rope)}), got {length}")
        embedded = self.embed(tokens)
        x, cos_sin = embedded, self.rope[:length]
        probes = []
        replay = replay or Replay()
        replay.check(self.config, *tokens.shape)
        for number, layer in enumerate(self.layers):
            keys_bts, experts_btn = replay.keys_bts.get(number), replay.experts_btn.get(number)
            chosen = select if keys_bts is None else partial(_replayed, keys_bts)
            x, probe = layer(x, cos_sin, chosen, probed_bq, experts_btn)
            probes.append(probe)
        hidden = self.norm(x)
        mtp_hidden = None
        if mtp:
            combined = self.mtp.combine(embedded[:, 1:], hidden[:, :-1])
            x, probe = self.mtp(combined, cos_sin[:-1], select, probed_bq)
            probes.append(probe)
            mtp_hidden = self.mtp.norm(x)
        return Output(hidden, mtp_hidden, [probe for probe in probes if probe is not None])


@torch.no_grad()
def initialise(model: DsaModel, seed: int) -> None:
    """Matrices keep the size of what they multiply; what is added to the residual stream starts at zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            continue  # norms start as the identity
        drawn = torch.empty(parameter.shape).normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
        if name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")):
            drawn.zero_()
        parameter.copy_(drawn)
