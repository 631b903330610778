"""The named cases: an output, and what it means. Also read by `compare_engines.py`."""

import json
import re
from dataclasses import dataclass
from typing import Any

D = "｜DSML｜"
BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
START = f"<{D}function_calls>"
END = f"</{D}function_calls>"


def open_invoke(name: str) -> str:
    return f'<{D}invoke name="{name}">\n'


def invoke(name: str, *parameters: str) -> str:
    return open_invoke(name) + "\n".join(parameters) + f"\n</{D}invoke>"


def block(*invokes: str) -> str:
    return f"\n\n{START}\n" + "\n".join(invokes) + f"\n{END}"


def text(name: str, value: str) -> str:
    return f'<{D}parameter name="{name}" string="true">{value}</{D}parameter>'


def data(name: str, value: str) -> str:
    return f'<{D}parameter name="{name}" string="false">{value}</{D}parameter>'


def untyped(name: str, value: str, attributes: str = "") -> str:
    return f'<{D}parameter name="{name}"{attributes}>{value}</{D}parameter>'


def tool(name: str, properties: dict[str, Any] | None = None, **schema: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties or {}, **schema}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


STRING = {"type": "string"}
TOOLS = [
    tool("get_weather", {"location": STRING, "date": STRING}),
    tool("search", {"query": STRING, "topn": {"type": "integer"}, "exact": {"type": "boolean"}}),
    tool("run", {"code": STRING, "env": {"type": "object"}, "args": {"type": "array", "items": STRING}}),
    tool(
        "edit",
        {
            "path": {"$ref": "#/$defs/Path"},
            "change": {"$ref": "#/$defs/Change"},
            "label": {"type": ["string", "null"]},
            "line": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
            "target": {"anyOf": [{"type": "integer"}, {"type": "string"}]},
            "anything": {},
        },
        **{"$defs": {"Path": STRING, "Change": {"type": "object", "properties": {"next": {"$ref": "#/$defs/Change"}}}}},
    ),
    tool("now"),
]


@dataclass(frozen=True)
class Case:
    """`calls` holds (name, arguments); arguments as a mapping are compared as JSON, as text exactly."""

    id: str
    text: str
    content: str = ""
    calls: tuple[tuple[str, Any], ...] = ()
    reasoning: str = ""
    notes: tuple[str, ...] = ()
    thinking: bool = False
    policy: str = "repair"
    tools: tuple[Any, ...] = tuple(TOOLS)
    options: tuple[tuple[str, bool], ...] = ()

    @property
    def official(self) -> bool:
        """Undamaged: nothing to note. Most of these DeepSeek's own parser reads too, with the same values."""
        return not self.notes and self.policy == "repair" and not self.options


CASES: list[Case] = []


def case(id: str, text: str, content: str = "", *calls: tuple[str, Any], notes: str = "", **options: Any) -> None:
    CASES.append(Case(id, text, content, calls, notes=tuple(notes.split()), **options))


def value_case(id: str, value: str, notes: str = "", **options: Any) -> None:
    """The text `value` is one string argument, exactly."""
    call = ("run", json.dumps({"code": value}, ensure_ascii=False))
    case(id, block(invoke("run", text("code", value))), "", call, notes=notes, **options)


HZ = ("get_weather", {"location": "Hangzhou"})
BJ = ("get_weather", {"location": "Beijing"})
NOW = ("now", "{}")
CALL_HZ = invoke("get_weather", text("location", "Hangzhou"))
CALL_BJ = invoke("get_weather", text("location", "Beijing"))

# -- prose without calls
case("prose/plain", "Hello! I am DeepSeek.", "Hello! I am DeepSeek.")
case("prose/empty", "")
case("prose/eos", f"Hello!{EOS}", "Hello!")
case("prose/less-than", "if a < b and c <d or e<f", "if a < b and c <d or e<f")
case("prose/html", "<div>\n<p class='x'>hi</p></div>", "<div>\n<p class='x'>hi</p></div>")
case("prose/ends-in-less-than", "a <", "a <")
case("prose/ends-in-slash", "a </", "a </")
case("prose/ends-in-bar", "a <｜", "a <｜")
case("prose/ends-in-line-breaks", "a\n\n\n", "a\n\n\n")
case("prose/pipes-and-tables", "| a | b |\n|<|>|", "| a | b |\n|<|>|")
case("prose/chatml-token", "<|im_end|>", "<|im_end|>")
case("prose/xml-function-calls", "<function_calls>\n<invoke name='f'>", "<function_calls>\n<invoke name='f'>")
case("prose/mark-alone", f"The mark is {D}.", f"The mark is {D}.")
case("prose/line-breaks-only", "\n\n", "\n\n")

# -- well-formed calls
case("call/one", block(CALL_HZ), "", HZ)
case("call/eos", block(CALL_HZ) + EOS, "", HZ)
case("call/after-prose", "Let me look." + block(CALL_HZ), "Let me look.", HZ)
case("call/prose-keeps-its-own-line-break", "Look:\n" + block(CALL_HZ), "Look:\n", HZ)
case("call/parallel", block(CALL_HZ, CALL_BJ), "", HZ, BJ)
case("call/same-call-twice", block(CALL_HZ, CALL_HZ), "", HZ, HZ)
case("call/no-parameters", block(invoke("now")), "", NOW)
case("call/no-parameters-one-line-break", block(f"{open_invoke('now')}</{D}invoke>"), "", NOW)
case("call/several-without-parameters", block(invoke("now"), CALL_HZ, invoke("now")), "", NOW, HZ, NOW)
case(
    "call/two-parameters-official-layout",
    block(invoke("get_weather", text("location", "Hangzhou"), text("date", "2024-01-16"))),
    "",
    ("get_weather", '{"location": "Hangzhou", "date": "2024-01-16"}'),
)
case(
    "call/mixed-types",
    block(invoke("search", text("query", "x"), data("topn", "10"), data("exact", "false"))),
    "",
    ("search", '{"query": "x", "topn": 10, "exact": false}'),
)
case("call/without-tools", block(invoke("anything", text("k", "v"))), "", ("anything", {"k": "v"}), tools=())
case("call/name-with-dots", block(invoke("mcp.files-v2/read")), "", ("mcp.files-v2/read", "{}"), tools=())
case("call/chinese-names", block(invoke("查天气", text("城市", "杭州"))), "", ("查天气", '{"城市": "杭州"}'), tools=())
case(
    "call/key-with-quotes-and-brackets",
    block(invoke("f", text('a"b', "1"), text("<c>", "2"), text("d>e\n", "3"))),
    "",
    ("f", '{"a\\"b": "1", "<c>": "2", "d>e\\n": "3"}'),
    tools=(),
)
case("call/empty-key", block(invoke("f", text("", "v"))), "", ("f", {"": "v"}), tools=())

