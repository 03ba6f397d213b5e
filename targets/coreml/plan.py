"""What a package will look like, settled before anything is converted: sizes, names, images, classifier, types."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from vlexport.core.artifact import ONLY_COMPONENT, TensorSpec
from vlexport.core.errors import CapabilityError, UsageError, nearest
from vlexport.core.preprocess import Preprocess
from vlexport.ir.program import Program
from vlexport.targets.base import Brief
from vlexport.targets.coreml import CoreMLOptions, deployment_target
from vlexport.targets.coreml.classify import is_classifier, with_probabilities
from vlexport.targets.coreml.compat import operator_types
from vlexport.targets.coreml.names import LABEL, PROBABILITIES, feature_names, swift_class_name, swift_identifier
from vlexport.targets.coreml.outputs import shared_outputs, with_own_outputs
from vlexport.targets.coreml.pixels import require_images, with_pixels
from vlexport.targets.coreml.quantized import stored_integers
from vlexport.targets.coreml.shapes import Sizes, enumerated_shapes, parse_shapes, sizes_of_dims

if TYPE_CHECKING:
    from collections.abc import Sequence

_BYTES = ("uint8", "int8")
"""Types of inputs that coremltools stops at; of images it makes them itself, from a Program that takes floats."""
_ENUMERATED_INPUTS_FROM = 18
"""iOS version from which more than one input may have enumerated shapes."""


@dataclass(frozen=True)
class Plan:
    """A Program with what its package is to be.

    Attributes:
        program: With pixel values as inputs and probabilities as output where they are wanted.
        package: Name without suffix, a Swift identifier.
        deployment: Oldest system (``iOS17``).
        inputs: Specs of the artifact's inputs, by their public names.
        outputs: Specs of the artifact's outputs, by their public names.
        input_names: Names in the package, in the order of ``inputs``.
        output_names: Names of the converted Program's outputs in the package, in its order.
        images: Public names of inputs that are images → their preprocessing.
        labels: Class names of a classifier, else empty.
        sizes: Every dynamic dim → its sizes.
        typed: The Program says itself what is computed in fp16.
        half: coremltools is to make the Program fp16; else types stay as the Program has them.
        keep: MIL operators that stay in fp32 then.
        copies: The Program multiplies by 1 to give an output a value of its own.
        integers: Elements of weights that the Program stores in 8 or 4 bits; equal weights count once.
    """

    program: Program
    package: str
    deployment: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    images: Mapping[str, Preprocess]
    labels: tuple[str, ...]
    sizes: Mapping[str, Sizes]
    half: bool
    typed: bool
    keep: frozenset[str]
    copies: bool
    integers: int = 0


def plan_of(program: Program, brief: Brief, options: CoreMLOptions) -> Plan:
    """Settle everything.

    Raises:
        UsageError: VLX0703 for options that contradict the program or each other.
        DataError: VLX0206 for images without known preprocessing.
        CapabilityError: VLX0503 for inputs and labels that Core ML does not take.
    """
    signature = program.signature
    _require_takable(signature.inputs)
    specs = {spec.name: spec for spec in signature.inputs}
    images = dict(brief.preprocess) if options.inputs == "image" else {}
    if options.inputs == "image":
        require_images(specs, images)
    known = {
        dim: want
        for name, how in images.items()
        for dim, want in zip(specs[name].shape[1:], how.output_shape, strict=True)
        if isinstance(dim, str) and isinstance(want, int)
    }
    sizes = sizes_of_dims(signature.dims, parse_shapes(options.shapes), known)
    deployment = deployment_target(brief)
    _require_one_enumerated(signature.inputs, sizes, deployment)
    inputs = tuple(_settled(spec, spec.shape, sizes) for spec in signature.inputs)
    outputs = tuple(
        _settled(spec, _settled_shape(program, spec, node.meta["val"].shape, sizes), sizes)
        for spec, node in zip(signature.outputs, program.results, strict=True)
    )
    _require_single_images(inputs, images)
    batch = outputs[0].shape[0] if outputs[0].shape else None
    labels = brief.labels if is_classifier(program, brief.labels, _number(batch), options.classifier) else ()
    taken = (LABEL, PROBABILITIES) if labels else ()
    in_names, out_names = feature_names(specs, [s.name for s in outputs], taken=taken)
    if options.io == "float16":
        if brief.precision != "fp16":
            raise UsageError("VLX0703", f"io=float16 goes with fp16, not with {brief.precision}",
                             where="--set coreml.io", hint="leave it at float32")  # fmt: skip
        inputs, outputs = _halved(inputs), _halved(outputs)
    inputs = tuple(s.model_copy(update={"dtype": "uint8"}) if s.name in images else s for s in inputs)
    if labels:
        probabilities = TensorSpec(name=PROBABILITIES, dtype="float32", shape=(1, len(labels)))
        outputs = (TensorSpec(name=LABEL, dtype="str", shape=(1,)), probabilities, *outputs[1:])
    typed = is_typed(program)
    own = with_own_outputs(program)
    changed = with_pixels(own, images) if images else own
    return Plan(
        program=with_probabilities(changed) if labels else changed,
        package=_package(options, brief),
        deployment=deployment,
        inputs=inputs,
        outputs=outputs,
        input_names=tuple(in_names),
        output_names=tuple(out_names),
        images=images,
        labels=tuple(labels),
        sizes=sizes,
        half=brief.precision == "fp16" and not typed,
        typed=typed,
        keep=_kept(options.keep),
        copies=bool(shared_outputs(program)),
        integers=stored_integers(program, deployment_target(brief)),
    )


def is_typed(program: Program) -> bool:
    """Whether the Program says itself what is computed in fp16."""
    values = [*program.used_tensors().values(), *(node.meta["val"] for node in program.calls())]
    return any(isinstance(value, torch.Tensor) and value.dtype is torch.float16 for value in values)


def _kept(text: str) -> frozenset[str]:
    names = frozenset(filter(None, (part.strip() for part in text.split(","))))
    known = operator_types() if names else frozenset()
    for name in sorted(names - known):
        raise UsageError("VLX0703", f"no MIL operator is called '{name}'{nearest(name, known)}",
                         where="--set coreml.keep", hint="write for example softmax,layer_norm")  # fmt: skip
    return names


def _require_takable(inputs: Sequence[TensorSpec]) -> None:
    for spec in inputs:
        if not spec.shape:
            raise CapabilityError("VLX0503", f"input {spec.name} is a scalar: Core ML's inputs have dims",
                                  where=spec.name, hint="give it a dim of size 1 in the model")  # fmt: skip
        if spec.dtype in _BYTES:
            raise CapabilityError(
                "VLX0503", f"input {spec.name} is {spec.dtype}: Core ML's inputs are float32, float16 or int32",
                where=spec.name, hint="let the model take float32 or int32 there, and cast in the app (or, for "
                "pictures of 8 bits, float32 with --set coreml.inputs=image)",
            )  # fmt: skip


def _package(options: CoreMLOptions, brief: Brief) -> str:
    """The package's name; one of several components has its own behind it, or two classes would be called alike."""
    if not options.name or brief.name == ONLY_COMPONENT:
        return options.name or swift_identifier(brief.name)
    return options.name + swift_class_name(brief.name)


