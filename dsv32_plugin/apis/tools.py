"""The tools of a request: what a client runs is a function of the model, what a provider's server runs is left out."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dsv32_plugin.parsers.parts import well_formed

from .fields import listed
from .refusal import Refusal

logger = logging.getLogger("dsv32_plugin.apis")

Kind = Literal["function", "custom", "local_shell", "shell", "apply_patch"]
NAMESPACE_SEPARATOR = "__"
_STRING = {"type": "string"}
_OF_FUNCTIONS = ("function", "custom", "parameters", "input_schema")
"""Fields that only a tool has which the client runs."""
_TYPES = {"chat completions": "function or custom", "responses": "function or custom", "messages": "custom, or none"}


def _parameters(required: tuple[str, ...], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required)}


def _described(kind: str, description: str, **more: Any) -> dict[str, Any]:
    return {"type": kind, "description": description, **more}


_INTEGER = {"type": "integer"}
OPENAI_CLIENT_TOOLS: dict[str, tuple[Kind, str, dict[str, Any]]] = {
    "local_shell": (
        "local_shell",
        "Run a command on the user's machine and return its output.",
        _parameters(
            ("command",),
            command=_described("array", "The program and its arguments.", items=_STRING),
            working_directory=_described("string", "Where to run it."),
            timeout_ms=_described("integer", "Stop it after this many milliseconds."),
            env=_described("object", "Environment variables to set.", additionalProperties=_STRING),
            user=_described("string", "The user to run it as."),
        ),
    ),
    "shell": (
        "shell",
        "Run shell commands on the user's machine and return their output.",
        _parameters(
            ("commands",),
            commands=_described("array", "The commands, each a line of shell.", items=_STRING),
            timeout_ms=_described("integer", "Stop them after this many milliseconds."),
            max_output_length=_described("integer", "Return at most this many characters of each output."),
        ),
    ),
    "apply_patch": (
        "apply_patch",
        "Create, update or delete a file by a diff.",
        _parameters(
            ("type", "path"),
            type=_described("string", "What to do.", enum=["create_file", "update_file", "delete_file"]),
            path=_described("string", "The file's path."),
            diff=_described("string", "A V4A diff: the lines of a new file with +, or hunks under @@. None to delete."),
        ),
    ),
}
"""Tools of the Responses API that have a type in place of a schema, and that the client runs."""

_COMMANDS = ("view", "create", "str_replace", "insert")
_EDITS = {
    "view_range": _described("array", "view: the first and the last line; -1 is the end.", items=_INTEGER),
    "file_text": _described("string", "create: the content of the file."),
    "old_str": _described("string", "str_replace: the text to replace, which must be there once."),
    "new_str": _described("string", "str_replace: the new text. insert, in older versions: the text to insert."),
    "insert_line": _described("integer", "insert: the line after which to insert; 0 is the beginning."),
    "insert_text": _described("string", "insert: the text to insert."),
}
_EDITOR = _parameters(
    ("command", "path"),
    command=_described("string", "What to do.", enum=[*_COMMANDS]),
    path=_described("string", "Absolute path of a file or directory."),
    **_EDITS,
)
_MEMORY = _parameters(
    ("command",),
    command=_described("string", "What to do.", enum=[*_COMMANDS, "delete", "rename"]),
    path=_described("string", "A path under /memories; rename has two others in place of it."),
    old_path=_described("string", "rename: the path now."),
    new_path=_described("string", "rename: the new path."),
    **_EDITS,
)
ANTHROPIC_CLIENT_TOOLS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bash": (
        "bash",
        "Run a command in a bash session that keeps its state, and return its output.",
        _parameters(
            (),
            command=_described("string", "The command. Needed unless the session is restarted."),
            restart=_described("boolean", "Start the session anew."),
        ),
    ),
    "text_editor": ("str_replace_based_edit_tool", "View, create and edit text files.", _EDITOR),
    "memory": ("memory", "Read and keep notes in files under /memories.", _MEMORY),
}
"""The same of the Messages API; there the type ends in a date."""


@dataclass(frozen=True)
class ClientTool:
    """A tool in effect: the model's function, and by what name and form the client knows it."""

    function: dict[str, Any]
    kind: Kind = "function"
    name: str = ""
    namespace: str | None = None