# -- string values
value_case("string/plain", "Hangzhou")
value_case("string/empty", "")
value_case("string/leading-and-trailing-space", "  x \t")
value_case("string/line-breaks-around", "\n\nx\n\n")
value_case("string/one-line-break", "\n")
value_case("string/raw-line-breaks-and-quotes", 'print("a")\n\'b\' \\n \\" \\')
value_case("string/redirect", "make 2>&1")
value_case("string/ends-in-less-than", "a <")
value_case("string/ends-in-less-than-slash", "a </")
value_case("string/ends-in-bar", "a <｜")
value_case("string/ends-in-letters-of-parameter", "the para")
value_case("string/ends-in-parameter", "the parameter")
value_case("string/ends-in-slash-parameter", "</parameter")
value_case("string/ends-in-greater-than", "a -> b>")
value_case("string/html", "<div><p>x</p></div>")
value_case("string/xml-invoke-end", "</invoke></function_calls>")
value_case("string/invoke-end-inside", f"a</{D}invoke>b")
value_case("string/whole-call-inside", f'<{D}function_calls>\n<{D}invoke name="x">\n</{D}invoke>\n</{D}function_calls>')
value_case("string/ends-in-invoke-end", f"a</{D}invoke>")
value_case("string/ends-in-all-end-tags", f"a\n</{D}invoke>\n</{D}function_calls>")
value_case("string/parameter-start-inside", f'<{D}parameter name="y" string="true">v')
value_case("string/other-mark-inside", "</|DSML|parameter>")
value_case("string/doubled-bar-inside", "</｜｜DSML｜｜parameter> x")
value_case("string/parameters-is-not-parameter", f"</{D}parameters>")
value_case("string/cut-end-tag-inside", f"</{D}param </{D} </")
value_case("string/think-tags", "<think>a</think>")
value_case("string/special-tokens", f"{BOS}a{EOS}b")
value_case("string/diff", "--- a\n+++ b\n@@ -1 +1 @@\n-<a>\n+</a>\n")
value_case("string/looks-like-a-number", "007")
value_case("string/looks-like-true", "true")
value_case("string/looks-like-an-object", '{"a": [1, 2]}')
value_case("string/looks-like-a-json-string", '"quoted"')
value_case("string/control-characters", "\x00\x01\x1b[0m\r\n\x7f")
value_case("string/astral-and-combining", "📅 e\u0301 \u2028 ￼")
value_case("string/code-fence", "```\nx\n```")
value_case("string/many-less-than", "<" * 50 + "</" * 20)

# -- JSON values
for name, value in {
    "integer": "5",
    "negative": "-3",
    "big-number-verbatim": "12345678901234567890123",
    "decimal-verbatim": "1.50",
    "underflow-verbatim": "1e-999",
    "long-integer-verbatim": "1" * 400,
    "exponent-verbatim": "1E+5",
    "true": "true",
    "null": "null",
    "string": '"a\\u00e9\\n"',
    "array": "[1, 2]",
    "compact-array-verbatim": '[1,2,{"a":[]}]',
    "object": '{"a": {"b": "c"}}',
    "empty-object": "{}",
    "empty-array": "[]",
    "space-around": " [1] ",
    "line-breaks-inside": "[\n  1,\n  2\n]",
    "markup-in-a-string": f'["</{D}invoke>", "<{D}parameter name=\\"x\\""]',
    "escaped-quotes": '["a \\"b\\" \\\\"]',
}.items():
    case(f"json/{name}", block(invoke("f", data("v", value))), "", ("f", f'{{"v": {value}}}'), tools=())

# -- JSON that isn't
for name, value in {
    "code": "def f(x): return x < 3",
    "cyrillic": "привет, мир",
    "code-in-braces": "{ foo: 1 }",
    "comprehension": "[x for x in y]",
    "number-and-unit": "12 apples",
    "bare-word": "hello",
    "leading-zero": "007",
    "nan": "NaN",
    "extra-bracket": "7]",
    "empty": "",
    "space": "  ",
    "beyond-a-double": "1e999",
}.items():
    call = ("f", json.dumps({"v": value}, ensure_ascii=False))
    case(f"not-json/{name}", block(invoke("f", data("v", value))), "", call, notes="not_json", tools=())
for name, value, meaning, note in (
    ("missing-brackets", '{"a": [1, 2', {"a": [1, 2]}, "unbalanced_json"),
    ("missing-quote", '["a', ["a"], "unbalanced_json"),
    ("wrong-bracket", '{"a": [1, 2}', '{"a": [1, 2}', "not_json"),
    ("extra-brackets", "[1, 2]]", "[1, 2]]", "not_json"),
    ("text-after", '{"a": 1} and more', '{"a": 1} and more', "not_json"),
    ("unescaped-quotes", '{"a": "he said "hi""}', '{"a": "he said "hi""}', "not_json"),
    ("dangling-key", '{"a": ', '{"a": ', "not_json"),
    ("beyond-a-double", "[1, -1.5E+400]", "[1, -1.5E+400]", "not_json"),
    ("raw-line-break-in-string", '["a\nb"]', ["a\nb"], "raw_control_character"),
    ("stray-backslash", '["\\d+"]', ["\\d+"], "stray_backslash"),
    (
        "half-a-pair",
        r'{"a": "x\uD83D", "\udc00": "\ud83d\ude00"}',
        {"a": "x\ufffd", "\ufffd": "😀"},
        "half_surrogate_pair",
    ),
    (
        "halves-of-pairs",
        r'["\ude00\ud83d\ud83d\uDE00\ud83d\n\ud83dx"]',
        ["\ufffd\ufffd😀\ufffd\n\ufffdx"],
        "half_surrogate_pair",
    ),
    ("trailing-comma", '{"a": [1, 2, ], }', {"a": [1, 2]}, "trailing_comma"),
    ("python-literals", "[True, False, None]", [True, False, None], "python_literal"),
):
    case(f"damaged-json/{name}", block(invoke("f", data("v", value))), "", ("f", {"v": meaning}), notes=note, tools=())

