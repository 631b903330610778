"""A running server is given new weights over HTTP, as trainers do: it answers as one that was started with them.

On a GPU with block-fp8 weights, which the engine repacks for its kernels; on a CPU in float32.
"""

from __future__ import annotations

import base64
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch
from client import TIMEOUT_S, Completion, random_prompt
from engines import installed
from oracle import hf_greedy
from test_updates import FP8, buckets, stored, with_another_width, without_a_layer

from dsv32_plugin.tools.tiny import TinySpec

ENGINE = installed()
GPU = torch.cuda.is_available()
pytestmark = pytest.mark.engine

OPTIONS = ("--dtype", "bfloat16" if GPU else "float32")
PROMPTS = [random_prompt(length, seed=3) for length in (17, 130)]
STEPS = 8
# vLLM's own endpoint for it is one for developers.
ENVIRONMENT = {"VLLM_SERVER_DEV_MODE": "1"}


def answers(url: str) -> list[Completion]:
    """One prompt after the other, and nothing of a prefix cache."""
    forget = {"vllm": "reset_prefix_cache", "sglang": "flush_cache"}[ENGINE.name]
    assert httpx.post(f"{url}/{forget}", timeout=TIMEOUT_S).status_code == httpx.codes.OK
    return [replace(ENGINE.complete(url, prompt, STEPS), retractions=0) for prompt in PROMPTS]


def answers_of(model: Path, tmp_path: Path) -> list[list[int]]:
    """The tokens of a server that was started with this checkpoint; on a CPU, of Hugging Face."""
    if not GPU:
        return [truth.tokens for truth in hf_greedy(model, PROMPTS, STEPS)]
    with ENGINE.serve(model, tmp_path / "new.log", *OPTIONS, env=ENVIRONMENT) as url:
        return [answer.tokens for answer in answers(url)]


def load_folder(url: str, folder: Path) -> httpx.Response:
    if ENGINE.name == "vllm":
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        return httpx.post(f"{url}/collective_rpc", json=body, timeout=TIMEOUT_S)
    return httpx.post(f"{url}/update_weights_from_disk", json={"model_path": str(folder)}, timeout=TIMEOUT_S)


def load_tensors(url: str, tensors: list[tuple[str, torch.Tensor]]) -> httpx.Response:
    """One bucket, by SGLang's own serializer, as verl and slime send it."""
    from sglang.srt.utils import MultiprocessingSerializer

    # A tensor's file descriptor can be passed on to a child process alone.
    torch.multiprocessing.set_sharing_strategy("file_system")
    device = "cuda" if GPU else "cpu"
    bucket = MultiprocessingSerializer.serialize([(name, tensor.to(device)) for name, tensor in tensors])
    body = {"serialized_named_tensors": [base64.b64encode(bucket).decode()]}
    return httpx.post(f"{url}/update_weights_from_tensor", json=body, timeout=TIMEOUT_S)


@contextmanager
def session(url: str) -> Iterator[None]:
    """SGLang 0.5.23 takes tensors within one alone; a server that knows of none says 404."""
    begun = httpx.post(f"{url}/begin_weight_update", json={}, timeout=TIMEOUT_S)
    yield
    if begun.status_code != httpx.codes.NOT_FOUND:
        ended = httpx.post(f"{url}/end_weight_update", json={}, timeout=TIMEOUT_S)
        assert (begun.status_code, ended.status_code) == (httpx.codes.OK, httpx.codes.OK), begun.text + ended.text


def test_new_weights_over_http(checkpoint: Callable[[TinySpec], Path], tmp_path: Path) -> None:
    old, new = checkpoint(FP8), checkpoint(replace(FP8, seed=1))
    right = answers_of(new, tmp_path)
    with ENGINE.serve(old, tmp_path / "server.log", *OPTIONS, env=ENVIRONMENT) as url:
        before = answers(url)
        for damage in (without_a_layer, with_another_width):
            bad = Path(shutil.copytree(new, tmp_path / damage.__name__))
            damage(bad)
            assert load_folder(url, bad).status_code >= httpx.codes.BAD_REQUEST
            assert answers(url) == before, f"after {damage.__name__}"
        assert load_folder(url, new).status_code == httpx.codes.OK
        expected = answers(url)
        assert [answer.tokens for answer in expected] == right != [answer.tokens for answer in before]
        assert load_folder(url, old).status_code == httpx.codes.OK
        assert answers(url) == before
        if ENGINE.name == "sglang":
            with session(url):
                for bucket in buckets(stored(new), "scales-last"):
                    loaded = load_tensors(url, bucket)
                    assert loaded.status_code == httpx.codes.OK, loaded.text
                wrong = load_tensors(url, [("model.layers.0.no_such.weight", torch.zeros(4))])
                assert wrong.status_code >= httpx.codes.BAD_REQUEST, wrong.text
                assert "no_such" in wrong.text
            assert answers(url) == expected