@dataclass
class Tools:
    """The tools of a request.

    Attributes:
        by_name: those in effect, by their names in the prompt.
        given: the client's own objects of these.
        left_out: types and names of those that a provider's server would run.
        forced: "auto", "none" or "required".
        allowed: names of those that may be called; all where it is None.
    """

    by_name: dict[str, ClientTool] = field(default_factory=dict)
    given: list[Any] = field(default_factory=list)
    left_out: set[str] = field(default_factory=set)
    forced: Literal["auto", "none", "required"] = "auto"
    allowed: list[str] | None = None

    @property
    def functions(self) -> list[dict[str, Any]]:
        """What the model is to know."""
        return [tool.function for tool in self.by_name.values()]

    def shown(self, hides_unused: bool) -> list[dict[str, Any]]:
        """The functions in the prompt: all, whatever may be called, so that a choice doesn't change the prompt."""
        return [] if hides_unused and self.forced == "none" else self.functions

    @property
    def callable(self) -> list[dict[str, Any]]:
        """What the engine's grammar and parser are given."""
        return [tool.function for name, tool in self.by_name.items() if self.allowed is None or name in self.allowed]

    @property
    def needs_translation(self) -> bool:
        """Whether a call comes back in another form than a function's."""
        return any(tool.kind != "function" or tool.namespace for tool in self.by_name.values())

    def add(self, tool: ClientTool, given: Any, where: str) -> None:
        name = tool.function["name"]
        if name in self.by_name:
            raise Refusal(f"{where}: expected a name of its own, {name!r} is that of an earlier tool", param="tools")
        self.by_name[name] = tool
        if not self.given or self.given[-1] is not given:
            self.given.append(given)

    def leave_out(self, tool: Mapping[str, Any], where: str, api: str) -> None:
        """A tool that the provider's server would run; one that brings a schema is the client's, by a wrong type."""
        kind = _kind(tool, where)
        if any(tool.get(field) is not None for field in _OF_FUNCTIONS) or kind.lower() in ("function", "custom"):
            raise Refusal(f"{where}.type: expected {_TYPES[api]}, got {kind!r}", param="tools")
        self.left_out |= {name for field in ("name", "server_label") if isinstance(name := tool.get(field), str)}
        if kind not in self.left_out:
            self.left_out.add(kind)
            warn_once(f"{api}: a tool of type {kind} is run by the provider's server; here it is left out")

    def choose(self, mode: str, names: Iterable[str] | None = None) -> None:
        """Set what may and must be called; raises Refusal where that can't be."""
        names = None if names is None else list(names)
        for name in names or ():
            if not isinstance(name, str) or name not in self.by_name:
                raise self.refusal(name)
        if mode not in ("auto", "none", "required"):
            raise Refusal(f"tool_choice: mode: expected auto or required, got {mode!r}", param="tool_choice")
        if mode == "required" and not (self.by_name if names is None else names):
            raise Refusal(f"tool_choice: a call is required, but {self._in_effect()}", param="tool_choice")
        if mode == "auto" and names == []:
            mode, names = "none", None
        self.forced = mode  # type: ignore[assignment]
        self.allowed = names

    def leaves_out(self, name: Any) -> bool:
        return isinstance(name, str) and name in self.left_out

    def refusal(self, name: Any) -> Refusal:
        why = "is run by the provider's server and left out here" if self.leaves_out(name) else "is no tool"
        return Refusal(f"tool_choice: {name!r} {why}; {self._in_effect()}", param="tool_choice")

    def _in_effect(self) -> str:
        names = list(self.by_name)
        return f"the tools in effect are {', '.join(names)}" if names else "no tool is in effect"


_warned: set[str] = set()


def warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        logger.warning(message)


def function(name: Any, description: Any, parameters: Any, strict: Any = None, **more: Any) -> dict[str, Any]:
    """A function as the prompt shows it, the same whatever API it came by. Only a `strict` that is true is shown."""
    fields = {"name": name, "description": description, "parameters": parameters, "strict": strict or None, **more}
    return {key: value for key, value in fields.items() if value is not None}


def read_chat_tools(tools: Any) -> Tools:
    """`tools` of Chat Completions: functions, wrapped or bare, and custom tools."""
    return _read(tools, _add_chat_tool)


def read_responses_tools(tools: Any) -> Tools:
    """`tools` of Responses: functions, custom tools, namespaces of both, and the tools that it names by a type."""
    return _read(tools, _add_responses_tool)


def read_messages_tools(tools: Any) -> Tools:
    """`tools` of Messages: those with an `input_schema`, and those that it names by a dated type."""
    return _read(tools, _add_messages_tool)


def allowed_tools(choice: Mapping[str, Any], where: str) -> list[Mapping[str, Any]]:
    """The `tools` of a choice among some."""
    given = listed(choice.get("tools"), f"{where}.tools")
    for position, tool in enumerate(given):
        if not isinstance(tool, Mapping) or not isinstance(tool.get("type", ""), str):
            raise Refusal(f"{where}.tools[{position}]: expected a tool with a type, got {tool!r}", param="tool_choice")
    return given


def _read(tools: Any, add: Callable[[Tools, Mapping[str, Any], str], None]) -> Tools:
    read = Tools()
    for position, tool in enumerate(well_formed(listed(tools, "tools"))):
        where = f"tools[{position}]"
        if not isinstance(tool, Mapping):
            raise Refusal(f"{where}: expected an object, got {type(tool).__name__}", param="tools")
        add(read, tool, where)
    return read


