"""Artifact and Session: what a target makes, and what runs it. No torch.

A :class:`Session` is opened from an :class:`Artifact` alone, on a machine that may never have seen the model.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from vlexport.core.errors import InputError, nearest

if TYPE_CHECKING:
    from typing_extensions import Self

Array = npt.NDArray[Any]
Timing = Literal["real", "emulated", "none"]
ONLY_COMPONENT = "main"
"""Name of a component that has no others beside it."""


class Frozen(BaseModel):
    """Base of all typed data that passes between stages: immutable, unknown keys refused."""

    # Strict JSON has no infinity: a perfect SQNR is written as the string "Infinity" and read back as a float.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class TensorSpec(Frozen):
    """One input or output: its public name, dtype and shape.

    Attributes:
        name: The argument of ``forward``, or the key of the output.
        dtype: A numpy dtype name (``float32``, ``int64``, ``bool``).
        shape: Integers for fixed dims, names for dynamic ones.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def problem(self, array: Array) -> str:
        """Why ``array`` does not fit, or an empty string. Named dims accept any size ≥ 1."""
        if array.dtype != np.dtype(self.dtype):
            return f"dtype is {array.dtype}, {self.dtype} is wanted"
        shown = "×".join(str(d) for d in self.shape)
        if array.ndim != len(self.shape):
            return f"shape is {'×'.join(map(str, array.shape)) or 'scalar'}, {shown} is wanted"
        for have, want in zip(array.shape, self.shape, strict=True):
            if (isinstance(want, int) and have != want) or have < 1:
                return f"shape is {'×'.join(map(str, array.shape))}, {shown} is wanted"
        return ""


class DimRange(Frozen):
    """The sizes a named dynamic dim may take.

    Attributes:
        min: Smallest size, inclusive.
        max: Largest size, inclusive; ``None`` means unbounded.
        opt: The size that the artifact is tuned and measured for.
    """

    min: int = 1
    max: int | None = None
    opt: int = 1


class Signature(Frozen):
    """The public face of a graph: what goes in, what comes out, which dims are dynamic.

    Attributes:
        inputs: In the order of ``forward``'s arguments.
        outputs: In the order of the returned structure, flattened.
        dims: Every dynamic dim named in a shape of ``inputs``.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    dims: dict[str, DimRange] = Field(default_factory=dict)


class Artifact(Frozen):
    """A lowered model on disk and all that is needed to open it.

    Attributes:
        target: Id of the target that made it (``onnxruntime``).
        path: Its main file, relative to the folder it lies in.
        inputs: Specs of the inputs, in ``forward``'s order.
        outputs: Specs of the outputs.
        session_options: Options recorded for opening it (threads, optimisation level).
        facts: What only lowering finds out and the user should know: what lies beside the main file, for which
            devices it is, and why something is missing.
    """

    target: str
    path: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    session_options: dict[str, str | int | float | bool] = Field(default_factory=dict)
    facts: dict[str, str] = Field(default_factory=dict)

    def batch(self, dims: Mapping[str, DimRange]) -> int:
        """Samples of a run: the first size of the first input, at its opt where it is dynamic."""
        first = next((spec.shape[0] for spec in self.inputs if spec.shape), 1)
        return dims[first].opt if isinstance(first, str) else first

    def needed_with(self, name: str) -> tuple[str, ...]:
        """Names of the inputs that a run on input ``name`` needs, itself among them."""
        return tuple(spec.name for spec in self.inputs)


class Session(abc.ABC):
    """A loaded artifact. Options are fixed at open; not thread-safe: open one session per thread.

    ``timing`` says whether a time measured on it means anything: ``real``, ``emulated`` (right numbers, wrong
    speed) or ``none``. Profiling and every search refuse a session whose timing is not real.
    """

    timing: Timing = "none"

    def __init__(self, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> None:
        self.inputs = inputs
        self.outputs = outputs

    @abc.abstractmethod
    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run once. Arrays are keyed by spec name.

        Raises:
            InputError: VLX0507 when an input is missing, unknown or does not fit its spec.
        """

    def operator_times(self, inputs: Mapping[str, Array], *, runs: int) -> dict[str, tuple[int, float]]:
        """Operator → how often it runs, and milliseconds of all of them together, both a run of the model.

        By the runtime's own profiler, in a session of its own, whose measuring costs time: it ranks operators, and its
        sum is no latency. Empty where the runtime does not tell.

        Args:
            inputs: As for :meth:`run`.
            runs: How many runs are averaged.
        """
        return {}

    def checked(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """``inputs`` as arrays that fit the specs, for :meth:`run` to begin with.

        Raises:
            InputError: VLX0507 when an input is missing, unknown or does not fit its spec.
        """
        return fitted(self.inputs, inputs)

    @abc.abstractmethod
    def close(self) -> None:
        """Free the runtime's memory; calling it twice is harmless."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def fitted(specs: Sequence[TensorSpec], inputs: Mapping[str, Array], *, known: Sequence[str] = ()) -> dict[str, Array]:
    """``inputs`` as arrays that fit the specs.

    Args:
        specs: What is wanted.
        inputs: Name → array.
        known: Names to choose the nearest from for one that is not wanted; by default those of the specs.

    Raises:
        InputError: VLX0507 when an input is missing, unknown or does not fit its spec.
    """
    wanted = {spec.name: spec for spec in specs}
    arrays = {name: np.asarray(value) for name, value in inputs.items()}
    for name in arrays:
        if name not in wanted:
            raise InputError("VLX0507", f"no input '{name}'{nearest(name, known or wanted)}", where=name)
    for name, spec in wanted.items():
        problem = spec.problem(arrays[name]) if name in arrays else "it is missing"
        if problem:
            raise InputError("VLX0507", f"input {name}: {problem}", where=name)
    sizes: dict[str, tuple[int, str]] = {}
    for name, spec in wanted.items():
        for size, dim in zip(arrays[name].shape, spec.shape, strict=True):
            first, other = sizes.setdefault(str(dim), (size, name))
            if isinstance(dim, str) and size != first:
                raise InputError("VLX0507", f"{dim} is {size} in input {name}, but {first} in {other}", where=name)
    return arrays


def artifact_file(folder: Path, artifact: Artifact) -> Path:
    """The artifact's main file inside ``folder``."""
    return folder / artifact.path
