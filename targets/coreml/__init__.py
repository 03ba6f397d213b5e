"""coreml: an ML Program for iPhone, iPad and Mac, written on any machine, run on Apple's."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, cast

from pydantic import Field, field_validator

from vlexport.core.artifact import Artifact, Frozen, Signature, TensorSpec
from vlexport.core.device_profiles import DeviceProfile, Fact
from vlexport.core.devices import this_machine
from vlexport.core.errors import VlexportError
from vlexport.core.scheme import QuantScheme, read_schemes
from vlexport.targets.base import Brief, Probe, Target
from vlexport.targets.coreml.names import (
    LABEL,
    PROBABILITIES,
    feature_names,
    is_swift_identifier,
    swift_class_name,
    swift_identifier,
)
from vlexport.targets.coreml.session import why_not_here
from vlexport.targets.coreml.shapes import parse_shapes

if TYPE_CHECKING:
    from torch.fx import Node

    from vlexport.core.bundle_schema import Change
    from vlexport.ir.program import Program
    from vlexport.passes.base import Pass
    from vlexport.passes.quantization.decisions import Decisions, LayerDecision

DEFAULT_DEPLOYMENT = "iOS17"
"""Where neither the option nor the device profile says otherwise."""
_SPECIFICATIONS = {"iOS16": 7, "iOS17": 8, "iOS18": 9}
"""Deployment target → version of Core ML's model specification."""
_NEEDED = ("coremltools", "torch")


class CoreMLOptions(Frozen):
    """Options of the coreml target.

    Attributes:
        name: Of the package, and so of the class that Xcode makes; a Swift identifier. A build takes the model's
            file name (solar_cells.pt makes SolarCells); of several components each has its own name behind it.
        deployment_target: Oldest system that runs it (macOS 13, 14, 15 likewise); auto: the device profile's, else
            iOS17.
        inputs: image: inputs with a known preprocessing take an image of 8 bits; scale, mean and std become exact
            operators of the program, resizing and cropping stay with the app. tensor: all inputs are arrays.
        classifier: on: the first output becomes classLabel with probabilities, a softmax is added unless there is one;
            auto: so where labels are known, fit the first output, and the batch is 1.
        compute_units: Recorded for the app, which chooses them when it loads the package.
        shapes: Sizes of dynamic dims: batch=1 (fixed), height=224:320 (these), width=160-640 (a range).
        io: Type of floating inputs and outputs, whatever is computed in; float16 goes with fp16.
        keep: MIL operators that stay in fp32 in an fp16 package (softmax,layer_norm); of no effect on a Program that
            says its types itself.
        author: Recorded in the package.
        license: Recorded in the package.
        version: Recorded in the package.
        description: Recorded in the package.
    """

    name: str = ""
    deployment_target: Literal["auto", "iOS16", "iOS17", "iOS18"] = "auto"
    inputs: Literal["tensor", "image"] = "tensor"
    classifier: Literal["auto", "on", "off"] = "auto"
    compute_units: Literal["all", "cpu-only", "cpu-and-gpu", "cpu-and-ne"] = "all"
    shapes: str = ""
    io: Literal["float32", "float16"] = "float32"
    keep: str = ""
    author: str = Field(default="", max_length=1000)
    license: str = Field(default="", max_length=10_000)
    version: str = Field(default="", max_length=100)
    description: str = Field(default="", max_length=10_000)

    @field_validator("name")
    @classmethod
    def _is_an_identifier(cls, value: str) -> str:
        if value and not is_swift_identifier(value):
            raise ValueError(f"'{value}' is no Swift identifier; write for example {swift_identifier(value)}")
        return value

    @field_validator("shapes")
    @classmethod
    def _is_understood(cls, value: str) -> str:
        parse_shapes(value)
        return value


def deployment_target(brief: Brief) -> str:
    """The oldest system that shall run the package: of the option, else of the device profile, else iOS17."""
    asked = cast("CoreMLOptions", brief.options).deployment_target
    if asked != "auto":
        return asked
    fact = brief.device.facts.get("deployment-target")
    return fact.value if fact is not None else DEFAULT_DEPLOYMENT


def _interface_facts(
    signature: Signature, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]
) -> dict[str, str]:
    """That golden vectors are of the source program, where an app meets other names or types."""
    names = [[spec.name for spec in specs] for specs in (signature.inputs, inputs, signature.outputs, outputs)]
    if [spec.dtype for spec in signature.inputs] == [spec.dtype for spec in inputs] and names[2] == names[3]:
        return {}
    pairs = (f"{', '.join(names[0])} → {', '.join(names[2])}", f"{', '.join(names[1])} → {', '.join(names[3])}")
    return {"golden_vectors": f"of the source program ({pairs[0]} as arrays), not of the package ({pairs[1]})"}


