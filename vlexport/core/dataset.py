"""A sample, and a dataset: a lazy, restartable, checked sequence of samples."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlexport.core.artifact import Array, TensorSpec
from vlexport.core.errors import DataError, nearest
from vlexport.core.preprocess import guess_spec

Label = int | Array | dict[str, Any] | None
SKIPPABLE = ("VLX0203", "VLX0204")
"""Codes of samples that are bad in themselves (unreadable, NaN); anything else is wrong with the data as a whole."""


@dataclass(frozen=True, eq=False)
class Sample:
    """One sample.

    Attributes:
        id: Path below the data folder with ``/``, or ``#<index>``.
        inputs: Input name → array of the input's dtype and of its shape without the batch dim.
        label: Class index; or an array or dict for other tasks; or None.
    """

    id: str
    inputs: dict[str, Array]
    label: Label = None

    def content_hash(self) -> str:
        """SHA-256 of the inputs as the model gets them (names, dtypes, shapes, values); id and label do not count."""
        digest = hashlib.sha256()
        for name in sorted(self.inputs):
            array = np.ascontiguousarray(self.inputs[name])
            digest.update(f"{name} {array.dtype.str} {np.shape(self.inputs[name])}\n".encode())
            digest.update(array.tobytes())
        return digest.hexdigest()


class Dataset:
    """Samples in a fixed order. Each ``iter()`` starts anew and reads samples as they are asked for.

    Iterating raises:
        DataError: VLX0203 a photo cannot be read, VLX0204 a float input holds NaN or infinity, VLX0205 an input is
            missing or of another dtype or shape, VLX0208 a label is not the model's, VLX0209 the user's function
            fails, VLX0210 a label is missing although the first sample has one. Each names the sample.

    Attributes:
        kind: ``class-folders``, ``photos``, ``npz``, ``jsonl`` or ``function``.
        labelled: Whether samples have labels.
        classes: Names of the classes that occur, sorted; empty unless the data names them.
        skip_bad: Leave out samples that cannot be read or hold NaN (VLX0203, VLX0204) instead of raising.
        skipped: Id of every sample that was left out so far → the error that it would have been.
    """

    def __init__(
        self,
        *,
        kind: str,
        count: Callable[[], int],
        read: Callable[[], Iterator[Sample | DataError]],
        inputs: Sequence[TensorSpec],
        labelled: bool,
        labels: Sequence[str] | None,
        classes: tuple[str, ...] = (),
        read_kept: Callable[[Callable[[str], bool]], Iterator[Sample | DataError]] | None = None,
    ) -> None:
        self.kind = kind
        self.labelled = labelled
        self.classes = classes
        self.skip_bad = False
        self.skipped: dict[str, DataError] = {}
        self._count = count
        self._read = read
        self._read_kept = read_kept
        self._labels = labels
        self._rows = {spec.name: spec.model_copy(update={"shape": spec.shape[1:]}) for spec in inputs}
        self._length: int | None = None

    def __len__(self) -> int:
        """Number of samples, bad ones included. For a function that returns no list, they are counted once."""
        if self._length is None:
            self._length = self._count()
        return self._length

    def __iter__(self) -> Iterator[Sample]:
        for found in self._read():
            try:
                if isinstance(found, DataError):
                    raise found
                sample = self._checked(found)
            except DataError as error:
                if not self.skip_bad or error.code not in SKIPPABLE:
                    raise
                self.skipped[error.where] = error
                continue
            yield sample

    def part(self, keep: Callable[[str], bool], count: int) -> Dataset:
        """The samples whose id ``keep`` takes, bad ones among them, in the same order; ``count`` is their number."""
        found = copy.copy(self)
        found.skipped = {}
        found._length = count
        quick = self._read_kept  # opens nothing that is not kept
        if quick is not None:
            found._read = lambda: quick(keep)
            found._read_kept = lambda more: quick(lambda name: keep(name) and more(name))
        else:
            found._read = lambda: (each for each in self._read() if keep(_id_of(each)))
        return found

    def _checked(self, sample: Sample) -> Sample:
        unknown = sorted(set(sample.inputs) - set(self._rows))
        if unknown:
            raise misfit(f"the model has no input '{unknown[0]}'{nearest(unknown[0], self._rows)}", sample.id)
        for name, row in self._rows.items():
            if name not in sample.inputs:
                raise misfit(f"input '{name}' is missing", sample.id)
            array = sample.inputs[name]
            problem = row.problem(array)
            if problem:
                photo = self.kind in ("class-folders", "photos")
                fix = "change resize or crop of the preprocessing" if photo else f"give {row.dtype} without batch dim"
                raise misfit(f"input '{name}': {problem}", sample.id, fix)
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise DataError(
                    "VLX0204",
                    f"input '{name}' of sample {sample.id} holds NaN or infinity",
                    where=sample.id,
                    hint="leave the sample out, or repair it",
                )
        if self.labelled and sample.label is None:
            raise DataError("VLX0210", f"sample {sample.id} has no label, the first sample has one", where=sample.id)
        if isinstance(sample.label, int):
            self._check_class(sample.id, sample.label)
        return sample

    def _check_class(self, where: str, label: int) -> None:
        if label < 0:
            raise DataError("VLX0208", f"sample {where} has label {label}, labels count from 0", where=where)
        if self._labels and label >= len(self._labels):
            known = f"the model has {len(self._labels)} labels, counted from 0"
            raise DataError("VLX0208", f"sample {where} has label {label}, {known}", where=where)


def _id_of(found: Sample | DataError) -> str:
    return found.id if isinstance(found, Sample) else found.where


def first_sample(read: Callable[[], Iterator[Sample | DataError]]) -> Sample | None:
    """The first sample that can be read, or None where there is none at all.

    Raises:
        DataError: The first error, when every sample is bad, or when it is no sample's fault.
    """
    problem: DataError | None = None
    for found in read():
        if isinstance(found, Sample):
            return found
        if found.code not in SKIPPABLE:
            raise found
        problem = problem or found
    if problem is not None:
        raise problem
    return None


def misfit(message: str, where: str, hint: str = "") -> DataError:
    """VLX0205: data that does not fit the model's inputs; ``where`` is the sample or the data."""
    return DataError("VLX0205", f"{where}: {message}", where=where, hint=hint)


