"""Random JSON schemas whose values are short, and schemas that are meant to do harm."""

import json
import random

WORDS = [
    "a",
    "name",
    "\u00e9t\u00e9",
    "\u6f22\u5b57",
    'quo"te',
    "back\\slash",
    "sp ace",
    "\U0001f600",
    "x\n",
]


def random_schema(source: random.Random, depth: int = 0):
    """A schema of at most 3 levels; what fits it is at most some 300 characters long."""
    leaves = [
        "string",
        "integer",
        "number",
        "boolean",
        "null",
        "enum",
        "const",
        "pattern",
        "format",
    ]
    kind = source.choice(
        leaves + ([] if depth == 3 else ["object"] * 5 + ["array"] * 3 + ["anyOf"])
    )
    match kind:
        case "string":
            least = source.randint(0, 3)
            return {"type": "string", "minLength": least, "maxLength": least + source.randint(0, 5)}
        case "integer":
            least = source.randint(-2000, 2000)
            return {"type": "integer", "minimum": least, "maximum": least + source.randint(0, 5000)}
        case "number":
            return {"enum": [source.uniform(-10, 10), 1e-7, 3]}
        case "enum":
            return {"enum": source.sample([*WORDS, 1, 2.5, None, True, [1, "a"], {"k": "v"}], 4)}
        case "const":
            return {"const": source.choice([*WORDS, {"a": [1, {"b": None}]}])}
        case "pattern":
            return {
                "type": "string",
                "pattern": source.choice(["^[a-c]{2,4}$", "^\\d+-x?$"]),
                "maxLength": 9,
            }
        case "format":
            return {"type": "string", "format": source.choice(["date", "time", "uuid", "ipv4"])}
        case "array":
            least = source.randint(0, 2)
            items = random_schema(source, depth + 1)
            return {"type": "array", "items": items, "minItems": least, "maxItems": least + 2}
        case "anyOf":
            return {"anyOf": [random_schema(source, depth + 1) for _ in range(2)]}
        case "object":
            names = source.sample(WORDS, source.randint(0, 4))
            return {
                "type": "object",
                "properties": {name: random_schema(source, depth + 1) for name in names},
                "required": [name for name in names if source.random() < 0.7],
                "additionalProperties": False,
            }
        case _:
            return {"type": kind}


def _chain(count, link):
    defs = {f"d{i}": link({"$ref": f"#/$defs/d{i + 1}"}) for i in range(count)}
    return {"$defs": defs | {f"d{count}": {"type": "string"}}, "$ref": "#/$defs/d0"}


def _object_of(schema):
    return {"type": "object", "properties": {"a": schema}, "required": ["a"]}


HOSTILE = {
    "overflows the stack": _chain(1000, _object_of),
    "takes hours": {"anyOf": [{"type": "integer", "multipleOf": 997 + 2 * i} for i in range(20)]},
    "a large automaton": {"type": "integer", "multipleOf": 999983},
    "patterns at once": {"allOf": [{"type": "string", "pattern": f".*a{i}.*"} for i in range(40)]},
    "exponential": {
        "allOf": [{"anyOf": [_object_of({"const": j}) for j in (i, -i)]} for i in range(24)]
    },
    "many names": {"type": "object", "properties": {f"{i:x}": {} for i in range(6000)}},
    "many patterns": {"patternProperties": {f"^a{i}x*$": {} for i in range(2000)}},
    "deep": '{"items":' * 3000 + "{}" + "}" * 3000,
    "long": {"const": "x" * 200_000},
    "itself": {"$ref": "#"},
    "in circles": {
        "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"
    },
    "a huge number": '{"const": 1' + "0" * 5000 + "}",
    "a network": {"$ref": "http://127.0.0.1:1/x.json"},
    "a file": {"$ref": "file:///etc/passwd"},
    "nowhere": {"$ref": "#/nope"},
    "contradiction": {"type": "integer", "minimum": 3, "maximum": 2},
    "a bad type": {"type": "strin"},
    "wrong types": {"type": "object", "properties": [], "required": "a"},
    "a bad pattern": {"type": "string", "pattern": "(["},
    "look ahead": {"type": "string", "pattern": "^(?=a)b"},
    "not": {"not": {"type": "string"}},
    "uniqueItems": {"type": "array", "uniqueItems": True},
    "no schema": "[1]",
    "no value": "false",
    "no JSON": "{",
    "a lone surrogate": {"const": "\ud800"},
}  # fmt: skip
# These are taken, and must go on step by step, to the end, to the limit, or to an error.
HARD = {
    "recursive": {"type": "object", "properties": {"c": {"$ref": "#"}}, "required": ["c"]},
    "long strings": {"type": "string", "minLength": 10**6, "maxLength": 10**7},
    "many items": {"type": "array", "items": {"type": "integer"}, "minItems": 10**6},
    "explodes": {
        "anyOf": [{"minLength": i, "maxLength": 1000 * i, "type": "string"} for i in range(1, 900)]
    },
    "explodes later": {"type": "string", "pattern": "^(([a-z]{1,1000}){1,1000}){1,1000}$"},
    "many values": {"enum": [f"value {i * 7919 % 100_003}" for i in range(4000)]},
    "its own white space": {"x-guidance": {"whitespace_pattern": ".*"}, "type": "object"},
}  # fmt: skip


def as_text(schema) -> str:
    return schema if isinstance(schema, str) else json.dumps(schema)
