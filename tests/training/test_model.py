"""The training model: what Hugging Face computes, and whom each loss reaches."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import small
import torch
from safetensors.torch import load_file, save_file

from dsv32_plugin.core.config import ConfigError
from dsv32_plugin.training import checkpoint
from dsv32_plugin.training.losses import attention_target, indexer_kl
from dsv32_plugin.training.model import DsaModel, Experts, IndexInputs, index_scores, top_k
from dsv32_plugin.training.steps import is_indexer

TOP_K = partial(top_k, k=small.SIZES["index_topk"])


@pytest.fixture(scope="module")
def model() -> DsaModel:
    return small.lively_model()


@pytest.fixture(scope="module")
def saved(model: DsaModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    checkpoint.save(model, small.recipe().model, folder, torch.float32)
    return folder


@pytest.fixture
def trained(model: DsaModel) -> Iterator[DsaModel]:
    yield model
    model.zero_grad(set_to_none=True)


def test_equal_to_hugging_face(model: DsaModel, saved: Path) -> None:
    pytest.importorskip("transformers")
    from oracle import load

    tokens = small.random_tokens(2, 100)
    with torch.no_grad():
        theirs = load(str(saved))(tokens).logits
        sparse = model.head(model(tokens, select=TOP_K).hidden)
        dense = model.head(model(tokens).hidden)
    # Float32 sums of at most a few hundred terms, in other orders.
    torch.testing.assert_close(sparse, theirs, atol=1e-4, rtol=1e-4)
    assert (dense - theirs).abs().max() > 0.1, "the selection matters"


def test_the_same_in_bfloat16_storage(model: DsaModel, tmp_path: Path) -> None:
    """What is loaded is what was rounded once; nothing else changes."""
    checkpoint.save(model, small.recipe().model, tmp_path / "once")
    once = checkpoint.load(tmp_path / "once")
    checkpoint.save(once, small.recipe().model, tmp_path / "twice")
    first, second = (load_file(tmp_path / name / checkpoint.FILE) for name in ("once", "twice"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    kept = {name for name, value in first.items() if value.dtype == torch.float32}
    assert {name.rpartition(".layers.")[2].partition(".")[2] for name in kept} == {
        "mlp.gate.e_score_correction_bias",
        "self_attn.indexer.k_norm.weight",
        "self_attn.indexer.k_norm.bias",
    }


def test_mtp_layer_is_stored_as_published(saved: Path) -> None:
    tensors = load_file(saved / checkpoint.FILE)
    mtp = f"model.layers.{small.SIZES['num_hidden_layers']}."
    names = {name.removeprefix(mtp) for name in tensors if name.startswith(mtp)}
    assert {"enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight"} <= names
    assert {"self_attn.indexer.wq_b.weight", "mlp.experts.7.down_proj.weight"} <= names
    assert torch.equal(tensors[mtp + "embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    assert torch.equal(tensors[mtp + "shared_head.head.weight"], tensors["lm_head.weight"])


def test_mtp_sees_one_token_more(model: DsaModel) -> None:
    """hidden[i] depends on tokens up to i, mtp_hidden[i] on those up to i + 1."""
    tokens = small.random_tokens(1, 40)
    changed = tokens.clone()
    changed[0, 20] += 1
    with torch.no_grad():
        before, after = model(tokens, select=TOP_K, mtp=True), model(changed, select=TOP_K, mtp=True)
    assert before.mtp_hidden is not None
    assert after.mtp_hidden is not None
    assert before.mtp_hidden.shape[1] == 39
    assert torch.equal(before.hidden[:, :20], after.hidden[:, :20])
    assert not torch.equal(before.hidden[:, 20], after.hidden[:, 20])
    assert torch.equal(before.mtp_hidden[:, :19], after.mtp_hidden[:, :19])
    assert not torch.equal(before.mtp_hidden[:, 19], after.mtp_hidden[:, 19])


def test_sparse_is_dense_while_all_keys_fit(model: DsaModel) -> None:
    tokens = small.random_tokens(2, small.SIZES["index_topk"])
    with torch.no_grad():
        torch.testing.assert_close(model(tokens, select=TOP_K).hidden, model(tokens).hidden, atol=1e-5, rtol=1e-5)


class TestTopK:
    @pytest.fixture
    def index(self) -> IndexInputs:
        generator = torch.Generator().manual_seed(0)
        q, k, w = (torch.randn(shape, generator=generator) for shape in ((2, 90, 32, 8), (2, 90, 8), (2, 90, 32)))
        return IndexInputs(q, k, w)

    def test_the_definition(self, index: IndexInputs) -> None:
        chosen = top_k(index, 10)
        dots = torch.einsum("btid,bsd->btsi", index.q_btid, index.k_bsd).relu()
        scores = (dots * index.w_bti.unsqueeze(2)).sum(-1)
        for b in range(2):
            for t in range(90):
                wanted = sorted(range(t + 1), key=lambda s: -scores[b, t, s].item())[:10]
                assert chosen[b, t].nonzero().flatten().tolist() == sorted(wanted)

    def test_chunks_change_nothing(self, index: IndexInputs, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = top_k(index, 10)
        monkeypatch.setattr("dsv32_plugin.training.model.CHUNK_ELEMENTS", 1)
        assert torch.equal(top_k(index, 10), whole)


class TestProbes:
    """What a layer reports of a query is what it did there."""

    @pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
    def test_attention_and_scores(self, model: DsaModel, sparse: bool) -> None:
        tokens = small.random_tokens(2, 60)
        probed = torch.tensor([[3, 30, 57], [0, 20, 44]])
        with torch.no_grad():
            output = model(tokens, select=TOP_K if sparse else None, probed_bq=probed, mtp=True)
        assert len(output.probes) == small.SIZES["num_hidden_layers"] + 1
        for probe in output.probes:
            counts = probe.visible_bqs.sum(-1)
            assert torch.equal(counts, (probed + 1).clamp(max=16) if sparse else probed + 1)
            torch.testing.assert_close(probe.attention_bhqs.sum(-1), torch.ones(2, 2, 3))
            assert not probe.attention_bhqs.masked_fill(probe.visible_bqs.unsqueeze(1), 0).any()
            if sparse:
                keys = torch.arange(probe.scores_bqs.shape[-1])
                best = probe.scores_bqs.masked_fill(keys > probed.unsqueeze(-1), float("-inf"))
                least = probe.scores_bqs.masked_fill(~probe.visible_bqs, float("inf")).amin(-1)
                others = best.masked_fill(probe.visible_bqs, float("-inf")).amax(-1)
                assert (least >= others).all(), "the selected keys are the best scored"


def reached(model: DsaModel) -> set[bool]:
    """Of the parameters that got a gradient, whether each is the indexer's."""
    return {is_indexer(name) for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


def test_the_indexer_loss_reaches_the_indexer_only(trained: DsaModel) -> None:
    tokens = small.random_tokens(1, 50)
    output = trained(tokens, probed_bq=torch.tensor([[20, 40]]), mtp=True)
    sum(indexer_kl(attention_target(p.attention_bhqs), p.scores_bqs, p.visible_bqs) for p in output.probes).backward()
    assert reached(trained) == {True}
    without = [n for n, p in trained.named_parameters() if is_indexer(n) and (p.grad is None or not p.grad.any())]
    assert without == [], "every indexer learns"


def test_the_language_loss_reaches_all_but_the_indexer(trained: DsaModel) -> None:
    output = trained(small.random_tokens(1, 50), select=TOP_K, mtp=True)
    assert output.mtp_hidden is not None
    (trained.head(output.hidden).sum() + trained.head(output.mtp_hidden).pow(2).sum()).backward()
    assert reached(trained) == {False}


def test_index_scores_against_the_served_operation(model: DsaModel) -> None:
    """`index_query` and `index_logits_ragged` are what serves."""
    from dsv32_plugin import kernels

    generator = torch.Generator().manual_seed(1)
    q, k, w = (torch.randn(shape, generator=generator) for shape in ((6, 8, 32), (9, 32), (6, 8)))
    table = torch.cat((torch.ones(6, 16), torch.zeros(6, 16)), 1)  # no rotation
    queries, weights = kernels.index_query(q, w, torch.arange(6), table)
    start = torch.zeros(6, dtype=torch.int32)
    served = kernels.index_logits_ragged(queries, weights, k, None, start, start + 9)
    scaled = w * 32**-0.5 * 8**-0.5
    torch.testing.assert_close(index_scores(q[None], k[None], scaled[None])[0], served)


def test_balancing_moves_the_bias_towards_an_even_load() -> None:
    experts = Experts(small.recipe().config)
    experts.load.copy_(torch.tensor([9.0, 1, 5, 5, 5, 5, 5, 5]))
    experts.balance(0.5)
    assert experts.bias.tolist() == [-0.5, 0.5, 0, 0, 0, 0, 0, 0]
    assert not experts.load.any()


class TestBadInput:
    def test_too_long(self, model: DsaModel) -> None:
        with pytest.raises(ValueError, match=r"at most max_position_embeddings \(2048\), got 2049"):
            model(small.random_tokens(1, 2049))

    def test_no_checkpoint(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"expected a checkpoint folder with a config\.json"):
            checkpoint.load(tmp_path)

    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("architectures", ["LlamaForCausalLM"], "architectures"),
            ("architectures", ["GlmMoeDsaForCausalLM"], "expected DeepseekV32ForCausalLM"),
            ("num_nextn_predict_layers", 0, "num_nextn_predict_layers"),
        ],
    )
    def test_another_architecture(self, saved: Path, tmp_path: Path, key: str, value: object, message: str) -> None:
        config = json.loads((saved / "config.json").read_text()) | {key: value}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ConfigError, match=message):
            checkpoint.load(tmp_path)

    def test_tensors_that_do_not_fit(self, saved: Path, tmp_path: Path) -> None:
        tensors = load_file(saved / checkpoint.FILE)
        del tensors["lm_head.weight"]
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:5].clone()
        tensors["extra"] = torch.zeros(1)
        save_file(tensors, tmp_path / checkpoint.FILE)
        (tmp_path / "config.json").write_text((saved / "config.json").read_text())
        with pytest.raises(ValueError, match=r"3 tensors do not fit its config\.json") as caught:
            checkpoint.load(tmp_path)
        for part in ("extra is unknown", "lm_head.weight is missing", "model.norm.weight has shape (5,)"):
            assert part in str(caught.value)
