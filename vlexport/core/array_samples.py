"""Samples from an ``.npz`` file: one array per input with a leading N, and ``label`` where there is one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import numpy as np

from vlexport.core.artifact import Array, TensorSpec
from vlexport.core.dataset import Dataset, Sample, as_label, misfit
from vlexport.core.errors import DataError, nearest
from vlexport.core.npz import read_npz


def open_npz(data: str, *, inputs: Sequence[TensorSpec], labels: Sequence[str] | None) -> Dataset:
    """Open an ``.npz``. Its arrays are read into memory once; pickled objects and bombs are refused.

    Args:
        data: The file.
        inputs: The model's inputs; each has an array of shape (N, …) of its own dtype, other arrays are ignored.
        labels: The model's label names, for labels that are names.

    Raises:
        DataError: VLX0202 no rows, VLX0203 unreadable, VLX0205 an array is missing or the numbers of rows differ.
    """
    names = [spec.name for spec in inputs]
    try:
        arrays, held = read_npz(data, [*names, "label"])
    except (OSError, ValueError) as error:
        kind = type(error.__cause__ or error).__name__
        raise DataError(
            "VLX0203",
            f"'{data}' cannot be read as .npz ({kind if isinstance(error, OSError) else error})",
            where=data,
            hint="write it with numpy.savez, arrays of numbers only",
        ) from error
    missing = next((name for name in names if name not in arrays), None)
    if missing is not None:
        shown = ", ".join(held) or "none"
        raise misfit(f"no array for input '{missing}'{nearest(missing, held)} (arrays: {shown})", data)
    label = None if "label" in names else arrays.get("label")
    rows = {name: arrays[name] for name in names}
    leading = {key: len(array) if array.ndim else 0 for key, array in rows.items()}
    if label is not None:
        leading["label"] = len(label) if label.ndim else 0
    if len(set(leading.values())) != 1:
        raise misfit("numbers of rows differ: " + ", ".join(f"{key} {n}" for key, n in leading.items()), data)
    count = leading[names[0]]
    if not count:
        raise DataError("VLX0202", f"'{data}' holds arrays of no rows", where=data)
    return Dataset(
        kind="npz",
        count=lambda: count,
        read=partial(_read_rows, rows, label, labels),
        inputs=inputs,
        labelled=label is not None,
        labels=labels,
        classes=_names_in(label, data) if label is not None and label.dtype.kind == "U" else (),
    )


def _names_in(label: Array, data: str) -> tuple[str, ...]:
    try:
        return tuple(np.unique(label).tolist())
    except ValueError as error:  # numbers that are no characters
        raise DataError("VLX0203", f"'{data}': a label is no text ({error})", where=data) from error


def _read_rows(rows: Mapping[str, Array], label: Array | None, labels: Sequence[str] | None) -> Iterator[Sample]:
    for i in range(len(next(iter(rows.values())))):
        inputs = {name: np.asarray(array[i]) for name, array in rows.items()}
        yield Sample(f"#{i}", inputs, None if label is None else as_label(label[i], labels, f"#{i}"))
