"""The answer that an engine of a new release must give is Hugging Face's, and tells mistakes apart.

`python tests/engine/test_expected_answer.py` writes it anew.
"""

from __future__ import annotations

import json
from random import Random

import pytest

pytest.importorskip("transformers")

from oracle import TIE, Fault, Greedy, hf_greedy

from dsv32_plugin.tools import parity
from dsv32_plugin.tools.demo import TRAINED
from dsv32_plugin.training import tasks
from dsv32_plugin.training.tokenizer import encode

SEED = 28
"""Of the prompt, chosen so that neither the next token nor a selection is near a tie."""
CUT, STEPS = 450, 16
"""In the midst of a list of codes: what comes next is open, so that probabilities say much."""
STORED = TRAINED / parity.EXPECTED


def answer(fault: Fault | None = None) -> Greedy:
    prompt = encode(tasks.needles_of(Random(SEED), 600, 1, thinking=0).text())[:CUT]
    return hf_greedy(TRAINED, [prompt], STEPS, fault=fault)[0]


def test_it_is_what_hugging_face_says() -> None:
    stored, truth = json.loads(STORED.read_text(encoding="utf-8")), answer()
    assert stored["prompt"] == truth.prompt
    assert stored["logprobs"] == pytest.approx(truth.logprobs, abs=parity.TOLERANCE / 10)
    assert truth.margin > TIE
    assert min(truth.gaps) > 4 * parity.TOLERANCE


@pytest.mark.parametrize("fault", Fault)
def test_a_mistake_shows(fault: Fault) -> None:
    stored = json.loads(STORED.read_text(encoding="utf-8"))
    wrong = answer(fault).logprobs
    assert max(abs(a - b) for a, b in zip(stored["logprobs"], wrong, strict=True)) > 4 * parity.TOLERANCE


if __name__ == "__main__":
    truth = answer()
    STORED.write_text(json.dumps({"prompt": truth.prompt, "logprobs": truth.logprobs}) + "\n", encoding="utf-8")
