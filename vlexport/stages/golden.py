"""The golden check: an artifact against vectors that the source Program computed. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from vlexport.core.artifact import Array, Artifact, Session, TensorSpec
from vlexport.core.bundle import artifact_folder, inside
from vlexport.core.bundle_schema import Bundle, Component, Golden
from vlexport.core.errors import BundleError, GateError
from vlexport.core.npz import read_npz
from vlexport.core.numerics import relative_error
from vlexport.core.wiring import WHOLE
from vlexport.targets.base import Target


def read_golden(folder: Path, component: Component) -> tuple[dict[str, Array], dict[str, Array]]:
    """Golden inputs and outputs, by public name.

    Raises:
        BundleError: VLX0601 when they are no arrays, or not those of the component.
    """
    return _pair(folder, component.golden, component.artifact)


def check_component(session: Session, folder: Path, component: Component, *, code: str, where: str = "") -> float:
    """Check all golden vectors of a component; returns the largest error. ``where`` stands before an output's name.

    Raises:
        BundleError: VLX0601.
        GateError: ``code``.
    """
    worst = 0.0
    for golden in (component.golden, component.golden_smallest):
        if golden is not None:
            inputs, outputs = _pair(folder, golden, component.artifact)
            error = check_golden(session, inputs, outputs, tolerance=golden.tolerance, code=code, where=where)
            worst = max(worst, error)
    return worst


def check_bundle(
    target: Target, whole: Session, folder: Path, bundle: Bundle, *, code: str, threads: int
) -> dict[str, float]:
    """Check every component by itself, then all of them together: an edge that leads elsewhere is found there only.

    Args:
        target: Opens the components.
        whole: A session of the whole bundle.
        folder: Of the bundle.
        bundle: Its components.
        code: Of the error.
        threads: Of the sessions.

    Returns:
        Component → largest error; ``whole`` among them where there are several.

    Raises:
        BundleError: VLX0601.
        GateError: ``code``.
    """
    errors = {}
    if len(bundle.components) == 1:
        return {name: check_component(whole, folder, each, code=code) for name, each in bundle.components.items()}
    for name, each in bundle.components.items():
        place = folder / artifact_folder(bundle.components, name)
        with target.open(place, each.artifact, threads=threads) as session:
            errors[name] = check_component(session, folder, each, code=code, where=f"component {name}, ")
    return {**errors, WHOLE: check_component(whole, folder, bundle.main, code=code, where="the whole, ")}


def _pair(folder: Path, golden: Golden, artifact: Artifact) -> tuple[dict[str, Array], dict[str, Array]]:
    return _vectors(folder, golden.inputs, artifact.inputs), _vectors(folder, golden.outputs, artifact.outputs)


def _vectors(folder: Path, name: str, wanted: Sequence[TensorSpec]) -> dict[str, Array]:
    try:
        arrays, _ = read_npz(inside(folder, name), [spec.name for spec in wanted])
        return {spec.name: arrays[spec.name] for spec in wanted}
    except (OSError, ValueError, KeyError) as error:
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
    session: Session,
    inputs: Mapping[str, Array],
    outputs: Mapping[str, Array],
    *,
    tolerance: float,
    code: str,
    where: str = "",
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
            where=f"{where}{output}",
            hint="another version of the runtime may help; please report it with `vlexport --version`",
        )
    return error