# -- the attribute decides, the schema settles the rest
for name, parameter, value, notes in (
    ("string", untyped("path", "007"), {"path": "007"}, "no_string_attribute"),
    ("reference-to-object", untyped("change", '{"next": {}}'), {"change": {"next": {}}}, "no_string_attribute"),
    ("nullable-string-text", untyped("label", "no"), {"label": "no"}, "no_string_attribute"),
    ("nullable-string-null", untyped("label", "null"), {"label": None}, "no_string_attribute"),
    ("nullable-string-number", untyped("label", "5"), {"label": "5"}, "no_string_attribute"),
    ("nullable-integer", untyped("line", "12"), {"line": 12}, "no_string_attribute"),
    ("any-of-integer", untyped("target", "12"), {"target": 12}, "no_string_attribute"),
    ("any-of-string", untyped("target", "12b"), {"target": "12b"}, "no_string_attribute"),
    ("untyped-object", untyped("anything", '{"a": 1}'), {"anything": {"a": 1}}, "no_string_attribute"),
    ("untyped-text", untyped("anything", "[link](url)"), {"anything": "[link](url)"}, "no_string_attribute"),
    ("unknown-number", untyped("unknown", "5"), {"unknown": 5}, "no_string_attribute"),
    ("malformed-attribute", untyped("line", "12", ' string="maybe"'), {"line": 12}, "no_string_attribute"),
    ("attribute-wins-string", text("line", "12"), {"line": "12"}, "type_conflict"),
    ("attribute-wins-number", data("path", "12"), {"path": 12}, "type_conflict"),
    ("double-encoded-object", text("change", "{}"), {"change": "{}"}, "type_conflict"),
    ("json-string-for-object", data("change", '"{}"'), {"change": "{}"}, "type_conflict"),
    ("not-json-for-object", data("change", "a < b"), {"change": "a < b"}, "not_json"),
):
    case(f"schema/{name}", block(invoke("edit", parameter)), "", ("edit", value), notes=notes)
case(
    "wrapped/arguments",
    block(invoke("search", data("arguments", '{"query": "x", "topn": 5}'))),
    "",
    ("search", '{"query": "x", "topn": 5}'),
    notes="wrapped_arguments",
)
case(
    "wrapped/then-another-parameter",
    block(invoke("search", data("input", '{"query": "x"}'), data("topn", "5"))),
    "",
    ("search", '{"query": "x", "topn": 5}'),
    notes="wrapped_arguments",
)
case("wrapped/empty", block(invoke("search", data("args", "{}"))), "", ("search", "{}"), notes="wrapped_arguments")
case(
    "wrapped/other-keys-stay",
    block(invoke("search", data("arguments", '{"other": 1}'))),
    "",
    ("search", {"arguments": {"other": 1}}),
)
case(
    "wrapped/no-schema-stays",
    block(invoke("f", data("arguments", '{"query": "x"}'))),
    "",
    ("f", {"arguments": {"query": "x"}}),
    tools=(),
)
for outer in ("arguments", "args", "input", "parameters", "params"):
    for name, value, meaning, notes in (
        ("known", '{"query": "x", "topn": 5}', {"query": "x", "topn": 5}, "no_string_attribute wrapped_arguments"),
        ("unknown", '{"x": 1}', {outer: {"x": 1}}, "no_string_attribute"),
        ("empty", "{}", {}, "no_string_attribute wrapped_arguments"),
        ("text", "x", {outer: "x"}, "no_string_attribute"),
        ("number", "5", {outer: 5}, "no_string_attribute"),
        ("string", '"x"', {outer: '"x"'}, "no_string_attribute"),
        ("nothing", "", {outer: ""}, "no_string_attribute"),
        ("array", '[{"query": 1}]', {outer: [{"query": 1}]}, "no_string_attribute"),
        ("dangling", '{"query": ', {outer: '{"query": '}, "no_string_attribute"),
        ("open", '{"query": "x', {"query": "x"}, "no_string_attribute unbalanced_json wrapped_arguments"),
        ("text-after", '{"x": 1} y', {outer: '{"x": 1} y'}, "no_string_attribute"),
    ):
        case(
            f"wrapped/untyped-{outer}-{name}",
            block(invoke("search", untyped(outer, value))),
            "",
            ("search", meaning),
            notes=notes,
        )
for name, value, meaning, notes in (
    ("known", '{"query": "x", "topn": 5}', {"query": "x", "topn": 5}, "wrapped_arguments"),
    ("unknown", '{"x": 1}', {"input": '{"x": 1}'}, ""),
    ("text", "a\\b", {"input": "a\\b"}, ""),
    ("nothing", "", {"input": ""}, ""),
    ("broken", '{"query": oops', {"input": '{"query": oops'}, ""),
):
    case(f"wrapped/string-{name}", block(invoke("search", text("input", value))), "", ("search", meaning), notes=notes)
case(
    "wrapped/untyped-given-up",
    block(invoke("search", untyped("input", '{"query": "x" oops'))),
    "",
    ("search", '{"query": "x" , "input": "{\\"query\\": \\"x\\" oops"}'),
    notes="no_string_attribute not_json",
)
case("wrapped/declared-stays", block(invoke("run", data("args", '["a"]'))), "", ("run", {"args": ["a"]}))
case(
    "wrapped/object-as-body",
    block(open_invoke("search") + '{"query": "x", "topn": 5}\n' + f"</{D}invoke>"),
    "",
    ("search", '{"query": "x", "topn": 5}'),
    notes="wrapped_arguments",
)
case(
    "wrapped/object-as-body-then-text",
    block(invoke("search", '{"query": "x"}\nas asked')),
    "as asked\n",
    ("search", '{"query": "x"}'),
    notes="wrapped_arguments text_in_calls",
)
case(
    "wrapped/object-as-body-holds-markup",
    block(invoke("f", f'{{"a": "</{D}parameter>", "b": {{}}}}')),
    "",
    ("f", {"a": f"</{D}parameter>", "b": {}}),
    tools=(),
    notes="wrapped_arguments",
)
case(
    "wrapped/object-as-body-given-up",
    block(invoke("search", '{"query": "x" oops}')),
    "",
    ("search", '{"query": "x" , "arguments": "{\\"query\\": \\"x\\" oops}\\n"}'),
    notes="not_json",
)
case(
    "wrapped/object-as-body-given-up-before-anything-is-out",
    block(invoke("search", '{"query": [oops]}')),
    "",
    ("search", {"arguments": '{"query": [oops]}\n'}),
    notes="not_json",
)

