"""The trained tiny checkpoint's tokenizer: bytes, and one token for every fixed piece of the chat protocol.

DeepSeek's own vocabulary would be ten times the model. The prose that opens a tools block is one token as well, which
leaves the context to the schemas.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from dsv32_plugin.parsers import protocol

PAD = "<｜▁pad▁｜>"
SPECIAL = (protocol.BOS, protocol.EOS, PAD, protocol.USER, protocol.ASSISTANT)
"""Never part of a text that a user sees. The first two have the ids that the real vocabulary gives them."""
_INVOKE_OPEN, _QUOTE_CLOSE = protocol.invoke_start("\0").split("\0")
_PARAMETER_OPEN, _STRING = protocol.parameter_start("\0", is_string=True).split("\0")
_JSON = protocol.parameter_start("\0", is_string=False).split("\0")[1]
PIECES = (
    protocol.THINK_START,
    protocol.THINK_END,
    protocol.TOOLS_HEAD,
    protocol.TOOLS_TAIL,
    protocol.CALLS_START,
    protocol.CALLS_END,
    _INVOKE_OPEN,
    protocol.INVOKE_END,
    _PARAMETER_OPEN,
    _STRING,
    _JSON,
    protocol.PARAMETER_END,
    protocol.DSML,
    protocol.RESULTS_START.strip(),
    protocol.RESULTS_END.strip(),
    *protocol.result("\0").strip().split("\0"),
)
VOCAB_SIZE = 320
"""Bytes, special tokens and pieces, rounded up to what engines like to cut; the rest is never used."""

BOS_ID, EOS_ID, PAD_ID, USER_ID, ASSISTANT_ID = range(len(SPECIAL))
THINK_START_ID, THINK_END_ID = range(len(SPECIAL), len(SPECIAL) + 2)


@cache
def tokenizer() -> Tokenizer:
    """Byte-level without merges: text becomes its UTF-8 bytes but for the pieces."""
    names = [*SPECIAL, *PIECES, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    assert len(set(names)) == len(names) <= VOCAB_SIZE
    made = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in SPECIAL])
    made.add_tokens([AddedToken(name, normalized=False, special=False) for name in PIECES])
    return made


def encode(text: str) -> list[int]:
    ids: list[int] = tokenizer().encode(text, add_special_tokens=False).ids
    return ids


def decode(ids: list[int]) -> str:
    text: str = tokenizer().decode(ids, skip_special_tokens=False)
    return text


def save(out: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json; no chat template, as in the published checkpoint."""
    tokenizer().save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": protocol.BOS,
        "eos_token": protocol.EOS,
        "pad_token": PAD,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 8192,
    }
    (out / "tokenizer_config.json").write_text(
        json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
