"""Program → Core ML package through coremltools, which takes the functional ATen graph as it is.

What coremltools says of an operator that it does not take is mapped to the node: operator, module path, source line.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.export import ExportedProgram

from vlexport.core.artifact import TensorSpec
from vlexport.core.errors import CapabilityError
from vlexport.ir import dialect, provenance
from vlexport.ir.exported import exported_from_program
from vlexport.ir.program import Program
from vlexport.targets.base import Brief
from vlexport.targets.coreml import CoreMLOptions, compat
from vlexport.targets.coreml.check import require_as_planned
from vlexport.targets.coreml.legalize_spelling import is_misread
from vlexport.targets.coreml.mil import read_package
from vlexport.targets.coreml.package import write_package
from vlexport.targets.coreml.pixels import steps_outside
from vlexport.targets.coreml.plan import Plan
from vlexport.targets.coreml.quantized import WHAT_INSTEAD, register, why_not
from vlexport.targets.coreml.shapes import Sizes, enumerated_shapes
from vlexport.targets.coreml.typed import HALF, SINGLE, typed_conversion

SUFFIX = ".mlpackage"
_FLOATS = {torch.float16: HALF, torch.float32: SINGLE}
_COLOURS = {"rgb": "RGB", "bgr": "BGR", "gray": "GRAYSCALE"}


def write_planned(plan: Plan, folder: Path, brief: Brief, options: CoreMLOptions) -> str:
    """Convert, read back, compare with the plan, and only then put the package into ``folder``.

    Returns:
        Name of the package in ``folder``.

    Raises:
        CapabilityError: VLX0503 naming operator, module path and source line.
        GateError: VLX0504 when the package is not what was planned.
    """
    with tempfile.TemporaryDirectory(prefix="vlexport-") as scratch:
        spec, weights = _converted(plan, Path(scratch))
        _describe(spec, plan, options)
        name = plan.package + SUFFIX
        made = Path(scratch) / "made" / name
        write_package(made, spec, weights)
        require_as_planned(read_package(made), plan, brief.precision)
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / name).exists():
            shutil.rmtree(folder / name)
        shutil.move(made, folder / name)
    return name


def write_plain_conversion(program: Program, folder: Path, name: str, sizes: dict[str, int]) -> str:
    """What a user gets from ``ct.convert`` with its defaults, of the same captured graph.

    Args:
        program: As captured.
        folder: Made where it does not exist.
        name: Of the package.
        sizes: Every dynamic dim, fixed to one size.

    Raises:
        CapabilityError: VLX0503 where that fails.
    """
    ct = compat.coremltools()
    exported = exported_from_program(program)
    inputs = [
        ct.TensorType(name=spec.name, shape=tuple(sizes[d] if isinstance(d, str) else d for d in spec.shape))
        for spec in program.signature.inputs
    ]
    with compat.quiet(), tempfile.TemporaryDirectory(prefix="vlexport-") as scratch:
        made = Path(scratch) / (name + SUFFIX)
        try:
            ct.convert(
                exported.run_decompositions({}), inputs=inputs, skip_model_load=True, package_dir=str(made),
                minimum_deployment_target=ct.target.iOS17,
            )  # fmt: skip
        except compat.CONVERSION_ERRORS as error:
            raise _refused(program, exported, error) from error
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / made.name).exists():
            shutil.rmtree(folder / made.name)
        shutil.move(made, folder / made.name)
    return name + SUFFIX


def _converted(plan: Plan, scratch: Path) -> tuple[Any, bytes | None]:
    """The specification and the content of the weight file."""
    for node in plan.program.calls():
        reason = why_not(node, plan.deployment)
        if reason:
            raise CapabilityError(
                "VLX0503", f"Core ML cannot express {dialect.op_name(node)}: {reason}",
                where=provenance.describe(node), hint=WHAT_INSTEAD,
            )  # fmt: skip
        if is_misread(node):
            raise CapabilityError(
                "VLX0503", f"coremltools converts {dialect.op_name(node)} to something else here",
                where=provenance.describe(node), hint="the passes legalize-spelling and legalize-resize write it "
                "otherwise where the sizes of an image are fixed",
            )  # fmt: skip
    ct = compat.coremltools()
    register()
    exported = exported_from_program(plan.program)
    made = scratch / f"converted{SUFFIX}"
    with compat.quiet(), typed_conversion(_types(exported)) if plan.typed else contextlib.nullcontext():
        try:
            model = ct.convert(
                exported,
                convert_to="mlprogram",
                inputs=_inputs(ct, plan),
                outputs=_outputs(ct, plan),
                classifier_config=ct.ClassifierConfig(
                    list(plan.labels), predicted_probabilities_output=plan.output_names[0]
                )
                if plan.labels
                else None,
                minimum_deployment_target=getattr(ct.target, plan.deployment),
                compute_precision=_precision(ct, plan),
                pass_pipeline=compat.exact_pipeline(copies=plan.copies),
                skip_model_load=True,
                package_dir=str(made),
            )
        except compat.CONVERSION_ERRORS as error:
            raise _refused(plan.program, exported, error) from error
        spec = model.get_spec()
    blobs = [file for file in (made / "Data").rglob("*.bin") if file.is_file()]
    return spec, blobs[0].read_bytes() if blobs else None


def _types(exported: ExportedProgram) -> dict[str, str]:
    """Which of its values are fp16, and which fp32."""
    values = {node.name: node.meta.get("val") for node in exported.graph.nodes if node.op == "call_function"}
    return {name: _FLOATS[v.dtype] for name, v in values.items() if isinstance(v, torch.Tensor) and v.dtype in _FLOATS}


def _precision(ct: Any, plan: Plan) -> Any:
    """FLOAT32 leaves types as the Program has them."""
    if not plan.half:
        return ct.precision.FLOAT32
    if not plan.keep:
        return ct.precision.FLOAT16
    return ct.transform.FP16ComputePrecision(op_selector=lambda op: op.op_type not in plan.keep)


def _inputs(ct: Any, plan: Plan) -> list[Any]:
    ranges = {
        name: ct.RangeDim(lower_bound=s.low, upper_bound=s.high, default=s.default)
        for name, s in plan.sizes.items()
        if not s.listed
    }
    found = []
    for spec, name in zip(plan.inputs, plan.input_names, strict=True):
        shape = _shape(ct, spec, plan.sizes, ranges)
        if spec.name in plan.images:
            colour = getattr(ct.colorlayout, _COLOURS[plan.images[spec.name].color])
            found.append(ct.ImageType(name=name, shape=shape, color_layout=colour))
        else:
            found.append(ct.TensorType(name=name, shape=shape, dtype=_stored(spec)))
    return found


def _shape(ct: Any, spec: TensorSpec, sizes: Any, ranges: dict[str, Any]) -> Any:
    """Fixed sizes, enumerated shapes, or a shape with ranges: one object a dim, so that equal dims stay equal."""
    open_dims: dict[str, Sizes] = {d: sizes[d] for d in spec.shape if isinstance(d, str)}
    if any(each.listed for each in open_dims.values()):
        shapes = enumerated_shapes(spec.shape, sizes)
        return ct.EnumeratedShapes(shapes=shapes, default=shapes[0])
    return ct.Shape(shape=tuple(ranges[d] if isinstance(d, str) else d for d in spec.shape))


def _outputs(ct: Any, plan: Plan) -> list[Any]:
    kept = plan.outputs[1:] if plan.labels else plan.outputs
    types = [None if plan.labels and i == 0 else _stored(spec) for i, spec in enumerate(kept)]
    return [ct.TensorType(name=n, dtype=t) for n, t in zip(plan.output_names, types, strict=True)]


def _stored(spec: TensorSpec) -> Any:
    """What an array of the app holds: Core ML has no 64-bit integers and no booleans there."""
    kind = np.dtype(spec.dtype)
    if kind.kind == "f":
        return np.float16 if kind == np.float16 else np.float32
    return np.int32


def _describe(spec: Any, plan: Plan, options: CoreMLOptions) -> None:
    """Metadata: what the user asked for, and what an app must do before it hands over an image."""
    versions = {"version": importlib.metadata.version("coremltools"),
                "source": f"torch=={importlib.metadata.version('torch').split('+')[0]}"}  # fmt: skip
    compat.forget_build(spec, versions=versions)
    about = spec.description.metadata
    about.author, about.license = options.author, options.license
    about.versionString, about.shortDescription = options.version, options.description
    stored = about.userDefined
    stored["vlexport.compute_units"] = options.compute_units
    for name, how in plan.images.items():
        stored[f"vlexport.preprocess.{name}"] = how.to_spec()
        stored[f"vlexport.before.{name}"] = steps_outside(how)
    names = zip((s.name for s in plan.program.signature.inputs), plan.input_names, strict=True)
    renamed = {f"input.{public}": name for public, name in names if public != name}
    names = zip((s.name for s in plan.program.signature.outputs), plan.output_names, strict=True)
    first = 1 if plan.labels else 0
    renamed |= {f"output.{public}": name for public, name in list(names)[first:] if public != name}
    for key, name in renamed.items():
        stored[f"vlexport.{key}"] = name


def _refused(program: Program, exported: ExportedProgram, error: BaseException) -> CapabilityError:
    calls = [n for n in exported.graph.nodes if n.op == "call_function"]
    by_name = dict(zip((n.name for n in calls), program.calls(), strict=True))
    node = by_name.get(compat.failing_node(error))
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if node is None:
        return CapabilityError(
            "VLX0503",
            f"Core ML cannot express the program: {reason}",
            hint="please report it with the model's architecture",
        )
    if "Unsupported fx node" in reason or "not implemented" in reason:
        reason = "coremltools has no conversion for it"
    return CapabilityError(
        "VLX0503", f"Core ML cannot express {dialect.op_name(node)}: {reason}", where=provenance.describe(node),
        hint="rewrite that operator in the model, or export the part before and after it",
    )  # fmt: skip
