"""Names of vLLM that only tests use and that have moved: the module of the newest release first."""

from pkgutil import resolve_name

from dsv32_plugin.surface import first_of

make_arg_parser = resolve_name(
    first_of(
        "vllm.entrypoints.common.cli_args:make_arg_parser",  # 0.33
        "vllm.entrypoints.launchers.cli_args:make_arg_parser",  # 0.29
        "vllm.entrypoints.openai.cli_args:make_arg_parser",
    )
)
RequestResponseMetadata = resolve_name(
    first_of(
        "vllm.entrypoints.generate.base.protocol:RequestResponseMetadata",  # 0.29
        "vllm.entrypoints.openai.engine.protocol:RequestResponseMetadata",
    )
)
