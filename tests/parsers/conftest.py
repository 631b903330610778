"""Keeps hypothesis patient with a busy machine; a judge of grammars."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("busy-machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy-machine")


@pytest.fixture(scope="session")
def accepts() -> Callable[[Any, str], bool]:
    """Whether a grammar lets a model write a text and end there."""
    xgrammar = pytest.importorskip("xgrammar", reason="xgrammar, which the engines bring, judges the grammar")
    characters = sorted({*map(chr, range(1, 128)), *"｜杭州"})
    tokenizer = xgrammar.TokenizerInfo([*characters, "<eos>"], stop_token_ids=[len(characters)])
    compiler = xgrammar.GrammarCompiler(tokenizer)

    def judge(grammar: Any, text: str) -> bool:
        matcher = xgrammar.GrammarMatcher(compiler.compile_structural_tag(json.dumps(grammar.structural_tag)))
        return bool(matcher.accept_string(text) and matcher.accept_token(len(characters)))

    return judge
