"""``vlexport build``. Its flags are made from :class:`vlexport.core.config.BuildConfig`."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any

import typer

from vlexport.cli.console import make_reporter
from vlexport.cli.outcome import Outcome
from vlexport.core.bundle_schema import plain_json
from vlexport.core.config import PRECISIONS, BuildConfig, config_from, flags_of, options_from_text
from vlexport.core.errors import UsageError, nearest
from vlexport.core.halves import require_build_half
from vlexport.core.verdict import exit_code


def build(**values: Any) -> Outcome:
    """Build a verified, measured bundle from a model file."""
    recipe = values.pop("recipe")
    values.pop("json_output")
    planned = values.pop("plan")
    options = options_from_text(values.pop("options") or [])
    precision = values.get("precision")
    if precision is not None and precision not in PRECISIONS:
        raise UsageError(
            "VLX0703",
            f"no precision '{precision}'{nearest(precision, PRECISIONS)}",
            where="--precision",
            hint=f"known: {', '.join(PRECISIONS)}",
        )
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    config = config_from({**given, "options": options}, recipe=Path(recipe) if recipe else None)

    from vlexport.core.bundle import MEASURED_FOLDER
    from vlexport.report.receipt import receipt
    from vlexport.targets import open_target

    open_target(config.target)
    require_build_half("vlexport build")
    from vlexport.stages.build import build as build_stage

    if planned:
        return _plan(config)
    _use_threads(config.threads)
    reporter = make_reporter()
    result = build_stage(config, reporter=reporter)
    lines = receipt(result.bundle, result.report, str(result.output))
    payload = {
        "bundle": str(result.output),
        "digest": result.bundle.digest,
        "report": plain_json(result.report),
        "report_file": str(result.output / MEASURED_FOLDER / "local-1" / "report.html"),
        "seconds": {name: round(spent, 3) for name, spent in result.seconds.items()},
        "use_it": lines[lines.index("Use it:") + 1 :],
    }
    return Outcome(lines, payload, exit_code(result.report.verdicts))


def _plan(config: BuildConfig) -> Outcome:
    from vlexport.report.figures import macs_phrase, pass_phrase, size_phrase
    from vlexport.stages.plan import plan

    found = plan(config, reporter=make_reporter())
    lines = [
        f"Plan     {config.target}: {found.calls_before} calls become {found.calls_after}, "
        f"{macs_phrase(found.after.macs, found.after.opaque)}, {size_phrase(found.after.size_bytes)} of weights"
    ]
    for record in found.passes:
        lines.append(f"Pass     {pass_phrase(record)}")
        lines += [f"         {change.what} ×{change.count}" for change in record.changes]
        lines += [f"         not {miss.pattern} at {miss.node}: {miss.reason}" for miss in record.near_misses]
    lines += [f"Pass     {name}: on the lowered graph, which a plan does not make" for name in found.lowered]
    lines += [f"Note     {note}" for note in found.notes]
    for problem in found.problems:
        where = f" ({problem.where})" if problem.where else ""
        hint = f"; {problem.hint}" if problem.hint else ""
        lines.append(f"Problem  {problem.code}: {problem.message}{where}{hint}")
    lines.append("Nothing was written." if found.problems else "No problem found; nothing was written.")
    payload = {
        "passes": [plain_json(record) for record in found.passes],
        "lowered_passes": list(found.lowered),
        "before": plain_json(found.before),
        "after": plain_json(found.after),
        "problems": [problem.as_dict() for problem in found.problems],
        "notes": list(found.notes),
    }
    return Outcome(lines, payload, found.problems[0].exit_code if found.problems else 0)


def _use_threads(threads: int) -> None:
    """The command line owns its process, so it may set torch's thread count."""
    if threads:
        import torch

        torch.set_num_threads(threads)


def _signature() -> inspect.Signature:
    parameters = []
    for name, field in BuildConfig.model_fields.items():
        text = field.description
        if not flags_of(name):
            annotation: Any = Annotated[str, typer.Argument(help=text, metavar=name.upper(), show_default=False)]
            parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation))
            continue
        kind, default = _plain(field.annotation, field.default)
        annotation = Annotated[
            kind, typer.Option(*flags_of(name), help=text, show_default=default not in (None, False, True, ""))
        ]
        parameters.append(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        )
    extra: dict[str, tuple[Any, Any]] = {
        "recipe": (
            Annotated[str | None, typer.Option("--recipe", help="TOML file with any of these options; flags win.")],
            None,
        ),
        "plan": (
            Annotated[bool, typer.Option("--plan", help="Say what a build would do, in seconds; write nothing.")],
            False,
        ),
        "json_output": (Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")], False),
    }
    for name, (annotation, default) in extra.items():
        parameters.append(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        )
    return inspect.Signature(parameters)


def _plain(annotation: Any, default: Any) -> tuple[Any, Any]:
    """Type and default as typer wants them: lists for what repeats, None for what a recipe may give."""
    if annotation in (bool, int):
        return (bool | None if annotation is bool else int | None), None
    if default in ((), {}):
        return list[str] | None, None
    if annotation == float | None:
        return float | None, None
    return str | None, None


build.__signature__ = _signature()  # type: ignore[attr-defined]
build.__annotations__ = {p.name: p.annotation for p in build.__signature__.parameters.values()}  # type: ignore[attr-defined]
