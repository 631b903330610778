"""What a rollout chose comes back with SGLang's answer: the positions and experts that Hugging Face chooses."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import drafts
import httpx
import numpy as np
import pytest
from client import TIMEOUT_S, random_prompt
from engines import SGLANG, installed
from oracle import clear_cut, hf_choices

from dsv32_plugin.rollout import Selection, decode_selection
from dsv32_plugin.tools.tiny import TinySpec

if installed() is not SGLANG:
    pytest.skip("SGLang's", allow_module_level=True)
pytestmark = pytest.mark.engine

SPEC = TinySpec(num_hidden_layers=3, num_attention_heads=4)
SHARING = replace(TinySpec.glm_defaults(), num_hidden_layers=3, index_topk_pattern="FSF")
KEEPS = ("--enable-return-indexer-topk", "--enable-return-routed-experts")
ASKS = {"return_indexer_topk": True, "return_routed_experts": True}
STEPS = 12


def generate(url: str, prompt: Sequence[int], steps: int = STEPS, **options: Any) -> dict[str, Any]:
    """The answer's metadata, with its tokens."""
    sampling = {"max_new_tokens": steps, "temperature": 0, "ignore_eos": True}
    body = {"input_ids": list(prompt), "sampling_params": sampling, "return_logprob": True, **ASKS, **options}
    response = httpx.post(f"{url}/generate", json=body, timeout=TIMEOUT_S)
    assert response.status_code == httpx.codes.OK, response.text
    meta: dict[str, Any] = response.json()["meta_info"]
    return {**meta, "tokens": [token for _, token, _ in meta["output_token_logprobs"]]}


def together(url: str, prompts: Sequence[Sequence[int]], steps: int = STEPS) -> list[dict[str, Any]]:
    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(lambda prompt: generate(url, prompt, steps), prompts))


def assert_chosen(model: Path, prompt: Sequence[int], answer: dict[str, Any]) -> Selection:
    """The answer's selections are those of Hugging Face for the same tokens."""
    tokens = [*prompt, *answer["tokens"]][:-1]
    masks, experts = hf_choices(model, tokens)
    found = decode_selection(answer["indexer_topk"])
    assert (found.positions, len(found.layers)) == (len(tokens), len(masks))
    assert found.known_p.all()
    for layer, mask_tt in zip(found.layers, masks, strict=True):
        wrong = np.flatnonzero((found.mask(layer) != mask_tt.numpy()).any(axis=1))
        assert wrong.size == 0, f"layer {layer}: positions {wrong[:9]}"
    routed = np.frombuffer(base64.b64decode(answer["routed_experts"]), np.int32)
    routed = routed.reshape(len(tokens), -1, SPEC.num_experts_per_tok)
    for layer, experts_te in experts.items():
        assert np.array_equal(np.sort(routed[:, layer]), experts_te.numpy()), f"experts of layer {layer}"
    return found


@pytest.fixture(scope="module")
def model(checkpoint: Callable[[TinySpec], Path]) -> Path:
    return checkpoint(SPEC)


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with SGLANG.serve(model, tmp_path_factory.mktemp("rollout") / "server.log", *KEEPS) as url:
        yield url


def test_chunked_prompts_alone_and_together(server: str, model: Path) -> None:
    prompts = [truth.prompt for truth in clear_cut(model, [40, 63, 64, 150, 300], STEPS)]
    answers = [generate(server, prompts[3]), *together(server, prompts)]
    for prompt, answer in zip([prompts[3], *prompts], answers, strict=True):
        assert_chosen(model, prompt, answer)


def test_a_prefix_that_another_request_computed(server: str, model: Path) -> None:
    (truth,) = clear_cut(model, [333], STEPS)
    generate(server, truth.prompt[:290], return_indexer_topk=False)
    answer = generate(server, truth.prompt)
    assert answer["cached_tokens"] > 128
    assert_chosen(model, truth.prompt, answer)


