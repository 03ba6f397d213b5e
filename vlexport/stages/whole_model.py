"""What a build makes of all components of a model together: inputs, golden vectors, the plain export. Needs torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path

import numpy as np

from vlexport.core.artifact import Array, DimRange
from vlexport.core.bundle_schema import Golden
from vlexport.core.dataset import Dataset
from vlexport.core.errors import DataError
from vlexport.core.wiring import WHOLE
from vlexport.frontends.sources import Sources
from vlexport.stages.component import drawn, write_goldens

_SEED_STEP = 16
"""Between the draws of two components: inputs of the same shape must differ, or exchanging them would not be seen."""


def first_samples(dataset: Dataset | None, sources: Sources, *, count: int) -> dict[str, list[dict[str, Array]]]:
    """What each component is given on the first calibration samples, with batch dim; nothing without data.

    Raises:
        DataError: VLX0202 when the data is empty, VLX0205 for sizes that narrowed dims do not take.
    """
    if dataset is None:
        return {}
    found: dict[str, list[dict[str, Array]]] = {name: [] for name in sources.components}
    for given in islice(samples_of(dataset, sources), count):
        for name, inputs in given.items():
            found[name].append(inputs)
    if not any(found.values()):
        raise DataError("VLX0202", "the calibration data is empty", where="--calib")
    return found


def spread_samples(dataset: Dataset, sources: Sources, *, count: int) -> dict[str, list[dict[str, Array]]]:
    """As :func:`first_samples`, evenly spread: data often come in an order, one class behind the other.

    Raises:
        DataError: VLX0202, VLX0205.
    """
    found: dict[str, list[dict[str, Array]]] = {name: [] for name in sources.components}
    step = max(len(dataset) // count, 1)
    for given in islice(samples_of(dataset, sources), 0, step * count, step):
        for name, inputs in given.items():
            found[name].append(inputs)
    if not any(found.values()):
        raise DataError("VLX0202", "the calibration data is empty", where="--calib")
    return found


def samples_of(dataset: Dataset, sources: Sources) -> Iterator[dict[str, dict[str, Array]]]:
    """What each component is given on every calibration sample, with batch dim, read one by one.

    Raises:
        DataError: VLX0205 for sizes that narrowed dims do not take.
    """
    for sample in dataset:
        _require_fit(sample.inputs, sources)
        yield sources.inputs_of(_batched(sample.inputs, sources))


def _require_fit(sample: Mapping[str, Array], sources: Sources) -> None:
    """Refuse a sample, which has no batch dim, whose sizes the dims do not take."""
    for spec in sources.signature.inputs:
        for size, dim in zip(sample[spec.name].shape, spec.shape[1:], strict=False):
            taken = sources.signature.dims[dim] if isinstance(dim, str) else DimRange(min=dim, max=dim, opt=dim)
            if size < taken.min or (taken.max is not None and size > taken.max):
                raise DataError(
                    "VLX0205", f"input {spec.name} of a calibration sample has a size of {size}, {dim} is wanted",
                    where="--calib", hint="give samples of the sizes that the artifact takes, or another --dynamic",
                )  # fmt: skip


def _batched(sample: Mapping[str, Array], sources: Sources) -> dict[str, Array]:
    """A sample with its batch dim: the smallest that is taken, or repeated to the size that the graph fixes."""
    made = {}
    for spec in sources.signature.inputs:
        size = spec.shape[0] if spec.shape else 1
        size = sources.signature.dims[size].min if isinstance(size, str) else size
        made[spec.name] = np.repeat(sample[spec.name][None], size, axis=0)
    return made


def opt_inputs(sources: Sources, seed: int) -> dict[str, Array]:
    """Seeded inputs with every dynamic dim at its ``opt``: what latency is measured on."""
    return _drawn(sources, seed + 2, {name: r.opt for name, r in sources.signature.dims.items()})


def whole_goldens(folder: Path, sources: Sources, seed: int, tolerance: float) -> tuple[Golden | None, Golden | None]:
    """Golden vectors of all components together, and at the smallest sizes; a single one has its own and no others."""
    if sources.only is not None:
        return None, None

    def draw(sizes: Mapping[str, int], masks: bool) -> dict[str, Array]:
        return _drawn(sources, seed + 1, sizes, masks=masks)

    return write_goldens(folder, WHOLE, tolerance=tolerance, dims=sources.signature.dims, draw=draw, run=sources.run)


def _drawn(sources: Sources, seed: int, sizes: Mapping[str, int], *, masks: bool = False) -> dict[str, Array]:
    """Inputs of the whole: for each component a draw of its own, of which the inputs that no edge feeds are taken."""
    draws = {}
    for number, (name, source) in enumerate(sources.components.items()):
        own = sources.wiring.dims.sizes(name, sizes)
        draws[name] = drawn(source.program, seed + number * _SEED_STEP, own, masks=masks)
    return {public: draws[port.component][port.name] for public, port in sources.wiring.inputs.items()}
