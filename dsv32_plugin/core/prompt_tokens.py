"""Prompts to token ids: control tokens come from the template alone.

A plain tokenizer looks for its added tokens in the whole prompt, so that a web page or a tool's result which spells
`<｜User｜>` speaks as the user. Here they are looked for in what the template wrote, and nowhere else.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from hashlib import blake2b
from itertools import product
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

from tokenizers import AddedToken, Encoding, Tokenizer, models

from dsv32_plugin import settings
from dsv32_plugin.parsers import Markup, protocol

_ADVICE = "serve the checkpoint's tokenizer.json, or set DSV32_TRUST_MARKUP=1 to let content spell control tokens"
_TEMPLATE = (
    *(protocol.BOS, protocol.USER, protocol.ASSISTANT, protocol.THINK_START, protocol.THINK_END, protocol.EOS),
    *(protocol.TOOLS_HEAD, protocol.TOOLS_TAIL, protocol.CALLS_START, protocol.CALLS_END),
    *(protocol.invoke_start("f"), protocol.parameter_start("x", is_string=True), protocol.PARAMETER_END),
    *(protocol.INVOKE_END, protocol.RESULTS_START, protocol.result("r"), protocol.RESULTS_END),
)
KEPT_LENGTHS = 1 << 16
"""Of so many stretches of prompts is known how many ids they are."""
_NEIGHBOURS = ("a", " b ", "1", "\n\n", "<", "…", " 你")


class TokenizerError(ValueError):
    """The tokenizer can't be told where not to look for control tokens; says what to do."""


class PromptTokenizer:
    """Tokenizes prompts as `tokenizer` does, except that what others wrote is ordinary text whatever it spells.

    The prompt is cut where the tokenizer finds its added tokens in the template's text. The stretches between them,
    template and content together, are tokenized whole: their merges are those of the whole prompt. Threads may share
    it, and it shares the model, and so the memory, of `tokenizer`.

    Raises:
        TokenizerError: `tokenizer` treats a stretch other than the prompt that it is cut from, as no published
            tokenizer of DeepSeek's does.
    """

    def __init__(self, tokenizer: Tokenizer):
        added = tokenizer.get_added_tokens_decoder()
        # The one knows the model and no added token; the other the added tokens, and drops all else.
        self._text = _text_tokenizer(tokenizer, added)
        self._marks = Tokenizer(models.BPE(vocab={token.content: id for id, token in added.items()}, merges=[]))
        self._marks.add_tokens([added[id] for id in sorted(added)])
        if tokenizer.normalizer is not None:
            self._marks.normalizer = tokenizer.normalizer
        # The template has few texts, and a history repeats them.
        self._marks_in = lru_cache(maxsize=4096)(self._find_marks)
        self._lengths: OrderedDict[bytes, int] = OrderedDict()
        self._lengths_lock = Lock()
        self._check(tokenizer)

    def encode(self, prompt: Markup) -> list[int]:
        """The ids of a prompt, with no special tokens added."""
        stretches, marks = self._cut(prompt)
        return _joined(self._text.encode_batch_fast(stretches, add_special_tokens=False), marks)

    def count(self, prompt: Markup) -> int:
        """How many ids `encode` gives. What a prompt has in common with earlier ones is not tokenized again."""
        stretches, marks = self._cut(prompt)
        digests = [blake2b(stretch.encode(), digest_size=16).digest() for stretch in stretches]
        with self._lengths_lock:
            known = {digest: self._lengths[digest] for digest in digests if digest in self._lengths}
        new = {digest: text for digest, text in zip(digests, stretches, strict=True) if digest not in known}
        if new:
            encoded = self._text.encode_batch_fast(list(new.values()), add_special_tokens=False)
            known |= {digest: len(ids) for digest, ids in zip(new, encoded, strict=True)}
        with self._lengths_lock:
            for digest in digests:
                self._lengths[digest] = known[digest]
                self._lengths.move_to_end(digest)
            while len(self._lengths) > KEPT_LENGTHS:
                self._lengths.popitem(last=False)
        return len(marks) + sum(known[digest] for digest in digests)

    def _cut(self, prompt: Markup) -> tuple[list[str], list[int]]:
        """The stretches before, between and after the template's added tokens, and the ids of these."""
        stretches: list[str] = []
        marks: list[int] = []
        end = 0
        for start, stop in prompt.spans:
            for mark_start, mark_stop, mark in self._marks_in(prompt[start:stop]):
                stretches.append(prompt[end : start + mark_start])
                marks.append(mark)
                end = start + mark_stop
        stretches.append(prompt[end:])
        return stretches, marks

    def _find_marks(self, text: str) -> tuple[tuple[int, int, int], ...]:
        """Start, end and id of every added token in a text."""
        found = self._marks.encode(text, add_special_tokens=False)
        return tuple((start, stop, mark) for (start, stop), mark in zip(found.offsets, found.ids, strict=True))

    def _check(self, tokenizer: Tokenizer) -> None:
        """The template among texts of every kind gives the tokenizer's own ids."""
        for mark, text in product(_TEMPLATE, _NEIGHBOURS):
            prompt = protocol.BOS + text + mark + text
            stretches, marks = self._cut(prompt)
            if _joined(_one_by_one(self._text, stretches), marks) != _one_by_one(tokenizer, [prompt])[0].ids:
                raise TokenizerError(f"this tokenizer reads {text!r} beside {mark!r} in a way of its own; {_ADVICE}")


