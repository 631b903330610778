"""The losses of the DeepSeek-V3.2 paper: the indexer's (equations 3 and 4) and the policy's (equations 5 to 9).

All are plain functions of tensors; masked entries never reach a gradient.
"""

from __future__ import annotations

import torch


def attention_target(probabilities_hs: torch.Tensor) -> torch.Tensor:
    """The distribution that the indexer learns: p[t, s] = sum_h a[h, t, s] / sum_s sum_h a[h, t, s] (section 2.1.1).

    Args:
        probabilities_hs: [..., H, T, S] the main attention's weights, one distribution per head.

    Returns:
        [..., T, S], detached: the indexer follows the attention, never the other way round.
    """
    summed = probabilities_hs.detach().sum(-3)
    return summed / summed.sum(-1, keepdim=True)


def indexer_kl(
    target_ts: torch.Tensor, scores_ts: torch.Tensor, visible_ts: torch.Tensor, *, weights_t: torch.Tensor | None = None
) -> torch.Tensor:
    """KL(p[t, :] || softmax(I[t, :])), averaged over the queries (equation 3; equation 4 for a selected set).

    Equation 3 (dense warm-up): `visible` holds all earlier keys. Equation 4 (sparse training): `visible` holds the
    selected set S_t, and both distributions are over that set only. Which of the two it is depends on nothing else.

    Args:
        target_ts: [..., T, S] float32, sums to 1 over the visible keys; zero elsewhere.
        scores_ts: [..., T, S] float32 index scores I[t, s]; any value, NaN and inf included, where not visible.
        visible_ts: [..., T, S] bool, at least one key for every query.
        weights_t: [..., T] how much a query counts (default: all alike).

    Returns:
        The mean over the queries, a scalar.
    """
    log_q = scores_ts.float().masked_fill(~visible_ts, float("-inf")).log_softmax(-1).masked_fill(~visible_ts, 0)
    p = target_ts.masked_fill(~visible_ts, 0)
    divergence_t = (torch.special.xlogy(p, p) - p * log_q).sum(-1)
    if weights_t is None:
        return divergence_t.mean()
    return (divergence_t * weights_t).sum() / weights_t.sum()


def group_advantages(rewards_g: torch.Tensor) -> torch.Tensor:
    """A[i] = R[i] - mean(R) over the group (section 3.1): not divided by the spread, which would favour easy questions.

    Args:
        rewards_g: [..., G] one reward for each of the G outputs to the same question.
    """
    return rewards_g - rewards_g.mean(-1, keepdim=True)


def importance_ratio(logp_gt: torch.Tensor, old_logp_gt: torch.Tensor) -> torch.Tensor:
    """r[i, t] = pi_theta(o[i, t]) / pi_old(o[i, t]) (equation 6), from log-probabilities of the sampled tokens."""
    return (logp_gt - old_logp_gt).exp()


def k3_kl(logp_gt: torch.Tensor, ref_logp_gt: torch.Tensor) -> torch.Tensor:
    """Schulman's K3 = pi_ref/pi_theta - log(pi_ref/pi_theta) - 1: on-policy unbiased, but for its gradient."""
    log_ratio = ref_logp_gt - logp_gt
    return log_ratio.exp() - log_ratio - 1


def unbiased_kl(logp_gt: torch.Tensor, old_logp_gt: torch.Tensor, ref_logp_gt: torch.Tensor) -> torch.Tensor:
    """KL(pi_theta || pi_ref) estimated from samples of pi_old: r[i, t] * K3 (equation 7).

    Over o ~ pi_old both its value and its gradient have the exact KL's as their mean. The gradient must flow through
    the ratio too.
    """
    return importance_ratio(logp_gt, old_logp_gt) * k3_kl(logp_gt, ref_logp_gt)


def off_policy_mask(
    logp_gt: torch.Tensor,
    old_logp_gt: torch.Tensor,
    advantages_gt: torch.Tensor,
    lengths_mask_gt: torch.Tensor,
    threshold: float,
) -> torch.Tensor:
    """M[i, t] (equation 9): 0 where A[i, t] < 0 and mean_t log(pi_old / pi_theta) > threshold, else 1.

    Bad outputs that the policy has moved away from teach little and disturb; good ones always count.

    Args:
        logp_gt, old_logp_gt: [..., G, T] log-probabilities of the sampled tokens.
        advantages_gt: [..., G, T], or [..., G, 1] where an output has one advantage.
        lengths_mask_gt: [..., G, T] True at the tokens of an output, False at padding.
        threshold: delta, in nats a token.

    Returns:
        [..., G, T] float, without a gradient.
    """
    drift_g = _mean_over_tokens((old_logp_gt - logp_gt).detach(), lengths_mask_gt)
    masked = (advantages_gt < 0) & (drift_g.unsqueeze(-1) > threshold)
    return (~masked).to(logp_gt.dtype).expand_as(logp_gt)


def grpo_loss(
    logp_gt: torch.Tensor,
    old_logp_gt: torch.Tensor,
    ref_logp_gt: torch.Tensor,
    advantages_g: torch.Tensor,
    lengths_mask_gt: torch.Tensor,
    *,
    clip: float = 0.2,
    beta: float = 0.0,
    threshold: float | None = None,
) -> torch.Tensor:
    """The negated GRPO objective (equation 5; equation 8 with `threshold`), to be minimised.

        J = mean_i 1/|o_i| sum_t  min(r A, clamp(r, 1 - clip, 1 + clip) A) M  -  beta KL

    Args:
        logp_gt: [..., G, T] log pi_theta of the sampled tokens; the only argument with a gradient.
        old_logp_gt, ref_logp_gt: [..., G, T] the same under the policy that sampled, and under the reference policy.
        advantages_g: [..., G], see `group_advantages`.
        lengths_mask_gt: [..., G, T] True at the tokens of an output; at least one each.
        clip: epsilon.
        beta: weight of the KL of equation 7.
        threshold: delta of equation 9; None masks nothing.
    """
    advantages_gt = advantages_g.unsqueeze(-1)
    # Padding may hold anything; an infinite ratio there would make the gradient NaN.
    logp, old, ref = (x.masked_fill(~lengths_mask_gt, 0) for x in (logp_gt, old_logp_gt, ref_logp_gt))
    ratio = importance_ratio(logp, old)
    gain = torch.minimum(ratio * advantages_gt, ratio.clamp(1 - clip, 1 + clip) * advantages_gt)
    if threshold is not None:
        gain = gain * off_policy_mask(logp, old, advantages_gt, lengths_mask_gt, threshold)
    objective = gain - beta * unbiased_kl(logp, old, ref) if beta else gain
    return -_mean_over_tokens(objective, lengths_mask_gt).mean()


def _mean_over_tokens(values_gt: torch.Tensor, lengths_mask_gt: torch.Tensor) -> torch.Tensor:
    return values_gt.masked_fill(~lengths_mask_gt, 0).sum(-1) / lengths_mask_gt.sum(-1)
