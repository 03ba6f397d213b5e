"""Reading a saved package: features, operators and constants of its program. No torch, no prediction.

On Linux nothing runs a Core ML program; what can be known of one is read off the package itself.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlexport.core.artifact import Array
from vlexport.core.errors import CapabilityError
from vlexport.targets.coreml import compat

_NUMPY = {
    "FLOAT16": np.float16, "FLOAT32": np.float32, "FLOAT64": np.float64, "INT8": np.int8, "UINT8": np.uint8,
    "INT16": np.int16, "UINT16": np.uint16, "INT32": np.int32, "UINT32": np.uint32, "INT64": np.int64,
    "UINT64": np.uint64,
}  # fmt: skip
"""Types of MIL that numpy has; a weight of another (4 bits) counts a byte an element."""


@dataclass(frozen=True)
class Feature:
    """An input or output as an app sees it.

    Attributes:
        name: In the generated class.
        kind: ``array``, ``image``, ``string`` or ``dictionary``.
        dtype: ``FLOAT32`` … of an array, ``RGB`` … of an image.
        shape: Default sizes; empty where they depend on the input. (height, width) of an image.
        sizes: For every dim what it may be: one size, several, or (low, high) with ``ranged``. Empty when all are
            fixed.
        ranged: ``sizes`` are ranges.
    """

    name: str
    kind: str
    dtype: str = ""
    shape: tuple[int, ...] = ()
    sizes: tuple[tuple[int, ...], ...] = ()
    ranged: bool = False


@dataclass(frozen=True)
class Operation:
    """One operator of the program.

    Attributes:
        type: Its name in MIL (``softmax``).
        inputs: Parameter → names of the values bound to it.
        outputs: Names of its values.
        dtypes: Their types (``FLOAT16``), empty for strings and dictionaries' containers.
    """

    type: str
    inputs: dict[str, tuple[str, ...]]
    outputs: tuple[str, ...]
    dtypes: tuple[str, ...]


@dataclass(frozen=True)
class MilSummary:
    """What a saved package holds.

    Attributes:
        inputs: Features in order.
        outputs: Features in order.
        opset: Op set of the program (``CoreML7``).
        operations: All but constants, in order.
        constants: Name → value of every constant that lies in the program itself; weights lie beside it. One that is
            unpacked on load has ``NAME.quantized_data`` and the like.
        weight_bytes: Type → bytes of the weights beside the program.
        predicted: Names of the class label and of the probabilities of a classifier, else empty.
        metadata: What the package says of itself.
    """

    inputs: tuple[Feature, ...]
    outputs: tuple[Feature, ...]
    opset: str
    operations: tuple[Operation, ...]
    constants: dict[str, Array]
    weight_bytes: dict[str, int]
    predicted: tuple[str, ...]
    metadata: dict[str, str]

    def histogram(self) -> dict[str, int]:
        """Operator → how often, constants left out."""
        return dict(sorted(Counter(op.type for op in self.operations).items()))

    def maker(self, value: str) -> Operation | None:
        """The operation that computes a value; None for inputs and constants."""
        return next((op for op in self.operations if value in op.outputs), None)

    def readers(self, value: str) -> list[Operation]:
        """Operations that read a value."""
        return [op for op in self.operations if any(value in names for names in op.inputs.values())]

    def before_classify(self) -> str:
        """The operator whose result is classified, casts aside; empty when nothing is."""
        last = next((op for op in self.operations if op.type == "classify"), None)
        while last is not None and last.type in ("classify", "cast"):
            last = self.maker(last.inputs["probabilities" if last.type == "classify" else "x"][0])
        return last.type if last is not None else ""

    def affine_at(self, name: str) -> list[tuple[str, Array]]:
        """(operator, constant) of every ``mul`` and ``add`` that an input goes through first, casts aside."""
        found: list[tuple[str, Array]] = []
        value = name
        while len(readers := self.readers(value)) == 1:
            reader = readers[0]
            others = [n for key in ("x", "y") for n in reader.inputs.get(key, ()) if n != value]
            if reader.type in ("mul", "add") and len(others) == 1 and others[0] in self.constants:
                found.append((reader.type, self.constants[others[0]]))
            elif reader.type != "cast":
                break
            value = reader.outputs[0]
        return found


def read_package(path: Path) -> MilSummary:
    """Load a package through coremltools and read it.

    Raises:
        CapabilityError: VLX0505 when coremltools does not take it, VLX0501 when coremltools is not installed.
    """
    try:
        spec = compat.load_spec(path)
    except ImportError as error:
        raise CapabilityError(
            "VLX0501", "coremltools is not installed", hint="pip install 'vlexport[build,coreml]'"
        ) from error
    except ValueError as error:
        raise CapabilityError(
            "VLX0505", f"coremltools does not load the package: {error}", where=path.name,
            hint="it is damaged, or of another version of coremltools",
        ) from error  # fmt: skip
    return summary_of(spec)


def summary_of(spec: Any) -> MilSummary:
    """Read a specification that was loaded already."""
    function = spec.mlProgram.functions["main"]
    block = function.block_specializations[function.opset]
    operations, constants, weights = [], {}, Counter[str]()
    for op in _all_operations(block):
        if op.type != "const":
            operations.append(_operation(op))
        for name, value in _stored(op):
            dtype = compat.data_type_name(value.type.tensorType.dataType)
            shape = tuple(dim.constant.size for dim in value.type.tensorType.dimensions)
            if value.HasField("blobFileValue"):
                weights[dtype] += math.prod(shape) * np.dtype(_NUMPY.get(dtype, np.uint8)).itemsize
            elif value.immediateValue.HasField("tensor"):
                constants[name] = _immediate(value.immediateValue.tensor, dtype, shape)
    described = spec.description
    predicted = (described.predictedFeatureName, described.predictedProbabilitiesName)
    about = described.metadata
    plain = {"author": about.author, "license": about.license, "version": about.versionString,
             "description": about.shortDescription}  # fmt: skip
    return MilSummary(
        inputs=tuple(map(_feature, described.input)),
        outputs=tuple(map(_feature, described.output)),
        opset=str(function.opset),
        operations=tuple(operations),
        constants=constants,
        weight_bytes=dict(sorted(weights.items())),
        predicted=predicted if all(predicted) else (),
        metadata={**{k: v for k, v in plain.items() if v}, **dict(sorted(about.userDefined.items()))},
    )


def _stored(op: Any) -> Iterator[tuple[str, Any]]:
    """What an operation holds of itself: a constant's value; of one that is unpacked on load, its parameters."""
    if op.type == "const":
        yield op.outputs[0].name, op.attributes["val"]
    elif op.type.startswith("constexpr_"):
        for parameter, value in sorted(op.attributes.items()):  # up to iOS 17
            if parameter != "name":
                yield f"{op.outputs[0].name}.{parameter}", value
        for parameter, bound in sorted(op.inputs.items()):
            for argument in bound.arguments:
                if argument.HasField("value"):
                    yield f"{op.outputs[0].name}.{parameter}", argument.value