# -- malformed bodies: text, and never a call with {}
MALFORMED = {  # the body, and the tags in it that are text too
    "prose": ("hello", 0),
    "array": ('["x"]', 0),
    "json-text": ('"x"', 0),
    "code-in-braces": ("{ print(1) }", 0),
    "bare-word-in-braces": ('{"query": x}', 0),
    "unknown-parameter-without-mark": ('<parameter name="c" string="true">v</parameter>', 0),
    "attribute-with-the-mark": (f'<{D}parameter name="query"g={D}>v</{D}parameter>', 1),
    "parameter-without-name": (f'<{D}parameter string="true">v</{D}parameter>', 1),
    "other-tag": ("<argument>x</argument>", 0),
    "parameter-end": (f"</{D}parameter>", 1),
    "text-then-other-tag": ("a <b>c</b>", 0),
    "long-text": ("x" * 1000, 0),
}
for name, (body, tags) in MALFORMED.items():
    as_text = ["markup_as_text"] * (tags + 4)
    bad = invoke("search", body)
    case(f"malformed/{name}", block(bad), block(bad), notes=" ".join(as_text))
    mixed = block(bad, CALL_HZ)
    notes = " ".join([*as_text[1:], "bare_invoke", "stray_end_tag"])
    case(f"malformed/{name}-then-a-call", mixed, mixed[: mixed.index(f"\n{CALL_HZ}")], HZ, notes=notes)
    case(f"malformed/{name}-between-calls", block(CALL_HZ, bad, CALL_BJ), bad + "\n", HZ, BJ, notes="text_in_calls")
    case(f"malformed/{name}-bare", bad, bad, notes=" ".join(as_text[2:]))

# -- parameters without their mark
for name, body, meaning, notes in (
    ("start", f'<parameter name="query" string="true">x</{D}parameter>', {"query": "x"}, "spelling"),
    ("start-and-end", '<parameter name="query" string="true">x</parameter>', {"query": "x"}, "spelling spelling"),
    ("and-without-attribute", '<parameter name="topn">3</parameter>', {"topn": 3}, "no_string_attribute spelling"),
    (
        "two",
        '<parameter name="query" string="true">x</p></parameter>\n<parameter name="topn" string="false">3</parameter>',
        {"query": "x</p>", "topn": 3},
        "spelling spelling spelling spelling",
    ),
    (
        "after-a-whole-one",
        text("query", "x") + '\n<parameter name="topn" string="false">3</parameter>',
        {"query": "x", "topn": 3},
        "spelling spelling",
    ),
):
    case(f"unmarked/{name}", block(invoke("search", body)), "", ("search", meaning), notes=notes)
    whole = invoke("search", body).replace(f"</{D}invoke", "</invoke")
    case(f"unmarked/{name}-and-call-end", block(whole), "", ("search", meaning), notes=f"{notes} spelling")
    case(f"unmarked/{name}-bare", invoke("search", body), "", ("search", meaning), notes=f"bare_invoke {notes}")
case(
    "unmarked/unknown-after-a-whole-one-is-content",
    block(invoke("search", text("query", "x"), '<parameter name="c">v</parameter>')),
    '<parameter name="c">v</parameter>\n',
    ("search", {"query": "x"}),
    notes="text_in_calls",
)
case(
    "unmarked/without-tools",
    block(invoke("f", '<parameter name="c" string="true">v</parameter>')),
    "",
    ("f", {"c": "v"}),
    notes="spelling spelling",
    tools=(),
)
case(
    "unmarked/text-then-a-parameter",
    block(invoke("search", "as asked:", text("query", "x"))),
    "as asked:\n",
    ("search", {"query": "x"}),
    notes="text_in_calls",
)

# -- reasoning
case("think/answer", "I see.</think>Yes.", "Yes.", reasoning="I see.", thinking=True)
case("think/call", f"Look.</think>{block(CALL_HZ)}{EOS}", "", HZ, reasoning="Look.", thinking=True)
case("think/prose-and-call", f"Look.</think>Hm.{block(CALL_HZ)}", "Hm.", HZ, reasoning="Look.", thinking=True)
case("think/empty", "</think>Yes.", "Yes.", thinking=True)
case("think/line-breaks-kept", "a\n\n</think>\n\nb", "\n\nb", reasoning="a\n\n", thinking=True)
case("think/after-results-no-thinking", "The weather is fine.", "The weather is fine.")
case("think/markup-quoted", f"I use {START} here.</think>ok", "ok", reasoning=f"I use {START} here.", thinking=True)
case("think/less-than", "a <b </thin</think>c", "c", reasoning="a <b </thin", thinking=True)
case("think/xml", "<a></a></think>c", "c", reasoning="<a></a>", thinking=True)
QUOTED = block(CALL_HZ)
case("think/call-before-end-stays", f"So{QUOTED}</think>ok", "ok", reasoning=f"So{QUOTED}", thinking=True)
case(
    "think/call-before-end-then-prose",
    f"So{QUOTED} or so.\n</think>ok{block(CALL_BJ)}",
    "ok",
    BJ,
    reasoning=f"So{QUOTED} or so.\n",
    thinking=True,
)
case(
    "think/never-closed-then-call",
    f"So{QUOTED}{EOS}",
    "",
    HZ,
    reasoning="So",
    thinking=True,
    notes="unclosed_reasoning",
)
for name, thoughts in (("without-thoughts", ""), ("after-one-line-break", "So\n"), ("indented", "So\n\n  ")):
    case(
        f"think/never-closed-then-call-{name}",
        f"{thoughts}{QUOTED.strip()}{EOS}",
        "",
        HZ,
        reasoning=thoughts.removesuffix("\n"),
        thinking=True,
        notes="unclosed_reasoning",
    )