def _add_chat_tool(read: Tools, tool: Mapping[str, Any], where: str) -> None:
    kind = _kind(tool, where)
    if kind == "function":
        read.add(_function_tool(tool.get("function", tool), where), tool, where)
    elif kind == "custom":
        read.add(_custom_tool(tool.get("custom", tool), where), tool, where)
    else:
        read.leave_out(tool, where, "chat completions")


def _add_responses_tool(read: Tools, tool: Mapping[str, Any], where: str) -> None:
    kind = _kind(tool, where)
    if kind == "function":
        read.add(_function_tool(tool.get("function", tool), where, only_known=True), tool, where)
    elif kind == "custom":
        read.add(_custom_tool(tool, where), tool, where)
    elif kind == "namespace":
        _add_namespace(read, tool, where)
    elif kind in OPENAI_CLIENT_TOOLS and _runs_on_client(tool):
        client_kind, description, parameters = OPENAI_CLIENT_TOOLS[kind]
        read.add(ClientTool(function(kind, description, parameters), client_kind, kind), tool, where)
    else:
        read.leave_out(tool, where, "responses")


def _add_namespace(read: Tools, tool: Mapping[str, Any], where: str) -> None:
    namespace = _name(tool, where)
    for position, inner in enumerate(listed(tool.get("tools"), f"{where}.tools")):
        inside = f"{where}.tools[{position}]"
        if not isinstance(inner, Mapping):
            raise Refusal(f"{inside}: expected an object, got {type(inner).__name__}", param="tools")
        kind = _kind(inner, inside)
        if kind not in ("function", "custom"):
            read.leave_out(inner, inside, "responses")
            continue
        made = _custom_tool(inner, inside) if kind == "custom" else _function_tool(inner, inside, only_known=True)
        full = namespace + NAMESPACE_SEPARATOR + made.name
        read.add(ClientTool({**made.function, "name": full}, made.kind, made.name, namespace), tool, inside)


def _add_messages_tool(read: Tools, tool: Mapping[str, Any], where: str) -> None:
    kind = _kind(tool, where, "custom")
    if kind == "custom":
        schema = tool.get("input_schema")
        if not isinstance(schema, Mapping):
            raise Refusal(f"{where}: expected an input_schema, got {schema!r}", param="tools")
        made = function(_name(tool, where), tool.get("description"), schema, tool.get("strict"))
        read.add(ClientTool(made, "function", made["name"]), tool, where)
        return
    family = re.sub(r"_\d{8}$", "", kind)
    if family in ANTHROPIC_CLIENT_TOOLS:
        usual, description, parameters = ANTHROPIC_CLIENT_TOOLS[family]
        made = function(_name({**tool, "name": tool.get("name") or usual}, where), description, parameters)
        read.add(ClientTool(made, "function", made["name"]), tool, where)
    else:
        read.leave_out(tool, where, "messages")


def _function_tool(given: Any, where: str, *, only_known: bool = False) -> ClientTool:
    if not isinstance(given, Mapping):
        raise Refusal(f"{where}: expected a function object with a name, got {given!r}", param="tools")
    if given.get("parameters") is None and given.get("input_schema") is not None:
        raise Refusal(f"{where}: expected parameters, got an input_schema, which is Anthropic's", param="tools")
    known = ("type", "name", "description", "parameters", "strict")
    more = {} if only_known else {key: value for key, value in given.items() if key not in known}
    name = _name(given, where)
    made = function(name, given.get("description"), given.get("parameters"), given.get("strict"), **more)
    return ClientTool(made, "function", name)


def _custom_tool(given: Any, where: str) -> ClientTool:
    """A tool that takes any text is a function of one string; a grammar for the text is told to the model."""
    name = _name(given, where)
    text: dict[str, Any] = dict(_STRING)
    shape = given.get("format")
    if isinstance(shape, Mapping) and shape.get("type") == "grammar":
        grammar = shape["grammar"] if isinstance(shape.get("grammar"), Mapping) else shape
        text["description"] = f"Text by this {grammar.get('syntax')} grammar:\n{grammar.get('definition')}"
    made = function(name, given.get("description"), _parameters(("input",), input=text))
    return ClientTool(made, "custom", name)


def _kind(tool: Mapping[str, Any], where: str, usual: str = "function") -> str:
    kind = tool.get("type")
    if kind is not None and not isinstance(kind, str):
        raise Refusal(f"{where}.type: expected text, got {type(kind).__name__}", param="tools")
    return kind or usual


def _name(given: Any, where: str) -> str:
    name = given.get("name") if isinstance(given, Mapping) else None
    if not isinstance(name, str) or not name:
        raise Refusal(f"{where}: expected a tool with a name, got {given!r}", param="tools")
    return name


def _runs_on_client(tool: Mapping[str, Any]) -> bool:
    """A `shell` may run in a container of the provider's."""
    environment = tool.get("environment")
    return not isinstance(environment, Mapping) or environment.get("type", "local") == "local"