class CoreMLTarget(Target):
    """ML Program packages.

    fp16 is made in one of two ways. A Program that is typed already (it holds float16 tensors or casts to them) is
    converted with its types as they are. Any other is made fp16 by coremltools' own pass, all of it but the operators
    in ``keep``.
    """

    id: ClassVar[str] = "coreml"
    summary: ClassVar[str] = "Core ML package for iPhone, iPad and Mac"
    precisions: ClassVar[tuple[str, ...]] = ("fp16", "fp32", "int8")
    precision_reason: ClassVar[str] = "the Neural Engine computes in fp16 only"
    Options: ClassVar[type[Frozen]] = CoreMLOptions
    session_entry: ClassVar[str] = "vlexport.targets.coreml.session:open_session"
    fixed_batch: ClassVar[bool] = True
    default_device: ClassVar[str] = "ios17"

    def schemes(self) -> tuple[QuantScheme, ...]:
        """Those of ``schemes.json``."""
        return read_schemes(__name__)

    def quantized_for(self, brief: Brief) -> DeviceProfile:
        """The device, with the system that the package is made for."""
        fact = Fact(value=deployment_target(brief), source="option coreml.deployment_target, or the device profile")
        return brief.device.model_copy(update={"facts": {**brief.device.facts, "deployment-target": fact}})

    def float_precision(self, precision: str) -> str:
        """Half: the Neural Engine computes in nothing else."""
        return "fp16"

    def emit_quant(
        self, program: Program, decisions: Decisions, nodes: Mapping[str, Node], layer: LayerDecision
    ) -> Change:
        """Symmetric, with a float bias; stored weights unpack on load."""
        from vlexport.targets.coreml.emit_quant import emit_quant

        return emit_quant(program, decisions, nodes, layer)

    def probe(self) -> Probe:
        """Nothing runs Core ML artifacts in this version; the version is that of coremltools."""
        installed = importlib.util.find_spec("coremltools") is not None
        return Probe(
            available=False,
            timing="none",
            version=importlib.metadata.version("coremltools") if installed else "",
            instruction_set=this_machine().instruction_set,
            reason=why_not_here(),
        )

    def implied_options(self, model_name: str) -> Mapping[str, str]:
        """The package is named after the model: Xcode makes one class a package, and two in a project must differ."""
        return {"name": swift_class_name(model_name)}

    def missing_tools(self, brief: Brief) -> str:
        """coremltools and torch; neither is imported to find out."""
        missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
        return f"{' and '.join(missing)} not installed: pip install 'vlexport[build,coreml]'" if missing else ""

    def problems(self, program: Program, brief: Brief) -> Sequence[VlexportError]:
        """Calls that coremltools does not convert, tensors of too many dims, and inputs and labels that do not fit."""
        from vlexport.targets.coreml.op_support import problems_of

        return problems_of(program, brief, cast("CoreMLOptions", brief.options))

    def lower(self, program: Program, folder: Path, brief: Brief) -> Artifact:
        """Write ``NAME.mlpackage``, load it back and compare it with the specs returned.

        Specs are of what an app meets: an image input is uint8 of shape (1, C, H, W); a classifier's outputs are
        ``classLabel`` (str) and ``classLabel_probs`` (float32, N labels in their order), then the further outputs.

        Raises:
            CapabilityError: VLX0503 for an operator, input or labels that Core ML does not take.
            UsageError: VLX0703 for options that contradict the program.
            DataError: VLX0206 for images without known preprocessing.
            GateError: VLX0504 when the package is not what was asked for.
        """
        from vlexport.targets.coreml.convert import write_planned
        from vlexport.targets.coreml.plan import plan_of

        self.require_tools(brief)
        options = cast("CoreMLOptions", brief.options)
        plan = plan_of(program, brief, options)
        return Artifact(
            target=self.id,
            path=write_planned(plan, folder, brief, options),
            inputs=plan.inputs,
            outputs=plan.outputs,
            session_options={"compute_units": options.compute_units},
            facts=_interface_facts(program.signature, plan.inputs, plan.outputs),
        )

    def lower_naive(self, program: Program, folder: Path) -> Artifact:
        """``ct.convert`` of the decomposed graph with coremltools' defaults, every dynamic dim at its ``opt``."""
        from vlexport.targets.coreml.convert import write_plain_conversion

        signature = program.signature
        sizes = {name: found.opt for name, found in signature.dims.items()}
        return Artifact(
            target=self.id,
            path=write_plain_conversion(program, folder, "main", sizes),
            inputs=signature.inputs,
            outputs=signature.outputs,
        )

    def program_passes(self, brief: Brief) -> Sequence[Pass[Program]]:
        """Spellings that coremltools has no conversion for, or converts to something else."""
        from vlexport.targets.coreml.legalize_resize import LegalizeResize
        from vlexport.targets.coreml.legalize_spelling import LegalizeSpelling

        return [LegalizeSpelling(), LegalizeResize()]

    def compatibility(self, brief: Brief) -> dict[str, str]:
        """The system that is new enough."""
        deployment = deployment_target(brief)
        return {
            "deployment-target": deployment,
            "specification-version": str(_SPECIFICATIONS[deployment]),
            "compute-units": cast("CoreMLOptions", brief.options).compute_units,
        }

    def usage(self, artifact: Artifact, folder: str) -> Sequence[str]:
        """Swift: Xcode makes a class of the package, with an argument for every input."""
        if Path(artifact.path).suffix != ".mlpackage":  # of several components each is a class of its own
            return ()
        package = Path(artifact.path).stem
        inputs, outputs = ([spec.name for spec in specs] for specs in (artifact.inputs, artifact.outputs))
        labelled = outputs[0] == LABEL
        taken = (LABEL, PROBABILITIES) if labelled else ()
        names, results = feature_names(inputs, outputs[len(taken) :], taken=taken)
        arguments = ", ".join(f"{name}: {name}" for name in names)
        result = LABEL if labelled else results[0]
        call = f"try {package}(configuration: .init()).prediction({arguments}).{result}"
        return [f"    {call}  // Swift, with {folder}/artifact/{artifact.path} in the Xcode project"]

    def tools(self) -> dict[str, str]:
        """What takes part in lowering."""
        return {name: importlib.metadata.version(name).split("+")[0] for name in ("torch", "coremltools", "numpy")}
