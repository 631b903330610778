"""The trained tiny checkpoint's tokenizer: bytes, the control tokens of V3.2 with its flags, and a few words.

DeepSeek's own vocabulary would be ten times the model. As in that one, BOS, EOS, the padding and the mark of a call are
flagged special and the other control tokens are not, and a tag is its bracket, the mark and words. The prose that opens
a tools block is a word a sentence, which leaves the context to the schemas.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from dsv32_plugin.parsers import protocol

PAD = protocol.PAD
SPECIAL = {
    protocol.BOS: True,
    protocol.EOS: True,
    PAD: True,
    protocol.USER: False,
    protocol.ASSISTANT: False,
    protocol.THINK_START: False,
    protocol.THINK_END: False,
    protocol.DSML: True,
}
"""Control token -> whether it is flagged special. The first two have the ids that the real vocabulary gives them."""
BOS_ID, EOS_ID, PAD_ID, USER_ID, ASSISTANT_ID, THINK_START_ID, THINK_END_ID, DSML_ID = range(len(SPECIAL))
_TAG_WORDS = ("function_calls", "function_results", "invoke", "parameter", ' name="', '" string="')
_SCHEMA_WORDS = (
    *('{"type": "', '{"name": "', '"description": "', '"parameters": ', '"properties": {"', '"required": ["'),
    *("object", "string", "integer", "boolean", "number", "array"),
)
_SENTENCE = 15
"""Least characters."""


def _words() -> list[str]:
    """The longer ones come first, since the first that fits is taken."""
    controls = "|".join(map(re.escape, SPECIAL))
    pieces = re.split(f'{controls}|[\n<>"/=]', protocol.TOOLS_HEAD)
    return sorted(
        {*_TAG_WORDS, *_SCHEMA_WORDS, *(piece for piece in pieces if len(piece) >= _SENTENCE)},
        key=lambda w: (-len(w), w),
    )


WORDS = _words()
"""Ordinary tokens: what tags and schemas are made of, and the prose that opens a tools block."""
VOCAB_SIZE = 320
"""Bytes, control tokens and words, rounded up to what engines like to cut; the rest is never used."""


@cache
def tokenizer() -> Tokenizer:
    """Byte-level without merges: text becomes its UTF-8 bytes but for the control tokens and words."""
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = [spell.pre_tokenize_str(word)[0][0] for word in WORDS]
    names = [*SPECIAL, *words, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    assert len(set(names)) == len(names) <= VOCAB_SIZE
    made = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[], ignore_merges=True))
    isolate = pre_tokenizers.Split(Regex("|".join(map(re.escape, WORDS))), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([isolate, spell])
    made.decoder = decoders.ByteLevel()
    for name, special in SPECIAL.items():
        add = made.add_special_tokens if special else made.add_tokens
        add([AddedToken(name, normalized=False, special=special)])
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
