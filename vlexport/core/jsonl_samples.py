"""Samples from a ``.jsonl`` file: one JSON object a line, with one entry per input and ``label`` where there is one.

An entry that is text names a photo, relative to the file and never outside of its folder; numbers and lists are arrays.
Other entries are ignored. A sample's id is ``FILE:LINE``, so that every error names both.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vlexport.core.artifact import Array, TensorSpec
from vlexport.core.dataset import Dataset, Label, Sample, as_label, misfit, unknown_preprocess
from vlexport.core.errors import DataError, nearest
from vlexport.core.photo_samples import read_photo
from vlexport.core.preprocess import Preprocess

Row = dict[str, Any]


def open_jsonl(
    data: str,
    path: Path,
    *,
    inputs: Sequence[TensorSpec],
    preprocess: Mapping[str, Preprocess],
    labels: Sequence[str] | None,
) -> Dataset:
    """Open a ``.jsonl`` file. It is read line by line, anew at each iteration.

    Args:
        data: The file as the user wrote it.
        path: The same, as a path.
        inputs: The model's inputs.
        preprocess: Input name → how a photo becomes that input.
        labels: The model's label names, for labels that are names.

    Raises:
        DataError: VLX0202 no rows, VLX0203 the file cannot be read, or every line is damaged.
    """
    try:
        rows = sum(1 for _ in _lines(path))
    except OSError as error:
        raise DataError("VLX0203", f"'{data}' cannot be read ({type(error).__name__})", where=data) from error
    if not rows:
        raise DataError("VLX0202", f"'{data}' holds no row", where=data, hint="one JSON object a line")
    first, problem = None, None
    for where, text in _lines(path):
        row = _row(text, where)
        if isinstance(row, dict):
            first = row
            break
        problem = problem or row
    if first is None:
        raise problem or DataError("VLX0202", f"'{data}' holds no row", where=data)
    keeps_label = all(spec.name != "label" for spec in inputs)
    return Dataset(
        kind="jsonl",
        count=lambda: rows,
        read=partial(_read_rows, path, tuple(inputs), preprocess, labels, keeps_label),
        inputs=inputs,
        labelled=keeps_label and first.get("label") is not None,
        labels=labels,
    )


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """(file and line, text) of every line that is not blank."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if text.strip():
                yield f"{path.name}:{number}", text


def _row(text: bytes, where: str) -> Row | DataError:
    problem = "is no JSON object"
    try:
        row = json.loads(text.decode())
        if isinstance(row, dict):
            return row
    except UnicodeDecodeError:
        problem = "is no UTF-8 text"
    except (ValueError, RecursionError) as error:
        problem = f"is no JSON: {error}"
    hint = 'write one object a line, as {"image": "a.jpg", "label": "cat"}'
    return DataError("VLX0203", f"{where} {problem}", where=where, hint=hint)


def _read_rows(
    path: Path,
    inputs: Sequence[TensorSpec],
    preprocess: Mapping[str, Preprocess],
    labels: Sequence[str] | None,
    keeps_label: bool,
) -> Iterator[Sample | DataError]:
    for where, text in _lines(path):
        row = _row(text, where)
        if isinstance(row, DataError):
            yield row
            continue
        try:
            arrays = {spec.name: _value(row, spec, preprocess, path.parent, where) for spec in inputs}
        except DataError as error:
            yield error
            continue
        yield Sample(where, arrays, _label(row.get("label"), labels, where) if keeps_label else None)


def _label(value: Any, labels: Sequence[str] | None, where: str) -> Label:
    try:
        return as_label(value, labels, where)
    except ValueError as error:  # a ragged list
        raise DataError("VLX0208", f"{where}: the label is no array: {error}", where=where) from error


def _value(row: Row, spec: TensorSpec, preprocess: Mapping[str, Preprocess], folder: Path, where: str) -> Array:
    name = spec.name
    if name not in row:
        raise misfit(f"no entry for input '{name}'{nearest(name, row)} (entries: {', '.join(row) or 'none'})", where)
    value = row[name]
    if not isinstance(value, str):
        return _numbers(value, spec, where)
    if name not in preprocess:
        raise unknown_preprocess(spec, where)
    shown = f"{where} ({value})"
    try:
        return read_photo(_inside(folder, value, where), shown, preprocess[name])
    except DataError as error:
        raise DataError(error.code, error.message, where=where, hint=error.hint) from error


def _inside(folder: Path, written: str, where: str) -> Path:
    """A photo below the folder, links followed.

    Raises:
        DataError: VLX0201 when it leads out of the folder.
    """
    root = folder.resolve()
    try:
        place = (root / written).resolve()
    except (OSError, ValueError, RuntimeError) as error:  # a loop of links, a zero byte
        raise DataError("VLX0203", f"{where}: {written!r} is no path ({type(error).__name__})", where=where) from error
    if Path(written).is_absolute() or not place.is_relative_to(root):
        raise DataError(
            "VLX0201",
            f"{where}: {written} leaves the folder that the file lies in",
            where=where,
            hint="put the photos below the .jsonl file, and name them relative to it",
        )
    return place


def _numbers(value: Any, spec: TensorSpec, where: str) -> Array:
    """A number or nested list as an array of the input's dtype; nothing is rounded on the way to an integer."""
    wanted = np.dtype(spec.dtype)
    try:
        raw = np.asarray(value)
    except ValueError as error:
        raise misfit(f"input '{spec.name}': the lists are ragged", where) from error
    if raw.size == 0 and raw.ndim:
        raw = raw.astype(wanted)
    kinds = {"f": "iuf", "i": "iu", "u": "iu", "b": "b"}.get(wanted.kind, "")
    if raw.dtype.kind not in kinds:
        given = "text or null" if raw.dtype.kind in "OUS" else str(raw.dtype)
        raise misfit(f"input '{spec.name}': {given} is given, {spec.dtype} is wanted", where)
    with np.errstate(over="ignore"):
        array = raw.astype(wanted)
    if wanted.kind in "iu" and not np.array_equal(raw, array):
        raise misfit(f"input '{spec.name}': a value does not fit {spec.dtype}", where)
    return array
