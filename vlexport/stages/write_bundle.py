"""Writing a bundle: into a temporary sibling, flushed to disk, renamed in one step. Nothing is seen half-written."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from vlexport.core.artifact import Array
from vlexport.core.bundle import BUNDLE_FILE, COMPARE_FILE, GOLDEN_FOLDER, RECIPE_FILE, bundle_text, recorded_files
from vlexport.core.bundle_schema import Bundle, Golden, digest_of
from vlexport.core.config import BuildConfig
from vlexport.core.errors import BundleError
from vlexport.stages.replace_folder import replace_folder, working_sibling

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
"""What the system says when a disk is full, a quota or a file's largest size is reached, or the disk is broken."""

GOLDEN_TOLERANCE = 1e-4
"""Bound of max|a−b| / max|b| between artifact and source Program, fp32: other kernels sum in another order."""

TIPPING_SLACK = 2.0
"""Rows whose choices or integers hang on the last digits are held to so many times what the program itself moved by."""
TIPPING_LARGEST = 0.5
"""And to no more than this: outputs that far off prove nothing."""

_HALF_TOLERANCE = {"fp16": 2e-2, "bf16": 1e-1, "int8": 1e-1, "fp8": 1e-1}
"""The same for artifacts in a half type: a unit in the last place is 1e-3 (fp16) and 8e-3 (bf16) of a value, and a deep
net loses a few bits more; the signal to noise ratio is what the pass was judged by. int8 is held to the Program in
integers: where a kernel rounds another way at a tie, a value is off by a step of 1/255 of its range."""


def golden_tolerance(precision: str) -> float:
    """Bound of ``max|a−b| / max|b|`` between an artifact of this precision and the source Program, which is fp32."""
    return _HALF_TOLERANCE.get(precision, GOLDEN_TOLERANCE)


def model_name_of(config: BuildConfig) -> str:
    """The model's file name without its ending."""
    return Path(os.path.abspath(config.model)).stem


def output_of(config: BuildConfig) -> Path:
    """The bundle's folder: ``-o``, or the model's name with ``.bundle``."""
    return Path(config.output or f"{model_name_of(config)}.bundle")


def require_free(output: Path, *, force: bool, several: bool = False) -> None:
    """Refuse an output that exists, before any work is done.

    Args:
        output: Where a bundle, or the folder of several targets' bundles, would be written.
        force: Replace what stands there, if that is of the same kind, or a single bundle.
        several: Bundles of several targets would be written.

    Raises:
        BundleError: VLX0604, also with ``force`` when what stands there is no bundle, or holds the bundles of several
            targets and only one would be written; VLX0607 when the folder above
            does not exist or cannot be written, or the name is impossible.
    """
    try:
        os.lstat(output)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise BundleError(
            "VLX0607", f"the output cannot have this name: {why}", where=str(output), hint="choose another -o"
        ) from error
    if output.exists() or output.is_symlink():
        empty = output.is_dir() and not any(output.iterdir())
        ours = empty or _is_ours(output / BUNDLE_FILE) or (output / COMPARE_FILE).is_file()
        if not force:
            more = ", or replace it with --force" if ours else "; it is no bundle, so --force would not replace it"
            raise BundleError(
                "VLX0604", "the output exists already", where=str(output), hint=f"choose another -o{more}"
            )
        if not ours:
            raise BundleError(
                "VLX0604",
                "the output exists and is no bundle, so --force does not replace it",
                where=str(output),
                hint="choose another -o",
            )
        beside = sorted(file.parent.name for file in output.glob(f"*/{BUNDLE_FILE}"))
        if not several and (output / COMPARE_FILE).is_file() and beside:
            raise BundleError(
                "VLX0604",
                f"the output holds bundles of {', '.join(beside)}, and --force would replace them all by one",
                where=str(output),
                hint=f"name one of them, as -o {output / beside[0]}, or all: --target {','.join(beside)}; "
                "or remove the folder first",
            )
    if not output.absolute().parent.is_dir():
        raise BundleError(
            "VLX0607", "the folder above the output does not exist", where=str(output.parent), hint="create it first"
        )
    if not os.access(output.absolute().parent, os.W_OK):
        raise BundleError(
            "VLX0607",
            "the folder above the output cannot be written",
            where=str(output.parent),
            hint="choose another -o",
        )


