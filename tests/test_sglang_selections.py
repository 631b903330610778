"""What SGLang's capturer of ours makes of a step: slots become positions, and the sequence's own row comes before."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("sglang")

from dsv32_plugin.core.recorder import Recorder
from dsv32_plugin.rollout import decode_selection
from dsv32_plugin.rollout.store import SelectionStore
from dsv32_plugin.sglang_adapter.rollout import SelectionCapturer

TOPK, LAYERS, PAGES = 3, [0, 2], 40
pytestmark = pytest.mark.engine


class Engine:
    """Two sequences in pages of 4 slots that are handed out in any order, and a model that selects at random."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(0)
        free = self.random.permutation(np.arange(1, PAGES))
        self.req_to_token = torch.zeros(8, 48, dtype=torch.int32)
        for request, pages in ((2, free[:10]), (5, free[10:20])):
            self.req_to_token[request, :40] = torch.from_numpy((pages[:, None] * 4 + np.arange(4)).ravel())
        runner: Any = SimpleNamespace(
            req_to_token_pool=SimpleNamespace(req_to_token=self.req_to_token),
            token_to_kv_pool=SimpleNamespace(size=4 * PAGES),
            page_size=4,
            device="cpu",
        )
        self.recorder = Recorder(LAYERS, TOPK, 64, torch.device("cpu"))
        self.capturer = SelectionCapturer(self.recorder, SelectionStore(LAYERS, TOPK, 32), runner)
        self.truth: dict[tuple[int, int, int], np.ndarray] = {}

    def step(self, mode: str, *parts: tuple[int, int, int], later: bool = False) -> None:
        """Tokens (request, first position, how many) of each sequence."""
        tokens = [(request, position) for request, first, size in parts for position in range(first, first + size)]
        for layer in LAYERS:
            slots_tk = torch.full((len(tokens), TOPK), -1, dtype=torch.int32)
            for row, (request, position) in enumerate(tokens):
                chosen = np.sort(self.random.choice(position + 1, min(TOPK, position + 1), replace=False))
                self.truth[request, position, layer] = chosen
                slots_tk[row, : len(chosen)] = self.req_to_token[request, torch.from_numpy(chosen)]
            self.recorder.record(layer, slots_tk)
        requests_t, positions_t = torch.tensor(tokens).unbind(1)
        batch = SimpleNamespace(
            forward_mode=SimpleNamespace(
                is_idle=lambda: False,
                is_extend_without_speculative=lambda: mode == "extend",
                is_target_verify=lambda: mode == "verify",
            ),
            spec_info=None if mode == "extend" else SimpleNamespace(is_draft_input=lambda: mode == "draft"),
            out_cache_loc=self.req_to_token[requests_t, positions_t].long(),
            positions=positions_t,
            seq_lens_cpu=torch.tensor([first + size for _, first, size in parts]),
            extend_seq_lens=torch.tensor([size for *_, size in parts]),
            req_pool_indices=torch.tensor([request for request, *_ in parts]),
            batch_size=len(parts),
        )
        captured = self.capturer.on_forward_end(batch, False, None, no_copy_to_cpu=later)
        if captured is not None:
            self.recorder.slots_tlk.fill_(7)  # as the next step does
            captured.map_device_tensors(torch.clone)
            captured.finalize()

    def check(self, request: int, positions: int) -> None:
        data = self.capturer.get_topk(request, positions + 1, SimpleNamespace(req_to_token=self.req_to_token))
        found = decode_selection(data.numpy().tobytes())
        assert found.known_p.all()
        for layer in LAYERS:
            for position in range(positions):
                row = found.of(layer)[position]
                assert row[row >= 0].tolist() == self.truth[request, position, layer].tolist(), (layer, position)


@pytest.mark.parametrize("later", [False, True])
def test_chunks_beside_decodes_and_drafts(later: bool) -> None:
    engine = Engine()
    engine.step("extend", (2, 0, 2), later=later)  # sees no more than it may select
    engine.step("extend", (2, 2, 9), (5, 0, 13), later=later)
    engine.step("extend", (5, 13, 4), (2, 11, 1), later=later)
    for position in range(12, 16):
        engine.step("decode", (2, position, 1), (5, position + 5, 1), later=later)
    engine.step("verify", (2, 16, 4), (5, 21, 4), later=later)
    verified = dict(engine.truth)
    engine.step("draft", (2, 16, 4), (5, 21, 4), later=later)
    engine.truth = verified
    engine.step("verify", (2, 18, 4), (5, 24, 4), later=later)  # two and three were accepted
    engine.check(2, 22)
    engine.check(5, 28)
