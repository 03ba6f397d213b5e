"""The golden check: an artifact against vectors that the source Program computed. No torch."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from vlexport.core.artifact import Array, Artifact, Session, TensorSpec
from vlexport.core.bundle import inside
from vlexport.core.bundle_schema import Component, Golden
from vlexport.core.errors import BundleError, GateError
from vlexport.core.numerics import relative_error


def read_golden(folder: Path, component: Component) -> tuple[dict[str, Array], dict[str, Array]]:
    """Golden inputs and outputs, by public name.

    Raises:
        BundleError: VLX0601 when they are no arrays, or not those of the component.
    """
    return _pair(folder, component.golden, component.artifact)


def check_component(session: Session, folder: Path, component: Component, *, code: str) -> float:
    """Check all golden vectors of a component; returns the largest error.

    Raises:
        BundleError: VLX0601.
        GateError: ``code``.
    """
    worst = 0.0
    for golden in (component.golden, component.golden_smallest):
        if golden is not None:
            inputs, outputs = _pair(folder, golden, component.artifact)
            worst = max(worst, check_golden(session, inputs, outputs, tolerance=golden.tolerance, code=code))
    return worst


def _pair(folder: Path, golden: Golden, artifact: Artifact) -> tuple[dict[str, Array], dict[str, Array]]:
    return _vectors(folder, golden.inputs, artifact.inputs), _vectors(folder, golden.outputs, artifact.outputs)


def _vectors(folder: Path, name: str, wanted: Sequence[TensorSpec]) -> dict[str, Array]:
    try:
        with np.load(inside(folder, name), allow_pickle=False) as file:
            return {spec.name: file[spec.name] for spec in wanted}
    except (OSError, ValueError, EOFError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise BundleError(
            "VLX0601", f"{name} does not hold the golden vectors", where=str(folder), hint="build it again"
        ) from error


def worst_error(session: Session, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> tuple[float, str]:
    """Largest ``max|a−b| / max|b|`` over outputs, and the output it was found at."""
    found = session.run(inputs)
    errors = {
        name: relative_error(found[name], expected) if found[name].dtype == expected.dtype else float("inf")
        for name, expected in outputs.items()
    }
    worst = max(errors, key=lambda name: errors[name])
    return errors[worst], worst


def check_golden(
    session: Session, inputs: Mapping[str, Array], outputs: Mapping[str, Array], *, tolerance: float, code: str
) -> float:
    """Raise when the artifact does not reproduce the vectors.

    Raises:
        GateError: ``code`` (VLX0504 when building, VLX0606 when verifying), naming the output and the error.
    """
    error, output = worst_error(session, inputs, outputs)
    if not error <= tolerance:
        raise GateError(
            code,
            f"output {output} of the artifact differs from the source program by {error:.1e} (bound {tolerance:.0e})",
            where=output,
            hint="another version of the runtime may help; please report it with `vlexport --version`",
        )
    return error
