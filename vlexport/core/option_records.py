"""Typed options in words: names, types, defaults and descriptions, read off the class that holds them. No torch."""

from __future__ import annotations

import inspect
import json
import re
from typing import Any

from vlexport.core.artifact import Frozen

_LIMITS = (
    ("minimum", "≥ {}"), ("exclusiveMinimum", "> {}"), ("maximum", "≤ {}"), ("exclusiveMaximum", "< {}"),
    ("pattern", "as {}"),
)  # fmt: skip
_CHOICES = re.compile(r"\^\(([\w|.-]+)\)\$")
_ATTRIBUTE = re.compile(r"^ {4}(\w+): (.*)$")


class OptionRecord(Frozen):
    """One option of a pass or target.

    Attributes:
        name: As after the scope in ``--set SCOPE.NAME=VALUE``.
        type: In words, with its limits (``integer, ≥ 18, ≤ 24``; ``none | basic | all``).
        default: As a user would type it; None when the option must be given.
        description: From the field, or from the class's docstring.
    """

    name: str
    type: str
    default: str | None
    description: str


def option_records(kind: type[Frozen]) -> tuple[OptionRecord, ...]:
    """Every option of a class of options, in its order."""
    schema = kind.model_json_schema()
    described = _attributes(inspect.getdoc(kind) or "")
    found = []
    for name, field in kind.model_fields.items():
        default = None if field.is_required() else _typed_text(field.get_default(call_default_factory=True))
        about = " ".join((field.description or described.get(name, "")).split())
        kind_text = _type_text(schema["properties"][name], schema.get("$defs", {}))
        found.append(OptionRecord(name=name, type=kind_text, default=default, description=about))
    return tuple(found)


def option_lines(scope: str, records: tuple[OptionRecord, ...]) -> list[str]:
    """Options as lines for people; one line saying so when there are none."""
    if not records:
        return ["options: none"]
    lines = ["options:"]
    for each in records:
        default = "must be given" if each.default is None else f"default {each.default}"
        lines.append(f"  --set {scope}.{each.name}=…  ({each.type}; {default})")
        lines += [f"      {each.description}"] if each.description else []
    return lines


def _typed_text(value: Any) -> str:
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _type_text(schema: dict[str, Any], named: dict[str, Any]) -> str:
    if "$ref" in schema:
        return _type_text(named[schema["$ref"].rpartition("/")[2]], named)
    if "anyOf" in schema:
        return " or ".join(_type_text(each, named) for each in schema["anyOf"])
    if "enum" in schema:
        return " | ".join(_typed_text(value) for value in schema["enum"])
    if "const" in schema:
        return _typed_text(schema["const"])
    choices = _CHOICES.fullmatch(schema.get("pattern", ""))
    if choices:
        return choices.group(1).replace("|", " | ")
    text = {"null": "none", "array": "list"}.get(schema.get("type", ""), schema.get("type", "any"))
    if text == "list" and "items" in schema:
        text = f"list of {_type_text(schema['items'], named)}"
    return ", ".join([text, *(shape.format(schema[key]) for key, shape in _LIMITS if key in schema)])


def _attributes(doc: str) -> dict[str, str]:
    """Name → text of the lines under ``Attributes:``; continuation lines are indented further."""
    found: dict[str, str] = {}
    name = ""
    for line in doc.partition("Attributes:\n")[2].splitlines():
        begun = _ATTRIBUTE.match(line)
        if begun:
            name, text = begun.groups()
            found[name] = text
        elif name and line.startswith(" " * 8):
            found[name] += f" {line.strip()}"
        elif line.strip():
            break
    return found
