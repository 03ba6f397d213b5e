"""collect: run a Program over samples once, and see the values that somebody wants.

Memory does not grow with the number of samples. Threads are those that the process has: only the command line sets
them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from vlexport.calibration.data_key import DataKey
from vlexport.calibration.keys import model_key, value_keys
from vlexport.calibration.observer import NotFiniteError, Observer
from vlexport.calibration.seen import Collected, SeenValue
from vlexport.core.dataset import Dataset, Sample
from vlexport.core.errors import DataError
from vlexport.core.progress import Reporter, Silent
from vlexport.ir import dialect, provenance
from vlexport.ir.program import Program


@dataclass(frozen=True)
class Want:
    """What is wanted of one value.

    Attributes:
        histogram: Counts, for methods that need them; extremes alone cost a third.
        channel_axis: Dim whose entries get ranges of their own; None for none.
    """

    histogram: bool = True
    channel_axis: int | None = None


Wanted = Callable[[Node], Want | None]
"""Whether somebody wants the value of an input or a call. Asked once a node, of those that make one floating tensor."""


def together(*wanted: Wanted) -> Wanted:
    """All that several want: counts where one of them wants counts, channels as the first that names a dim."""

    def want(node: Node) -> Want | None:
        found = [each for each in (one(node) for one in wanted) if each is not None]
        axes = [each.channel_axis for each in found if each.channel_axis is not None]
        histogram = any(each.histogram for each in found)
        return Want(histogram=histogram, channel_axis=axes[0] if axes else None) if found else None

    return want


def collect(
    program: Program,
    samples: Dataset,
    wanted: Wanted,
    *,
    batch: int = 1,
    at_least: int = 1,
    reporter: Reporter | None = None,
) -> Collected:
    """Run a Program over all samples, once.

    Args:
        program: In floating point; not changed.
        samples: Of the sizes that its signature takes.
        wanted: Which values are looked at.
        batch: Samples a run where the batch dim is dynamic and they are of one size. A batch dim that is fixed to more
            than one is filled up with the last sample.
        at_least: Different samples that are needed.
        reporter: Shows a step a sample.

    Raises:
        DataError: VLX0213 naming sample and node where a value becomes NaN or infinite, VLX0214 for fewer samples than
            are needed; VLX02xx for samples that cannot be read.
    """
    seen = asked(program, wanted)
    plain, ordered = DataKey(needed=at_least), DataKey(in_order=True)
    with (reporter or Silent()).steps("calibrate", len(samples)) as advance:
        for rows in _batches(samples, program, batch):
            inputs = _stacked(rows, program)
            try:
                _observe(program, inputs, seen)
            except _NotFiniteAtError as error:
                raise _refused(program, rows, inputs, error) from error
            for sample in rows:
                plain.add(sample)
                ordered.add(sample)
                advance()
    plain.require_enough()
    keys = value_keys(program)
    values = tuple(
        SeenValue(keys[n], "input" if n.op == "placeholder" else dialect.plain_name(n), provenance.module_path(n),
                  provenance.source_line(n), observer)
        for n, observer in seen.items()
    )  # fmt: skip
    return Collected(model_key(program), plain.digest(), ordered.digest(), plain.samples, batch, values)


class _NotFiniteAtError(Exception):
    """A value of this node is NaN or infinite."""

    def __init__(self, node: Node, kind: str) -> None:
        super().__init__(kind)
        self.node = node
        self.kind = kind


def asked(program: Program, wanted: Wanted) -> dict[Node, Observer]:
    """The inputs and calls whose value is wanted, in order, each with an observer that has seen nothing."""
    found = {}
    for node in (*program.placeholders, *program.calls()):
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.is_floating_point() and (want := wanted(node)) is not None:
            found[node] = Observer(channel_axis=want.channel_axis, with_histogram=want.histogram)
    return found


def _observe(program: Program, inputs: Sequence[Tensor], seen: dict[Node, Observer]) -> None:
    def look(node: Node, value: Any) -> None:
        if node in seen:
            try:
                seen[node].update(_array(value))
            except NotFiniteError as error:
                raise _NotFiniteAtError(node, str(error)) from error

    for node, value in zip(program.placeholders, inputs, strict=True):
        look(node, value)
    program.run(*inputs, observe=look)


def _array(value: Tensor) -> Any:
    kept = value.detach()
    return (kept.float() if kept.dtype is torch.bfloat16 else kept).numpy()


def _batches(samples: Dataset, program: Program, batch: int) -> Iterator[list[Sample]]:
    """Rows for one run each, all of one size."""
    sizes = [spec.shape[0] for spec in program.signature.inputs if spec.shape]
    fixed = next((size for size in sizes if isinstance(size, int)), 0)
    limits = [program.signature.dims[size].max for size in sizes if isinstance(size, str)]
    size = fixed or min([batch, *(limit for limit in limits if limit is not None)])
    rows: list[Sample] = []
    for sample in samples:
        if rows and (len(rows) == size or _shapes(sample) != _shapes(rows[0])):
            yield rows
            rows = []
        rows.append(sample)
    if rows:
        yield rows


def _shapes(sample: Sample) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in sample.inputs.items()}


def _stacked(rows: Sequence[Sample], program: Program) -> tuple[Tensor, ...]:
    made = []
    for spec in program.signature.inputs:
        least = spec.shape[0] if spec.shape else 1
        least = program.signature.dims[least].min if isinstance(least, str) else least
        full = [*rows, *[rows[-1]] * (least - len(rows))]
        made.append(torch.from_numpy(np.stack([sample.inputs[spec.name] for sample in full])))
    return tuple(made)


def _refused(program: Program, rows: Sequence[Sample], inputs: Sequence[Tensor], error: _NotFiniteAtError) -> DataError:
    """VLX0213 for the sample at fault: where several ran together, each is run alone until one fails."""
    guilty = rows[0]
    for row in rows if len(rows) > 1 else ():
        fresh: dict[Node, Observer] = {error.node: Observer(with_histogram=False)}
        try:
            _observe(program, _stacked([row], program), fresh)
        except _NotFiniteAtError:
            guilty = row
            break
    place = provenance.describe(error.node) if error.node.op == "call_function" else f"input {error.node.name}"
    return DataError(
        "VLX0213", f"a value becomes {error.kind} on calibration sample {guilty.id}", where=place,
        hint="leave the sample out, or repair the model there: such a value has no range",
    )  # fmt: skip
