"""tensorrt: typed ONNX for strongly typed networks, and an engine of TensorRT for RTX where one can be compiled."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, cast

from vlexport.core.artifact import Artifact, Frozen
from vlexport.core.device_profiles import DeviceProfile, Fact
from vlexport.core.devices import this_machine
from vlexport.core.errors import VlexportError
from vlexport.core.scheme import QUANTIZED, QuantScheme, read_schemes
from vlexport.targets.base import Brief, Probe, Target
from vlexport.targets.tensorrt.engine import choose_engine, compiler_version, missing_compiler
from vlexport.targets.tensorrt.options import TensorRTOptions

if TYPE_CHECKING:
    from torch.fx import Node

    from vlexport.core.bundle_schema import Change
    from vlexport.ir.program import Program
    from vlexport.passes.base import Pass
    from vlexport.passes.quantization.decisions import Decisions, LayerDecision

__all__ = ["TensorRTOptions", "TensorRTTarget"]

_CAPABILITY = "compute-capability"


class TensorRTTarget(Target):
    """ONNX for TensorRT 10 and 11 on NVIDIA GPUs, run here by ONNX Runtime: right numbers, no times."""

    id: ClassVar[str] = "tensorrt"
    summary: ClassVar[str] = "typed ONNX for TensorRT on Jetson and NVIDIA GPUs, with an engine for RTX GPUs"
    precisions: ClassVar[tuple[str, ...]] = ("fp16", "fp32", "int8", "fp8")
    precision_reason: ClassVar[str] = "tensor cores compute in fp16, and TensorRT keeps to the types of the graph"
    Options: ClassVar[type[Frozen]] = TensorRTOptions
    session_entry: ClassVar[str] = "vlexport.targets.tensorrt.session:open_session"
    fixed_batch: ClassVar[bool] = True

    def schemes(self) -> tuple[QuantScheme, ...]:
        """Those of ``schemes.json``."""
        return read_schemes(__name__)

    def float_precision(self, precision: str) -> str:
        """Half: what is not quantized is computed as in an fp16 artifact."""
        return "fp16"

    def quantized_for(self, brief: Brief) -> DeviceProfile:
        """The device; of one whose compute capability is not known, the least that an engine is asked for."""
        asked = cast("TensorRTOptions", brief.options).compute_capabilities
        if not asked or _CAPABILITY in brief.device.facts:
            return brief.device
        fact = Fact(value=min(asked.split(","), key=float), source="option tensorrt.compute_capabilities")
        return brief.device.model_copy(update={"facts": {**brief.device.facts, _CAPABILITY: fact}})

    def fallback_precision(self, brief: Brief) -> str:
        """fp16 beside int8 and fp8, which may be no faster on the device."""
        return "fp16" if brief.precision in QUANTIZED and cast("TensorRTOptions", brief.options).fallback else ""

    def quantized_passes(self, scheme: QuantScheme, *, min_sqnr_db: float) -> Sequence[Pass[Program]]:
        """Weights of attention in float8, too, where its operands are."""
        from vlexport.targets.tensorrt.quantize_softmax import QuantizeSoftmax

        return [QuantizeSoftmax(scheme, min_sqnr_db=min_sqnr_db)] if scheme.layer("softmax") is not None else []

    def emit_quant(
        self, program: Program, decisions: Decisions, nodes: Mapping[str, Node], layer: LayerDecision
    ) -> Change:
        """Symmetric, with a float bias."""
        from vlexport.targets.tensorrt.emit_quant import emit_quant

        return emit_quant(program, decisions, nodes, layer)

    def probe(self) -> Probe:
        """ONNX Runtime, which stands in for TensorRT here, and the compiler. Neither TensorRT nor a GPU is used."""
        instruction_set = this_machine().instruction_set
        compiler = compiler_version()
        compilers = (f"compiler: tensorrt_rtx {compiler}",) if compiler else ()
        try:
            runtime = importlib.import_module("onnxruntime")
        except ImportError:
            return Probe(
                available=False,
                timing="none",
                providers=compilers,
                instruction_set=instruction_set,
                reason="pip install 'vlexport[onnxruntime]', which stands in for TensorRT where there is none",
            )
        return Probe(
            available=True,
            timing="emulated",
            version=runtime.__version__,
            providers=(*compilers, "emulation: ONNX Runtime on the CPU, whose times mean nothing"),
            instruction_set=instruction_set,
            emulator=f"ONNX Runtime {runtime.__version__} on the CPU",
        )

    def missing_tools(self, brief: Brief) -> str:
        """The compiler, where an engine must be made."""
        return missing_compiler(cast("TensorRTOptions", brief.options))

    def problems(self, program: Program, brief: Brief) -> Sequence[VlexportError]:
        """Operators that the device's TensorRT refuses, and options that do not fit the device."""
        from vlexport.targets.tensorrt.lower import problems_of

        return problems_of(program, brief)

    def lower(self, program: Program, folder: Path, brief: Brief) -> Artifact:
        """Write the ONNX file, the engine if there is one, and the device's command lines."""
        from vlexport.targets.tensorrt.lower import lower_program

        return lower_program(program, folder, brief)

    def lower_naive(self, program: Program, folder: Path) -> Artifact:
        """``torch.onnx.export(dynamo=True)`` with its defaults."""
        from vlexport.targets.onnx.lower import MAIN_FILE, write_plain_export

        write_plain_export(program, folder)
        return Artifact(
            target=self.id, path=MAIN_FILE, inputs=program.signature.inputs, outputs=program.signature.outputs
        )

    def compatibility(self, brief: Brief) -> dict[str, str]:
        """What a device needs; whether there is an engine stands in the artifact's facts."""
        from vlexport.targets.tensorrt.lower import choose_opset
        from vlexport.targets.tensorrt.op_support import oldest_tensorrt

        options = cast("TensorRTOptions", brief.options)
        opset = choose_opset(options, brief.device)
        choose_engine(options, brief.device, precision=brief.precision)
        facts = brief.device.facts
        known = {name: facts[name].value for name in ("tensorrt", "tensorrt-rtx", _CAPABILITY) if name in facts}
        return {
            "opset": str(opset),
            "domains": "ai.onnx",
            "typing": "strong",
            "oldest_tensorrt": oldest_tensorrt(opset),
            **{f"device_{name.replace('-', '_')}": value for name, value in known.items()},
        }

    def tools(self) -> dict[str, str]:
        """The exporter's parts, the runtime that stands in, and the compiler."""
        names = ("torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime")
        found = {name: importlib.metadata.version(name).split("+")[0] for name in names}
        compiler = compiler_version()
        return {**found, "tensorrt-rtx": compiler} if compiler else found