case(
    "think/never-closed-then-two-blocks",
    f"So{QUOTED}{block(CALL_BJ)}{EOS}",
    "",
    HZ,
    BJ,
    reasoning="So",
    thinking=True,
    notes="unclosed_reasoning",
)
case(
    "think/never-closed-two-blocks-then-prose",
    f"So{QUOTED}{block(CALL_BJ)} or so.",
    reasoning=f"So{QUOTED}{block(CALL_BJ)} or so.",
    thinking=True,
    notes="unclosed_reasoning",
)
for name, thoughts in (("in-mid-line", "So: "), ("in-a-fence", "So\n```\n")):
    case(
        f"think/never-closed-call-{name}-stays",
        thoughts + QUOTED.strip(),
        reasoning=thoughts + QUOTED.strip(),
        thinking=True,
        notes="unclosed_reasoning",
    )
case(
    "think/never-closed-unfinished-call-stays",
    f"So{QUOTED[:-5]}",
    reasoning=f"So{QUOTED[:-5]}",
    thinking=True,
    notes="unclosed_reasoning",
)
case(
    "think/never-closed-unknown-function-stays",
    f"So{block(invoke('nope'))}",
    reasoning=f"So{block(invoke('nope'))}",
    thinking=True,
    notes="unclosed_reasoning",
)
case("think/never-closed", "Hm, so", reasoning="Hm, so", thinking=True, notes="unclosed_reasoning")
case("think/opened-again", "<think>a</think>b", "b", reasoning="a", thinking=True, notes="repeated_think_tag")
case("think/opened-though-off", "<think>a</think>b", "b", reasoning="a", notes="repeated_think_tag")
case("think/closed-though-off", "</think>b", "b", notes="repeated_think_tag")
case("think/closed-twice", "a</think></think>b", "b", reasoning="a", thinking=True, notes="repeated_think_tag")
case("think/again-after-a-call", f"{block(CALL_HZ)}<think>x</think>", "", HZ, reasoning="x", notes="repeated_think_tag")
case("think/in-prose-stays", "Use <think> and </think>.", "Use <think> and </think>.")
case("think/in-reasoning-stays", "a <think> b</think>c", "c", reasoning="a <think> b", thinking=True)

# -- spelling
SPELLINGS = {
    "ascii-bars": (D, "|DSML|"),
    "doubled-bars": (D, "｜｜DSML｜｜"),
    "doubled-ascii-bars": (D, "||DSML||"),
    "mixed-bars": (D, "｜DSML|"),
    "double-bars": (D, "‖DSML‖"),
    "spaces-inside": (D, "｜ DSML ｜"),
    "spaces-around": (D, " ｜DSML｜ "),
    "spaces-everywhere": (D, " | DSML | "),
    "spaces-between-doubled-bars": (D, "｜ ｜DSML｜ ｜"),
    "tool_calls": ("function_calls", "tool_calls"),
    "toolcalls": ("function_calls", "toolcalls"),
    "tool_call": ("function_calls", "tool_call"),
    "toolcall": ("function_calls", "toolcall"),
    "tool_use": ("function_calls", "tool_use"),
    "function_call": ("function_calls", "function_call"),
    "functionCalls": ("function_calls", "functionCalls"),
    "Tool-Calls": ("function_calls", "Tool-Calls"),
    "calls": ("function_calls", "calls"),
    "single-quotes": ('"', "'"),
    "smart-quotes": ('="([^"]*)"', "=“\\1”"),
    "space-before-end": (">", " >"),
    "space-around-equals": ("=", " = "),
}
for name, (old, new) in SPELLINGS.items():
    damaged = re.sub(old, new, block(CALL_HZ, CALL_BJ)) if "\\" in new else block(CALL_HZ, CALL_BJ).replace(old, new)
    count = 10 if old == D or name == "space-before-end" else 2 if old == "function_calls" else 4
    case(f"spelling/{name}", damaged, "", HZ, BJ, notes=" ".join(["spelling"] * count))
case(
    "spelling/attributes-reordered",
    block(invoke("get_weather", f'<{D}parameter string="true" name="location">Hangzhou</{D}parameter>')),
    "",
    HZ,
    notes="spelling",
)
case(
    "spelling/attribute-capitals",
    block(invoke("search", untyped("topn", "5", ' string="False"'))),
    "",
    ("search", {"topn": 5}),
    notes="spelling",
)
case(
    "spelling/extra-attribute",
    block(invoke("get_weather", untyped("location", "Hangzhou", ' string="true" type="str"'))),
    "",
    HZ,
    notes="spelling",
)
case("spelling/unquoted", block(invoke("now")).replace('"now"', "now"), "", NOW, notes="spelling")
for name, quoted in (("spaces-around-a-name", '" now "'), ("spaces-around-a-name-in-single-quotes", "' now\t'")):
    case(f"spelling/{name}", block(invoke("now")).replace('"now"', quoted), "", NOW, notes="spelling")
value_case("string/end-tag-in-capitals", f"a</{D}Parameter>")
case("spelling/self-closing-call", block(f'<{D}invoke name="now"/>', CALL_HZ), "", NOW, HZ, notes="spelling")
case(
    "spelling/self-closing-parameter",
    block(invoke("get_weather", f'<{D}parameter name="location" string="true"/>', text("date", "x"))),
    "",
    ("get_weather", {"location": "", "date": "x"}),
    notes="spelling",
)
case("spelling/one-line", block(CALL_HZ).replace("\n", ""), "", HZ)
case("spelling/indented", block(CALL_HZ).replace("\n<", "\n   <").replace("\n   <", "\n\n<", 1), "\n", HZ)
case("spelling/wide-layout", block(CALL_HZ).replace(">\n<", ">\n\n\t \n<"), "", HZ)
case("spelling/no-blank-line", "a\n" + block(CALL_HZ).strip(), "a", HZ)
case("spelling/at-the-very-start", block(CALL_HZ).strip(), "", HZ)
case("spelling/in-mid-line", "Sure!" + block(CALL_HZ).strip(), "Sure!", HZ)

