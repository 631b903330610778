"""The exact strings of DeepSeek-V3.2's chat protocol: the one place that knows them.

The prompt texts (`TOOLS_HEAD`, `TOOLS_TAIL`, `RESPONSE_FORMAT_HEAD`, `DEVELOPER_HEAD`) are DeepSeek's, kept verbatim
because the model was trained on them: from the model repository deepseek-ai/DeepSeek-V3.2, MIT License, Copyright (c)
2025 DeepSeek (LICENSES/MIT-DeepSeek.txt). `｜` is U+FF5C, `▁` is U+2581.

What a prompt is made of is `Markup`: in it, and nowhere else, control tokens are read.
"""

# ruff: noqa: E501 (DeepSeek's lines are as long as they are)
from typing import Final

from .markup import Markup

BOS: Final = Markup("<｜begin▁of▁sentence｜>")
EOS: Final = Markup("<｜end▁of▁sentence｜>")
PAD: Final = Markup("<｜▁pad▁｜>")
USER: Final = Markup("<｜User｜>")
ASSISTANT: Final = Markup("<｜Assistant｜>")
THINK_START: Final = Markup("<think>")
THINK_END: Final = Markup("</think>")

DSML: Final = Markup("｜DSML｜")
CALLS_START: Final = Markup(f"<{DSML}function_calls>")
CALLS_END: Final = Markup(f"</{DSML}function_calls>")
INVOKE_END: Final = Markup(f"</{DSML}invoke>")
PARAMETER_END: Final = Markup(f"</{DSML}parameter>")

RESULTS_START: Final = Markup("\n\n<function_results>")
RESULTS_END: Final = Markup("\n</function_results>")

RESPONSE_FORMAT_HEAD: Final = Markup(
    "\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
)
DEVELOPER_HEAD: Final = Markup("\n\n# The user's message is: ")

TOOLS_HEAD: Final = Markup(f"""\n
## Tools

You have access to a set of tools you can use to answer the user's question.
You can invoke functions by writing a "<{DSML}function_calls>" block like the following as part of your reply to the user:
<{DSML}function_calls>
<{DSML}invoke name="$FUNCTION_NAME">
<{DSML}parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</{DSML}parameter>
...
</{DSML}invoke>
<{DSML}invoke name="$FUNCTION_NAME2">
...
</{DSML}invoke>
</{DSML}function_calls>

String and scalar parameters should be specified as is without any escaping or quotes, while lists and objects should use JSON format. The "string" attribute should be set to "true" for string type parameters and "false" for other types (numbers, booleans, arrays, objects).

If the thinking_mode is enabled, then after function results you should strongly consider outputting a thinking block. Here is an example:

<{DSML}function_calls>
...
</{DSML}function_calls>

<function_results>
...
</function_results>

{THINK_START}...thinking about results{THINK_END}

Here are the functions available in JSONSchema format:
<functions>
""")
TOOLS_TAIL: Final = Markup("\n</functions>\n")


def invoke_start(name: str) -> Markup:
    """The tag that opens a call of the function `name`."""
    return Markup(f'<{DSML}invoke name="') + name + Markup('">')


def parameter_start(name: str, *, is_string: bool) -> Markup:
    """The tag that opens the argument `name`; `is_string` tells raw text from JSON."""
    kind = "true" if is_string else "false"
    return Markup(f'<{DSML}parameter name="') + name + Markup(f'" string="{kind}">')


def result(text: str) -> Markup:
    """One tool result inside the results block."""
    return Markup("\n<result>") + text + Markup("</result>")
