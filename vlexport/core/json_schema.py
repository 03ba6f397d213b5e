"""JSON Schema (draft 2020-12) of typed data, as it is written: infinities and NaN are strings there. No torch."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import DEFAULT_REF_TEMPLATE, GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

DRAFT = "https://json-schema.org/draft/2020-12/schema"
NOT_NUMBERS = ("Infinity", "-Infinity", "NaN")


class _AsWritten(GenerateJsonSchema):
    """What pydantic makes, but for floats: strict JSON has no infinity, so ours are written as words."""

    def float_schema(self, schema: core_schema.FloatSchema) -> JsonSchemaValue:
        """A number with its limits, or a word."""
        return {"anyOf": [super().float_schema(schema), {"enum": list(NOT_NUMBERS)}]}


def json_schema_of(kinds: Any, title: str) -> dict[str, Any]:
    """The schema of a model, or of a union of models.

    Args:
        kinds: A class of typed data, or ``A | B``.
        title: What it describes, as the reader calls it.
    """
    made = TypeAdapter(kinds).json_schema(
        by_alias=True, ref_template=DEFAULT_REF_TEMPLATE, schema_generator=_AsWritten, mode="validation"
    )
    return {"$schema": DRAFT, **made, "title": title}