def _require_one_enumerated(inputs: Sequence[TensorSpec], sizes: Mapping[str, Sizes], deployment: str) -> None:
    listed = [s.name for s in inputs if any(isinstance(d, str) and len(sizes[d].listed) > 1 for d in s.shape)]
    for spec in inputs:
        if spec.name in listed:
            enumerated_shapes(spec.shape, sizes)
    if len(listed) > 1 and int(deployment.removeprefix("iOS")) < _ENUMERATED_INPUTS_FROM:
        raise UsageError(
            "VLX0703", f"inputs {' and '.join(listed)} have listed sizes, {deployment} takes one such input",
            where="--set coreml.shapes", hint="give a range, or --for ios18",
        )  # fmt: skip


def _require_single_images(inputs: Sequence[TensorSpec], images: Mapping[str, Preprocess]) -> None:
    for spec in inputs:
        if spec.name in images and spec.shape[0] != 1:
            raise UsageError(
                "VLX0703", f"input {spec.name} takes {spec.shape[0]} images at a time, Core ML hands over one",
                where="--set coreml.inputs=image", hint=f"--set coreml.shapes={spec.shape[0]}=1"
                if isinstance(spec.shape[0], str) else "save the model with batch 1, or leave coreml.inputs at tensor",
            )  # fmt: skip


def _settled(spec: TensorSpec, shape: Any, sizes: Mapping[str, Sizes]) -> TensorSpec:
    fixed = {name: each.default for name, each in sizes.items() if each.fixed}
    return spec.model_copy(update={"shape": tuple(fixed.get(dim, dim) for dim in shape)})


def _settled_shape(program: Program, spec: TensorSpec, shape: Any, sizes: Mapping[str, Sizes]) -> tuple[int | str, ...]:
    """An output's shape with fixed dims put in; what depends on others stays as it is written."""
    values = {symbol: sizes[name].default for symbol, name in program.symbol_names().items() if sizes[name].fixed}
    found: list[int | str] = []
    for size, written in zip(shape, spec.shape, strict=True):
        value = size.node.expr.subs(values) if isinstance(size, torch.SymInt) else size
        found.append(int(value) if isinstance(value, int) or value.is_number else written)
    return tuple(found)


def _halved(specs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    return tuple(s.model_copy(update={"dtype": "float16"}) if s.dtype == "float32" else s for s in specs)


def _number(size: int | str | None) -> int | None:
    return size if isinstance(size, int) else None
