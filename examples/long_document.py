"""Ask several questions of one long document; the engine reads it once and keeps it in its prefix cache.

    python examples/long_document.py report.txt "Who signed it?" "On which day?"

Prints each answer and the seconds to its first token: the second question needs only its own words read. The server is
started as in chat_with_tools.py. Needs `pip install openai`.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from openai import OpenAI


def ask(client: OpenAI, model: str, document: str, question: str, temperature: float) -> tuple[str, float]:
    """The answer, and seconds to its first token. The document comes first, so that every prompt begins alike."""
    started, first_s, text = time.monotonic(), 0.0, ""
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": f"{document}\n{question}"}],
        temperature=temperature,
        top_p=0.95,
        stream=True,
        extra_body={"chat_template_kwargs": {"thinking": False}},
    )
    for chunk in stream:
        for choice in chunk.choices:
            if choice.delta.content:
                first_s = first_s or time.monotonic() - started
                text += choice.delta.content
    return text, first_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("document", type=Path, help="a file of text")
    parser.add_argument("questions", nargs="+", metavar="QUESTION")
    parser.add_argument("--url", default="http://localhost:8000/v1", help="of the server (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="default: 1, as DeepSeek recommends")
    arguments = parser.parse_args()
    client = OpenAI(base_url=arguments.url, api_key="none")
    model = client.models.list().data[0].id
    document = arguments.document.read_text(encoding="utf-8").rstrip("\n")
    for question in arguments.questions:
        text, first_s = ask(client, model, document, question, arguments.temperature)
        print(f"{question}\n  {text}\n  first token after {first_s:.2f} s")


if __name__ == "__main__":
    main()