def unknown_preprocess(spec: TensorSpec, where: str) -> DataError:
    """VLX0206: a photo for an input without preprocessing; the hint is the likeliest line to paste."""
    line = guess_spec(spec)
    return DataError(
        "VLX0206",
        f"how a photo becomes input '{spec.name}' is not known",
        where=where,
        hint=f'say how it was trained; most likely --preprocess "{line}"' if line else "it does not look like an image",
    )


def label_index(name: str, labels: Sequence[str], *, where: str) -> int:
    """Index of a label by its name.

    Args:
        name: The label.
        labels: The model's label names, in the order of its outputs.
        where: What bears the label, for the error.

    Raises:
        DataError: VLX0208 when the model has no such label, or two of that name.
    """
    found = [i for i, label in enumerate(labels) if label == name]
    if len(found) == 1:
        return found[0]
    message = f"the model has no label '{name}'{nearest(name, labels)}"
    if found:
        message = f"the model has label '{name}' more than once (at {', '.join(map(str, found))})"
    raise DataError("VLX0208", f"{where}: {message}", where=where, hint="name it as one of the model's labels")


def as_label(value: object, labels: Sequence[str] | None, where: str) -> Label:
    """A label as a sample keeps it: whole numbers become int, names are looked up, other scalars become arrays.

    Raises:
        DataError: VLX0208 when a name is no label of the model.
    """
    if value is None or isinstance(value, dict):
        return value
    if isinstance(value, str):
        if not labels:
            raise DataError(
                "VLX0208",
                f"sample {where} has label '{value}', the model has no label names",
                where=where,
                hint="save the model with labels=[…], or give class indices",
            )
        return label_index(value, labels, where=f"sample {where}")
    array = np.asarray(value)
    return int(array) if array.ndim == 0 and array.dtype.kind in "iub" else array
