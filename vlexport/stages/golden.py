"""The golden check: an artifact against vectors that the source Program computed. No torch.

Rows in which the program itself chooses other tokens once the last digits of its inputs move have a bound of their own,
that comes from how much its outputs moved then; a graph without such choices has none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

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
            worst = max(worst, check_golden(session, inputs, outputs, golden=golden, code=code, where=where))
    return worst


def tipping_note(components: Mapping[str, Component]) -> tuple[str, ...]:
    """What a user should know where choices of tokens, or integers, hang on the last digits."""
    found = [g for each in components.values() for g in (each.golden, each.golden_smallest) if g is not None]
    looser = [each for each in found if each.tipping_tolerance > each.tolerance]
    if not looser:
        return ()
    rows, bound = sum(len(each.tipping) for each in looser), max(each.tipping_tolerance for each in looser)
    return (
        f"{rows} golden samples hang on choices or integers that the last digits tip over: the artifact is held to "
        f"{bound:.1e} there, twice what the program's own outputs moved by, not to {looser[0].tolerance:.0e}",
    )


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


def worst_error(found: Mapping[str, Array], outputs: Mapping[str, Array]) -> tuple[float, str]:
    """Largest ``max|a−b| / max|b|`` over outputs, and the output it was found at."""
    errors = {
        name: relative_error(found[name], expected) if found[name].dtype == expected.dtype else float("inf")
        for name, expected in outputs.items()
    }
    worst = max(errors, key=lambda name: errors[name])
    return errors[worst], worst


def _at(
    found: Mapping[str, Array], outputs: Mapping[str, Array], rows: Sequence[int], batch: int, *, whole: bool
) -> dict[str, Array]:
    """What was found in those rows, and what was expected elsewhere; of an output without rows, ``whole`` decides."""
    made = {}
    for name, expected in outputs.items():
        value = made[name] = found[name]
        if value.shape == expected.shape and value.ndim and value.shape[0] == batch:
            counts = np.isin(np.arange(batch), rows).reshape(-1, *[1] * (value.ndim - 1))
            made[name] = np.where(counts, value, expected)
        elif not whole:
            made[name] = expected
    return made


def check_golden(
    session: Session,
    inputs: Mapping[str, Array],
    outputs: Mapping[str, Array],
    *,
    golden: Golden,
    code: str,
    where: str = "",
) -> float:
    """Raise when the artifact does not reproduce the vectors; returns the largest error.

    Raises:
        GateError: ``code`` (VLX0504 when building, VLX0606 when verifying), naming the output and the error.
    """
    found = session.run(inputs)
    if not golden.tipping:
        held = [(found, golden.tolerance)]
    else:
        batch = next(iter(inputs.values())).shape[0]
        firm = [row for row in range(batch) if row not in golden.tipping]
        held = [
            (_at(found, outputs, firm, batch, whole=False), golden.tolerance),
            (_at(found, outputs, golden.tipping, batch, whole=True), golden.tipping_tolerance),
        ]
    largest = 0.0
    for values, bound in held:
        error, output = worst_error(values, outputs)
        largest = max(largest, error)
        if not error <= bound:
            raise GateError(
                code,
                f"output {output} of the artifact differs from the source program by {error:.1e} (bound {bound:.0e})",
                where=f"{where}{output}",
                hint="another version of the runtime may help; please report it with `vlexport --version`",
            )
    return largest
