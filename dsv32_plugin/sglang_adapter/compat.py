"""What this adapter expects of SGLang: its releases, what one has and another has not, and the places to hook into.

A difference between releases is a question to SGLang itself, asked here. Who needs the answer says what follows.
"""

from __future__ import annotations

import inspect
import pkgutil
import re
import warnings
from contextlib import suppress
from importlib.util import find_spec

from dsv32_plugin import settings

TESTED_VERSION = "0.5.15.post1"
"""The release to install: every test runs against it, those for a GPU included."""
TESTED_RELEASES: dict[tuple[int, ...], str] = {
    (0, 5, 15): "tested",
    (0, 5, 23): f"tested without a GPU only; {TESTED_VERSION} with one, too",
}
"""Those whose hooks this adapter was written for, and how far. Between them SGLang moved piece by piece."""


def engine_version_problem(version: str) -> str | None:
    """Say why `version` of SGLang is none of the tested ones, or None when it is."""
    release = _release(version)
    if release is None:
        return f"sglang: expected a release number such as {TESTED_VERSION}, got {version!r}"
    if release in TESTED_RELEASES:
        return None
    tested = " and ".join(".".join(map(str, known)) for known in TESTED_RELEASES)
    return (
        f"sglang: dsv32-plugin is written for {tested}, found {version}; "
        f"install sglang=={TESTED_VERSION}, or set DSV32_PLUGIN=0 to run SGLang's own code, "
        f"or set DSV32_ALLOW_UNTESTED_ENGINE=1 to try anyway"
    )


def engine_version_remark(version: str) -> str:
    """How far a tested `version` is tested."""
    release = _release(version)
    assert release is not None, version
    return TESTED_RELEASES[release]


def _release(version: str) -> tuple[int, ...] | None:
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", version)
    return None if match is None else tuple(int(part or 0) for part in match.groups())


def check_engine_version() -> None:
    """Raise RuntimeError for an engine that is not tested, unless the user has allowed it."""
    problem = engine_version_problem(installed_version())
    if problem is None:
        return
    if not settings.allow_untested_engine():
        raise RuntimeError(problem)
    warnings.warn(problem, RuntimeWarning, stacklevel=2)


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


class HookError(RuntimeError):
    """A place to hook into is gone, or takes other parameters."""


def check_hook(target: str, parameters: tuple[str, ...] | None) -> None:
    """Raise HookError unless `target` exists and, where `parameters` says so, takes these first.

    Args:
        target: dotted path of a function, method or class.
        parameters: names of its leading parameters; None for a class that is replaced.
    """
    expected = "" if parameters is None else f"({', '.join(parameters)}, ...)"
    try:
        found = pkgutil.resolve_name(target)
    except (ImportError, AttributeError) as error:
        raise HookError(hook_problem(f"{target}{expected}", f"nothing ({error})")) from error
    if parameters is None:
        return
    names = tuple(inspect.signature(found).parameters)
    if names[: len(parameters)] != parameters:
        raise HookError(hook_problem(f"{target}{expected}", f"({', '.join(names)})"))


def hook_problem(expected: str, found: str) -> str:
    return (
        f"sglang {installed_version()}: expected {expected} to hook into, found {found}; "
        f"dsv32-plugin is written for sglang=={TESTED_VERSION}: install that"
    )
