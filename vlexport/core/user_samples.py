"""Samples from a function of the user's. What goes wrong in it becomes one readable error."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from vlexport.core.artifact import Array, TensorSpec
from vlexport.core.dataset import Dataset, Sample, as_label, first_sample, unknown_preprocess
from vlexport.core.errors import DataError
from vlexport.core.photo_samples import image_array
from vlexport.core.preprocess import Preprocess
from vlexport.core.user_code import Blamed, user_object


class UserFunction:
    """A function in a Python file, called with no arguments, that returns an iterable of samples.

    Attributes:
        name: ``FILE.py:FUNCTION`` as the user gave it.
    """

    def __init__(self, file: Path, function: str) -> None:
        """Import the file, which runs it.

        Args:
            file: The Python file. Modules beside it can be imported by it.
            function: Name of the function.

        Raises:
            DataError: VLX0201 when there is no such file, VLX0209 when importing fails or the file has no such
                function.
        """
        self.name = f"{file}:{function}"
        self._file = file
        found = user_object(file, function)
        self._function: Callable[[], object] = found
        self._last: object = None

    def _call(self) -> Iterable[object]:
        with Blamed(self._file, f"{self.name.rpartition(':')[2]} in"):
            made = self._function()
        if isinstance(made, (str, bytes, dict)) or not isinstance(made, Iterable):
            raise DataError(
                "VLX0209",
                f"{self.name} returned a {type(made).__name__}",
                where=self.name,
                hint="return a list of samples, or yield them",
            )
        if made is self._last and isinstance(made, Iterator):
            raise DataError(
                "VLX0209",
                f"{self.name} returns the same iterator again, which is used up",
                where=self.name,
                hint="make a new iterator at each call, or return a list",
            )
        self._last = made
        return made

    def items(self) -> Iterator[object]:
        """Call the function and go through what it returns.

        Raises:
            DataError: VLX0209 when it fails or returns no iterable.
        """
        made = self._call()
        doing = f"{self.name.rpartition(':')[2]} in"
        with Blamed(self._file, doing):
            iterator = iter(made)
        end = object()
        while True:
            with Blamed(self._file, doing):
                item = next(iterator, end)
            if item is end:
                return
            yield item

    def count(self) -> int:
        """Number of samples: the length of what the function returns, else by going through it."""
        made = self._call()
        if isinstance(made, Sized):
            return len(made)
        return sum(1 for _ in self.items())


def open_function(
    file: Path,
    function: str,
    *,
    inputs: Sequence[TensorSpec],
    preprocess: Mapping[str, Preprocess],
    labels: Sequence[str] | None,
) -> Dataset:
    """Open a function of the user's; it is called once for its first sample, and anew for each iteration.

    Args:
        file: The Python file, which is run.
        function: The function: no arguments, returns an iterable of samples, dicts or (inputs, label) pairs.
        inputs: The model's inputs.
        preprocess: Input name → how a pillow image becomes it.
        labels: The model's label names, for labels that are names.

    Raises:
        DataError: VLX0201 no such file, VLX0202 no sample, VLX0206 an image without preprocessing, VLX0208 an unknown
            label name, VLX0209 the file or the function fails, with file and line.
    """
    user = UserFunction(file, function)
    read = partial(_read_user, user, inputs, preprocess, labels)
    first = first_sample(read)
    if first is None:
        raise DataError("VLX0202", f"{user.name} yields no sample", where=user.name)
    return Dataset(
        kind="function",
        count=user.count,
        read=read,
        inputs=inputs,
        labelled=first.label is not None,
        labels=labels,
    )


def _read_user(
    user: UserFunction, inputs: Sequence[TensorSpec], preprocess: Mapping[str, Preprocess], labels: Sequence[str] | None
) -> Iterator[Sample | DataError]:
    specs = {spec.name: spec for spec in inputs}
    for i, item in enumerate(user.items()):
        sample_id = f"#{i}"
        sample = item if isinstance(item, Sample) else _sample_from_item(item, sample_id, inputs, user.name)
        try:
            arrays = {
                name: _user_array(value, name, specs.get(name), preprocess, sample.id)
                for name, value in sample.inputs.items()
            }
        except DataError as error:
            yield error
            continue
        yield replace(sample, inputs=arrays, label=as_label(sample.label, labels, sample.id))


def _sample_from_item(item: object, sample_id: str, inputs: Sequence[TensorSpec], where: str) -> Sample:
    names = [spec.name for spec in inputs]
    if isinstance(item, Mapping):
        values = dict(item)
        return Sample(sample_id, values, None if "label" in names else values.pop("label", None))
    if isinstance(item, tuple) and len(item) == 2:
        given, label = item
        if isinstance(given, Mapping):
            return Sample(sample_id, dict(given), label)
        if len(names) == 1:
            return Sample(sample_id, {names[0]: given}, label)
    raise DataError(
        "VLX0209",
        f"{where} yields a {type(item).__name__} as sample {sample_id}",
        where=where,
        hint="yield Sample objects, dicts {input: array, 'label': …} or pairs (inputs, label)",
    )


def _user_array(
    value: object, name: str, spec: TensorSpec | None, preprocess: Mapping[str, Preprocess], where: str
) -> Array:
    if not isinstance(value, Image.Image):
        return np.asarray(value)
    if name in preprocess:
        return image_array(value, where, preprocess[name])
    raise unknown_preprocess(spec or TensorSpec(name=name, dtype="float32", shape=()), where)
