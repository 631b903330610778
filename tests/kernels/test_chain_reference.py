"""All operations of a layer, one after the other, against Hugging Face's DeepseekV32Attention in float32."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from transformers import DeepseekV32Config, DynamicCache
from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32Attention, DeepseekV32RotaryEmbedding

import cases
from dsv32_plugin.core.rope import rope_table, softmax_scale
from dsv32_plugin.kernels import (
    dense_mla,
    gather_index_keys,
    gather_latents,
    index_logits_paged,
    index_query,
    index_topk_ragged,
    masked_mha,
    norm_rope_cache,
    select_topk,
    sparse_mla,
)
from dsv32_plugin.kernels.formulas import rope

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 64,
}
CONFIG = DeepseekV32Config(
    hidden_size=96,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=4,
    q_lora_rank=48,
    kv_lora_rank=32,
    qk_nope_head_dim=24,
    qk_rope_head_dim=16,
    v_head_dim=20,
    index_n_heads=32,
    index_head_dim=64,
    index_topk=12,
    max_position_embeddings=2560,
    rope_parameters=YARN,
    attn_implementation="eager",
)
TOPK, PAGE = CONFIG.index_topk, 16
# One layer differs from Hugging Face by float32 rounding in another order of sums.
CLOSE = {"rtol": 1e-4, "atol": 2e-6}


@dataclass
class Layer:
    """The layer as an engine runs it: absorbed weights, paged caches, one sequence of a batch at a time."""

    attention: DeepseekV32Attention
    table: torch.Tensor
    pages: int
    interleaved: bool = False
    topk: int = TOPK
    latents: torch.Tensor = field(init=False)
    keys: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.latents = cases.empty_latent_cache(
            self.pages, cache_dtype=torch.float32, page_size=PAGE, rank=32, rope_dim=16, page_padding=8
        )
        self.keys = cases.empty_index_cache(self.pages, cache_dtype=torch.float32, page_size=PAGE, index_dim=64)
        self.rope_table = rope_table(16, 2560, None, YARN)
        self.scale = softmax_scale(40, YARN)
        up = self.attention.kv_b_proj.weight.view(4, 24 + 20, 32)
        self.key_up_hdc, self.value_up_hvc = up[:, :24], up[:, 24:]

    def project(self, hidden: torch.Tensor, seq: int, begin: int) -> dict[str, Any]:
        """Write the caches for tokens begin.. of a sequence; returns the queries."""
        a, indexer = self.attention, self.attention.indexer
        position = torch.arange(begin, begin + len(hidden))
        slots = self.table[seq, position // PAGE].long() * PAGE + position % PAGE
        kv_a, k_pe = a.kv_a_proj_with_mqa(hidden).split([32, 16], 1)
        q_norm = norm_rope_cache(
            a.q_a_proj(hidden),
            kv_a,
            k_pe,
            indexer.wk(hidden),
            position,
            slots,
            self.rope_table,
            q_a_weight_l=a.q_a_layernorm.weight,
            kv_a_weight_c=a.kv_a_layernorm.weight,
            eps=1e-6,
            latent_cache=self.latents,
            index_k_weight_d=indexer.k_norm.weight,
            index_k_bias_d=indexer.k_norm.bias,
            index_cache=self.keys,
            interleaved=self.interleaved,
        )
        q_nope, q_pe = a.q_b_proj(q_norm).view(-1, 4, 40).split([24, 16], 2)
        index_q, weights = index_query(
            indexer.wq_b(q_norm).view(-1, 32, 64),
            indexer.weights_proj(hidden),
            position,
            self.rope_table,
            interleaved=self.interleaved,
        )
        return {
            "q_nope": q_nope,
            "q_rope": rope(q_pe, self.rope_table[position].unsqueeze(1), interleaved=True),
            "q_latent": torch.einsum("thd,hdc->thc", q_nope, self.key_up_hdc),
            "index_q": index_q,
            "weights": weights,
            "visible": (position + 1).int(),
        }

    def output(self, latent_thc: torch.Tensor) -> torch.Tensor:
        return self.attention.o_proj(torch.einsum("thc,hvc->thv", latent_thc, self.value_up_hvc).flatten(1))

    def prefill(self, hidden: torch.Tensor, seq: int, begin: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """(layer output, selected positions) of a chunk: ragged scores, sparse attention over slots."""
        p = self.project(hidden, seq, begin)
        total = begin + len(hidden)
        table = self.table[seq : seq + 1]
        keys, _ = gather_index_keys(self.keys, table, torch.tensor([0, total]).int(), total)
        ranges = torch.zeros_like(p["visible"]), p["visible"]
        slots = index_topk_ragged(
            p["index_q"], p["weights"], keys, None, *ranges, self.topk, block_table_bp=table, page_size=PAGE
        )
        positions = index_topk_ragged(p["index_q"], p["weights"], keys, None, *ranges, self.topk)
        out, _ = sparse_mla(p["q_latent"], p["q_rope"], self.latents, slots, self.scale)
        return self.output(out), positions

    def prefill_masked(self, hidden: torch.Tensor, seq: int) -> torch.Tensor:
        """A short prefill in expanded heads under a mask."""
        p = self.project(hidden, seq, 0)
        total, table, cu = len(hidden), self.table[seq : seq + 1], torch.tensor([0, len(hidden)]).int()
        rows = gather_latents(self.latents, table, cu, total, dtype=torch.float32)
        keys, _ = gather_index_keys(self.keys, table, cu, total)
        start, end = torch.zeros_like(p["visible"]), p["visible"]
        selected = index_topk_ragged(p["index_q"], p["weights"], keys, None, start, end, self.topk)
        k_nope = torch.einsum("sc,hdc->shd", rows[:, :32], self.key_up_hdc)
        k = torch.cat((k_nope, rows[:, None, 32:].expand(-1, 4, -1)), 2)
        v = torch.einsum("sc,hvc->shv", rows[:, :32], self.value_up_hvc)
        q = torch.cat((p["q_nope"], p["q_rope"]), 2)
        out, _ = masked_mha(q, k, v, start, end, self.scale, selected_tk=selected)
        return self.attention.o_proj(out.flatten(1))

    def decode(self, hidden: torch.Tensor, begins: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """One token of every sequence: paged scores, slots from the selection, sparse attention."""
        parts = [self.project(hidden[seq : seq + 1], seq, begin) for seq, begin in enumerate(begins)]
        p = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        logits = index_logits_paged(
            p["index_q"].unsqueeze(1),
            p["weights"].unsqueeze(1),
            self.keys,
            self.table,
            p["visible"].unsqueeze(1),
            max_visible=int(p["visible"].max()),
        ).squeeze(1)
        slots = select_topk(logits, None, p["visible"], self.topk, block_table_bp=self.table, page_size=PAGE)
        out, _ = sparse_mla(p["q_latent"], p["q_rope"], self.latents, slots, self.scale)
        return self.output(out), select_topk(logits, None, p["visible"], self.topk)

    def decode_dense(self, hidden: torch.Tensor, begins: list[int]) -> torch.Tensor:
        """One token of every sequence while every key is selected."""
        parts = [self.project(hidden[seq : seq + 1], seq, begin) for seq, begin in enumerate(begins)]
        p = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        seq = torch.arange(len(begins)).int()
        out, _ = dense_mla(
            p["q_latent"], p["q_rope"], self.latents, self.table, seq, p["visible"], self.scale, max_visible=TOPK
        )
        return self.output(out)


@pytest.fixture(scope="module")
def attention():
    torch.manual_seed(0)
    module = DeepseekV32Attention(CONFIG, 0).eval().requires_grad_(False)
    for parameter in module.parameters():
        parameter.normal_(std=0.15)
    for norm in (module.q_a_layernorm, module.kv_a_layernorm, module.indexer.k_norm):
        norm.weight.add_(1)
    return module


def hugging_face(attention, hidden):
    """(output, selected sets) of a whole prefill of one sequence."""
    tokens = len(hidden)
    mask = torch.full((tokens, tokens), -torch.inf).triu(1).view(1, 1, tokens, tokens)
    angles = DeepseekV32RotaryEmbedding(CONFIG)(hidden, torch.arange(tokens).unsqueeze(0))
    selections = []
    hook = attention.indexer.register_forward_hook(lambda module, arguments, result: selections.append(result[0]))
    out, _ = attention(hidden.unsqueeze(0), angles, mask, DynamicCache(config=CONFIG))
    hook.remove()
    chosen = [{s for s in row.tolist() if s <= t} for t, row in enumerate(selections[0])]
    return out[0], chosen


def hidden_states(lengths, seed=1):
    g = cases.rng(seed)
    return [torch.randn(length, CONFIG.hidden_size, generator=g) for length in lengths]


def layer(attention, lengths, **options):
    pages = cases.pages_for(lengths, PAGE)
    return Layer(attention, cases.block_table(lengths, pages, PAGE, cases.rng(2)), pages, **options)


def as_sets(positions):
    return [set(row) - {-1} for row in positions.tolist()]


LENGTHS = [70, 5, 33]


@pytest.mark.parametrize("chunk", [1000, 16, 7], ids=["whole", "chunks_of_16", "chunks_of_7"])
def test_prefill_equals_hugging_face(attention, chunk):
    ours = layer(attention, LENGTHS)
    for seq, hidden in enumerate(hidden_states(LENGTHS)):
        parts = [ours.prefill(hidden[b : b + chunk], seq, b) for b in range(0, len(hidden), chunk)]
        expected, chosen = hugging_face(attention, hidden)
        assert as_sets(torch.cat([positions for _, positions in parts])) == chosen
        torch.testing.assert_close(torch.cat([out for out, _ in parts]), expected, **CLOSE)


def test_decode_step_by_step_equals_hugging_face(attention):
    """Sequences of different lengths in one batch, each token decoded alone, caches shared."""
    prompts, steps = [37, 0, 11], 25
    lengths = [prompt + steps for prompt in prompts]
    ours = layer(attention, lengths)
    hidden = hidden_states(lengths)
    expected = [hugging_face(attention, h) for h in hidden]
    for seq, prompt in enumerate(prompts):
        ours.prefill(hidden[seq][:prompt], seq)
    for step in range(steps):
        begins = [prompt + step for prompt in prompts]
        out, positions = ours.decode(torch.stack([h[b] for h, b in zip(hidden, begins, strict=True)]), begins)
        for seq, begin in enumerate(begins):
            assert as_sets(positions[seq : seq + 1]) == [expected[seq][1][begin]]
            torch.testing.assert_close(out[seq], expected[seq][0][begin], **CLOSE)


def test_masked_prefill_equals_hugging_face(attention):
    ours = layer(attention, LENGTHS)
    for seq, hidden in enumerate(hidden_states(LENGTHS)):
        torch.testing.assert_close(ours.prefill_masked(hidden, seq), hugging_face(attention, hidden)[0], **CLOSE)


def test_dense_decode_equals_hugging_face_while_every_key_is_selected(attention):
    lengths = [TOPK, TOPK, 3]
    ours = layer(attention, lengths)
    hidden = hidden_states(lengths)
    for seq, h in enumerate(hidden):
        ours.prefill(h[:-1], seq)
    out = ours.decode_dense(torch.stack([h[-1] for h in hidden]), [length - 1 for length in lengths])
    torch.testing.assert_close(out, torch.stack([hugging_face(attention, h)[0][-1] for h in hidden]), **CLOSE)


@pytest.mark.parametrize("mistake", [{"interleaved": True}, {"topk": TOPK - 1}], ids=["index_rope", "index_topk"])
def test_the_comparison_notices_a_mistake(attention, mistake):
    (hidden,) = hidden_states([70])
    wrong, _ = layer(attention, [70], **mistake).prefill(hidden, 0)
    expected, _ = hugging_face(attention, hidden)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        torch.testing.assert_close(wrong, expected, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fp8_caches_come_close_to_float_caches(dtype):
    """Real widths; e4m3 has 4 significant bits, so each value is off by 1/16 of itself at most."""
    tokens, results = 150, []
    for cache_dtype in (torch.float32, torch.uint8):
        inputs = cases.norm_rope_cache_inputs(
            tokens, dtype=dtype, latent_dtype=cache_dtype, index_dtype=cache_dtype, rotate=True, skip=False
        )
        norm_rope_cache(**inputs)
        query = cases.index_query_inputs(4, dtype=dtype, rotate=True, quantize=cache_dtype == torch.uint8)
        if cache_dtype == torch.float32:
            query["q_tid"] = query["q_tid"].float()
        index_q, weights = index_query(**query)
        slots = inputs["slots_t"].int()
        absorbed = cases.absorbed_query(4, 8, 512, 64, g=cases.rng(5), dtype=torch.float32, strided=False)
        out, lse = sparse_mla(**absorbed, latent_cache=inputs["latent_cache"], slots_tk=slots.repeat(4, 1), scale=0.04)
        pages = inputs["index_cache"].shape[0]
        table = torch.arange(pages).int().unsqueeze(0)
        logits = index_logits_paged(
            index_q.unsqueeze(0),
            weights.unsqueeze(0),
            inputs["index_cache"],
            table,
            torch.full((1, 4), pages * 64).int(),
            max_visible=pages * 64,
        )[0][:, slots.long()]
        results.append((out, lse, logits))
    for exact, fp8 in zip(*results, strict=True):
        error = (exact - fp8).norm() / exact.norm()
        assert error < 1 / 16, f"relative error {error:.4f}"
