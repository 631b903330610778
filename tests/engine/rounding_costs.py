"""What each rounding costs Hugging Face's model: `python tests/engine/rounding_costs.py [cpu|cuda]`.

Mean absolute error of teacher-forced log-probabilities against float32, on random prompts and a random tiny checkpoint,
whose scores are close to each other: where fp8 changes a selection, it changes the answer.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from client import random_prompt
from oracle import hf_logprobs
from rounding import Rounding, mean_error

from dsv32_plugin.tools import tiny
from dsv32_plugin.tools.tiny import TinySpec

LENGTHS = (17, 65, 130, 300, 600, 2100, 4000)
SEEDS = 4
BFLOAT16 = {"dtype": torch.bfloat16}
RUNS: dict[str, dict[str, Any]] = {
    "bfloat16": BFLOAT16,
    "float32, index keys fp8": {"rounding": Rounding(index=True)},
    "bfloat16, index keys fp8": {**BFLOAT16, "rounding": Rounding(index=True)},
    "bfloat16, index keys and latents fp8": {**BFLOAT16, "rounding": Rounding(index=True, latents=True)},
}


def main(device: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder)
        tiny.write(TinySpec(dtype="bfloat16"), model)
        print("| tokens |", *(f"{run} |" for run in RUNS))
        print("| --- |", *("--- |" for _ in RUNS))
        for length in LENGTHS:
            prompts = [random_prompt(length, seed) for seed in range(SEEDS)]
            exact = [hf_logprobs(model, prompt, device=device) for prompt in prompts]
            cells = []
            for run in RUNS.values():
                found = [hf_logprobs(model, prompt, device=device, **run) for prompt in prompts]
                errors = [mean_error(x, y) for x, y in zip(found, exact, strict=True)]
                cells.append(f"{statistics.mean(errors):.2f} ± {statistics.stdev(errors):.2f} |")
            print(f"| {length} |", *cells, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:] or ["cpu"])