def test_nothing_comes_back_unasked(server: str) -> None:
    answer = generate(server, random_prompt(80, 5), **dict.fromkeys(ASKS, False))
    assert not {"indexer_topk", "routed_experts"} & answer.keys()


@pytest.mark.wide
def test_sequences_that_were_taken_back(model: Path, tmp_path: Path) -> None:
    prompts = [truth.prompt for truth in clear_cut(model, [100, 140, 180, 220], 40)]
    test = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "7"}
    with SGLANG.serve(model, tmp_path / "server.log", *KEEPS, *SGLANG.few_pages, env=test) as url:
        answers = together(url, prompts, 40)
    assert sum(answer["num_retractions"] for answer in answers) > 0
    for prompt, answer in zip(prompts, answers, strict=True):
        assert_chosen(model, prompt, answer)


@pytest.mark.wide
def test_two_ranks_and_layers_that_share_a_selection(checkpoint: Callable[[TinySpec], Path], tmp_path: Path) -> None:
    """SGLang's own capturer is for one rank."""
    glm = checkpoint(SHARING)
    prompts = [truth.prompt for truth in clear_cut(glm, [90, 300], STEPS)]
    with SGLANG.serve(glm, tmp_path / "server.log", *KEEPS, *SGLANG.two_ranks) as url:
        for prompt, answer in zip(prompts, together(url, prompts), strict=True):
            found = assert_chosen(glm, prompt, answer)
    assert found.layers == (0, 2)
    with pytest.raises(ValueError, match="layer: expected one that selects \\(0, 2\\), got 1"):
        found.of(1)


def test_drafts(checkpoint: Callable[[TinySpec], Path], tmp_path: Path) -> None:
    """Of the drafts that are rejected nothing comes back, nor of the layer that drafts."""
    drafting = drafts.half_right(checkpoint(drafts.SPEC), tmp_path / "model")
    prompts = [truth.prompt for truth in clear_cut(drafting, [70, 150], 30)]
    chain = ("--speculative-num-steps", "3", "--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", "4")
    with SGLANG.serve(drafting, tmp_path / "server.log", *KEEPS, "--speculative-algorithm", "EAGLE", *chain) as url:
        answers = together(url, prompts, 30)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert_chosen(drafting, prompt, answer)


def test_weights_that_change_while_a_request_waits(server: str, checkpoint: Callable[[TinySpec], Path]) -> None:
    """It goes on with the new ones, which compute its prefix and select for it anew; the version says which.

    Last of the file: the server keeps them.
    """
    new, prompt, steps = checkpoint(replace(SPEC, seed=1)), random_prompt(100, 3), 100
    with ThreadPoolExecutor(1) as pool:

        def post(path: str, **body: Any) -> None:
            answer = httpx.post(f"{server}/{path}", json=body, timeout=TIMEOUT_S)
            assert answer.status_code == httpx.codes.OK, answer.text

        old_answer = generate(server, prompt, steps)
        waiting = pool.submit(generate, server, prompt, steps)
        time.sleep(1)
        update = {"model_path": str(new), "weight_version": "7"}
        post("pause_generation", mode="in_place")
        refused = httpx.post(f"{server}/update_weights_from_disk", json=update, timeout=TIMEOUT_S)
        assert refused.status_code == httpx.codes.BAD_REQUEST
        assert "while requests are unfinished" in refused.text
        post("pause_generation", mode="retract")
        post("update_weights_from_disk", **update)
        post("continue_generation")
        answer = waiting.result()
        new_answer = generate(server, prompt, steps)
    assert answer["weight_version"] == new_answer["weight_version"] == "7"
    changed = next(i for i, (a, b) in enumerate(zip(answer["tokens"], old_answer["tokens"], strict=True)) if a != b)
    assert 0 < changed < steps
    assert_chosen(new, prompt, answer)
    assert_chosen(new, prompt, new_answer)
