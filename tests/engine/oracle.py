"""What Hugging Face's own DeepSeek-V3.2 and GLM-5 answer (float32, eager, CPU): the judge of engine tests.

    greedy = hf_greedy(checkpoint, [[0, 128803, 33310, 128804, 128799]], 32)[0]
    assert greedy.tokens == engine_tokens

The oracle can be wrong on purpose, to prove that a parity test would notice: `hf_greedy(..., fault=Fault.NO_RELU)`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from client import random_prompt
from rounding import EXACT, Rounding, rounded
from safetensors.torch import load_file
from torch.overrides import TorchFunctionMode

from dsv32_plugin.core import checkpoint
from dsv32_plugin.core.config import DsaConfig
from dsv32_plugin.core.dequantise import Gatherer


class Fault(Enum):
    """Mistakes that an implementation of sparse attention could make, made in the oracle."""

    WRONG_TOPK = "half the selected keys"
    ALL_KEYS = "no selection"
    RANDOM_KEYS = "a selection that does not depend on what the keys say"
    WRONG_INDEX_ROPE = "the index rope interleaved where it is not, and the other way round"
    NO_RELU = "index scores without their ReLU"


TIE = 1e-6
"""A margin that the order of summation can turn around in float32 is less than this."""
FEW_SEEDS = range(1, 20)


@dataclass(frozen=True)
class Greedy:
    """One greedy continuation: each token, its log-probability, and how far the second best was behind."""

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    gaps: list[float]
    margin: float
    """How far the last key that was selected was ahead of the next one, at the least, in standard deviations of the
    index scores."""


def hf_greedy(
    model_dir: str | Path, prompts: Sequence[Sequence[int]], steps: int, *, fault: Fault | None = None
) -> list[Greedy]:
    """Continue each prompt by `steps` greedy tokens (an end-of-sequence token does not stop it)."""
    model = load(str(Path(model_dir).resolve()))
    with _faulty(model, fault):
        return [_greedy(model, list(prompt), steps) for prompt in prompts]


def clear_cut(model_dir: str | Path, lengths: Sequence[int], steps: int) -> list[Greedy]:
    """Continuations of random prompts of these lengths in which no selection is a tie but for rounding.

    One prompt in some dozens has one. What is selected then depends on the order of summation, in Hugging Face as in
    the engine, and with it on the processor.
    """

    def first(length: int) -> Greedy:
        answers = (hf_greedy(model_dir, [random_prompt(length, seed)], steps)[0] for seed in FEW_SEEDS)
        found = next((answer for answer in answers if answer.margin > TIE), None)
        assert found is not None, f"all {len(FEW_SEEDS)} prompts of {length} tokens have a tie"
        return found

    return [first(length) for length in lengths]


def assert_same_tokens(found: Sequence[int], truth: Greedy, *, tie: float) -> None:
    """Raise AssertionError at the first token that differs where Hugging Face's best two are more than `tie` apart.

    Where they are closer the choice is a matter of rounding, and what follows another choice cannot be compared.
    """
    for step, (token, expected, gap) in enumerate(zip(found, truth.tokens, truth.gaps, strict=True)):
        if token != expected:
            assert gap < tie, f"token {step}: {token} instead of {expected}, {gap:.4f} ahead of the second best"
            return


def hf_logprobs(
    model_dir: str | Path,
    token_ids: Sequence[int],
    *,
    fault: Fault | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    rounding: Rounding = EXACT,
) -> list[float]:
    """Teacher forced: the log-probability of each token but the first, given those before it."""
    logprobs_bnv = hf_distributions(
        model_dir, [token_ids], len(token_ids) - 1, fault=fault, dtype=dtype, device=device, rounding=rounding
    )
    tokens_n = torch.tensor(list(token_ids[1:]), device=device)
    return logprobs_bnv[0].gather(1, tokens_n[:, None])[:, 0].tolist()


@torch.inference_mode()
def hf_distributions(
    model_dir: str | Path,
    sequences: Sequence[Sequence[int]],
    count: int,
    *,
    fault: Fault | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    rounding: Rounding = EXACT,
) -> torch.Tensor:
    """Log-probabilities [B, count, V] from which the last `count` tokens of sequences of one length were chosen."""
    model = load(str(Path(model_dir).resolve()), dtype, device)
    with _faulty(model, fault), rounded(model, _modeling(model), rounding):
        tokens_bt = torch.tensor([list(tokens) for tokens in sequences], device=device)
        return model(tokens_bt, use_cache=False, logits_to_keep=count + 1).logits[:, :-1].float().log_softmax(-1)


@torch.inference_mode()
def hf_choices(model_dir: str | Path, token_ids: Sequence[int]) -> tuple[list[torch.Tensor], dict[int, torch.Tensor]]:
    """What is chosen for each token of a sequence: keys [T, T] bool of each layer that selects, and experts [T, E].

    The experts are those of each layer that has some, sorted.
    """
    model = load(str(Path(model_dir).resolve()))
    experts: dict[int, torch.Tensor] = {}
    with ExitStack() as stack:
        for number, layer in enumerate(model.model.layers):
            if hasattr(layer.mlp, "experts"):
                keep = partial(_keep_experts, experts, number)
                stack.callback(layer.mlp.experts.register_forward_pre_hook(keep).remove)
        selected = stack.enter_context(_Selected(model.config.index_topk))
        stack.enter_context(_faulty(model, None))
        model(torch.tensor([list(token_ids)]), use_cache=False)
    return selected.masks, experts


def _keep_experts(experts: dict[int, torch.Tensor], layer: int, module: Any, inputs: Any) -> None:
    experts[layer] = inputs[1].sort(-1).values


class _Selected(TorchFunctionMode):
    """The keys that each selecting layer chose in one pass over one sequence."""

    def __init__(self, topk: int) -> None:
        super().__init__()
        self.topk = topk
        self.masks: list[torch.Tensor] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **kwargs or {})
        if function is torch.Tensor.topk and args[0].dim() == 3 and args[1] == min(self.topk, args[0].shape[-1]):
            scores = args[0][0]
            visible = scores > torch.finfo(scores.dtype).min
            self.masks.append(torch.zeros_like(visible).scatter_(-1, found.indices[0], True) & visible)
        return found


def dequantized_weights(model_dir: str | Path) -> dict[str, torch.Tensor]:
    """All weights of a checkpoint in float32, block-fp8 ones as what they stand for."""
    model_dir = Path(model_dir)
    config = json.loads((model_dir / "config.json").read_text())
    stored = chain.from_iterable(load_file(path).items() for path in sorted(model_dir.glob("*.safetensors")))
    stored = Gatherer(checkpoint.matrices(DsaConfig.from_hf(config))).dequantised(stored, keep=False)
    return {name: tensor.float() for name, tensor in stored}


@torch.inference_mode()
def _greedy(model: Any, prompt: list[int], steps: int) -> Greedy:
    tokens: list[int] = []
    logprobs: list[float] = []
    gaps: list[float] = []
    cache, fresh, selections = None, prompt, _Selections(model.config.index_topk)
    for _ in range(steps):
        with selections:
            output = model(torch.tensor([fresh]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        (best, second), (token, _) = (x.tolist() for x in output.logits[0, -1].log_softmax(-1).topk(2))
        tokens.append(token)
        logprobs.append(best)
        gaps.append(best - second)
        cache, fresh = output.past_key_values, [token]
    return Greedy(prompt, tokens, logprobs, gaps, selections.margin)


class _Selections(TorchFunctionMode):
    """Measures how clear they are."""

    def __init__(self, topk: int) -> None:
        super().__init__()
        self.topk, self.margin = topk, float("inf")

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.topk and args[1] == self.topk < args[0].shape[-1]:
            self._measure(args[0])
        return function(*args, **kwargs or {})

    def _measure(self, scores: torch.Tensor) -> None:
        best = scores.topk(self.topk + 1).values
        visible = scores > torch.finfo(scores.dtype).min
        gaps = (best[..., -2] - best[..., -1])[visible.sum(-1) > self.topk]
        if len(gaps):
            self.margin = min(self.margin, float(gaps.min() / scores[visible].std()))


@lru_cache(maxsize=4)
def load(model_dir: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """The Hugging Face model; every weight must be used and none may be missing."""
    import transformers

    # Not AutoConfig: in a process that has used vLLM it answers with vLLM's choice of class.
    architecture = json.loads((Path(model_dir) / "config.json").read_text())["architectures"][0]
    model_class = getattr(transformers, architecture)
    config = model_class.config_class.from_pretrained(model_dir)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    layers = config.num_hidden_layers
    weights = {k: v for k, v in dequantized_weights(model_dir).items() if not k.startswith(f"model.layers.{layers}.")}
    model, loading = model_class.from_pretrained(
        None,
        config=config,
        state_dict=weights,
        dtype=dtype,  # not by `.to` afterwards, which would round the rope frequencies and the router's bias, too
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    wrong = {key: loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if loading[key]}
    if wrong:
        raise ValueError(f"{model_dir}: Hugging Face does not load it whole: {wrong}")
    return model.eval().to(device)


@contextmanager
def _faulty(model: Any, fault: Fault | None) -> Iterator[None]:
    modeling = _modeling(model)
    with ExitStack() as stack:
        if getattr(model.config, "indexer_rope_interleave", False) and hasattr(modeling, "apply_rotary_pos_emb"):
            # Transformers 5.12 turns GLM's index keys as DeepSeek's; later releases as its config says.
            stack.enter_context(_other_index_rope(modeling))
        indexers = [layer.self_attn.indexer for layer in model.model.layers if layer.self_attn.indexer is not None]
        if fault in (Fault.WRONG_TOPK, Fault.ALL_KEYS):
            topk = model.config.index_topk // 2 if fault is Fault.WRONG_TOPK else model.config.max_position_embeddings
            for indexer in indexers:
                stack.enter_context(patch.object(indexer, "index_topk", topk))
        elif fault is Fault.RANDOM_KEYS:
            generator = torch.Generator().manual_seed(0)
            for indexer in indexers:
                stack.enter_context(patch.object(indexer.k_norm, "forward", partial(_noise_like, generator)))
        elif fault is Fault.WRONG_INDEX_ROPE:
            stack.enter_context(_other_index_rope(modeling))
        elif fault is Fault.NO_RELU:
            functional = SimpleNamespace(relu=lambda scores: scores, linear=modeling.F.linear)
            stack.enter_context(patch.object(modeling, "F", functional))
        yield


def _noise_like(generator: torch.Generator, x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape).normal_(generator=generator).to(x)


def _other_index_rope(modeling: ModuleType) -> Any:
    interleaved = modeling.apply_rotary_pos_emb_interleave
    if hasattr(modeling, "apply_rotary_pos_emb"):  # DeepSeek: only the indexer calls the half-split one
        return patch.object(modeling, "apply_rotary_pos_emb", interleaved)

    from transformers.models.deepseek_v32.modeling_deepseek_v32 import apply_rotary_pos_emb as half_split

    def other(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
        is_indexer = unsqueeze_dim == 2
        return (half_split if is_indexer else interleaved)(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)

    return patch.object(modeling, "apply_rotary_pos_emb_interleave", other)


def _modeling(model: Any) -> ModuleType:
    return sys.modules[type(model).__module__]
