"""Answer a file of questions, one a line, in one batch: vLLM in this process, without a server.

    python examples/offline_batch.py questions.txt --model deepseek-ai/DeepSeek-V3.2 --tensor-parallel-size 8

Nothing here names the plugin: vLLM loads it by its entry point. Without options it runs the small trained model in
float32 on a machine without a GPU. Prints one JSON object a line.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[1]
TINY = CHECKOUT / "assets" / "tiny-dsv32"
ON_A_CPU = {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 256 << 20, "max_model_len": 8192}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", type=Path, help="a file with a question in each line")
    parser.add_argument("--model", help="default: the small trained model of this checkout")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--max-tokens", type=int, default=1024, help="longest answer (default: %(default)s)")
    parser.add_argument("--thinking", action="store_true")
    arguments = parser.parse_args()
    questions = arguments.questions.read_text(encoding="utf-8").splitlines()

    from vllm import LLM, SamplingParams

    if arguments.model:
        options: dict[str, Any] = {"model": arguments.model, "tensor_parallel_size": arguments.tensor_parallel_size}
        # As DeepSeek recommends.
        sampling = SamplingParams(temperature=1.0, top_p=0.95, max_tokens=arguments.max_tokens)
    else:
        options = {"model": str(TINY), **ON_A_CPU}
        sampling = SamplingParams(temperature=0.0, max_tokens=arguments.max_tokens)
    answers = LLM(**options).chat(
        [[{"role": "user", "content": question}] for question in questions],
        sampling,
        chat_template_kwargs={"thinking": arguments.thinking},
    )
    for question, answer in zip(questions, answers, strict=True):
        print(json.dumps({"question": question, "answer": answer.outputs[0].text}, ensure_ascii=False))


if __name__ == "__main__":
    # vLLM's worker processes import this file again.
    main()
