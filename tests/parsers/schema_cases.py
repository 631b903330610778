"""Parameters of tools as clients send them, in the shapes of the generators that they come from."""

from typing import Any

STRING: dict[str, Any] = {"type": "string"}
INTEGER: dict[str, Any] = {"type": "integer"}


def obj(properties: dict[str, Any], *required: str, **more: Any) -> dict[str, Any]:
    """An object whose listed properties are required; all of them where none is listed."""
    return {"type": "object", "properties": properties, "required": list(required or properties), **more}


def strict(properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    """As OpenAI's strict functions must be."""
    return obj(properties, additionalProperties=False, **more)


UI = {
    "type": "object",
    "properties": {
        "type": {"type": "string", "enum": ["div", "button", "header", "section", "field", "form"]},
        "label": {"type": "string"},
        "children": {"type": "array", "items": {"$ref": "#"}},
        "attributes": {"type": "array", "items": strict({"name": STRING, "value": STRING})},
    },
    "required": ["type", "label", "children", "attributes"],
    "additionalProperties": False,
}
STEP = strict({"explanation": STRING, "output": STRING})
NODE = strict({"value": {"type": "number"}, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}})

OPENAI = {
    "openai-weather": strict({"location": STRING, "units": {"type": "string", "enum": ["celsius", "fahrenheit"]}}),
    "openai-optional-as-null": strict(
        {"location": STRING, "unit": {"type": ["string", "null"], "enum": ["F", "C", None]}}
    ),
    "openai-steps": strict(
        {"steps": {"type": "array", "items": {"$ref": "#/$defs/step"}}, "final_answer": STRING},
        **{"$defs": {"step": STEP}},
    ),
    "openai-linked-list": strict({"linked_list": {"$ref": "#/$defs/node"}}, **{"$defs": {"node": NODE}}),
    "openai-recursive-root": UI,
    "openai-any-of": strict(
        {
            "item": {
                "anyOf": [
                    strict({"name": STRING, "age": {"type": "number"}}),
                    strict({"number": STRING, "street": STRING, "city": STRING}),
                ]
            }
        }
    ),
    "openai-query": strict(
        {
            "table_name": {"type": "string", "enum": ["orders"]},
            "columns": {"type": "array", "items": {"type": "string", "enum": ["id", "status", "ordered_at"]}},
            "conditions": {
                "type": "array",
                "items": strict(
                    {
                        "column": STRING,
                        "operator": {"type": "string", "enum": ["=", ">", "<", "<=", ">=", "!="]},
                        "value": {"anyOf": [STRING, {"type": "number"}, strict({"column_name": {"type": "string"}})]},
                    }
                ),
            },
            "order_by": {"type": "string", "enum": ["asc", "desc"]},
        }
    ),
    "openai-bounds": strict(
        {
            "username": {"type": "string", "pattern": "^@[a-zA-Z0-9_]+$"},
            "email": {"type": "string", "format": "email"},
            "age": {"type": "integer", "minimum": 18, "maximum": 120},
            "score": {"type": "number", "exclusiveMinimum": 0, "maximum": 1.5},
            "tags": {"type": "array", "items": STRING, "minItems": 1, "maxItems": 3},
        }
    ),
    "openai-no-parameters": {"type": "object", "properties": {}, "required": [], "additionalProperties": False},
}

