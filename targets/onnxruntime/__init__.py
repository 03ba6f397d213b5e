"""onnxruntime: ONNX for CPU boxes (fp32; fp16 to halve the weights)."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from pydantic import Field

from vlexport.core.artifact import Artifact, Frozen
from vlexport.core.devices import this_machine
from vlexport.core.errors import CapabilityError
from vlexport.targets.base import Brief, Probe, Target

if TYPE_CHECKING:
    from vlexport.ir.program import Program
    from vlexport.passes.base import Pass
    from vlexport.passes.level import Level


_FP16_NOTE = "asked for; weights take half the space, the CPU provider computes most of it in fp32 and gains no speed"


class OnnxRuntimeOptions(Frozen):
    """Options of the onnxruntime target.

    Attributes:
        opset: Version of ONNX's standard domain.
        graph_optimization: ONNX Runtime's own optimisation level when the artifact is opened.
        optimize: Run optimize-onnx (onnxscript's optimizer) on the lowered graph. Off: the exporter leaves it nothing.
        simplify: Run simplify-onnx (onnxsim) before it. Off: fewer nodes, no gain in speed shown.
    """

    opset: int = Field(default=20, ge=18, le=24)
    graph_optimization: str = Field(default="all", pattern="^(none|basic|extended|all)$")
    optimize: bool = False
    simplify: bool = False


class OnnxRuntimeTarget(Target):
    """ONNX for ONNX Runtime's CPU provider."""

    id: ClassVar[str] = "onnxruntime"
    summary: ClassVar[str] = "ONNX model for ONNX Runtime on CPUs"
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "fp16")
    precision_reason: ClassVar[str] = "the CPU provider computes in fp32"
    Options: ClassVar[type[Frozen]] = OnnxRuntimeOptions
    session_entry: ClassVar[str] = "vlexport.targets.onnxruntime.session:open_session"

    def probe(self) -> Probe:
        """Version, providers and instruction set."""
        instruction_set = this_machine().instruction_set
        try:
            runtime = importlib.import_module("onnxruntime")
        except ImportError:
            return Probe(
                available=False,
                timing="none",
                instruction_set=instruction_set,
                reason="pip install 'vlexport[onnxruntime]'",
            )
        return Probe(
            available=True,
            version=runtime.__version__,
            providers=tuple(runtime.get_available_providers()),
            instruction_set=instruction_set,
        )

    def choose_precision(self, wished: str | None) -> tuple[str, str]:
        """fp16 with what it is good for here; bf16 is refused with the reason."""
        if wished == "bf16":
            raise CapabilityError(
                "VLX0502", f"{self.id} does not run bf16: its CPU provider has no bf16 kernels and opens no such graph",
                where="--precision", hint=f"it runs: {', '.join(self.precisions)}",
            )  # fmt: skip
        precision, reason = super().choose_precision(wished)
        return precision, _FP16_NOTE if precision == "fp16" else reason

    def lower(self, program: Program, folder: Path, brief: Brief) -> Artifact:
        """Write ``main.onnx``."""
        from vlexport.targets.onnx.lower import MAIN_FILE, onnx_from_program, write_onnx
        from vlexport.targets.onnx.model import OnnxModel

        chosen = cast("OnnxRuntimeOptions", brief.options)
        lowered = OnnxModel(onnx_from_program(program, opset=chosen.opset), program.signature)
        lowered = brief.rewrite(lowered) if brief.rewrite is not None else lowered
        write_onnx(lowered.model, folder)
        return Artifact(
            target=self.id,
            path=MAIN_FILE,
            inputs=program.signature.inputs,
            outputs=program.signature.outputs,
            session_options={"graph_optimization": chosen.graph_optimization, "threads": brief.threads},
        )

    def lower_naive(self, program: Program, folder: Path) -> Artifact:
        """``torch.onnx.export(dynamo=True)`` with its defaults."""
        from vlexport.targets.onnx.lower import MAIN_FILE, write_plain_export

        write_plain_export(program, folder)
        return Artifact(
            target=self.id, path=MAIN_FILE, inputs=program.signature.inputs, outputs=program.signature.outputs
        )

    def lowered_passes(self, options: Frozen) -> Sequence[Pass[Any]]:
        """simplify-onnx and optimize-onnx, where they are asked for."""
        from vlexport.targets.onnx.optimize_onnx import OptimizeOnnx
        from vlexport.targets.onnx.simplify_onnx import SimplifyOnnx

        chosen = cast("OnnxRuntimeOptions", options)
        wanted: list[Pass[Any]] = [SimplifyOnnx()] if chosen.simplify else []
        return [*wanted, OptimizeOnnx()] if chosen.optimize else wanted

    def lowered_level(self) -> Level[Any]:
        """ONNX models."""
        from vlexport.targets.onnx.level import ONNX

        return ONNX

    def compatibility(self, brief: Brief) -> dict[str, str]:
        """The opset decides which ONNX Runtime is new enough."""
        return {
            "opset": str(cast("OnnxRuntimeOptions", brief.options).opset),
            "domains": "ai.onnx",
            "provider": "CPUExecutionProvider",
        }

    def tools(self) -> dict[str, str]:
        """The exporter's parts and the runtime."""
        names = ("torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime")
        return {name: importlib.metadata.version(name).split("+")[0] for name in names}
