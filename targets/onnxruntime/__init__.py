"""onnxruntime: ONNX for CPU boxes (fp32 in this version)."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from pydantic import Field

from vlexport.core.artifact import Artifact, Frozen
from vlexport.core.devices import this_machine
from vlexport.targets.base import LoweredPass, Probe, Target

if TYPE_CHECKING:
    from vlexport.ir.program import Program
    from vlexport.passes.level import Level


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
    precisions: ClassVar[tuple[str, ...]] = ("fp32",)
    precision_reason: ClassVar[str] = "the CPU provider computes in fp32"
    Options: ClassVar[type[Frozen]] = OnnxRuntimeOptions
    session_entry: ClassVar[str] = "vlexport.targets.onnxruntime.session:open_session"
    lowered: ClassVar[tuple[LoweredPass, ...]] = (
        LoweredPass(name="simplify-onnx", value="vlexport.targets.onnx.simplify_onnx:SimplifyOnnx", option="simplify"),
        LoweredPass(name="optimize-onnx", value="vlexport.targets.onnx.optimize_onnx:OptimizeOnnx", option="optimize"),
    )

    def probe(self) -> Probe:
        """Version, providers and instruction set."""
        instruction_set = this_machine().instruction_set
        try:
            runtime = importlib.import_module("onnxruntime")
        except ImportError:
            return Probe(available=False, instruction_set=instruction_set, reason="pip install 'vlexport[onnxruntime]'")
        return Probe(
            available=True,
            version=runtime.__version__,
            providers=tuple(runtime.get_available_providers()),
            instruction_set=instruction_set,
        )

    def lower(
        self,
        program: Program,
        folder: Path,
        *,
        options: Frozen,
        threads: int,
        rewrite: Callable[[Any], Any] | None = None,
    ) -> Artifact:
        """Write ``main.onnx``."""
        from vlexport.targets.onnx.lower import MAIN_FILE, onnx_from_program, write_onnx
        from vlexport.targets.onnx.model import OnnxModel

        chosen = cast("OnnxRuntimeOptions", options)
        lowered = OnnxModel(onnx_from_program(program, opset=chosen.opset), program.signature)
        lowered = rewrite(lowered) if rewrite is not None else lowered
        write_onnx(lowered.model, folder)
        return Artifact(
            target=self.id,
            path=MAIN_FILE,
            inputs=program.signature.inputs,
            outputs=program.signature.outputs,
            session_options={"graph_optimization": chosen.graph_optimization, "threads": threads},
        )

    def lower_naive(self, program: Program, folder: Path) -> Artifact:
        """``torch.onnx.export(dynamo=True)`` with its defaults."""
        from vlexport.targets.onnx.lower import MAIN_FILE, write_plain_export

        write_plain_export(program, folder)
        return Artifact(
            target=self.id, path=MAIN_FILE, inputs=program.signature.inputs, outputs=program.signature.outputs
        )

    def lowered_level(self) -> Level[Any]:
        """ONNX models."""
        from vlexport.targets.onnx.level import ONNX

        return ONNX

    def compatibility(self, options: Frozen) -> dict[str, str]:
        """The opset decides which ONNX Runtime is new enough."""
        return {
            "opset": str(cast("OnnxRuntimeOptions", options).opset),
            "domains": "ai.onnx",
            "provider": "CPUExecutionProvider",
        }

    def tools(self) -> dict[str, str]:
        """The exporter's parts and the runtime."""
        names = ("torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime")
        return {name: importlib.metadata.version(name).split("+")[0] for name in names}
