"""run and ``vlexport.load``: a bundle as a function. No torch; one session a thread."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image

from vlexport.core.artifact import Array, DimRange, Session, TensorSpec
from vlexport.core.bundle import ARTIFACT_FOLDER, check_files, read_bundle
from vlexport.core.errors import BundleError, DataError, InputError, UsageError
from vlexport.core.photo_samples import UNREADABLE, open_photo
from vlexport.core.samples import ROW_FILES, open_data, require_data
from vlexport.stages.write_bundle import write_npz
from vlexport.targets import open_target


class LoadedBundle:
    """A bundle that is ready to run in this process, with its recorded session options and preprocessing.

    Not thread-safe: load once per thread. Use it as a context manager, or call :meth:`close`.

    Attributes:
        bundle: Its ``bundle.json``.
    """

    def __init__(self, folder: str | Path, *, threads: int = 0, isolated: bool = False) -> None:
        path = Path(folder)
        self.bundle = read_bundle(path)
        check_files(path, self.bundle)
        target = open_target(self.bundle.target)
        artifact = self.bundle.main.artifact
        opener = target.open if isolated else target.open_here
        self._session: Session = opener(path / ARTIFACT_FOLDER, artifact, threads=threads)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run on arrays by input name.

        Args:
            inputs: Name → array as the bundle's specs say, dim 0 is the batch. A dynamic dim takes the sizes that it
                was built for.

        Returns:
            Output name → array.

        Raises:
            InputError: VLX0507.
        """
        main = self.bundle.main
        if not isinstance(inputs, Mapping):
            names = [spec.name for spec in main.artifact.inputs]
            raise InputError(
                "VLX0507", f"inputs are arrays by name, not {type(inputs).__name__}", where=", ".join(names),
                hint=f"as run({{{names[0]!r}: array}})",
            )  # fmt: skip
        for spec in main.artifact.inputs:
            if spec.name in inputs:
                _require_built_for(spec, inputs[spec.name], main.dims)
        return self._session.run(inputs)

    def classify(self, image: str | Path | Image.Image, *, top: int = 5) -> list[tuple[str, float]]:
        """Labels and softmax probabilities of an image, the best first.

        Args:
            image: A file or an opened image.
            top: How many.

        Raises:
            DataError: VLX0203 when the file is no image, VLX0206 when the bundle records no preprocessing, VLX0208
                when its first output is no score per class.
        """
        first = self.bundle.main.artifact.outputs[0]
        if len(first.shape) != 2 or not first.dtype.startswith("float"):
            raise DataError(
                "VLX0208", f"output {first.name} is no score per class", where=first.name,
                hint="call run(prepare(image)) for the arrays",
            )  # fmt: skip
        scores = self.run(self.prepare(image))[first.name][0].astype(np.float64)
        return ranked(scores, self.bundle.main.labels, top=top)

    def prepare(self, image: str | Path | Image.Image) -> dict[str, Array]:
        """The model's input for an image, with batch dim, by the recorded preprocessing.

        Raises:
            DataError: VLX0203, VLX0206 as in :meth:`classify`.
        """
        main = self.bundle.main
        if len(main.preprocess) != 1 or len(main.artifact.needed_with(next(iter(main.preprocess)))) != 1:
            raise DataError(
                "VLX0206", "the bundle does not record how an image becomes its input",
                hint="save the model with preprocess=, or call run() with arrays",
            )  # fmt: skip
        name, preprocess = next(iter(main.preprocess.items()))
        if isinstance(image, Image.Image):
            pixels = preprocess.apply(image)
        elif not isinstance(image, str | os.PathLike):
            raise DataError(
                "VLX0203", f"an image is a path or a PIL image, not {type(image).__name__}", where=name,
                hint="PIL.Image.fromarray(array) makes one of a uint8 array in RGB",
            )  # fmt: skip
        else:
            try:
                with open_photo(image) as opened:
                    pixels = preprocess.apply(opened)
            except UNREADABLE as error:
                raise DataError("VLX0203", "the image cannot be read", where=str(image), hint=str(error)) from error
        return self.batched({name: pixels})

    def batched(self, sample: Mapping[str, Array]) -> dict[str, Array]:
        """One sample with batch dim, repeated where the artifact takes a fixed batch, or no batch of one."""
        main = self.bundle.main
        sizes = {spec.name: spec.shape[0] for spec in main.artifact.inputs if spec.shape}
        repeats = {name: size if isinstance(size, int) else main.dims[size].min for name, size in sizes.items()}
        return {name: np.repeat(value[None], repeats.get(name, 1), axis=0) for name, value in sample.items()}

    def close(self) -> None:
        """Free the runtime's memory."""
        self._session.close()

    def __enter__(self) -> LoadedBundle:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def load(folder: str | Path, *, threads: int = 0) -> LoadedBundle:
    """Open a bundle; see :class:`LoadedBundle`.

    Args:
        folder: The bundle.
        threads: Of the runtime; 0 means the bundle's, or all cores.

    Raises:
        UsageError: VLX0703 for threads that are no count.
        VlexportError: When the bundle is none, was altered, or does not run here.
    """
    if not isinstance(threads, int) or threads < 0:
        raise UsageError(
            "VLX0703", f"threads={threads!r} is no count", where="threads", hint="0 means the bundle's, or all cores"
        )
    return LoadedBundle(folder, threads=threads)


