"""What a config chooses, checked before any work is done: gates, options, passes, precision, places.

build stops at the first problem here, plan collects them all.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from vlexport.core.artifact import Frozen
from vlexport.core.config import BuildConfig
from vlexport.core.errors import CapabilityError, UsageError, nearest
from vlexport.core.samples import Dataset, open_data
from vlexport.core.verdict import Gate, gate_from_text
from vlexport.frontends.source import Source
from vlexport.ir.program import Program
from vlexport.passes import CATALOGUE as PASSES
from vlexport.passes import pass_class
from vlexport.passes.base import Pass
from vlexport.stages.validate import TIMED
from vlexport.targets import CATALOGUE as TARGETS
from vlexport.targets.base import Target


def output_of(config: BuildConfig) -> Path:
    """The bundle's folder: ``-o``, or the model's name with ``.bundle``."""
    return Path(config.output or f"{Path(config.model).stem}.bundle")


def precision_of(config: BuildConfig, target: Target) -> tuple[str, str]:
    """Precision and the reason for it.

    Raises:
        CapabilityError: VLX0502.
    """
    return target.choose_precision(None if config.precision == "auto" else config.precision)


def gates_of(config: BuildConfig) -> tuple[Gate, ...]:
    """All gates of a config, ``--max-drop`` among them; those that need data are refused without it.

    Raises:
        UsageError: VLX0702, VLX0804.
    """
    texts = [*config.gate, *([f"drop<={config.max_drop:g}"] if config.max_drop is not None else [])]
    gates = tuple(gate_from_text(text) for text in texts)
    for gate in gates:
        needs_data = gate.metric not in (*TIMED, "size_mb")
        if (needs_data and config.data is None) or (gate.metric in TIMED and not config.profile):
            flag = "--data DATA" if needs_data else "--profile"
            raise UsageError(
                "VLX0804",
                f"gate {gate} needs a measurement that this build does not make",
                where="--gate",
                hint=f"add {flag}",
            )
    return gates


def passes_of(config: BuildConfig) -> list[Pass[Program]]:
    """Every pass of the catalogue with its options.

    Raises:
        UsageError: VLX0703.
    """
    made: list[Pass[Program]] = []
    for name in PASSES:
        kind = pass_class(name)
        made.append(kind(_typed(kind.Options, config.scoped_options(name), name)))
    return made


def options_of(config: BuildConfig, target: Target) -> Frozen:
    """The target's options; every ``--set`` must name a pass or target that exists.

    Raises:
        UsageError: VLX0703.
    """
    scopes = [*PASSES, *TARGETS]
    for key in config.options:
        scope = key.partition(".")[0]
        if scope not in scopes:
            raise UsageError(
                "VLX0703",
                f"--set {key}: no pass or target '{scope}'{nearest(scope, scopes)}",
                where="--set",
                hint=f"known: {', '.join(scopes)}",
            )
    return _typed(target.Options, config.scoped_options(target.id), target.id)


def _typed(kind: type[Frozen], values: dict[str, str], scope: str) -> Frozen:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        near = nearest(name, kind.model_fields)
        raise UsageError(
            "VLX0703",
            f"--set {scope}.{name}: {first['msg'].lower()}{near}",
            where="--set",
            hint=f"options of {scope}: {', '.join(kind.model_fields) or 'none'}",
        ) from error


def check_device_profile(config: BuildConfig) -> None:
    """Refuse device profiles that do not exist.

    Raises:
        CapabilityError: VLX0703.
    """
    if config.device_profile != "this":
        raise CapabilityError(
            "VLX0703", f"no device profile '{config.device_profile}' in this version", where="--for", hint="known: this"
        )


def open_dataset(data: str | None, source: Source) -> Dataset | None:
    """DATA for a model, or None where none was given.

    Raises:
        DataError: VLX02xx.
    """
    if data is None:
        return None
    return open_data(
        data, inputs=source.program.signature.inputs, preprocess=source.preprocess, labels=source.labels or None
    )
