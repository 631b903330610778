"""The measures: selections as they are served, and figures that can be bad."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from random import Random
from typing import Any

import pytest
import small
import torch

from dsv32_plugin import kernels
from dsv32_plugin.kernels.formulas import quantize, rotate
from dsv32_plugin.training import measures, tasks
from dsv32_plugin.training.model import DsaModel, IndexInputs, Output, Probe, top_k
from dsv32_plugin.training.tokenizer import encode


@pytest.fixture(scope="module")
def model() -> DsaModel:
    return small.lively_model()


@pytest.mark.parametrize("rotated", [False, True])
def test_the_fp8_selection_is_the_served_one(rotated: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    tokens, heads, dim, k = 70, 32, 64, 16
    q, key, w = (
        torch.randn(shape, generator=generator) for shape in ((tokens, heads, dim), (tokens, dim), (tokens, heads))
    )
    unturned = torch.cat((torch.ones(tokens, dim // 2), torch.zeros(tokens, dim // 2)), 1)
    queries, weights = kernels.index_query(q, w, torch.arange(tokens), unturned, rotate=rotated, quantize=True)
    keys, scales = quantize(rotate(key) if rotated else key, dim)
    start, end = torch.zeros(tokens, dtype=torch.int32), torch.arange(1, tokens + 1, dtype=torch.int32)
    logits = kernels.index_logits_ragged(queries, weights, keys, scales[:, 0], start, end)
    served = kernels.select_topk(logits, start, end, k)
    index = IndexInputs(q[None], key[None], w[None] * dim**-0.5 * heads**-0.5)
    chosen = measures.fp8_top_k(index, k, rotated=rotated)[0]
    for t in range(tokens):
        assert chosen[t].nonzero().flatten().tolist() == served[t][served[t] >= 0].tolist()
    assert not torch.equal(chosen, top_k(index, k)[0]), "fp8 costs something here"


def test_a_random_selection_has_the_size_of_the_real_one(model: DsaModel) -> None:
    index = IndexInputs(torch.zeros(2, 50, 1, 4), torch.zeros(2, 50, 4), torch.zeros(2, 50, 1))
    chosen = measures.random_k(index, 16, torch.Generator().manual_seed(0))
    assert torch.equal(chosen.sum(-1), torch.arange(1, 51).clamp(max=16).expand(2, -1))
    assert not chosen.triu(1).any()
    assert not torch.equal(chosen[0], chosen[1])


class TestGreedy:
    def test_against_generation(self, model: DsaModel) -> None:
        """Right for what the model generates token by token, wrong where any one token is changed."""
        select = partial(top_k, k=16)
        prompts = [small.random_tokens(1, length, seed=length)[0].tolist() for length in (20, 33)]
        pairs = []
        for prompt in prompts:
            said: list[int] = []
            for _ in range(6):
                with torch.no_grad():
                    hidden = model(torch.tensor([prompt + said]), select=select).hidden
                said.append(int(model.head(hidden[0, -1]).argmax()))
            pairs.append((prompt, said))
        assert measures.greedy_gives(model, pairs, select) == [True, True]
        for place in range(6):
            changed = [(prompt, [*said[:place], said[place] ^ 1, *said[place + 1 :]]) for prompt, said in pairs]
            assert measures.greedy_gives(model, [pairs[0], changed[1]], select) == [True, False]

    def test_an_untrained_model_finds_nothing(self, model: DsaModel) -> None:
        assert not any(measures.exact(model, measures.needle_questions(256, 4), None))


def test_questions_are_held_out_and_end_with_one_answer() -> None:
    (prompt, answer), *_ = measures.needle_questions(512, 3)
    assert answer.count("=") == 1
    key, value = answer.removesuffix("<｜end▁of▁sentence｜>").split("</think>")[-1].split("=")
    assert f"\n{key}={value}\n" in prompt
    assert 400 < len(encode(prompt + answer)) <= 512
    assert measures.needle_questions(512, 3) == measures.needle_questions(512, 3)


class Stub:
    """Stands in for the model: `answer` makes its output."""

    def __init__(self, model: DsaModel, answer: Callable[[torch.Tensor], Output]) -> None:
        self.rope, self.head, self.config, self._answer = model.rope, model.head, model.config, answer

    def __call__(self, tokens: torch.Tensor, **options: Any) -> Output:
        return self._answer(tokens)


class TestMeasures:
    @pytest.mark.parametrize(("scores", "share"), [("the attention", 1.0), ("its opposite", 0.0)])
    def test_attention_mass(self, model: DsaModel, scores: str, share: float) -> None:
        """All attention is on the last 16 keys, which the indexer scores best, or worst."""
        attention = torch.zeros(4, 2, 8, 100)
        attention[..., -16:] = 1 / 16
        said = attention.mean(1) if scores == "the attention" else -attention.mean(1)
        probe = Probe(attention, said, torch.ones(4, 8, 100, dtype=torch.bool))
        stub = Stub(model, lambda tokens: Output(tokens, None, [probe] * 4))
        assert measures.attention_mass(stub, 128, rows=4, queries=8) == pytest.approx([share] * 4)

    def test_mtp_acceptance(self, model: DsaModel) -> None:
        def knows_the_next(tokens: torch.Tensor) -> Output:
            hidden = model(tokens).hidden
            return Output(hidden, hidden[:, 1:], [])

        assert measures.mtp_acceptance(Stub(model, knows_the_next), length=256, rows=16) == 1
        assert measures.mtp_acceptance(model, length=256, rows=16) < 0.5, "an untrained draft is right by chance"


def test_needles_are_those_of_the_tasks() -> None:
    random = Random(f"{measures.SEED}/needles/512")
    assert measures.needle_questions(512, 1) == [tasks.needles_of(random, 512, 1).cut(0)]