def _require_built_for(spec: TensorSpec, array: Array, dims: Mapping[str, DimRange]) -> None:
    """Refuse a size that a dynamic dim was not built for, and not checked at; the session refuses other faults.

    Raises:
        InputError: VLX0507.
    """
    try:
        shape = np.shape(array)
    except ValueError:  # nested lists of unlike lengths
        return
    for size, dim in zip(shape, spec.shape, strict=False):
        if isinstance(dim, int) or dim not in dims or size < 1 or len(shape) != len(spec.shape):
            continue
        least, most = dims[dim].min, dims[dim].max
        if size < least or (most is not None and size > most):
            taken = f"from {least} to {most}" if most is not None else f"of {least} and more"
            raise InputError(
                "VLX0507", f"{dim} is {size}, and the bundle takes sizes {taken}", where=spec.name,
                hint=f"build with --dynamic {dim}=MIN:OPT:MAX for others",
            )  # fmt: skip


def ranked(scores: Array, labels: tuple[str, ...], *, top: int) -> list[tuple[str, float]]:
    """The best classes with their softmax probabilities; a tie goes to the lower index."""
    shifted = np.exp(scores - scores.max())
    shares = shifted / shifted.sum()
    order = np.argsort(-shares, kind="stable")[:top]
    return [(labels[i] if i < len(labels) else str(i), float(shares[i])) for i in order]


def require_place(file: Path, *, data: str, force: bool) -> None:
    """Refuse a file that could not or should not be written, before anything is computed.

    Args:
        file: Where the outputs shall go.
        data: What is run on; it is never replaced.
        force: Another file that stands there is replaced.

    Raises:
        BundleError: VLX0604, VLX0607.
    """
    if file.is_dir():
        raise _unwritable(file, IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR)))
    if not file.absolute().parent.is_dir():
        raise _unwritable(file, FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)))
    if not os.path.lexists(file):
        return
    if os.path.exists(data) and os.path.exists(file) and os.path.samefile(data, file):
        raise BundleError(
            "VLX0604", "the output is the data that is run on", where=str(file), hint="choose another --output"
        )
    if not file.is_file():  # a device, a pipe or a link to nothing: a file would take its place
        raise BundleError("VLX0607", "the output is no plain file", where=str(file), hint="choose another --output")
    if not force:
        raise BundleError(
            "VLX0604", "the output exists already", where=str(file),
            hint="choose another --output, or replace it with --force",
        )  # fmt: skip


def write_outputs(file: Path, found: Sequence[tuple[str, Mapping[str, Array]]]) -> None:
    """All samples' outputs as one ``.npz``: output name → array with a leading dim of samples.

    Raises:
        BundleError: VLX0607 when the file cannot be written.
        InputError: VLX0507 when an output's shape differs between samples.
    """
    try:
        stacked = {name: np.stack([values[name] for _, values in found]) for name in found[0][1]}
    except ValueError as error:
        raise InputError(
            "VLX0507", "outputs of the samples differ in shape, so one array cannot hold them", where=str(file),
            hint="run the samples one by one",
        ) from error  # fmt: skip
    made = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        write_npz(made, stacked)
        made.replace(file)
    except OSError as error:
        raise _unwritable(file, error) from error
    finally:
        with suppress(OSError):  # where nothing can be written, nothing is left to be removed
            made.unlink()


def _unwritable(file: Path, error: OSError) -> BundleError:
    return BundleError(
        "VLX0607", f"the output cannot be written: {error.strerror}", where=str(file), hint="choose another --output"
    )


def run(folder: Path, data: str, *, threads: int = 0) -> list[tuple[str, dict[str, Array]]]:
    """Outputs for every sample of DATA, in order.

    Returns:
        ``(sample id, output name → array without batch dim)`` pairs.
    """
    photo = os.path.isfile(data) and Path(data).suffix.lower() not in (*ROW_FILES, ".py")
    if not photo:
        require_data(data)
    with LoadedBundle(folder, threads=threads, isolated=True) as loaded:
        main = loaded.bundle.main
        if photo:
            inputs = loaded.prepare(data)
            return [(Path(data).name, _first_rows(loaded.run(inputs), batch_of(inputs)))]
        dataset = open_data(data, inputs=main.artifact.inputs, preprocess=main.preprocess, labels=main.labels or None)
        found = []
        for each in dataset:
            inputs = loaded.batched(each.inputs)
            found.append((each.id, _first_rows(loaded.run(inputs), batch_of(inputs))))
        return found


def batch_of(inputs: Mapping[str, Array]) -> int:
    """Size of the batch: dim 0 of the first input."""
    first = next(iter(inputs.values()))
    return int(first.shape[0]) if first.ndim else 1


def _first_rows(outputs: Mapping[str, Array], batch: int) -> dict[str, Array]:
    """The first sample's part of each output; an output whose dim 0 is not the batch is kept whole."""
    return {n: v[0] if v.ndim and v.shape[0] == batch else v for n, v in outputs.items()}
