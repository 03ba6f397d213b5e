"""Options of passes and targets in words."""

from __future__ import annotations

from typing import Literal

import pytest
from pydantic import Field

from vlexport.core.artifact import Frozen
from vlexport.core.option_records import option_lines, option_records


class Options(Frozen):
    """Options of nothing.

    Attributes:
        share: How much is kept,
            in percent.
        method: Ours wins over the docstring.
        names: Which ones.

    Raises:
        nothing: This is no option.
    """

    share: float = Field(default=50.0, gt=0, le=100)
    method: Literal["mean", "max"] = Field(default="mean", description="How values are joined.")
    level: str = Field(default="all", pattern="^(none|all)$")
    names: tuple[str, ...] = ()
    most: int | None = None
    given: bool


@pytest.mark.parametrize(
    ("name", "kind", "default", "description"),
    [
        ("share", "number, > 0, ≤ 100", "50.0", "How much is kept, in percent."),
        ("method", "mean | max", "mean", "How values are joined."),
        ("level", "none | all", "all", ""),
        ("names", "list of string", "[]", "Which ones."),
        ("most", "integer or none", "none", ""),
        ("given", "boolean", None, ""),
    ],
)
def test_option_is_told_in_words_when_it_is_typed(name: str, kind: str, default: str | None, description: str) -> None:
    found = {each.name: each for each in option_records(Options)}
    assert list(found) == ["share", "method", "level", "names", "most", "given"]
    assert (found[name].type, found[name].default, found[name].description) == (kind, default, description)


def test_lines_are_what_a_user_types_when_there_are_options() -> None:
    lines = option_lines("here", option_records(Options))
    assert lines[:3] == [
        "options:",
        "  --set here.share=…  (number, > 0, ≤ 100; default 50.0)",
        "      How much is kept, in percent.",
    ]
    assert lines[-1] == "  --set here.given=…  (boolean; must be given)"


def test_one_line_says_so_when_there_are_none() -> None:
    class Nothing(Frozen):
        """None."""

    assert option_lines("here", option_records(Nothing)) == ["options: none"]