# -- structure
case("structure/bare-invoke", "Ok\n\n" + CALL_HZ, "Ok", HZ, notes="bare_invoke")
case("structure/bare-invokes", f"{CALL_HZ}\n{CALL_BJ}", "", HZ, BJ, notes="bare_invoke bare_invoke")
case(
    "structure/bare-invoke-then-wrapper-end",
    f"{CALL_HZ}\n{END}",
    "",
    HZ,
    notes="bare_invoke stray_end_tag",
)
BARE_UNKNOWN = invoke("nope", text("a", "b"))
case(
    "structure/bare-unknown-function-stays",
    BARE_UNKNOWN,
    BARE_UNKNOWN,
    notes="markup_as_text markup_as_text markup_as_text markup_as_text",
)
case("structure/bare-parameter-stays", text("a", "b"), text("a", "b"), notes="markup_as_text markup_as_text")
case(
    "structure/unknown-function-in-block",
    block(invoke("nope", text("a", "b"))),
    "",
    ("nope", {"a": "b"}),
    notes="unknown_function",
)
UNFINISHED = "unfinished_call unclosed_block"
for name, ends, calls in (
    ("call", f"</{D}invoke>\n{END}", True),
    ("bare-call", f"</{D}invoke>", True),
    ("wrapper", END, True),
    ("nothing", "", False),
):
    case(
        f"unmarked/end-of-the-last-value-then-the-end-of-{name}",
        f'\n\n{START}\n<{D}invoke name="f">\n<{D}parameter name="v" string="false">[1]</parameter>\n{ends}',
        "",
        ("f", '{"v": [1]}' if calls else '{"v": [1]'),
        notes="unclosed_parameter unclosed_invoke unclosed_block" if calls else f"truncated_markup {UNFINISHED}",
        tools=(),
    )
value_case("string/unmarked-end-tags", f"a</parameter>\n</{D}invoke>\n")
HALF = f"\n\n{START}\n" + open_invoke("get_weather") + f'<{D}parameter name="location" string="true">Hangzhou'
case(
    "structure/unclosed-parameter",
    HALF + f"\n</{D}invoke>\n{END}",
    "",
    HZ,
    notes="unclosed_parameter unclosed_invoke unclosed_block",
)
case(
    "structure/unclosed-parameter-eos",
    HALF + f"</{D}invoke>{EOS}",
    "",
    HZ,
    notes="unclosed_parameter unclosed_invoke unclosed_block",
)
case(
    "structure/unclosed-parameter-swallows-the-next",
    HALF + f"\n</{D}invoke>\n{CALL_BJ}\n{END}",
    "",
    ("get_weather", {"location": f"Hangzhou\n</{D}invoke>\n{CALL_BJ[: CALL_BJ.index(f'</{D}parameter')]}"}),
)
case(
    "structure/unclosed-invoke",
    HALF + f"</{D}parameter>\n{END}",
    "",
    HZ,
    notes="unclosed_invoke",
)
case(
    "structure/unclosed-invoke-then-another",
    HALF + f"</{D}parameter>\n{CALL_BJ}\n{END}",
    "",
    HZ,
    BJ,
    notes="unclosed_invoke",
)
case("structure/unclosed-block", f"\n\n{START}\n{CALL_HZ}", "", HZ, notes="unclosed_block")
case("structure/unclosed-block-eos", f"\n\n{START}\n{CALL_HZ}{EOS}", "", HZ, notes="unclosed_block")
case(
    "structure/nested-invoke",
    block(open_invoke("now") + CALL_HZ + f"\n</{D}invoke>"),
    "",
    NOW,
    HZ,
    notes="unclosed_invoke stray_end_tag",
)
case(
    "structure/duplicate-parameter",
    block(invoke("get_weather", text("location", "Beijing"), text("location", "Hangzhou"))),
    "",
    ("get_weather", '{"location": "Beijing", "location": "Hangzhou"}'),
    notes="duplicate_parameter",
)
case(
    "structure/two-blocks",
    block(CALL_HZ) + block(CALL_BJ),
    "",
    HZ,
    BJ,
)
case(
    "structure/prose-around-and-between",
    f"A{block(CALL_HZ)}\nB{block(CALL_BJ)}\nC",
    "A\nB\nC",
    HZ,
    BJ,
    notes="text_after_calls text_after_calls",
)
case(
    "structure/prose-between-calls",
    block(CALL_HZ, "and then", CALL_BJ),
    "and then\n",
    HZ,
    BJ,
    notes="text_in_calls",
)
case("structure/wrapper-twice", f"\n\n{START}\n{START}\n{CALL_HZ}\n{END}", "", HZ, notes="repeated_start_tag")
case(
    "structure/wrapper-end-twice",
    f"{block(CALL_HZ)}\n{END}",
    "",
    HZ,
    notes="stray_end_tag",
)
case("structure/empty-block", f"a\n\n{START}\n{END}", "a")
case("structure/text-after-eos", f"a{EOS}b", "ab", notes="text_after_eos")
case("structure/call-then-text-after-eos", f"{block(CALL_HZ)}{EOS}b", "b", HZ, notes="text_after_eos text_after_calls")
case("structure/leaked-bos-at-start", BOS + "Hello", "Hello", notes="leaked_token")
case("structure/leaked-bos-at-end", "Hello" + BOS, "Hello", notes="leaked_token")
case(
    "structure/leaked-bos-in-calls",
    block(CALL_HZ + BOS, BOS + CALL_BJ),
    "",
    HZ,
    BJ,
    notes="leaked_token leaked_token",
)

# -- calls in prose
BARE = f'<{D}invoke name="now">'
for name, prose, tags in (
    ("named", f"A call begins with {BARE} and the parameters.", 1),
    ("named-at-the-end-of-a-line", f"A call begins with {BARE}\nand then the parameters.", 1),
    ("named-with-its-end", f"A call is {BARE} up to </{D}invoke>.", 2),
    ("named-on-its-own-line", f"It begins with\n\n{BARE}\n\nand the parameters.", 1),
    ("named-twice", f"{BARE} {BARE} is what it says.", 2),
    ("named-then-a-list", f"{BARE}: [1]", 1),
    ("named-then-an-object", f'{BARE}{{"a": 1}}', 1),
    ("named-then-html", f"{BARE} <b>not</b>", 1),
    ("named-then-the-block-end", f"{BARE}\n{END} is wrong", 2),
    ("named-far-from-its-end", f"{BARE}{' ' * 65}</{D}invoke>", 2),
    ("wrapper-and-name", f"Write {START}\n{BARE} and so on.", 2),
    ("wrapper-and-name-and-its-end", f"Write {START}\n{BARE}\n{END} and so on.", 3),
    ("end-tag", f"A value ends with </{D}parameter> and a call with </{D}invoke>.", 2),
):
    case(f"prose/{name}", prose, prose, notes=" ".join(["markup_as_text"] * tags))
case("prose/named-eos", f"It begins with {BARE}{EOS}", f"It begins with {BARE}", notes="markup_as_text")
case("prose/named-cut", f"It begins with {BARE}", "It begins with ", notes="truncated_markup")

