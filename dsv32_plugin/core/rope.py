"""Rotary position embedding of DeepSeek: the table of angles with YaRN scaling, and the softmax scale to go with it.

`scaling` is the config's dict in either spelling: `rope_parameters` of Transformers 5 (`rope_type`, `rope_theta`
inside) or `rope_scaling` of the published checkpoints (`type`, theta apart).
"""

import math
from collections.abc import Mapping
from typing import Any

import torch

ROPE_TYPES = ("default", "yarn")


def rope_table(
    rope_dim: int, max_position: int, theta: float | None, scaling: Mapping[str, Any] | None
) -> torch.Tensor:
    """cos | sin of every position, for `norm_rope_cache` and `index_query`.

        table[p, j]       = m * cos(p * frequency[j])     0 <= j < R/2
        table[p, R/2 + j] = m * sin(p * frequency[j])

    "default": frequency[j] = theta**(-2j/R), m = 1. "yarn": frequencies that turn more than `beta_fast` times in the
    original context stay, those that turn less than `beta_slow` times are divided by `factor`, a linear ramp over j
    lies between; m = `attention_factor`, or mscale(factor, mscale) / mscale(factor, mscale_all_dim) (1 for DeepSeek).

    Args:
        rope_dim: R, even.
        max_position: rows of the table.
        theta: base of the frequencies; None where `scaling` holds `rope_theta`.
        scaling: `rope_parameters` or `rope_scaling` of the config, or None for "default".

    Returns:
        [max_position, R] float32 on the CPU: the same bits as Transformers' cos and sin.

    Raises:
        ValueError: a key is missing or unknown; the message names it.

    Source: YaRN (arXiv 2309.00071), section 3; DeepSeek-V3.2 inference code (`precompute_freqs_cis`).
    """
    kind = _rope_type(scaling)
    base = _theta(theta, scaling)
    exponent_j = torch.arange(0, rope_dim, 2, dtype=torch.float32) / rope_dim
    period_j = base**exponent_j
    frequency_j = 1.0 / period_j
    magnitude = 1.0
    if kind == "yarn":
        assert scaling is not None
        kept_j = 1 - _ramp(rope_dim, base, scaling)
        stretched_j = 1.0 / (_required(scaling, "factor") * period_j)
        frequency_j = stretched_j * (1 - kept_j) + frequency_j * kept_j
        magnitude = _attention_factor(scaling)
    angle_pj = torch.arange(max_position, dtype=torch.float32).unsqueeze(1) * frequency_j
    return torch.cat((angle_pj.cos() * magnitude, angle_pj.sin() * magnitude), dim=1)


def softmax_scale(qk_head_dim: int, scaling: Mapping[str, Any] | None) -> float:
    """qk_head_dim**-0.5, times mscale(factor, mscale_all_dim)**2 under YaRN (1.3689... squared for DeepSeek-V3.2).

    Args:
        qk_head_dim: width of a query head before absorption, qk_nope_head_dim + qk_rope_head_dim.
        scaling: `rope_parameters` or `rope_scaling` of the config, or None.

    Raises:
        ValueError: a key is missing or unknown; the message names it.
    """
    scale = qk_head_dim**-0.5
    if _rope_type(scaling) == "yarn":
        assert scaling is not None
        mscale_all_dim = scaling.get("mscale_all_dim")
        if mscale_all_dim:
            mscale = _mscale(_required(scaling, "factor"), mscale_all_dim)
            scale = scale * mscale * mscale
    return scale


def _rope_type(scaling: Mapping[str, Any] | None) -> str:
    if scaling is None:
        return "default"
    key = "rope_type" if "rope_type" in scaling else "type"
    if key not in scaling:
        raise ValueError(f"rope_type: expected one of {', '.join(ROPE_TYPES)}, got none; name it in the rope config")
    if scaling[key] not in ROPE_TYPES:
        raise ValueError(f"{key}: expected one of {', '.join(ROPE_TYPES)}, got {scaling[key]!r}")
    return str(scaling[key])


def _theta(theta: float | None, scaling: Mapping[str, Any] | None) -> float:
    inside = None if scaling is None else scaling.get("rope_theta")
    given = [value for value in (theta, inside) if value is not None]
    if not given:
        raise ValueError("rope_theta: missing; give it apart or in the rope config")
    if given[0] != given[-1]:
        raise ValueError(f"rope_theta: {given[0]} was given apart, but the rope config holds {given[-1]}; give one")
    return float(given[0])


def _required(scaling: Mapping[str, Any], key: str) -> float:
    if scaling.get(key) is None:
        raise ValueError(f"{key}: missing; a rope config of type yarn needs it")
    return float(scaling[key])


def _ramp(rope_dim: int, theta: float, scaling: Mapping[str, Any]) -> torch.Tensor:
    """[R/2] 0 where a frequency stays, 1 where it is stretched."""
    low = _turning_dim(scaling.get("beta_fast") or 32, rope_dim, theta, scaling)
    high = _turning_dim(scaling.get("beta_slow") or 1, rope_dim, theta, scaling)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope_dim - 1)
    width = high - low if high != low else 0.001
    return ((torch.arange(rope_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)


def _turning_dim(turns: float, rope_dim: int, theta: float, scaling: Mapping[str, Any]) -> float:
    """The (fractional) index of the frequency that makes `turns` turns within the original context."""
    context = _required(scaling, "original_max_position_embeddings")
    return rope_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))


def _attention_factor(scaling: Mapping[str, Any]) -> float:
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    factor = _required(scaling, "factor")
    mscale, mscale_all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if mscale and mscale_all_dim:
        return _mscale(factor, mscale) / _mscale(factor, mscale_all_dim)
    return _mscale(factor, 1.0)


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
