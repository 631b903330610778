"""SGLang's start-up options, read and decided upon in both of the forms that they have.

Up to 0.5.18 they are fields of one object, which whoever decides writes to. From 0.5.19 on it is sealed once they are
given: what is decided is declared beside it, and read through a view. What is called `options` in this adapter is read
only; `server_args` is SGLang's object, for `decide`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dsv32_plugin.sglang_adapter import upstream

if TYPE_CHECKING:
    from dsv32_plugin.sglang_adapter.upstream import ServerArgs

SOURCE = "dsv32-plugin"
"""Who decided, in SGLang's records."""


def in_effect(server_args: ServerArgs) -> Any:
    """The options, with all that has been decided so far."""
    if not upstream.declares_options():
        return server_args
    from dsv32_plugin.sglang_adapter.upstream import resolving_view

    return resolving_view(server_args)


def decide(server_args: ServerArgs, **values: Any) -> None:
    """Set options, while SGLang works out what the user has left open."""
    if upstream.declares_options():
        from dsv32_plugin.sglang_adapter.upstream import declare_resolution

        declare_resolution(server_args, SOURCE, **values)
        return
    for name, value in values.items():
        setattr(server_args, name, value)


def of_process() -> Any:
    """The options that this process serves with."""
    from dsv32_plugin.sglang_adapter.upstream import get_server_args

    return in_effect(get_server_args())


def model_config(options: Any) -> Any:
    """SGLang's reading of the checkpoint's configuration."""
    if not upstream.declares_options():
        return options.get_model_config()
    from dsv32_plugin.sglang_adapter.upstream import model_config_of

    return model_config_of(options)


def architecture(model_config: Any) -> str:
    """Of the checkpoint; empty where it names none."""
    return str((model_config.hf_config.architectures or [""])[0])


def attention_backends(options: Any) -> set[str | None]:
    """Of prefills and of decodes; None where nothing has been chosen yet."""
    from dsv32_plugin.sglang_adapter.upstream import attention_backends_of

    return set(attention_backends_of(options))


def attention_ranks(options: Any) -> int:
    """Ranks that share the same sequences, and cut the heads among them."""
    shares = getattr(options, "attn_dp_size", None) or (options.dp_size if options.enable_dp_attention else 1)
    return int(options.tp_size) // int(shares)


def longest_sequence(options: Any) -> int:
    """Positions that a sequence can reach: drafts may pass the end of the context, and are dropped after it."""
    return int(model_config(options).context_len) + (options.speculative_num_draft_tokens or 0)