# -- the turn ends
for name, token in (("user", "<｜User｜>"), ("assistant", "<｜Assistant｜>")):
    case(f"turn/{name}-after-prose", f"Hello{token}And you?{block(CALL_HZ)}", "Hello", notes="next_turn")
    case(f"turn/{name}-after-calls", f"{block(CALL_HZ)}{token}Thanks{EOS}", "", HZ, notes="next_turn")
    case(
        f"turn/{name}-in-a-block",
        f"\n\n{START}\n{CALL_HZ}\n{token}{CALL_BJ}",
        "",
        HZ,
        notes="unclosed_block next_turn",
    )
    case(
        f"turn/{name}-in-a-call",
        f"\n\n{START}\n{CALL_HZ.removesuffix(f'</{D}invoke>')}{token}{CALL_BJ}",
        "",
        HZ,
        notes="unclosed_invoke unclosed_block next_turn",
    )
    case(
        f"turn/{name}-in-the-reasoning",
        f"Hm{token}a</think>b",
        reasoning="Hm",
        thinking=True,
        notes="next_turn unclosed_reasoning",
    )
    case(f"turn/{name}-in-backticks-stays", f"The token `{token}` opens a turn.", f"The token `{token}` opens a turn.")
    case(f"turn/{name}-in-a-fence-stays", f"```\n{token}\n```\nso", f"```\n{token}\n```\nso")
    value_case(f"turn/{name}-in-a-value-stays", f"a{token}b")
case("turn/pad", "a<｜▁pad▁｜>b", "ab", notes="leaked_token")
case("turn/pad-in-calls", block(CALL_HZ + "<｜▁pad▁｜>"), "", HZ, notes="leaked_token")

# -- quotations
EXAMPLE = block(CALL_HZ).strip()
for name, quotation, notes in (
    ("wrapper-in-backticks", f"Write `{START}` first.", 1),
    ("wrapper-in-prose", f"Write {START} first.", 1),
    ("wrapper-line-alone", f"Begin with\n\n{START}\n\nand go on.", 1),
    ("tag-in-backticks", f'Use `<{D}invoke name="now">`.', 1),
    ("call-in-quotes", f"Like “{EXAMPLE}”", 6),
    ("call-in-a-code-fence", f"Like this:\n```xml\n{EXAMPLE}\n```\n", 6),
    ("call-in-a-fence-in-a-fence", f"Like this:\n````md\n```xml\n{EXAMPLE}\n```\n````\n", 6),
    ("call-after-an-inner-info-string", f"Like this:\n```md\n```xml\n{EXAMPLE}\n```\n", 6),
    ("call-in-an-indented-fence", f"- Like this:\n    ```xml\n    {EXAMPLE}\n    ```\n", 6),
    ("call-in-an-item-that-is-a-fence", f"1. ```xml\n   {EXAMPLE}\n   ```\n", 6),
    ("call-within-code", f"Like `x = {EXAMPLE}`.", 6),
    ("call-within-code-in-two-backticks", f"Like ``a ` {EXAMPLE}``.", 6),
):
    case(f"quoted/{name}", quotation, quotation, notes=" ".join(["markup_as_text"] * notes))
for name, prose in (
    ("a-code-fence", "```\nx\n```\n"),
    ("a-longer-end-of-a-fence", "```\nx\n````\n"),
    ("a-fence-in-an-item", "- ```\n  x\n  ```\n"),
    ("code-in-three-backticks", "```x``` is\n"),
    ("code", "With `x` and ``a`b``: "),
    ("a-line-with-a-backtick", "A ` is\n"),
):
    case(f"quoted/after-{name}-it-is-a-call", prose + EXAMPLE, prose.removesuffix("\n"), HZ)
case("turn/within-code-stays", "`a <｜User｜> b` opens a turn.", "`a <｜User｜> b` opens a turn.")

# -- truncation
case("cut/in-wrapper", f"a\n\n<{D}function_ca", "a", notes="truncated_markup")
case("cut/after-wrapper", f"a\n\n{START}\n", "a", notes="truncated_markup")
for name, rest in (
    ("mark", "<｜DS"),
    ("wrapper-name", f"<{D}func"),
    ("wrapper-after-call", f"{block(CALL_HZ)}\n\n<{D}func"),
    ("bare-name", f'<{D}invoke name="no'),
    ("bare-call", f'<{D}invoke name="now">\n'),
    ("end-of-nothing", f"</{D}invo"),
):
    calls = (HZ,) if "call>" in rest or CALL_HZ in rest else ()
    case(f"cut/in-{name}", f"{rest}", "", *calls, notes="truncated_markup")
    if not calls:
        case(f"cut/in-{name}-after-prose", f"Well, {rest}", "Well, ", notes="truncated_markup")
case(
    "cut/in-value-in-mark",
    HALF + "</｜DS",
    "",
    ("get_weather", '{"location": "Hangzhou'),
    notes=f"truncated_markup {UNFINISHED}",
)
case("cut/in-call-in-mark", f"\n\n{START}\n{BARE}\n<", "", ("now", "{"), notes=f"truncated_markup {UNFINISHED}")
case(
    "cut/in-bare-call-in-parameter",
    f"{BARE}\n<{D}para",
    "",
    ("now", "{"),
    notes="bare_invoke truncated_markup unfinished_call",
)
for begun in ("<", "<｜"):
    case(f"cut/after-blank-line-and-{len(begun)}", f"\n\n{begun}", notes="truncated_markup")
    case(f"cut/after-blank-line-and-{len(begun)}-eos", f"a\n\n{begun}{EOS}", f"a\n\n{begun}")
case("cut/in-name", f'a\n\n{START}\n<{D}invoke name="get_wea', "a", notes="truncated_markup")
NAMED = f"\n\n{START}\n{open_invoke('get_weather')}"
case("cut/after-name", NAMED, "", ("get_weather", "{"), notes=UNFINISHED)
case("cut/in-value", HALF, "", ("get_weather", '{"location": "Hangzhou'), notes=UNFINISHED)
for name, value in (("number", "12"), ("array", "[1]"), ("literal", "true")):
    case(f"cut/after-{name}", NAMED + data("v", value), "", ("get_weather", f'{{"v": {value}'), notes=UNFINISHED)