def require_folder(dump: str | None) -> None:
    """Refuse a place for dumps, or one above it, that is a file.

    Raises:
        BundleError: VLX0607.
    """
    if dump is None:
        return
    path = Path(dump).absolute()
    found = next(p for p in (path, *path.parents) if os.path.lexists(p))
    if not found.is_dir():
        raise BundleError("VLX0607", "--dump names a folder, this is a file", where=dump, hint="choose another --dump")


def _is_ours(file: Path) -> bool:
    """Whether a ``bundle.json`` says that vlexport wrote it, damaged or not: other tools write files of that name."""
    try:
        return b'"vlexport"' in file.read_bytes()
    except OSError:
        return False


@contextlib.contextmanager
def staging(output: Path, *, force: bool = False, several: bool = False) -> Iterator[Path]:
    """A temporary sibling of ``output`` that takes its place when the block ends well, and vanishes otherwise.

    What came to stand there meanwhile is judged again, as :func:`require_free` does.

    Raises:
        BundleError: VLX0604, VLX0607.
    """
    output = output.absolute()
    with contextlib.ExitStack() as held:
        try:
            folder = held.enter_context(working_sibling(output))
        except OSError as error:
            raise BundleError(
                "VLX0607", f"the output cannot be written: {error.strerror}", where=str(output)
            ) from error  # fmt: skip
        try:
            yield folder
            _flush(folder)
            _readable(folder)
            require_free(output, force=force, several=several)
            replace_folder(folder, output)
        except BaseException as error:
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, OSError) and error.errno in _NO_ROOM:
                raise BundleError(
                    "VLX0607", f"the output cannot be written: {error.strerror}", where=str(output),
                    hint="make room there and in the folder for temporary files, or choose another -o",
                ) from error  # fmt: skip
            raise


def write_golden(
    folder: Path,
    component: str,
    inputs: Mapping[str, Array],
    outputs: Mapping[str, Array],
    *,
    suffix: str = "",
    tolerance: float = GOLDEN_TOLERANCE,
    tipping: tuple[int, ...] = (),
    moved: float = 0.0,
) -> Golden:
    """Golden vectors of a component as two ``.npz`` files, ``inputs{suffix}.npz`` and ``outputs{suffix}.npz``.

    Args:
        folder: Of the bundle.
        component: Folder below ``golden/``.
        inputs: By name.
        outputs: By name.
        suffix: Of the files' names.
        tolerance: What an artifact may differ by, as ``max|a−b| / max|b|``.
        tipping: Rows whose choices or integers hang on the last digits.
        moved: By how much the outputs of these moved, in the same unit.
    """
    (folder / GOLDEN_FOLDER / component).mkdir(parents=True, exist_ok=True)
    names = [f"{GOLDEN_FOLDER}/{component}/{kind}{suffix}.npz" for kind in ("inputs", "outputs")]
    for name, arrays in zip(names, (inputs, outputs), strict=True):
        write_npz(folder / name, arrays)
    if not tipping:
        return Golden(inputs=names[0], outputs=names[1], tolerance=tolerance)
    allowed = min(max(two_digits_up(TIPPING_SLACK * moved), tolerance), TIPPING_LARGEST)
    return Golden(
        inputs=names[0], outputs=names[1], tolerance=tolerance, tipping=tipping, tipping_tolerance=allowed
    )  # fmt: skip


def two_digits_up(value: float) -> float:
    """Rounded up to two significant digits, so that bundles are equal from machine to machine."""
    if value <= 0.0 or not math.isfinite(value):
        return value
    step = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.ceil(value / step - 1e-9) * step:.1e}")


def write_npz(file: Path, arrays: Mapping[str, Array]) -> None:
    """``numpy.savez`` for names of any spelling (it takes ``file`` and ``allow_pickle`` for its own); same bytes."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)  # type: ignore[no-untyped-call]


def write_bundle(folder: Path, bundle: Bundle, recipe: str) -> Bundle:
    """Write the recipe and ``bundle.json``, with the hashes of everything recorded and the digest."""
    (folder / RECIPE_FILE).write_text(recipe, encoding="utf-8", newline="\n")
    bundle = bundle.model_copy(update={"files": dict(recorded_files(folder))})
    bundle = bundle.model_copy(update={"digest": digest_of(bundle)})
    (folder / BUNDLE_FILE).write_text(bundle_text(bundle), encoding="utf-8", newline="\n")
    return bundle


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def _readable(folder: Path) -> None:
    """``mkdtemp`` makes 0700; a bundle gets what the umask allows."""
    umask = os.umask(0)
    os.umask(umask)
    folder.chmod(0o777 & ~umask)
