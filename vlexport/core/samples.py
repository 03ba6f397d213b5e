"""DATA: where samples come from, as one lazy, restartable, checked sequence.

======================  ==========================================================================================
DATA                    yields
======================  ==========================================================================================
folder of folders       photos, labelled: each folder is a class, its name is matched with the model's label names
folder or glob          photos, unlabelled
``FILE.npz``            rows of one array per input (leading N), and of ``label`` where there is one
``FILE.jsonl``          one JSON object a line: input name → photo below the file's folder, number or list; ``label``
``FILE.py:FUNCTION``    what the function returns: samples, dicts of arrays, or (inputs, label) pairs
======================  ==========================================================================================
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from vlexport.core.array_samples import open_npz
from vlexport.core.artifact import TensorSpec
from vlexport.core.dataset import Dataset, Label, Sample
from vlexport.core.errors import DataError
from vlexport.core.jsonl_samples import open_jsonl
from vlexport.core.photo_samples import open_folder, open_glob
from vlexport.core.preprocess import Preprocess
from vlexport.core.user_code import require_code_file
from vlexport.core.user_samples import open_function

__all__ = ["Dataset", "Label", "Sample", "open_data", "require_data"]

ROW_FILES = (".npz", ".jsonl")
"""Endings of files that hold many samples."""


def open_data(
    data: str,
    *,
    inputs: Sequence[TensorSpec],
    preprocess: Mapping[str, Preprocess],
    labels: Sequence[str] | None = None,
    skip_bad: bool = False,
) -> Dataset:
    """Open DATA of any kind. Photos are looked for, not opened; a function is called for its first sample.

    Args:
        data: A folder, a glob of photos, ``FILE.npz``, ``FILE.jsonl`` or ``FILE.py:FUNCTION``. The latter runs the
            user's code.
        inputs: The model's inputs; the first dim of a shape is the batch.
        preprocess: Input name → how a photo becomes that input.
        labels: The model's label names, in the order of its outputs.
        skip_bad: Leave out samples that cannot be read or hold NaN; they are listed in ``Dataset.skipped``.

    Raises:
        DataError: VLX0201 DATA does not exist or is of no known kind, VLX0202 it is empty, VLX0203 a file of rows
            cannot be read, VLX0205 its arrays do not fit, or the model takes more than a photo, VLX0206 photos without
            known preprocessing, VLX0208 a class folder is no label of the model, VLX0209 the function cannot be used.
    """
    dataset = _opened(data, inputs, preprocess, labels)
    dataset.skip_bad = skip_bad
    return dataset


def _opened(
    data: str, inputs: Sequence[TensorSpec], preprocess: Mapping[str, Preprocess], labels: Sequence[str] | None
) -> Dataset:
    path = Path(data)
    file, colon, function = data.rpartition(":")
    if os.path.isdir(data):  # unlike Path's, false for a name that no file system can hold
        return open_folder(data, path, inputs=inputs, preprocess=preprocess, labels=labels)
    if os.path.isfile(data) and path.suffix.lower() == ".npz":
        return open_npz(data, inputs=inputs, labels=labels)
    if os.path.isfile(data) and path.suffix.lower() == ".jsonl":
        return open_jsonl(data, path, inputs=inputs, preprocess=preprocess, labels=labels)
    if colon and file.endswith(".py"):
        return open_function(Path(file), function, inputs=inputs, preprocess=preprocess, labels=labels)
    if _is_glob(data):
        return open_glob(data, inputs=inputs, preprocess=preprocess)
    raise _unknown(data)


def require_data(data: str | None) -> None:
    """Refuse DATA that is not there, without opening it or running the user's code; None is none.

    Raises:
        DataError: VLX0201.
    """
    if data is None:
        return
    file, colon, function = data.rpartition(":")
    if os.path.isdir(data) or (os.path.isfile(data) and Path(data).suffix.lower() in ROW_FILES) or _is_glob(data):
        return
    if not colon or not file.endswith(".py"):
        raise _unknown(data)
    require_code_file(Path(file), function)


def _is_glob(data: str) -> bool:
    return not os.path.exists(data) and re.search(r"[*?[]", data) is not None


def _unknown(data: str) -> DataError:
    path = Path(data)
    known = "a folder of photos, a folder of class folders, a glob of photos, FILE.npz, FILE.jsonl or FILE.py:FUNCTION"
    if path.suffix == ".py":
        return DataError("VLX0201", f"'{data}' names no function", where=data, hint=f"write {data}:FUNCTION")
    what = "is of no known kind" if os.path.exists(data) else "does not exist"
    return DataError("VLX0201", f"'{data}' {what}", where=data, hint=f"DATA is {known}")