case("cut/in-value-eos", HALF + EOS, "", ("get_weather", '{"location": "Hangzhou'), notes=UNFINISHED)
for begun in ("<", "</", "</｜"):
    case(
        f"cut/in-end-tag-{len(begun)}",
        HALF + begun,
        "",
        ("get_weather", '{"location": "Hangzhou'),
        notes=f"truncated_markup {UNFINISHED}",
    )
    case(
        f"cut/in-end-tag-of-a-number-{len(begun)}",
        f'{NAMED}<{D}parameter name="v" string="false">1{begun}',
        "",
        ("get_weather", '{"v": 1'),
        notes=f"truncated_markup {UNFINISHED}",
    )
case(
    "cut/in-end-tag",
    HALF + f"</{D}para",
    "",
    ("get_weather", '{"location": "Hangzhou'),
    notes=f"truncated_markup {UNFINISHED}",
)
case(
    "cut/in-end-tag-of-the-call-of-an-open-value",
    HALF + f"</{D}inv",
    "",
    ("get_weather", '{"location": "Hangzhou'),
    notes=f"truncated_markup {UNFINISHED}",
)
CLOSED = f"{HALF}</{D}parameter>"
case("cut/after-value", CLOSED, "", ("get_weather", '{"location": "Hangzhou"'), notes=UNFINISHED)
case("cut/after-value-eos", CLOSED + EOS, "", HZ, notes="unclosed_invoke unclosed_block")
for name, piece, complete in (
    ("next-parameter", f'\n<{D}parameter name="da', False),
    ("next-tag", f"\n<{D}", False),
    ("next-call", f"\n<{D}inv", True),
    ("end-tag-of-the-call", f"\n</{D}", True),
):
    case(
        f"cut/in-{name}",
        CLOSED + piece,
        "",
        ("get_weather", '{"location": "Hangzhou"'),
        notes=f"truncated_markup {UNFINISHED}",
    )
    case(
        f"cut/in-{name}-eos",
        CLOSED + piece + EOS,
        "",
        HZ if complete else ("get_weather", '{"location": "Hangzhou"'),
        notes=f"truncated_markup {'unclosed_invoke unclosed_block' if complete else UNFINISHED}",
    )
case(
    "cut/earlier-calls-stay-whole",
    block(CALL_BJ).removesuffix(END) + HALF.removeprefix(f"\n\n{START}\n"),
    "",
    BJ,
    ("get_weather", '{"location": "Hangzhou'),
    notes=UNFINISHED,
)
for name, attribute, value, rest in (
    ("text", ' string="true"', 'a "b"\\', '"a \\"b\\"\\\\'),
    ("json-before-value", ' string="false"', "", ""),
    ("json-number", ' string="false"', "12", "12"),
    ("json-literal", ' string="false"', "tru", "tru"),
    ("json-key", ' string="false"', '{"a": 1, "b', '{"a": 1, "b'),
    ("json-colon", ' string="false"', '{"a":', '{"a":'),
    ("json-comma", ' string="false"', "[1, ", "[1, "),
    ("json-escape", ' string="false"', '["a\\u00', '["a\\u00'),
    ("json-whole", ' string="false"', "[1]", "[1]"),
    ("guess", "", "[1, tru", "[1, tru"),
    ("guess-nothing", "", "", ""),
    ("guess-text", "", "[1, oops", '"[1, oops'),
    ("given-up-json", ' string="false"', '{"a": 1 oops', '{"a": 1 }, "v": "{\\"a\\": 1 oops'),
):
    notes = ["no_string_attribute"] if not attribute else ["not_json"] if "oops" in value and attribute else []
    case(
        f"cut/in-{name}",
        f'{NAMED}<{D}parameter name="v"{attribute}>{value}',
        "",
        ("get_weather", f'{{"v": {rest}'),
        notes=" ".join([*notes, UNFINISHED]),
    )
for name, value, rest in (
    ("before-the-first-name", '{"loc', '{"arguments": {"loc'),
    ("after-the-first-name", '{"location":', '{"location":'),
    ("in-a-value", '{"location": "Hang', '{"location": "Hang'),
    ("in-the-second-name", '{"location": "x", "da', '{"location": "x", "da'),
    ("after-the-object", '{"location": "x"}', '{"location": "x"'),
    ("after-the-parameter", f'{{"location": 5}}</{D}parameter>', '{"location": 5'),
):
    for attribute in ("", ' string="false"'):
        case(
            f"cut/wrapped-{name}{'-untyped' * (not attribute)}",
            f'{NAMED}<{D}parameter name="arguments"{attribute}>{value}',
            "",
            ("get_weather", rest),
            notes=("" if attribute else "no_string_attribute ")
            + ("wrapped_arguments " if "</" in value else "")
            + UNFINISHED,
        )
case("cut/in-body", f'{NAMED}{{"location": "Hang', "", ("get_weather", '{"location": "Hang'), notes=UNFINISHED)

# -- strict: damaged markup stays content
for id in ("spelling/ascii-bars", "spelling/tool_calls", "spelling/in-mid-line", "structure/bare-invoke"):
    damaged = next(c.text for c in CASES if c.id == id)
    count = {"spelling/ascii-bars": 0, "spelling/tool_calls": 8, "spelling/in-mid-line": 6, "structure/bare-invoke": 4}[
        id
    ]
    case(f"strict/{id.split('/')[1]}", damaged, damaged, notes=" ".join(["markup_as_text"] * count), policy="strict")
case("strict/well-formed", f"a{block(CALL_HZ, CALL_BJ)}{EOS}", "a", HZ, BJ, policy="strict")
case("strict/text-after-calls", block(CALL_HZ) + "\n", "\n", HZ, notes="text_after_calls", policy="strict")
case("strict/cut-tag-stays", f"a\n\n<{D}function_ca", f"a\n\n<{D}function_ca", policy="strict")
case(
    "strict/missing-attribute-stays",
    block(invoke("get_weather", untyped("location", "Hangzhou"))),
    f'<{D}parameter name="location">Hangzhou</{D}parameter>\n',
    ("get_weather", "{}"),
    notes="text_in_calls",
    policy="strict",
)

# -- phases apart
case(
    "phases/no-calls",
    f"r</think>a{QUOTED}",
    f"a{QUOTED}",
    reasoning="r",
    thinking=True,
    options=(("tool_calls", False),),
)
case("phases/no-think-tags", f"<think>a{QUOTED}", "<think>a", HZ, options=(("think_tags", False),))
