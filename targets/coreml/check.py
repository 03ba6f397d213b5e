"""The check of every package that was written: it is loaded back and compared with what was planned. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlexport.core.artifact import TensorSpec
from vlexport.core.errors import GateError

if TYPE_CHECKING:
    from vlexport.targets.coreml.mil import Feature, MilSummary
    from vlexport.targets.coreml.plan import Plan

_ARRAYS = {"float32": "FLOAT32", "float16": "FLOAT16"}
_INTEGERS = "INT32"
"""What every integer and boolean is in an array of Core ML."""
_COLOURS = {"rgb": "RGB", "bgr": "BGR", "gray": "GRAYSCALE"}


def require_as_planned(found: MilSummary, plan: Plan, precision: str) -> None:
    """Compare names, kinds, types and shapes of all features, and the types that are computed in.

    Raises:
        GateError: VLX0504, naming what differs.
    """
    wanted = [f for f in plan.output_names if not plan.labels or f != plan.output_names[0]]
    names = [*found.predicted, *wanted]
    _equal("inputs", [f.name for f in found.inputs], list(plan.input_names))
    _equal("outputs", [f.name for f in found.outputs], names)
    for feature, spec in zip(found.inputs, plan.inputs, strict=True):
        image = plan.images.get(spec.name)
        _require_feature(feature, spec, _COLOURS[image.color] if image is not None else "")
    for feature, spec in zip(found.outputs, plan.outputs, strict=True):
        _require_feature(feature, spec, "")
    if plan.labels:
        _equal("what is classified", found.before_classify(), "softmax")
    _require_types(found, plan, precision)
    _require_integers(found, plan)


def _require_feature(feature: Feature, spec: TensorSpec, colour: str) -> None:
    where = f"{spec.name} (in the package: {feature.name})"
    if feature.kind in ("string", "dictionary"):
        _equal(f"name of the {feature.kind}", feature.name, spec.name)
        return
    _equal(f"kind of {where}", feature.kind, "image" if colour else "array")
    _equal(f"type of {where}", feature.dtype, colour or _ARRAYS.get(spec.dtype, _INTEGERS))
    shape = spec.shape[2:] if colour else spec.shape
    if feature.shape or not any(isinstance(dim, str) for dim in shape):
        pairs = [(have, want) for have, want in zip(feature.shape, shape, strict=False) if isinstance(want, int)]
        _equal(f"dims of {where}", len(feature.shape), len(shape))
        _equal(f"sizes of {where}", [have for have, _ in pairs], [want for _, want in pairs])


def _require_types(found: MilSummary, plan: Plan, precision: str) -> None:
    """fp32 holds nothing in half, fp16 made by coremltools nothing in single; a typed Program's types are its own."""
    if precision == "fp32" and not plan.typed:
        halves = sorted({op.type for op in found.operations if "FLOAT16" in op.dtypes})
        _equal("operators in fp16 of an fp32 package", halves, [])
        _equal("bytes of fp16 weights in an fp32 package", found.weight_bytes.get("FLOAT16", 0), 0)
    if plan.half and not plan.keep:
        _equal("bytes of fp32 weights in an fp16 package", found.weight_bytes.get("FLOAT32", 0), 0)
        singles = sorted({op.type for op in found.operations if "FLOAT32" in op.dtypes} - {"cast", "classify"})
        _equal("operators in fp32 of an fp16 package", singles, [])


def _require_integers(found: MilSummary, plan: Plan) -> None:
    """No weight that the Program stores in integers was made float on the way."""
    kept = sum(found.weight_bytes.get(name, 0) for name in ("INT8", "UINT8", "INT4", "UINT4", "UINT6"))
    stored = plan.integers
    if kept < stored:
        _equal("elements of weights in integers", kept, stored)


def _equal(what: str, found: object, wanted: object) -> None:
    if found != wanted:
        raise GateError(
            "VLX0504", f"the package is not what was asked for: {what}: {found}, {wanted} is wanted",
            hint="please report it; coremltools made something else of the program",
        )  # fmt: skip
