"""/docs: the OpenAPI description as one plain page, without a script or anything from elsewhere.

The usual viewers come from a content delivery network, and a server that answers on a machine
without a network should explain itself there too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

Schema = Mapping[str, Any]


def docs_page(description: Schema) -> str:
    """HTML of an OpenAPI description."""
    title = escape(description["info"]["title"])
    parts = [
        "<!doctype html>",
        '<html lang="en">',
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width">',
        f"<title>{title}</title>",
        f"<h1>{title}</h1>",
        '<p>The same for machines: <a href="openapi.json">openapi.json</a></p>',
    ]
    for path, methods in description["paths"].items():
        for method, route in methods.items():
            parts += _route(f"{method.upper()} {path}", route, description)
    return "\n".join([*parts, "</html>", ""])


def _route(name: str, route: Schema, description: Schema) -> Iterator[str]:
    yield f"<h2>{escape(name)}</h2>"
    yield f"<p>{escape(route.get('description') or route.get('summary', ''))}</p>"
    body = route.get("requestBody", {}).get("content", {}).get("application/json")
    if body:
        schema = _resolve(body["schema"], description)
        required = schema.get("required", ())
        yield "<table border><tr><th>Field<th>Type<th>Default<th>Meaning"
        for field, entry in schema.get("properties", {}).items():
            default = "required" if field in required else str(entry.get("default", ""))
            cells = (field, _type_of(entry), default, entry.get("description", ""))
            yield "<tr>" + "".join(f"<td>{escape(cell)}" for cell in cells)
        yield "</table>"
    answers = route.get("responses", {}).items()
    yield "<ul>" + "".join(
        f"<li>{escape(status)}: {escape(answer['description'])}" for status, answer in answers
    )
    yield "</ul>"


def _resolve(schema: Schema, description: Schema) -> Schema:
    """What a reference to a component stands for."""
    if "$ref" not in schema:
        return schema
    return description["components"]["schemas"][schema["$ref"].rpartition("/")[2]]


def _type_of(schema: Schema) -> str:
    """A field's type in words, as far as one line goes."""
    if "$ref" in schema:
        return schema["$ref"].rpartition("/")[2]
    if "enum" in schema:
        return " | ".join(map(repr, schema["enum"]))
    if "const" in schema:
        return repr(schema["const"])
    if options := schema.get("anyOf") or schema.get("oneOf"):
        return " | ".join(map(_type_of, options))
    if schema.get("type") == "array":
        return f"list of {_type_of(schema.get('items', {}))}"
    return schema.get("type", "any")
