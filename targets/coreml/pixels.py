"""Image inputs: a Program that takes pixel values becomes one whose first operators are the preprocessing's arithmetic.

Before → after, for every input with a known preprocessing::

    image (normalized) → …       →       image (0 to 255) → mul [1, C, 1, 1] → add [1, C, 1, 1] → …

A first convolution that does not pad takes both in, one that pads takes the factor (fold-preprocess).

Equation: (p·scale − mean) / std = p·(scale / std) + (−mean / std), its factors computed in float64 and rounded once.
Core ML's own image input has one scale for all channels, which cannot say this. Resizing and cropping stay outside.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from vlexport.core.artifact import TensorSpec
from vlexport.core.errors import CapabilityError, DataError
from vlexport.core.preprocess import Preprocess
from vlexport.ir.input_arithmetic import with_arithmetic
from vlexport.ir.program import Program
from vlexport.passes.fold_preprocess import FoldPreprocess


def affine_of(preprocess: Preprocess) -> tuple[np.ndarray, np.ndarray]:
    """(factor, offset) for every channel, float64 of shape (C,), in the order of ``preprocess.color``."""
    mean, std = (
        np.broadcast_to(np.array(v, np.float64), (preprocess.channels,)) for v in (preprocess.mean, preprocess.std)
    )
    return preprocess.scale / std, -mean / std


def steps_outside(preprocess: Preprocess) -> str:
    """Resizing and cropping, which an app does before it hands over an image: as in ``--preprocess``, or empty."""
    plain = preprocess.model_copy(update={"scale": 1.0, "mean": (0.0,), "std": (1.0,)}).to_spec()
    return ",".join(part for part in plain.split(",") if not part.startswith(("scale=", "color=")))


def require_images(specs: Mapping[str, TensorSpec], preprocess: Mapping[str, Preprocess]) -> None:
    """Check that inputs can be images.

    Raises:
        DataError: VLX0206 when no input has a known preprocessing.
        CapabilityError: VLX0503 for an input that is not N×C×H×W of as many channels as its preprocessing makes.
    """
    if not preprocess:
        raise DataError(
            "VLX0206", "an image input needs to know how a photo becomes the model's input",
            where="--set coreml.inputs=image", hint="give --preprocess, or leave coreml.inputs at tensor",
        )  # fmt: skip
    for name, how in preprocess.items():
        spec = specs[name]
        shown = "×".join(map(str, spec.shape))
        if len(spec.shape) != 4 or spec.shape[1] != how.channels or spec.dtype not in ("float32", "float16"):
            raise CapabilityError(
                "VLX0503", f"input {name} ({spec.dtype} {shown}) cannot be an image of {how.channels} channels",
                where=name, hint="leave coreml.inputs at tensor",
            )  # fmt: skip
        for have, want in zip(spec.shape[2:], how.output_shape[1:], strict=True):
            if isinstance(have, int) and isinstance(want, int) and have != want:
                raise CapabilityError(
                    "VLX0503", f"input {name} is {shown}, but its preprocessing makes images of "
                    f"{how.output_shape[1]}×{how.output_shape[2]}", where=name, hint="give --preprocess of that size",
                )  # fmt: skip


def with_pixels(program: Program, preprocess: Mapping[str, Preprocess]) -> Program:
    """A copy that takes pixel values 0 to 255 as floats for every input in ``preprocess``.

    What is exact of the arithmetic goes into the first convolution, unless its weight is stored in half precision.
    """
    changed = with_arithmetic(program, {name: affine_of(how) for name, how in preprocess.items()})
    FoldPreprocess().run(changed)
    return changed
