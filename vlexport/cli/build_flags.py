"""Flags made from :class:`vlexport.core.config.BuildConfig`, for every command that meets a model as a build does."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from vlexport.core.config import PRECISIONS, BuildConfig, config_from, flags_of, options_from_text
from vlexport.core.errors import UsageError, nearest

NOT_OF_THE_GRAPH = frozenset(
    {
        "output", "gate", "max_drop", "metric", "numeric_gate", "profile", "require", "autotune", "budget_minutes",
        "resume", "force", "dump",
    }
)  # fmt: skip
"""Options that say what is done with an artifact, not what model it is made from and how."""
Parameter = tuple[Any, Any]
"""Annotation with typer's declaration, and default."""


def flag(kind: type, text: str, *names: str, **limits: Any) -> Parameter:
    """An option of a command's own: false, or None unless given."""
    annotation: Any = Annotated[kind if kind is bool else kind | None, typer.Option(*names, help=text, **limits)]
    return annotation, False if kind is bool else None


def takes(command: Callable[..., Any], fields: Sequence[str], extra: Mapping[str, Parameter]) -> None:
    """Give a command that is written with ``**values`` the flags of some fields, and its own.

    Args:
        command: Its signature is set.
        fields: Of BuildConfig.
        extra: Name → annotation and default.
    """
    parameters = [_parameter(name, BuildConfig.model_fields[name]) for name in fields]
    for name, (annotation, default) in extra.items():
        parameters.append(_keyword(name, annotation, default))
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {each.name: each.annotation for each in parameters}


def config_of(values: Mapping[str, Any]) -> BuildConfig:
    """A config from what a command was given, its ``recipe`` among it.

    Raises:
        UsageError: VLX0703, VLX0705.
    """
    given: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in values.items()}
    recipe = given.pop("recipe", None)
    options = options_from_text(given.pop("options", None) or ())
    precision = given.get("precision")
    if precision is not None and precision not in PRECISIONS:
        raise UsageError(
            "VLX0703",
            f"no precision '{precision}'{nearest(precision, PRECISIONS)}",
            where="--precision",
            hint=f"known: {', '.join(PRECISIONS)}",
        )
    return config_from({**given, "options": options}, recipe=Path(recipe) if recipe else None)


def command_line(command: str, values: Mapping[str, Any], *more: str) -> str:
    """What was typed, for another command: the model and every flag that was given, then ``more``."""
    words = ["vlexport", command, str(values["model"])]
    for name, value in values.items():
        if name == "recipe" and value:
            words += ["--recipe", str(value)]
        if name not in BuildConfig.model_fields or value in (None, False, (), [], {}) or not flags_of(name):
            continue
        first = flags_of(name)[0].partition("/")[0]
        for each in value if isinstance(value, list) else [value]:
            words += [first] if each is True else [first, str(each)]
    return shlex.join([*words, *more])


def _parameter(name: str, field: Any) -> inspect.Parameter:
    text = field.description
    if not flags_of(name):
        return _keyword(name, Annotated[str, typer.Argument(help=text, metavar=name.upper(), show_default=False)])
    kind, default = _plain(field.annotation, field.default)
    shown = default not in (None, False, True, "")
    return _keyword(name, Annotated[kind, typer.Option(*flags_of(name), help=text, show_default=shown)], default)


def _keyword(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _plain(annotation: Any, default: Any) -> tuple[Any, Any]:
    """Type and default as typer wants them: lists for what repeats, None for what a recipe may give."""
    if annotation in (bool, int):
        return (bool | None if annotation is bool else int | None), None
    if default in ((), {}):
        return list[str] | None, None
    if annotation == float | None:
        return float | None, None
    return str | None, None
