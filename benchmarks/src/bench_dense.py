"""The short-context path: dense_mla and masked_mha beside FlashMLA, FlashAttention-3 and torch.

These run while a sequence has no more keys than are selected. The longer contexts are there for comparison.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from dsv32_plugin import kernels
from dsv32_plugin.benchmarks import peers
from dsv32_plugin.benchmarks.clock import DEVICE, Launch
from dsv32_plugin.benchmarks.harness import Case, Work
from dsv32_plugin.kernels import cache_layout as layout
from dsv32_plugin.kernels.runtime.dispatch import force

PAGE, NOPE, VALUE = layout.PAGE_SIZE, 128, 128
SCALE = (NOPE + layout.ROPE_DIM) ** -0.5
ERROR = 0.01
"""Relative, of bfloat16 inputs and outputs with float32 accumulation."""


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    error = float((got.float() - want.float()).norm() / want.float().norm())
    assert error < ERROR, f"relative error {error:.4f}"


def agrees(launch: Launch, out: torch.Tensor) -> Callable[[], None]:
    return lambda: assert_close(launch(), out)


def decode(sequences: int, length: int, heads: int) -> Work:
    cache = normal(sequences * length // PAGE, PAGE, layout.LATENT_WIDTH)
    table = torch.randperm(len(cache), device=DEVICE).int().view(sequences, -1)
    sequence = torch.arange(sequences, dtype=torch.int32, device=DEVICE)
    visible = torch.full_like(sequence, length)
    q_latent, q_rope = normal(sequences, heads, layout.LATENT_RANK), normal(sequences, heads, layout.ROPE_DIM)
    out, lse = torch.empty_like(q_latent), torch.empty(sequences, heads, device=DEVICE)
    arguments = (q_latent, q_rope, cache, table, sequence, visible, SCALE)
    ours = functools.partial(kernels.dense_mla, *arguments, max_visible=length, out=out, lse=lse)

    def check() -> None:
        out.fill_(float("nan"))
        ours()
        with force("reference"):
            one = (q_latent[-1:], q_rope[-1:], cache, table, sequence[-1:], visible[-1:], SCALE)
            want, _ = kernels.dense_mla(*one, max_visible=length)
        assert_close(out[-1:], want)
        assert out.isfinite().all()

    pairs = sequences * heads * length
    work = Work(
        ours,
        check,
        bytes=2 * (cache.numel() + 2 * q_latent.numel() + q_rope.numel()),
        flops=2 * pairs * (2 * layout.LATENT_RANK + layout.ROPE_DIM),
    )
    vllm, reason = peers.load()
    if vllm is None:
        work.missing |= {"FlashMLA dense": reason, "FA3 dense": reason}
        return work
    flashmla, fa3 = vllm.dense_decode(table, visible, SCALE), vllm.dense_decode_fa3(table, visible, length, SCALE)
    for name, peer in (("FlashMLA dense", flashmla), ("FA3 dense", fa3)):
        work.peers[name] = functools.partial(peer, q_latent, q_rope, cache)
        work.peer_checks[name] = agrees(work.peers[name], out)
    return work


def prefill(tokens: int, heads: int, selected: int | None = None) -> Work:
    """A whole prompt at once, nothing masked but the future, or all but so many keys of each token, drawn at random.

    The peers have no such mask: they attend to everything.
    """
    q, k = normal(tokens, heads, NOPE + layout.ROPE_DIM), normal(tokens, heads, NOPE + layout.ROPE_DIM)
    v = normal(tokens, heads, VALUE)
    end = torch.arange(1, tokens + 1, dtype=torch.int32, device=DEVICE)
    out, lse = torch.empty_like(v), torch.empty(tokens, heads, device=DEVICE)
    start = torch.zeros_like(end)
    mask = None
    if selected is not None:
        mask = kernels.select_mask(torch.randn(tokens, tokens, device=DEVICE), start, end, selected)
    ours = functools.partial(kernels.masked_mha, q, k, v, start, end, SCALE, mask_tw=mask, out=out, lse=lse)

    def check() -> None:
        out.fill_(float("nan"))
        ours()
        with force("reference"):
            last = None if mask is None else mask[-4:]
            want, _ = kernels.masked_mha(q[-4:], k, v, start[-4:], end[-4:], SCALE, mask_tw=last)
        assert_close(out[-4:], want)
        assert out.isfinite().all()

    pairs = heads * tokens * (tokens + 1) // 2
    flops = 2 * pairs * (NOPE + layout.ROPE_DIM + VALUE)
    work = Work(ours, check, bytes=2 * (q.numel() + k.numel() + 2 * v.numel()), flops=flops)

    def torch_attention() -> torch.Tensor:
        by_head = [x.transpose(0, 1).unsqueeze(0) for x in (q, k, v)]
        attention = torch.nn.functional.scaled_dot_product_attention
        attended = attention(by_head[0], by_head[1], by_head[2], is_causal=True, scale=SCALE)
        return attended[0].transpose(0, 1)

    work.peers["torch"] = torch_attention
    vllm, reason = peers.load()
    if vllm is None:
        work.missing["FA3 dense"] = reason
    else:
        work.peers["FA3 dense"] = functools.partial(vllm.dense_prefill(tokens, tokens, SCALE), q, k, v)
    everything = out if mask is None else kernels.masked_mha(q, k, v, start, end, SCALE)[0]
    work.peer_checks = {name: agrees(launch, everything) for name, launch in work.peers.items()}
    return work


def cases() -> list[Case]:
    found = [
        Case("dense decode", {"B": b, "L": length, "H": h, "cache": "bf16"}, functools.partial(decode, b, length, h))
        for h in (16, 128)
        for b, length in ((1, 2048), (16, 2048), (64, 2048), (16, 32768))
    ]
    for heads in (16, 128):
        found.append(Case("masked MHA prefill", {"T": 2048, "H": heads}, functools.partial(prefill, 2048, heads)))
        for tokens in (4096, 8192):
            launch = functools.partial(prefill, tokens, heads, 2048)
            found.append(Case("masked MHA prefill", {"T": tokens, "H": heads, "K": 2048}, launch))
    return found


def tiny_cases() -> list[Case]:
    return [
        Case("dense decode", {"B": 2, "L": 128, "H": 16, "cache": "bf16"}, functools.partial(decode, 2, 128, 16)),
        Case("masked MHA prefill", {"T": 32, "H": 4}, functools.partial(prefill, 32, 4)),
        Case("masked MHA prefill", {"T": 32, "H": 4, "K": 8}, functools.partial(prefill, 32, 4, 8)),
    ]
