"""The attention layer, on torch's linear layers, against Hugging Face's DeepseekV32Attention in float32."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import DeepseekV32Config, DynamicCache
from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32Attention, DeepseekV32RotaryEmbedding

import cases
import oracles
from dsv32_plugin.core import latent_up, planner
from dsv32_plugin.core.attention import DsaAttention, Shared
from dsv32_plugin.core.config import DEEPSEEK_V32, DsaConfig
from dsv32_plugin.core.layers import TorchLayers
from dsv32_plugin.core.planner import Planner
from dsv32_plugin.core.plans import Masked, Parts
from dsv32_plugin.core.policy import Policy
from dsv32_plugin.core.rope import rope_table
from dsv32_plugin.core.step import LayerCaches, Step, mixed_batch
from dsv32_plugin.kernels import index_logits_paged, index_query, norm_rope_cache, sparse_mla
from dsv32_plugin.kernels.limits import mask_words

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


class Run:
    """The real layer on torch's linear layers, with paged caches, and the source of its steps."""

    def __init__(self, attention: DeepseekV32Attention, lengths: list[int], **other: Any) -> None:
        self.pages = cases.pages_for(lengths, PAGE)
        self.table = cases.block_table(lengths, self.pages, PAGE, cases.rng(2))
        self.caches = LayerCaches(
            cases.empty_latent_cache(
                self.pages, cache_dtype=torch.float32, page_size=PAGE, rank=32, rope_dim=16, page_padding=8
            ),
            cases.empty_index_cache(self.pages, cache_dtype=torch.float32, page_size=PAGE, index_dim=64),
        )
        config = replace(DsaConfig.from_hf({**CONFIG.to_dict(), "architectures": [DEEPSEEK_V32]}), **other)
        shared = Shared(rope_table(16, 2560, None, YARN), Planner(config.index_topk, 4, Policy()), self)
        self.layer = DsaAttention(config, TorchLayers(), 0, shared, "layer")
        self.topk = config.index_topk
        self._load(attention)

    def _load(self, theirs: DeepseekV32Attention) -> None:
        ours, indexer = self.layer, theirs.indexer
        assert ours.indexer is not None
        together = [theirs.q_a_proj.weight, indexer.wk.weight, theirs.kv_a_proj_with_mqa.weight]
        ours.q_index_kv_a_proj.weight.copy_(torch.cat(together))
        for parameter in ours.kv_up.parameters():
            parameter.weight_loader(parameter, theirs.kv_b_proj.weight)
        for name in ("q_b_proj", "o_proj", "q_a_layernorm", "kv_a_layernorm"):
            getattr(ours, name).weight.copy_(getattr(theirs, name).weight)
        for name in ("wq_b", "weights_proj", "k_norm"):
            getattr(ours.indexer, name).load_state_dict(getattr(indexer, name).state_dict())

    def current(self, layer: int) -> tuple[Step, LayerCaches]:
        return self.step, self.caches

    def done(self, layer: int) -> None:
        """Nothing is kept for anyone."""

    def __call__(
        self, parts: dict[int, tuple[int, torch.Tensor]], decodes: int | None = None
    ) -> tuple[torch.Tensor, list[set[int]] | None]:
        """A step of some sequences, the first token of each and its hidden states: outputs, and selected positions."""
        counts = [len(hidden) for _, hidden in parts.values()]
        positions = [torch.arange(begin, begin + len(hidden)) for begin, hidden in parts.values()]
        rows = self.table[list(parts)]
        row_t = torch.arange(len(parts)).repeat_interleave(torch.tensor(counts))
        position_t = torch.cat(positions)
        lengths_b = torch.tensor([int(position[-1]) + 1 for position in positions], dtype=torch.int32)
        starts_b1 = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)
        self.step = mixed_batch(
            slots_t=rows[row_t, position_t // PAGE].long() * PAGE + position_t % PAGE,
            block_table_bp=rows,
            seq_lens_b=lengths_b,
            query_start_b1=starts_b1,
            seq_lens_cpu_b=lengths_b,
            query_start_cpu_b1=starts_b1,
            max_visible=int(lengths_b.max()),
            num_decodes=(len(counts) if set(counts) == {1} else 0) if decodes is None else decodes,
        )
        slots_tk = torch.full((len(position_t), self.topk), -9, dtype=torch.int32)
        out_th = self.layer(position_t, torch.cat([hidden for _, hidden in parts.values()]), slots_tk)
        plan = self.layer.shared.planner.plan(self.step, torch.float32, torch.float32)
        if not plan.selects:
            return out_th, None
        selected: list[set[int]] = []
        for part_rows, part in plan.parts if isinstance(plan, Parts) else [(slice(0, len(slots_tk)), plan)]:
            assert part_rows.start == len(selected)
            if isinstance(part, Masked):
                (chunk,) = part.step.prefill_chunks
                selected += map(self._masked_positions, chunk.start_t, slots_tk[part_rows])
            else:
                selected += map(self._positions, rows[row_t[part_rows]], slots_tk[part_rows])
        return out_th, selected

    def _masked_positions(self, start: torch.Tensor, words_w: torch.Tensor) -> set[int]:
        words = words_w[: mask_words(self.step.prefill_chunks[0].total_keys)].tolist()
        return {s - int(start) for s in range(32 * len(words)) if oracles.has_bit(words, s)}

    def _positions(self, pages: torch.Tensor, slots: torch.Tensor) -> set[int]:
        where = dict(reversed([(page, index) for index, page in enumerate(pages.tolist())]))  # padded behind
        return {where[slot // PAGE] * PAGE + slot % PAGE for slot in slots.tolist() if slot >= 0}


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


LENGTHS = [70, 5, 33]


@pytest.fixture(params=["latents", "mask"])
def way(request, monkeypatch):
    """How prefills are attended to, where not every key is selected."""
    if request.param == "mask":
        monkeypatch.setattr(planner, "measured", lambda *about: True)
        monkeypatch.setattr(planner, "masked_pays", lambda *sizes: True)
    return request.param


@pytest.mark.parametrize("chunk", [1000, 16, 7], ids=["whole", "chunks_of_16", "chunks_of_7"])
def test_prefill_equals_hugging_face(attention, chunk, way):
    """A chunk whose tokens all see no more keys than they may select is attended to densely."""
    run = Run(attention, LENGTHS)
    for seq, hidden in enumerate(hidden_states(LENGTHS)):
        expected, chosen = hugging_face(attention, hidden)
        for begin in range(0, len(hidden), chunk):
            out, selected = run({seq: (begin, hidden[begin : begin + chunk])})
            torch.testing.assert_close(out, expected[begin : begin + chunk], **CLOSE)
            if selected is None:
                assert all(chosen[t] == set(range(t + 1)) for t in range(begin, begin + len(out)))
            else:
                assert selected == chosen[begin : begin + chunk]


def test_prefills_together_equal_hugging_face(attention, way):
    run, hidden = Run(attention, LENGTHS), hidden_states(LENGTHS)
    out, selected = run({seq: (0, states) for seq, states in enumerate(hidden)})
    assert isinstance(run.layer.shared.planner.plan(run.step, torch.float32, torch.float32), Masked) == (way == "mask")
    expected = [hugging_face(attention, states) for states in hidden]
    torch.testing.assert_close(out, torch.cat([out for out, _ in expected]), **CLOSE)
    assert selected == [row for _, chosen in expected for row in chosen]


@pytest.mark.parametrize("expanded_bytes", [1, 1 << 30], ids=["head_by_head", "all_heads"])
def test_a_decode_and_prefills_with_prefixes_equal_hugging_face(attention, way, expanded_bytes, monkeypatch):
    """A decode, a prompt whose beginning is in the cache already, and two new ones, one of them short."""
    monkeypatch.setattr(latent_up, "EXPANDED_BYTES", expanded_bytes)
    lengths, begins = [40, 70, 33, 5], [39, 41, 0, 0]
    run, hidden = Run(attention, lengths), hidden_states(lengths)
    for seq, begin in enumerate(begins):
        if begin:
            run({seq: (0, hidden[seq][:begin])})
    out, selected = run({seq: (begin, hidden[seq][begin:]) for seq, begin in enumerate(begins)}, decodes=1)
    assert isinstance(run.layer.shared.planner.plan(run.step, torch.float32, torch.float32), Parts) == (way == "mask")
    expected = [hugging_face(attention, states) for states in hidden]
    want = torch.cat([out[begin:] for (out, _), begin in zip(expected, begins, strict=True)])
    torch.testing.assert_close(out, want, **CLOSE)
    assert selected == [row for (_, chosen), begin in zip(expected, begins, strict=True) for row in chosen[begin:]]


def test_decode_step_by_step_equals_hugging_face(attention):
    """Sequences of different lengths in one batch, each token decoded alone, caches shared."""
    prompts, steps = [37, 0, 11], 25
    lengths = [prompt + steps for prompt in prompts]
    run, hidden = Run(attention, lengths), hidden_states(lengths)
    expected = [hugging_face(attention, h) for h in hidden]
    for seq, prompt in enumerate(prompts):
        if prompt:
            run({seq: (0, hidden[seq][:prompt])})
    for step in range(steps):
        begins = [prompt + step for prompt in prompts]
        out, selected = run({seq: (begin, hidden[seq][begin : begin + 1]) for seq, begin in enumerate(begins)})
        assert selected is not None, "the first sequence is long"
        for seq, begin in enumerate(begins):
            assert selected[seq] == expected[seq][1][begin]
            torch.testing.assert_close(out[seq], expected[seq][0][begin], **CLOSE)


def test_expanded_keys_equal_hugging_face_while_every_key_is_selected(attention, monkeypatch):
    monkeypatch.setattr(planner, "EXPANDED_PAIRS", 0)
    lengths = [TOPK, TOPK - 1, 3]
    run, hidden = Run(attention, lengths), hidden_states(lengths)
    out, selected = run({seq: (0, states) for seq, states in enumerate(hidden)})
    assert selected is None
    torch.testing.assert_close(out, torch.cat([hugging_face(attention, h)[0] for h in hidden]), **CLOSE)


def test_dense_decode_equals_hugging_face_while_every_key_is_selected(attention):
    lengths = [TOPK, TOPK, 3]
    run, hidden = Run(attention, lengths), hidden_states(lengths)
    for seq, h in enumerate(hidden):
        run({seq: (0, h[:-1])})
    out, selected = run({seq: (len(h) - 1, h[-1:]) for seq, h in enumerate(hidden)})
    assert selected is None
    torch.testing.assert_close(out, torch.stack([hugging_face(attention, h)[0][-1] for h in hidden]), **CLOSE)


@pytest.mark.parametrize(
    "mistake", [{"index_rope_interleave": True}, {"index_topk": TOPK - 1}], ids=["index_rope", "index_topk"]
)
def test_the_comparison_notices_a_mistake(attention, mistake):
    (hidden,) = hidden_states([70])
    wrong, _ = Run(attention, [70], **mistake)({0: (0, hidden)})
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