PYDANTIC = {
    "pydantic-nested": {
        "$defs": {
            "Address": obj(
                {
                    "city": {"title": "City", "type": "string"},
                    "zip": {"default": None, "anyOf": [STRING, {"type": "null"}]},
                },
                "city",
            ),
            "Role": {"enum": ["admin", "user"], "title": "Role", "type": "string"},
        },
        "properties": {
            "name": {"title": "Name", "type": "string"},
            "role": {"$ref": "#/$defs/Role", "default": "user"},
            "home": {"$ref": "#/$defs/Address"},
            "others": {"items": {"$ref": "#/$defs/Address"}, "title": "Others", "type": "array", "default": []},
        },
        "required": ["name", "home"],
        "title": "Person",
        "type": "object",
    },
    "pydantic-recursive": {
        "$defs": {
            "Tree": {
                "properties": {
                    "name": {"type": "string"},
                    "children": {"default": [], "items": {"$ref": "#/$defs/Tree"}, "type": "array"},
                },
                "required": ["name"],
                "type": "object",
            }
        },
        "$ref": "#/$defs/Tree",
    },
    "pydantic-discriminated": {
        "$defs": {
            "Cat": obj({"kind": {"const": "cat", "type": "string"}, "lives": INTEGER}),
            "Dog": obj({"kind": {"const": "dog", "type": "string"}, "name": STRING}),
        },
        "properties": {
            "pet": {
                "discriminator": {"mapping": {"cat": "#/$defs/Cat", "dog": "#/$defs/Dog"}, "propertyName": "kind"},
                "oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}],
            }
        },
        "required": ["pet"],
        "type": "object",
    },
    "pydantic-root-union": {
        "$defs": {
            "Cat": obj({"kind": {"const": "cat", "type": "string"}, "lives": INTEGER}),
            "Dog": obj({"kind": {"const": "dog", "type": "string"}, "name": STRING}),
        },
        "anyOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}],
    },
    "pydantic-tuple": obj(
        {
            "point": {"type": "array", "prefixItems": [{"type": "number"}, INTEGER], "minItems": 2, "maxItems": 2},
            "rest": {"type": "array", "prefixItems": [STRING], "items": {"type": "boolean"}, "minItems": 1},
        }
    ),
    "pydantic-dict": obj(
        {
            "headers": {"type": "object", "additionalProperties": STRING},
            "any": {"type": "object", "additionalProperties": True},
        }
    ),
    "pydantic-dates": obj(
        {
            "day": {"type": "string", "format": "date"},
            "at": {"type": "string", "format": "date-time"},
            "id": {"type": "string", "format": "uuid"},
            "link": {"type": "string", "format": "uri", "minLength": 1, "maxLength": 2083},
            "ip": {"type": "string", "format": "ipv4"},
        }
    ),
    "pydantic-decimal": obj(
        {"price": {"anyOf": [{"type": "number"}, {"type": "string", "pattern": r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$"}]}}
    ),
    "pydantic-literal": obj({"mode": {"enum": ["r", "w", 1, None, True]}, "one": {"const": 5}}),
    "pydantic-all-of-default": {
        "$defs": {"Unit": {"enum": ["C", "F"], "type": "string"}},
        "type": "object",
        "properties": {"unit": {"allOf": [{"$ref": "#/$defs/Unit"}], "default": "C"}},
        "required": ["unit"],
    },
}

ZOD = {
    "zod-object": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 1, "maxLength": 8},
            "age": {"type": "integer", "exclusiveMinimum": 0},
            "tag": {"type": ["string", "null"]},
        },
        "required": ["name"],
        "additionalProperties": False,
        "$schema": "http://json-schema.org/draft-07/schema#",
    },
    "zod-named": {
        "$ref": "#/definitions/Search",
        "definitions": {"Search": obj({"q": STRING, "limit": {"type": "integer", "minimum": 1, "maximum": 50}}, "q")},
        "$schema": "http://json-schema.org/draft-07/schema#",
    },
    "zod-path-reference": obj(
        {"from": obj({"lat": {"type": "number"}, "lon": {"type": "number"}}), "to": {"$ref": "#/properties/from"}},
        additionalProperties=False,
    ),
    "zod-recursive-path": obj(
        {"name": STRING, "subcategories": {"type": "array", "items": {"$ref": "#"}}}, additionalProperties=False
    ),
    "zod-intersection": {
        "allOf": [obj({"a": STRING}), obj({"b": {"type": "number"}})],
        "$schema": "http://json-schema.org/draft-07/schema#",
    },
    "zod-record": obj(
        {"by_name": {"type": "object", "additionalProperties": INTEGER, "propertyNames": {"type": "string"}}}
    ),
    "zod-tuple-draft-07": obj({"pair": {"type": "array", "minItems": 2, "maxItems": 2, "items": [STRING, INTEGER]}}),
    "zod-union": obj({"value": {"anyOf": [STRING, {"type": "number"}, {"type": "boolean"}]}}),
    "zod-literals": obj(
        {"level": {"anyOf": [{"type": "string", "const": "low"}, {"type": "string", "const": "high"}]}}
    ),
    "zod-nullable": obj(
        {"note": {"anyOf": [STRING, {"type": "null"}]}, "of": {"type": "string", "nullable": True}}, "note"
    ),
    "zod-regex": obj(
        {
            "sku": {"type": "string", "pattern": "^[A-Z]{2}-\\d{3,5}$"},
            "url": {"type": "string", "pattern": "^https?://"},
        }
    ),
    "zod-discriminated-root": {
        "oneOf": [
            strict({"op": {"type": "string", "const": "add"}, "value": {"type": "number"}}),
            strict({"op": {"type": "string", "const": "clear"}}),
        ]
    },
}

MCP = {
    "mcp-read-file": {
        "type": "object",
        "properties": {"path": STRING, "head": {"type": "number"}, "tail": {"type": "number"}},
        "required": ["path"],
    },
    "mcp-edit-file": obj(
        {
            "path": STRING,
            "edits": {
                "type": "array",
                "items": obj({"oldText": STRING, "newText": STRING}, additionalProperties=False),
            },
            "dryRun": {"type": "boolean", "default": False},
        },
        "path",
        "edits",
    ),
    "mcp-no-parameters": {"type": "object", "properties": {}},
    "mcp-either-required": {
        "type": "object",
        "properties": {"id": STRING, "url": STRING},
        "anyOf": [{"required": ["id"]}, {"required": ["url"]}],
    },
    "mcp-any-value": obj({"key": STRING, "value": {}}),
    "mcp-boolean-schemas": {"type": "object", "properties": {"any": True, "never": False}, "required": ["any"]},
    "mcp-github-issue": obj(
        {
            "owner": STRING,
            "issue_number": {"type": "number"},
            "labels": {"type": "array", "items": {"type": "string"}},
            "state": {"type": "string", "enum": ["open", "closed"]},
        },
        "owner",
        "issue_number",
    ),
    "mcp-nested-definitions": obj(
        {"filter": {"$ref": "#/$defs/query~1filter"}},
        **{
            "$defs": {
                "query/filter": obj({"and": {"type": "array", "items": {"$ref": "#/%24defs/query~1filter"}}}, "and")
            }
        },
    ),
    "mcp-entities": obj(
        {
            "entities": {
                "type": "array",
                "items": obj({"name": STRING, "observations": {"type": "array", "items": STRING}}),
            }
        }
    ),
    "mcp-without-type": {"properties": {"q": {"description": "what to look for"}}, "required": ["q"]},
    "mcp-names": obj({"a.b-c d": STRING, "数": INTEGER, "$ref_": {"type": "boolean"}, 'say "hi"': STRING}),
    "mcp-json-schema-of-a-schema": obj(
        {"schema": {"type": "object", "properties": {"type": {"enum": ["object"]}}, "additionalProperties": True}}
    ),
}

KINDS = {
    "free": {"type": "object", "additionalProperties": {"type": "number"}},
    "free-anything": {
        "type": "object",
        "additionalProperties": True,
        "properties": {"kind": {"enum": ["a", "b"]}},
        "required": ["kind"],
    },
    "object": {"type": "object"},
    "true": True,
    "patterns": {
        "type": "object",
        "patternProperties": {"^x-": {"type": "integer"}, "_at$": {"enum": ["now", "then"]}},
        "additionalProperties": False,
        "minProperties": 1,
    },
    "required-without-a-property": {"type": "object", "properties": {"a": STRING}, "required": ["a", "b"]},
    "reference-to-a-property": {
        "type": "object",
        "properties": {"a": {"enum": ["x", "y"]}, "b": {"$ref": "#/properties/a"}},
        "required": ["b"],
    },
    "reference-beside-keywords": {
        "type": "object",
        "properties": {"n": {"$ref": "#/$defs/n", "maximum": 9, "description": "d"}},
        "required": ["n"],
        "$defs": {"n": {"type": "integer", "minimum": 0}},
    },
    "enum-behind-all-of": obj({"e": {"allOf": [{"type": "string"}, {"enum": ["a", "b", 3]}]}}),
    "enum-behind-any-of": obj({"e": {"anyOf": [{"enum": ["a", 1]}, {"const": {"k": [None, 1.5, "｜"]}}]}}),
    "enum-of-numbers": obj({"e": {"enum": [12345678901234567890123, 1.5, -0.25, 0]}}),
    "all-of-references": {
        "allOf": [{"$ref": "#/definitions/a"}, {"$ref": "#/definitions/b"}, {"required": ["b"]}],
        "definitions": {
            "a": {"type": "object", "properties": {"a": STRING}},
            "b": {"type": "object", "properties": {"b": INTEGER}},
        },
    },
    "recursion-through-all-of": {
        "type": "object",
        "properties": {"left": {"allOf": [{"$ref": "#"}]}, "value": INTEGER},
        "required": ["value"],
    },
    "recursion-of-two": obj(
        {"a": {"$ref": "#/$defs/a"}},
        **{
            "$defs": {
                "a": obj({"b": {"anyOf": [{"$ref": "#/$defs/b"}, {"type": "null"}]}}),
                "b": obj({"a": {"type": "array", "items": {"$ref": "#/$defs/a"}, "maxItems": 2}}),
            }
        },
    ),
    "endless-branch": obj(
        {"a": {"anyOf": [{"$ref": "#/$defs/endless"}, {"type": "boolean"}]}},
        **{"$defs": {"endless": obj({"x": {"$ref": "#/$defs/endless"}})}},
    ),
    "integer-bounds": obj(
        {
            "a": {"type": "integer", "minimum": -12, "maximum": 305},
            "b": {"type": "integer", "exclusiveMaximum": -7},
            "c": {"type": "integer", "minimum": 1000001},
            "d": {"type": "integer", "minimum": 0.5, "maximum": 1.5},
        }
    ),
    "number-bounds": obj(
        {
            "a": {"type": "number", "minimum": 0.1, "maximum": 0.9},
            "b": {"type": "number", "exclusiveMinimum": -2.5, "exclusiveMaximum": -0.125},
            "c": {"type": "number", "minimum": -1, "exclusiveMaximum": 1},
            "d": {"type": "number", "minimum": 99.75},
            "e": {"type": "number", "maximum": -3},
        }
    ),
    "lengths": obj(
        {
            "none": {"type": "string", "maxLength": 0},
            "some": {"type": "string", "minLength": 2, "maxLength": 5},
            "inner": {
                "type": "array",
                "items": {"type": "string", "minLength": 1, "maxLength": 2},
                "minItems": 2,
                "maxItems": 3,
            },
            "pattern": {"type": "string", "pattern": "^[a-z0-9_-]+$", "minLength": 3, "maxLength": 20},
            "empty": {"type": "array", "maxItems": 0},
        }
    ),
    "types": obj(
        {
            "a": {"type": ["string", "integer", "array"], "items": INTEGER},
            "b": {"type": "null"},
            "c": {"type": ["boolean", "object"]},
        }
    ),
    "exclusive-of-draft-04": obj({"n": {"type": "integer", "minimum": 3, "exclusiveMinimum": True, "maximum": 5}}),
    "nested-objects": obj({"o": obj({"a": INTEGER, "b": INTEGER, "c": INTEGER}, "b")}),
    "closed-by-one": {
        "allOf": [
            {"type": "object", "properties": {"a": INTEGER, "b": INTEGER}, "additionalProperties": False},
            {"properties": {"c": INTEGER}},
            {"required": ["a"]},
        ]
    },
    "own-id": {
        "$id": "https://example.com/tool",
        "type": "object",
        "properties": {"a": {"$ref": "https://example.com/tool#/$defs/a"}},
        "required": ["a"],
        "$defs": {"a": {"type": "boolean"}},
    },
    "unevaluated-after-all-of": {
        "type": "object",
        "allOf": [{"properties": {"a": {"type": "string", "maxLength": 9}}, "required": ["a"]}],
        "properties": {"b": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["b"],
        "unevaluatedProperties": False,
    },
    "unevaluated-behind-a-reference": {
        "type": "object",
        "$ref": "#/$defs/base",
        "properties": {"b": {"type": "boolean"}},
        "required": ["a"],
        "unevaluatedProperties": False,
        "$defs": {"base": {"properties": {"a": {"enum": ["x", "y"]}}}},
    },
    "anchor": obj({"a": {"$ref": "#here"}}, **{"$defs": {"a": {"$anchor": "here", "type": "boolean"}}}),
}

SCHEMAS: dict[str, Any] = {**OPENAI, **PYDANTIC, **ZOD, **MCP, **KINDS}
