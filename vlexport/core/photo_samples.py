"""Samples from photos: a folder of class folders, a folder, or a glob."""

from __future__ import annotations

import contextlib
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from PIL import Image

from vlexport.core.artifact import Array, TensorSpec
from vlexport.core.dataset import Dataset, Label, Sample, label_index, misfit, unknown_preprocess
from vlexport.core.errors import DataError
from vlexport.core.preprocess import Preprocess

PHOTO_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""Endings, in lower case, of the files that count as photos. Hidden files never do."""

PHOTO_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""All that pillow is asked to open, whatever a file is called: its reader of EPS, for one, runs Ghostscript."""

UNREADABLE = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""What pillow raises on damaged files, a decompression bomb included: it promises no class of its own."""


def _photo_input(inputs: Sequence[TensorSpec], preprocess: Mapping[str, Preprocess], where: str) -> str:
    """Name of the one input that photos fill."""
    if len(inputs) != 1:
        names = ", ".join(spec.name for spec in inputs)
        raise misfit(
            f"photos fill one input, the model has {len(inputs)}: {names}",
            where,
            "give FILE.npz or FILE.py:FUNCTION with one array per input",
        )
    if inputs[0].name not in preprocess:
        raise unknown_preprocess(inputs[0], where)
    return inputs[0].name


def open_photo(file: str | Path) -> Image.Image:
    """``Image.open`` for :data:`PHOTO_FORMATS`; raises of :data:`UNREADABLE`."""
    return Image.open(file, formats=PHOTO_FORMATS)


def read_photo(file: Path, name: str, preprocess: Preprocess) -> Array:
    """A photo as the input that it fills, without batch dim.

    Args:
        file: Where it lies.
        name: What errors call it.
        preprocess: How it becomes the input.

    Raises:
        DataError: VLX0203 when it cannot be read; whatever the preprocessing refuses.
    """
    return _array(partial(open_photo, file), name, preprocess)


def image_array(image: Image.Image, name: str, preprocess: Preprocess) -> Array:
    """The same for an image that is open already, but perhaps not read yet."""
    return _array(lambda: contextlib.nullcontext(image), name, preprocess)


def _array(
    opened: Callable[[], contextlib.AbstractContextManager[Image.Image]], name: str, preprocess: Preprocess
) -> Array:
    try:
        with opened() as image:
            image.load()
            return preprocess.apply(image)
    except DataError as error:
        raise DataError(error.code, f"{name}: {error.message}", where=name, hint=error.hint) from error
    except UNREADABLE as error:
        # Pillow's message may hold the absolute path: only its kind is shown.
        said = "is no photo that can be read" if isinstance(error, OSError) else "is a damaged photo"
        if isinstance(error, Image.DecompressionBombError):
            said = "is a decompression bomb: it unpacks to more pixels than pillow allows"
        raise DataError(
            "VLX0203", f"{name} {said} ({type(error).__name__})", where=name, hint="remove it or save it again"
        ) from error


def _below(root: Path, folder: Path) -> Iterator[Path]:
    """All photos below a folder, links to folders refused: they could lead out, or round in circles.

    Raises:
        DataError: VLX0201 on a link to a folder, VLX0203 when a folder cannot be read.
    """
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        where = folder.relative_to(root).as_posix()
        raise DataError("VLX0203", f"folder {where} cannot be read ({type(error).__name__})", where=where) from error
    for entry in entries:
        if entry.name.startswith("."):
            continue
        file = Path(entry.path)
        if entry.is_dir(follow_symlinks=False):
            yield from _below(root, file)
        elif entry.is_symlink() and file.is_dir():
            raise _linked(root, file)
        elif file.suffix.lower() in PHOTO_SUFFIXES and (entry.is_file() or entry.is_symlink()):
            yield file


def _linked(root: Path, folder: Path) -> DataError:
    return DataError(
        "VLX0201",
        f"folder {folder.relative_to(root).as_posix()} is a link, and links to folders are not followed",
        where=folder.relative_to(root).as_posix(),
        hint="copy the folder, or leave the link out",
    )


def open_folder(
    data: str,
    root: Path,
    *,
    inputs: Sequence[TensorSpec],
    preprocess: Mapping[str, Preprocess],
    labels: Sequence[str] | None,
) -> Dataset:
    """Open a folder of photos, or of class folders of photos at any depth.

    Args:
        data: The folder as the user wrote it.
        root: The same, as a path.
        inputs: The model's one input.
        preprocess: Input name → how a photo becomes it.
        labels: The model's label names, to match class folders with.

    Raises:
        DataError: VLX0201 a link to a folder, or photos beside class folders; VLX0202 no photo; VLX0205 several inputs;
            VLX0206 no preprocessing; VLX0208 a class folder is no label.
    """
    found = [(file, file.relative_to(root).as_posix()) for file in _below(root, root)]
    if not found:
        raise DataError(
            "VLX0202", f"'{data}' holds no photo", where=data, hint="photos end in " + ", ".join(PHOTO_SUFFIXES)
        )
    files = {name: file for file, name in sorted(found, key=lambda pair: pair[1])}
    folders = sorted({name.split("/")[0] for name in files if "/" in name})
    loose = next((name for name in files if "/" not in name), None)
    if folders and loose is not None:
        raise DataError(
            "VLX0201",
            f"'{data}' holds class folders ({folders[0]}, …) and photos beside them ({loose}, …)",
            where=data,
            hint=f'move one of them away, or give "{data.rstrip("/")}/*" for the photos alone',
        )
    name = _photo_input(inputs, preprocess, data)
    index = {folder: _folder_label(folder, folders, labels) for folder in folders}
    read = partial(_read_photos, files, name, preprocess[name], index)
    return Dataset(
        kind="class-folders" if folders else "photos",
        count=lambda: len(files),
        read=read,
        read_kept=read,
        inputs=inputs,
        labelled=bool(folders),
        labels=labels,
        classes=tuple(folders),
    )


def _read_photos(
    files: Mapping[str, Path],
    name: str,
    preprocess: Preprocess,
    index: Mapping[str, int],
    keep: Callable[[str], bool] = lambda _: True,
) -> Iterator[Sample | DataError]:
    for sample_id, file in files.items():
        if not keep(sample_id):
            continue
        yield _photo_sample(sample_id, file, name, preprocess, index.get(sample_id.split("/")[0]))


def _photo_sample(sample_id: str, file: Path, name: str, preprocess: Preprocess, label: Label) -> Sample | DataError:
    try:
        return Sample(sample_id, {name: read_photo(file, sample_id, preprocess)}, label)
    except DataError as error:
        return error


def _folder_label(folder: str, folders: Sequence[str], labels: Sequence[str] | None) -> int:
    if labels:
        return label_index(folder, labels, where=f"class folder {folder}")
    if all(name.isascii() and name.isdecimal() for name in folders):
        return int(folder)
    raise DataError(
        "VLX0208",
        f"class folders have names ({folder}, …), the model has no label names to match them with",
        where=folder,
        hint="save the model with labels=[…] in the order of its outputs, or name the folders 0, 1, 2, …",
    )


def open_glob(data: str, *, inputs: Sequence[TensorSpec], preprocess: Mapping[str, Preprocess]) -> Dataset:
    """Open the photos that a glob matches (``**`` for folders at any depth); ids start at its first wildcard.

    Args:
        data: The glob.
        inputs: The model's one input.
        preprocess: Input name → how a photo becomes it.

    Raises:
        DataError: VLX0201 a match lies behind a link to a folder, VLX0202 no photo matches, VLX0205 several inputs,
            VLX0206 no preprocessing.
    """
    parts = Path(data).parts
    fixed = next(i for i, part in enumerate(parts) if re.search(r"[*?[]", part))
    root = Path(*parts[:fixed]) if fixed else Path()
    files = {}
    # pathlib's `**`, unlike glob's, does not go through links.
    for match in root.glob(str(Path(*parts[fixed:]))):
        between = [p for p in match.relative_to(root).parents if p != Path()]
        link = next((root / p for p in reversed(between) if (root / p).is_symlink()), None)
        if link is not None:
            raise _linked(root, link)
        hidden = any(part.startswith(".") for part in match.relative_to(root).parts)
        if match.suffix.lower() in PHOTO_SUFFIXES and not match.is_dir() and not hidden:
            files[match.relative_to(root).as_posix()] = match
    if not files:
        raise DataError("VLX0202", f"'{data}' matches no photo", where=data, hint="quote it, and check its folder")
    name = _photo_input(inputs, preprocess, data)
    return Dataset(
        kind="photos",
        count=lambda: len(files),
        read=partial(_read_photos, dict(sorted(files.items())), name, preprocess[name], {}),
        inputs=inputs,
        labelled=False,
        labels=None,
    )
