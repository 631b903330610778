"""What this adapter expects of SGLang's releases: what one has and another has not.

A difference between releases is a question to SGLang itself, asked here. Who needs the answer says what follows.
"""

from __future__ import annotations

import pkgutil
from contextlib import suppress
from importlib.util import find_spec


def installed_version() -> str:
    from sglang import __version__

    return str(__version__)


def declares_options() -> bool:
    """Whether options are sealed once given, and decided upon beside them, in steps that a plugin may go around.

    0.5.23: yes. In 0.5.15 they are fields of one object, which is written to.
    """
    return find_spec("sglang.srt.arg_groups.resolution_hooks") is not None


def knows_cut_answers() -> bool:
    """Whether parsers are told that a stream is over, and a call or an answer can say that it is cut. 0.5.23: yes."""
    from sglang.srt.function_call.base_format_detector import BaseFormatDetector

    return hasattr(BaseFormatDetector, "finish")


def keeps_special_tokens() -> bool:
    """Whether the Responses API asks for the special tokens that its parsers need, as Chat does. 0.5.23: yes."""
    from sglang.srt.entrypoints.openai.protocol import MessageProcessingResult

    return "skip_special_tokens" in MessageProcessingResult.__dataclass_fields__


def serves_responses() -> bool:
    """Whether the Responses API can be served here. SGLang goes on without it where a package of its is missing."""
    try:
        pkgutil.resolve_name("sglang.srt.entrypoints.openai.serving_responses")
    except ImportError:
        return False
    return True


def gives_reasoning() -> bool:
    """Whether past thoughts of an Anthropic conversation stay reasoning. 0.5.23: yes."""
    from sglang.srt.entrypoints.openai.serving_chat import OpenAIServingChat

    return hasattr(OpenAIServingChat, "supports_native_reasoning_history")


def asks_the_platform() -> bool:
    """Whether a platform says what its device can do, and SGLang leaves out what it cannot. 0.5.23: yes.

    0.5.15 runs Triton and NCCL wherever they are installed.
    """
    from sglang.srt.platforms.interface import SRTPlatform

    return hasattr(SRTPlatform, "capabilities")


def reckons_fp8_latents() -> bool:
    """Whether SGLang knows how many bytes latents in fp8 take, when it sizes the pool. 0.5.23: yes."""
    return find_spec("sglang.srt.mem_cache.kv_cache_configurator") is not None


def wraps_index_keys() -> bool:
    """Whether a pool holds its index keys in an object of their own. 0.5.23: yes. In 0.5.15 they are a list."""
    return find_spec("sglang.srt.mem_cache.index_key_cache") is not None


def masks_itself() -> bool:
    """Whether a batch's grammar mask knows how it is applied. 0.5.23: yes. In 0.5.15 it is a tensor."""
    from sglang.srt.constrained import base_grammar_backend

    return hasattr(base_grammar_backend, "GrammarMask")


def first_of(*targets: str) -> str:
    """The first of the dotted paths, the newest release's first, at which there is something; else the last."""
    for target in targets[:-1]:
        with suppress(ImportError, AttributeError):
            pkgutil.resolve_name(target)
            return target
    return targets[-1]
