"""``vlexport inspect`` and ``vlexport explain``: what a model or bundle is, what passes did, what an error means."""

from __future__ import annotations

import inspect as python_inspect
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlexport.cli.build_flags import NOT_OF_THE_GRAPH, config_of, flag, takes
from vlexport.cli.console import make_reporter
from vlexport.cli.measure import JsonOption
from vlexport.cli.outcome import Outcome
from vlexport.core.bundle_schema import plain_json
from vlexport.core.config import BuildConfig
from vlexport.core.errors import CODES, UsageError, nearest
from vlexport.core.explanations import code_in, explanation, explanation_lines
from vlexport.core.halves import require_build_half

if TYPE_CHECKING:
    from vlexport.core.bundle_schema import Bundle


def inspect(**values: Any) -> Outcome:
    """Show what a model file or a bundle holds, and what targets would refuse of a model."""
    from vlexport.frontends.named_paths import require_model
    from vlexport.report.inspection import bundle_lines, model_lines
    from vlexport.stages.inspect import inspect_bundle, is_bundle

    values.pop("json_output")
    depth = values.pop("depth") or 1
    if is_bundle(Path(values["model"])):
        unfit = next((name for name, value in values.items() if name != "model" and value), None)
        if unfit is not None:
            raise UsageError(
                "VLX0703", "this is a bundle: it is of one target already, and options are for models",
                where=unfit, hint="leave them out, or name the model file",
            )  # fmt: skip
        shown = inspect_bundle(Path(values["model"]))
        return Outcome(bundle_lines(shown), {"kind": "bundle", **plain_json(shown)})
    require_model(values["model"], values["arch"])
    require_build_half("vlexport inspect MODEL")
    from vlexport.stages.inspect_model import inspect_model

    asked = values["target"] is not None or values["device_profile"] is not None
    if values["target"] is None and asked:
        values["target"] = _targets_of(values["device_profile"])
    found = inspect_model(config_of(values), targets=asked, depth=depth, reporter=make_reporter())
    lines = model_lines(found)
    if not asked:
        again = shlex.quote(values["model"])
        lines.append(f"Next     vlexport inspect {again} --target all   (what each target would refuse)")
    return Outcome(lines, {"kind": "model", **plain_json(found)})


def _targets_of(device: str) -> str:
    """Targets that run on a device; all of them where that is not known, or there is no such device."""
    from vlexport.core.device_profiles import device_profiles

    known = device_profiles().get(device)
    return ",".join(known.targets) if known is not None and known.targets else "all"


def explain(
    subject: Annotated[
        str, typer.Argument(help="An error's code, as VLX0503, or a bundle.", metavar="CODE|BUNDLE", show_default=False)
    ],
    pass_name: Annotated[str | None, typer.Option("--pass", help="Only this pass of the bundle.")] = None,
    layers: Annotated[
        bool, typer.Option("--layers", help="What each layer in integers loses, and what to try.")
    ] = False,
    json_output: JsonOption = False,
) -> Outcome:
    """Explain an error code, or what each pass of a bundle did, where, and why not elsewhere."""
    code = code_in(subject)
    if code and not os.path.exists(subject):
        if pass_name is not None or layers:
            flag = "--layers" if layers else "--pass"
            raise UsageError("VLX0703", f"{flag} goes with a bundle", where=flag, hint="leave it out")
        found = explanation(code)
        return Outcome(explanation_lines(found), plain_json(found))
    if not os.path.exists(subject):
        raise UsageError(
            "VLX0703", f"'{subject}' is no error code, and no bundle stands there{nearest(subject, CODES)}",
            where="explain", hint="as `vlexport explain VLX0503` or `vlexport explain BUNDLE`; "
            "`vlexport passes NAME` describes a pass",
        )  # fmt: skip
    from vlexport.core.bundle import read_bundle
    from vlexport.report.inspection import pass_lines

    bundle = read_bundle(Path(subject))
    if layers:
        return _layers(Path(subject), bundle)
    components = bundle.components
    known = list(dict.fromkeys(record.name for each in components.values() for record in each.passes))
    if pass_name is not None and pass_name not in known:
        raise UsageError(
            "VLX0703", f"no pass '{pass_name}' ran on this bundle{nearest(pass_name, known)}", where="--pass",
            hint=f"these did: {', '.join(known)}",
        )  # fmt: skip
    kept = {
        name: [record for record in each.passes if pass_name in (None, record.name)]
        for name, each in components.items()
    }
    lines = [
        line
        for name, each in kept.items()
        for line in pass_lines(name if len(kept) > 1 else "", each, every=pass_name is not None)
    ]
    if pass_name is None:
        lines.append(f"Next     vlexport explain {shlex.quote(subject)} --pass NAME   (every place)")
    payload = {name: [plain_json(record) for record in each] for name, each in kept.items()}
    return Outcome(lines, {"components": payload})


def _layers(folder: Path, bundle: Bundle) -> Outcome:
    """What the layers of a quantized bundle lose."""
    from vlexport.core.layer_record import read_layers
    from vlexport.report.layer_advice import layer_lines, suggestions

    found = read_layers(folder, bundle)
    if not found.layers:
        raise UsageError(
            "VLX0703", f"--layers is about layers in integers, and {bundle.precision} has none", where="--layers",
            hint="leave it out, or give a bundle that was built with --precision int8",
        )  # fmt: skip
    payload = {"layers": found.model_dump(mode="json"), "suggestions": list(suggestions(found))}
    return Outcome(layer_lines(found), payload)


_MODEL: Any = Annotated[
    str,
    typer.Argument(help="A model as `build` takes it, or a bundle.", metavar="MODEL|BUNDLE", show_default=False),
]
_LEFT_OUT = (*NOT_OF_THE_GRAPH, "model", "calib", "data", "skip_bad", "seed")
_FIELDS = tuple(name for name in BuildConfig.model_fields if name not in _LEFT_OUT)
_EXTRA = {
    "model": (_MODEL, python_inspect.Parameter.empty),
    "recipe": flag(str, "TOML file with any of these options; flags win.", "--recipe"),
    "depth": flag(int, "Names of a module path by which cost is summed.", "--depth", min=1, max=64),
    "json_output": flag(bool, "Print one JSON object on stdout.", "--json"),
}
takes(inspect, _FIELDS, _EXTRA)
