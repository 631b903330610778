"""The paper's losses against closed forms, enumerated policies and their own definitions."""

from __future__ import annotations

import math

import pytest
import torch

from dsv32_plugin.training.losses import (
    attention_target,
    group_advantages,
    grpo_loss,
    importance_ratio,
    indexer_kl,
    k3_kl,
    off_policy_mask,
    unbiased_kl,
)

NAN = float("nan")


def tensor(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


class TestIndexer:
    """Equations 3 and 4."""

    def test_target_sums_heads_and_normalises(self) -> None:
        heads = tensor([[[0.5, 0.5, 0.0]], [[0.1, 0.2, 0.7]]]).requires_grad_()
        target = attention_target(heads)
        torch.testing.assert_close(target, tensor([[0.3, 0.35, 0.35]]))
        assert not target.requires_grad, "the attention does not follow the indexer"

    def test_closed_form(self) -> None:
        scores = tensor([[0.0, math.log(3.0)]])  # softmax: 1/4, 3/4
        target = tensor([[0.5, 0.5]])
        expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
        assert indexer_kl(target, scores, torch.ones(1, 2, dtype=torch.bool)).item() == pytest.approx(expected)

    def test_zero_where_the_scores_say_what_the_attention_does(self) -> None:
        target = torch.rand(3, 5, 7).double().softmax(-1)
        visible = torch.ones(3, 5, 7, dtype=torch.bool)
        assert indexer_kl(target, target.log() + 4.2, visible).item() == pytest.approx(0, abs=1e-6)

    def test_gradient_is_softmax_minus_target(self) -> None:
        scores = torch.randn(4, 6).requires_grad_()
        target = torch.rand(4, 6).softmax(-1)
        indexer_kl(target, scores, torch.ones(4, 6, dtype=torch.bool)).backward()
        torch.testing.assert_close(scores.grad, (scores.softmax(-1) - target).detach() / 4)

    @pytest.mark.parametrize("garbage", [NAN, math.inf, -math.inf, 1e30])
    def test_a_selected_set_is_all_there_is(self, garbage: float) -> None:
        """Equation 4: the same as equation 3 on the gathered keys, and no other score matters."""
        chosen = torch.tensor([[1, 4, 5], [0, 2, 3]])
        visible = torch.zeros(2, 6, dtype=torch.bool).scatter_(1, chosen, True)
        scores = torch.randn(2, 6)
        inside = torch.rand(2, 3).softmax(-1)
        target = torch.zeros(2, 6).scatter_(1, chosen, inside)
        gathered = scores.gather(1, chosen)
        spoiled = scores.masked_fill(~visible, garbage).requires_grad_()
        loss = indexer_kl(target, spoiled, visible)
        torch.testing.assert_close(loss, indexer_kl(inside, gathered, torch.ones(2, 3, dtype=torch.bool)))
        loss.backward()
        assert spoiled.grad is not None
        assert torch.equal(spoiled.grad[~visible], torch.zeros(6))
        torch.testing.assert_close(spoiled.grad.gather(1, chosen), (gathered.softmax(-1) - inside) / 2)

    def test_attention_that_is_exactly_zero_somewhere(self) -> None:
        scores = torch.zeros(1, 3).requires_grad_()
        loss = indexer_kl(torch.tensor([[1.0, 0.0, 0.0]]), scores, torch.ones(1, 3, dtype=torch.bool))
        assert loss.item() == pytest.approx(math.log(3))
        loss.backward()
        assert scores.grad is not None
        assert scores.grad.isfinite().all()


VOCABULARY = 5


@pytest.fixture
def policies() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities of every token: the trained policy (a leaf's log-softmax), the old one, the reference."""
    generator = torch.Generator().manual_seed(3)
    theta, old, ref = torch.randn(3, VOCABULARY, generator=generator, dtype=torch.float64)
    return theta.requires_grad_(), old.log_softmax(-1), ref.log_softmax(-1)


def exact_kl(theta: torch.Tensor, ref: torch.Tensor) -> torch.Tensor:
    logp = theta.log_softmax(-1)
    return (logp.exp() * (logp - ref)).sum()


def gradient(value: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    (result,) = torch.autograd.grad(value, theta)
    return result


class TestUnbiasedKl:
    """Equation 7: the mean over every token that the old policy could have sampled, weighted by its probability."""

    def test_value_and_gradient_are_those_of_the_exact_kl(self, policies: tuple[torch.Tensor, ...]) -> None:
        theta, old, ref = policies
        mean = (old.exp() * unbiased_kl(theta.log_softmax(-1), old, ref)).sum()
        exact = exact_kl(theta, ref)
        torch.testing.assert_close(mean, exact)
        torch.testing.assert_close(gradient(mean, theta), gradient(exact, theta))

    def test_k3_has_the_value_on_policy_but_not_the_gradient(self, policies: tuple[torch.Tensor, ...]) -> None:
        theta, _, ref = policies
        logp = theta.log_softmax(-1)
        mean = (logp.detach().exp() * k3_kl(logp, ref)).sum()
        exact = exact_kl(theta, ref)
        torch.testing.assert_close(mean, exact)
        k3, true = gradient(mean, theta), gradient(exact, theta)
        assert (k3 - true).norm() > 0.1 * true.norm()

    def test_k3_grows_without_bound_where_the_policy_leaves_the_reference(self) -> None:
        """The paper's reason: K3's gradient weighs tokens by pi_ref / pi_theta, equation 7 does not."""
        theta = tensor([0.0, -30.0]).requires_grad_()
        ref = tensor([math.log(0.5), math.log(0.5)])
        logp = theta.log_softmax(-1)
        assert gradient(k3_kl(logp, ref)[1], theta).abs().max() > 1e10
        assert gradient(unbiased_kl(theta.log_softmax(-1), logp.detach(), ref)[1], theta).abs().max() < 100


class TestOffPolicyMask:
    """Equation 9."""

    @pytest.mark.parametrize(
        ("advantage", "drift", "kept"),
        [
            pytest.param(-1.0, 0.6, False, id="bad-and-far"),
            pytest.param(-1.0, 0.4, True, id="bad-but-near"),
            pytest.param(-1.0, 0.5, True, id="bad-at-the-threshold"),
            pytest.param(1.0, 0.6, True, id="good-and-far"),
            pytest.param(0.0, 0.6, True, id="neither-and-far"),
            pytest.param(-1.0, -9.0, True, id="bad-and-now-more-likely"),
        ],
    )
    def test_fires_exactly_where_it_should(self, advantage: float, drift: float, kept: bool) -> None:
        logp = tensor([[-1.0, -2.0, NAN]])
        # The drift is a mean over tokens, not the same at each; padding holds anything.
        old = logp + tensor([[drift + 0.25, drift - 0.25, NAN]])
        lengths = torch.tensor([[True, True, False]])
        mask = off_policy_mask(logp, old, tensor([[advantage]]), lengths, 0.5)
        assert mask.tolist() == [[float(kept)] * 3]

    def test_each_output_of_a_group_by_itself(self) -> None:
        logp = torch.zeros(3, 2)
        old = torch.tensor([[1.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
        mask = off_policy_mask(logp, old, torch.tensor([[-1.0], [1.0], [-1.0]]), torch.ones(3, 2).bool(), 0.5)
        assert mask[:, 0].tolist() == [0, 1, 1]


class TestGrpo:
    """Equations 5, 6 and 8."""

    def test_advantages_are_centred_and_not_scaled(self) -> None:
        assert group_advantages(torch.tensor([[1.0, 0.0, 0.0, 3.0]])).tolist() == [[0.0, -1.0, -1.0, 2.0]]

    def test_ratio(self) -> None:
        assert importance_ratio(tensor([math.log(0.6)]), tensor([math.log(0.2)])).item() == pytest.approx(3)

    def test_on_policy_gradient_is_the_policy_gradient(self) -> None:
        lengths = torch.tensor([[True, True, True], [True, False, False]])
        logp = torch.randn(2, 3).requires_grad_()
        grpo_loss(logp, logp.detach(), logp.detach(), torch.tensor([0.5, -2.0]), lengths).backward()
        expected = torch.tensor([[0.5 / 3] * 3, [-2.0, 0.0, 0.0]]) / 2  # A / |o|, mean over the group
        torch.testing.assert_close(logp.grad, -expected)

    @pytest.mark.parametrize(
        ("ratio", "advantage", "objective", "moves"),
        [
            pytest.param(1.5, 1.0, 1.2, False, id="good-and-already-likelier"),
            pytest.param(0.5, 1.0, 0.5, True, id="good-and-less-likely"),
            pytest.param(0.5, -1.0, -0.8, False, id="bad-and-already-less-likely"),
            pytest.param(1.5, -1.0, -1.5, True, id="bad-and-likelier"),
        ],
    )
    def test_clipping(self, ratio: float, advantage: float, objective: float, moves: bool) -> None:
        logp = tensor([[math.log(ratio)]]).requires_grad_()
        zero = torch.zeros_like(logp)
        loss = grpo_loss(logp, zero, zero, tensor([advantage]), torch.tensor([[True]]), clip=0.2)
        assert loss.item() == pytest.approx(-objective)
        assert (gradient(loss, logp) != 0).item() is moves

    def test_kl_term(self) -> None:
        logp, old, ref = torch.randn(3, 2, 4).double()
        lengths = torch.ones(2, 4).bool()
        with_kl = grpo_loss(logp, old, ref, torch.zeros(2).double(), lengths, beta=0.3)
        assert with_kl.item() == pytest.approx(0.3 * unbiased_kl(logp, old, ref).mean().item())

    def test_masked_outputs_keep_their_kl_only(self) -> None:
        """Equation 8 puts the mask on the first term."""
        logp = tensor([[-2.0], [-2.0]]).requires_grad_()
        old = tensor([[-1.0], [-2.0]])  # the first has moved away by 1 nat
        advantages = tensor([-1.0, -1.0])
        lengths = torch.ones(2, 1).bool()
        masked = grpo_loss(logp, old, old, advantages, lengths, threshold=0.5)
        assert masked.item() == pytest.approx(0.5), "only the second counts, and the mean is still over both"
        assert gradient(masked, logp).flatten().tolist() == [0.0, 0.5]
        with_kl = grpo_loss(logp, old, old, advantages, lengths, threshold=0.5, beta=1.0)
        assert gradient(with_kl, logp)[0].item() != 0

    @pytest.mark.parametrize("garbage", [NAN, math.inf, -math.inf])
    def test_padding_is_never_read(self, garbage: float) -> None:
        lengths = torch.tensor([[True, True], [True, False]])
        clean = torch.randn(3, 2, 2)
        dirty = clean.masked_fill(~lengths, garbage)
        results = []
        for logp, old, ref in (clean, dirty):
            logp = logp.clone().requires_grad_()
            loss = grpo_loss(logp, old, ref, torch.tensor([1.0, -1.0]), lengths, beta=0.1, threshold=0.1)
            results.append((loss, gradient(loss, logp)))
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])