def _all_operations(block: Any) -> Iterator[Any]:
    for op in block.operations:
        yield op
        for inner in op.blocks:
            yield from _all_operations(inner)


def _operation(op: Any) -> Operation:
    return Operation(
        type=op.type,
        inputs={key: tuple(a.name for a in bound.arguments if a.name) for key, bound in sorted(op.inputs.items())},
        outputs=tuple(each.name for each in op.outputs),
        dtypes=tuple(
            compat.data_type_name(each.type.tensorType.dataType)
            for each in op.outputs
            if each.type.HasField("tensorType")
        ),
    )


def _immediate(tensor: Any, dtype: str, shape: tuple[int, ...]) -> Array:
    kind = tensor.WhichOneof("value")
    if kind is None:
        return np.zeros(shape, np.float32)
    values = getattr(tensor, kind).values
    if kind == "bytes":
        return np.frombuffer(values, _NUMPY[dtype]).reshape(shape)
    made = {"floats": np.float32, "ints": np.int32, "longInts": np.int64, "bools": np.bool_, "doubles": np.float64}
    return np.array(list(values), made.get(kind, np.str_)).reshape(shape)


def _feature(described: Any) -> Feature:
    kind = described.type.WhichOneof("Type")
    if kind == "imageType":
        image = described.type.imageType
        colour = type(image).ColorSpace.Name(image.colorSpace)
        sizes: tuple[tuple[int, ...], ...] = ()
        if image.WhichOneof("SizeFlexibility") == "imageSizeRange":
            spans = (image.imageSizeRange.heightRange, image.imageSizeRange.widthRange)
            sizes = tuple((int(s.lowerBound), int(s.upperBound)) for s in spans)
        elif image.WhichOneof("SizeFlexibility") == "enumeratedSizes":
            listed: list[tuple[int, ...]] = [(int(s.height), int(s.width)) for s in image.enumeratedSizes.sizes]
            sizes = tuple(tuple(sorted(set(each))) for each in zip(*listed, strict=True))
            return Feature(described.name, "image", colour, (image.height, image.width), sizes)
        return Feature(described.name, "image", colour, (image.height, image.width), sizes, bool(sizes))
    if kind == "multiArrayType":
        array = described.type.multiArrayType
        dtype, shape = compat.array_type_name(array.dataType), tuple(map(int, array.shape))
        flexible = array.WhichOneof("ShapeFlexibility")
        if flexible == "shapeRange":
            spans = array.shapeRange.sizeRanges
            return Feature(
                described.name,
                "array",
                dtype,
                shape,
                tuple((int(s.lowerBound), int(s.upperBound)) for s in spans),
                True,
            )
        if flexible == "enumeratedShapes":
            shapes = [tuple(map(int, s.shape)) for s in array.enumeratedShapes.shapes]
            sizes = tuple(tuple(sorted(set(each))) for each in zip(*shapes, strict=True))
            return Feature(described.name, "array", dtype, shape, sizes)
        return Feature(described.name, "array", dtype, shape)
    return Feature(described.name, "string" if kind == "stringType" else "dictionary")