def _text_tokenizer(tokenizer: Tokenizer, added: Mapping[int, AddedToken]) -> Tokenizer:
    """The tokenizer without its added tokens; it shares the model, unless that would make one of text by itself."""
    text = Tokenizer(tokenizer.model)
    if tokenizer.normalizer is not None:
        text.normalizer = tokenizer.normalizer
    if tokenizer.pre_tokenizer is not None:
        text.pre_tokenizer = tokenizer.pre_tokenizer
    if not (made := _made_of_text(text, added)):
        return text
    parts = json.loads(tokenizer.to_str())
    vocab = parts["model"]["vocab"]
    parts |= {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    try:
        parts["model"]["vocab"] = {word: id for word, id in vocab.items() if id not in made}
        text = Tokenizer.from_str(json.dumps(parts))
        made = _made_of_text(text, added)
    except Exception as error:  # of no class of its own, or a vocabulary that is a list
        raise TokenizerError(f"this tokenizer's model can't do without its added tokens: {error}; {_ADVICE}") from error
    if made:
        names = ", ".join(added[id].content for id in sorted(made)[:5])
        raise TokenizerError(f"this tokenizer's model makes added tokens of text ({names}); {_ADVICE}")
    return text


def _made_of_text(text: Tokenizer, added: Mapping[int, AddedToken]) -> set[int]:
    """The added tokens that a tokenizer without added tokens makes of text that spells one."""
    spelled = [around.format(token.content) for token in added.values() for around in ("{}", " {} ", "\n{}\n", "a{}a")]
    return {id for found in _one_by_one(text, spelled) for id in found.ids if id in added}


def _one_by_one(tokenizer: Tokenizer, texts: Iterable[str]) -> list[Encoding]:
    """As a batch, whose threads must not have started when an engine forks."""
    return [tokenizer.encode(text, add_special_tokens=False) for text in texts]


def _joined(stretches: Sequence[Encoding], marks: Sequence[int]) -> list[int]:
    ids: list[int] = stretches[0].ids
    for mark, stretch in zip(marks, stretches[1:], strict=True):
        ids.append(mark)
        ids += stretch.ids
    return ids


_tokenizers: WeakKeyDictionary[Any, PromptTokenizer] = WeakKeyDictionary()


def encode(tokenizer: Any, prompt: Markup) -> list[int]:
    """The ids of a prompt by an engine's tokenizer, one of transformers'.

    Raises:
        TokenizerError: it has no fast tokenizer behind it, or one that can't be told where not to look.
    """
    if settings.trust_markup():
        ids: list[int] = tokenizer.encode(prompt, add_special_tokens=False)
        return ids
    return prompt_tokenizer(tokenizer).encode(prompt)


def count(tokenizer: Any, prompt: Markup) -> int:
    """How many ids `encode` gives; raises TokenizerError as it does."""
    if settings.trust_markup():
        return len(tokenizer.encode(prompt, add_special_tokens=False))
    return prompt_tokenizer(tokenizer).count(prompt)


def check(tokenizer: Any) -> None:
    """Refuse now, and before an engine starts its processes, what `encode` would refuse with every prompt."""
    if not settings.trust_markup():
        prompt_tokenizer(tokenizer)


def prompt_tokenizer(tokenizer: Any) -> PromptTokenizer:
    """The `PromptTokenizer` of a tokenizer of transformers', made once."""
    made = _tokenizers.get(tokenizer)
    if made is None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise TokenizerError(f"expected a fast tokenizer, got {type(tokenizer).__name__}; {_ADVICE}")
        made = _tokenizers[tokenizer] = PromptTokenizer(backend)
    return made
