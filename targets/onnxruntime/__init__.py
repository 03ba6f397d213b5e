"""onnxruntime: ONNX for CPU boxes (fp32; int8 with calibration samples; fp16 to halve the weights)."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from pydantic import Field

from vlexport.core.artifact import Artifact, Frozen
from vlexport.core.device_profiles import THIS, DeviceProfile
from vlexport.core.devices import this_machine
from vlexport.core.errors import CapabilityError, VlexportError
from vlexport.core.scheme import QuantScheme, read_schemes
from vlexport.targets.base import Brief, LoweredPass, PlainProduct, Probe, Target
from vlexport.targets.onnx.providers import CPU, FLOATS, OPENVINO, PROVIDERS, missing_provider
from vlexport.targets.onnxruntime.fusions import is_worth_it
from vlexport.targets.onnxruntime.minimum import oldest_release

if TYPE_CHECKING:
    from torch.fx import Node

    from vlexport.core.bundle_schema import Change
    from vlexport.ir.program import Program
    from vlexport.passes.level import Level
    from vlexport.passes.quantization.decisions import Decisions, LayerDecision


_FP16_NOTE = "asked for; weights take half the space, the CPU provider computes most of it in fp32 and gains no speed"


class OnnxRuntimeOptions(Frozen):
    """Options of the onnxruntime target.

    Attributes:
        opset: Version of ONNX's standard domain.
        graph_optimization: ONNX Runtime's own optimisation level when the artifact is opened.
        allow_spinning: Idle threads wait in a loop for some 40 ms, which wakes them sooner. Off: a core less is busy.
        memory_arena: Keep freed memory for the next run. Off: it goes back to the system, at the price of time.
        memory_pattern: Plan the memory of a run as one block, by the shapes of an earlier one.
        dynamic_block_base: 0 cuts an operator's work into blocks of one size; above 0, blocks shrink towards the end,
            so that threads end together (ONNX Runtime recommends 4).
        optimize: Run optimize-onnx (onnxscript's optimizer) on the lowered graph. Off: the exporter leaves it nothing.
        simplify: Run simplify-onnx (onnxsim) before it. Off: fewer nodes, no gain in speed shown.
        provider: Execution provider that opens the artifact, beside the CPU's for operators that it lacks. Where it is
            missing, opening is an error. Only cpu and openvino have been run by us.
        provider_fallback: The CPU may stand in for a missing provider; its times are then not measured.
        provider_floats: What the OpenVINO provider computes floats in: f32, or bf16 (8 bits of each value, faster where
            the processor has it). Other providers do not look at it.
        gather_rows: Write a selection of whole tokens as a gather of rows, not of values one by one. Left out, it is
            done.
        part_norms: Write a sum that only a norm reads so that ONNX Runtime does not join both into a slower operator.
            Left out, it is done.
        fuse_attention: Write attention as one operator of ONNX Runtime's own (com.microsoft.Attention), which no other
            runtime opens. Left out, it is done where that was measured to be faster on such a processor.
        fuse_biased_attention: The same where a mask or bias is added to the scores. Left out, it is as fuse_attention
            is given, or done where it was itself measured to be faster.
        fuse_multi_head_attention: The same where queries, keys and values are not projected from one value
            (com.microsoft.MultiHeadAttention). Left out, it is done where that was measured to be faster and
            fuse_attention is not given as false.
        fuse_qattention: The same where projections are in integers (com.microsoft.QAttention).
        fuse_dynamic_linear: Write linears that are rounded by the range of each run as one operator of ONNX Runtime's
            own (com.microsoft.DynamicQuantizeMatMul). Left out, it is done: without, they are slower than in float.
    """

    opset: int = Field(default=20, ge=18, le=24)
    graph_optimization: str = Field(default="all", pattern="^(none|basic|extended|all)$")
    allow_spinning: bool = True
    memory_arena: bool = True
    memory_pattern: bool = True
    dynamic_block_base: int = Field(default=0, ge=0, le=64)
    optimize: bool = False
    simplify: bool = False
    provider: str = Field(default=CPU, pattern=f"^({'|'.join(PROVIDERS)})$")
    provider_fallback: bool = False
    provider_floats: str = Field(default=FLOATS[0], pattern=f"^({'|'.join(FLOATS)})$")
    gather_rows: bool | None = None
    part_norms: bool | None = None
    fuse_attention: bool | None = None
    fuse_biased_attention: bool | None = None
    fuse_multi_head_attention: bool | None = None
    fuse_qattention: bool | None = None
    fuse_dynamic_linear: bool | None = None


_WORTH_TRYING: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("graph_optimization", ("all", "extended", "basic", "none")),
    ("allow_spinning", ("true", "false")),
    ("memory_pattern", ("true", "false")),
    ("memory_arena", ("true", "false")),
    ("dynamic_block_base", ("0", "4")),
)
"""Left out: parallel execution, which takes threads of its own beside those of --threads, and denormals as zero, which
ONNX Runtime sets for the whole process when its first session is opened."""


def _session_options(options: OnnxRuntimeOptions) -> dict[str, str | int | float | bool]:
    names = [name for name, _ in _WORTH_TRYING]
    if options.provider != CPU:
        names += ["provider", "provider_fallback"]
    if options.provider == OPENVINO:
        names.append("provider_floats")
    return {name: getattr(options, name) for name in names}


def _biased_too(options: OnnxRuntimeOptions, flags: Iterable[str]) -> bool:
    """Whether attention with a mask becomes one operator where nobody has said so: as without, where that is given."""
    given = options.fuse_attention
    return is_worth_it("fuse-biased-attention", "fp32", flags) if given is None else given


def _as_text(value: object) -> str:
    return str(value).lower()


class OnnxRuntimeTarget(Target):
    """ONNX for ONNX Runtime's CPU provider, or another one that is asked for."""

    id: ClassVar[str] = "onnxruntime"
    summary: ClassVar[str] = "ONNX model for ONNX Runtime on CPUs"
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "fp16", "int8")
    precision_reason: ClassVar[str] = "the CPU provider computes in fp32"
    Options: ClassVar[type[Frozen]] = OnnxRuntimeOptions
    session_entry: ClassVar[str] = "vlexport.targets.onnxruntime.session:open_session"
    lowered: ClassVar[tuple[LoweredPass, ...]] = (
        LoweredPass(name="simplify-onnx", value="vlexport.targets.onnx.simplify_onnx:SimplifyOnnx", option="simplify"),
        LoweredPass(name="optimize-onnx", value="vlexport.targets.onnx.optimize_onnx:OptimizeOnnx", option="optimize"),
        LoweredPass(
            name="gather-rows", value="vlexport.targets.onnxruntime.gather_rows:GatherRows", option="gather_rows",
        ),
        LoweredPass(
            name="part-norms", value="vlexport.targets.onnxruntime.part_norms:PartNorms", option="part_norms",
        ),
        LoweredPass(
            name="fuse-qattention", value="vlexport.targets.onnxruntime.fuse_qattention:FuseQattention",
            option="fuse_qattention", searched=True,
        ),
        LoweredPass(
            name="fuse-attention", value="vlexport.targets.onnxruntime.fuse_attention:FuseAttention",
            option="fuse_attention", searched=True,
        ),
        LoweredPass(
            name="fuse-biased-attention",
            value="vlexport.targets.onnxruntime.fuse_biased_attention:FuseBiasedAttention",
            option="fuse_biased_attention", searched=True,
        ),
        LoweredPass(
            name="fuse-multi-head-attention",
            value="vlexport.targets.onnxruntime.fuse_multi_head_attention:FuseMultiHeadAttention",
            option="fuse_multi_head_attention", searched=True,
        ),
        LoweredPass(
            name="fuse-dynamic-linear", value="vlexport.targets.onnxruntime.fuse_dynamic_linear:FuseDynamicLinear",
            option="fuse_dynamic_linear", searched=True,
        ),
    )  # fmt: skip

    def schemes(self) -> tuple[QuantScheme, ...]:
        """Those of ``schemes.json``."""
        return read_schemes(__name__)

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

    def probe_for(self, brief: Brief) -> Probe:
        """Not available where the runtime lacks the provider that is asked for and nothing may stand in for it."""
        found, options = self.probe(), cast("OnnxRuntimeOptions", brief.options)
        missing = missing_provider(options.provider, found.providers)
        if not found.available or missing is None or options.provider_fallback:
            return found
        why = f"{missing.message}; {missing.hint}"
        return found.model_copy(update={"available": False, "timing": "none", "reason": why})

    def computes_in(self, brief: Brief) -> str:
        """bf16 for an fp32 artifact whose floats OpenVINO may round."""
        options = cast("OnnxRuntimeOptions", brief.options)
        rounds = options.provider == OPENVINO and options.provider_floats == "bf16"
        return "bf16" if rounds and brief.precision == "fp32" else brief.precision

    def choose_precision(self, wished: str | None) -> tuple[str, str]:
        """fp16 with what it is good for here; bf16 is refused with the reason."""
        if wished == "bf16":
            raise CapabilityError(
                "VLX0502", f"{self.id} does not run bf16: its CPU provider has no bf16 kernels and opens no such graph",
                where="--precision",
                hint=f"it runs: {', '.join(self.precisions)}; or let OpenVINO compute in it: "
                f"--set {self.id}.provider={OPENVINO} --set {self.id}.provider_floats=bf16",
            )  # fmt: skip
        precision, reason = super().choose_precision(wished)
        return precision, _FP16_NOTE if precision == "fp16" else reason

    def settled(self, options: Frozen, *, precision: str, device: DeviceProfile) -> Frozen:
        """Rewrites that the options leave open, on the CPU by what was measured, elsewhere off."""
        chosen = cast("OnnxRuntimeOptions", options)
        flags = this_machine().instruction_set if device.id == THIS else device.instruction_set
        own = chosen.provider == CPU and precision in ("fp32", "int8")
        worth = {
            "gather_rows": chosen.provider == CPU,
            "part_norms": chosen.provider == CPU,
            "fuse_attention": own and is_worth_it("fuse-attention", "fp32", flags),
            "fuse_biased_attention": own and _biased_too(chosen, flags),
            "fuse_multi_head_attention": own
            and chosen.fuse_attention is not False
            and is_worth_it("fuse-multi-head-attention", "fp32", flags),
            "fuse_qattention": own and precision == "int8" and is_worth_it("fuse-qattention", "int8", flags),
            "fuse_dynamic_linear": own and precision == "int8",
        }
        return chosen.model_copy(update={k: v for k, v in worth.items() if getattr(chosen, k) is None})

    def emit_quant(
        self, program: Program, decisions: Decisions, nodes: Mapping[str, Node], layer: LayerDecision
    ) -> Change:
        """As integer kernels want it."""
        from vlexport.targets.onnxruntime.emit_quant import emit_quant

        return emit_quant(program, decisions, nodes, layer)

    def problems(self, program: Program, brief: Brief) -> Sequence[VlexportError]:
        """Calls that torch's exporter refuses, or the opset has no spelling for."""
        from vlexport.targets.onnx.op_limits import refused
        from vlexport.targets.onnx.quantized import unexpressible

        return [*refused(program), *unexpressible(program, opset=cast("OnnxRuntimeOptions", brief.options).opset)]

    def lower(self, program: Program, folder: Path, brief: Brief) -> Artifact:
        """Write ``main.onnx``."""
        from vlexport.targets.onnx.lower import MAIN_FILE, onnx_from_program, write_onnx
        from vlexport.targets.onnx.model import OnnxModel
        from vlexport.targets.onnx.rewriting import domains
        from vlexport.targets.onnxruntime.norm_biases import give_biases

        chosen = cast("OnnxRuntimeOptions", brief.options)
        lowered = OnnxModel(onnx_from_program(program, opset=chosen.opset), program.signature)
        give_biases(lowered)
        lowered = brief.rewrite(lowered) if brief.rewrite is not None else lowered
        write_onnx(lowered.model, folder)
        return Artifact(
            target=self.id,
            path=MAIN_FILE,
            inputs=program.signature.inputs,
            outputs=program.signature.outputs,
            facts=domains(lowered),
            session_options={**_session_options(chosen), "threads": brief.threads},
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

    def tunables(self, options: Frozen) -> Mapping[str, tuple[str, ...]]:
        """Session options and the level of graph optimisation, the likeliest first; of OpenVINO's, how it computes."""
        chosen = cast("OnnxRuntimeOptions", options)
        if chosen.provider == OPENVINO:
            return {"provider_floats": tuple(each for each in FLOATS if each != chosen.provider_floats)}
        return {
            name: tuple(v for v in values if v != _as_text(getattr(options, name))) for name, values in _WORTH_TRYING
        }

    def relowered(self, options: Frozen) -> Mapping[str, tuple[str, ...]]:
        """The OpenVINO provider, where this machine's runtime has it."""
        offered = PROVIDERS[OPENVINO] in self.probe().providers
        return {"provider": (OPENVINO,)} if offered and cast("OnnxRuntimeOptions", options).provider == CPU else {}

    def retuned(self, artifact: Artifact, options: Frozen) -> Artifact:
        """The same model file with other session options."""
        chosen = _session_options(cast("OnnxRuntimeOptions", options))
        return artifact.model_copy(update={"session_options": {**artifact.session_options, **chosen}})

    def plain_products(self, artifact: Artifact, precision: str, folder: Path) -> Sequence[PlainProduct]:
        """In fp32 and, for an artifact in integers, in int8; none for another provider than the CPU's."""
        from vlexport.targets.onnxruntime.plain_product import plain_product

        if artifact.session_options.get("provider", CPU) != CPU:
            return ()
        found = [plain_product(folder, "fp32", artifact)]
        return [*found, plain_product(folder, "int8", artifact)] if precision == "int8" else found

    def compatibility(self, brief: Brief) -> dict[str, str]:
        """The opset decides which ONNX Runtime is new enough."""
        oldest = oldest_release(cast("OnnxRuntimeOptions", brief.options).opset)
        return {
            **({"onnxruntime": f"{oldest} or later"} if oldest else {}),
            "opset": str(cast("OnnxRuntimeOptions", brief.options).opset),
            "domains": "ai.onnx",
            "provider": PROVIDERS[cast("OnnxRuntimeOptions", brief.options).provider],
        }

    def tools(self) -> dict[str, str]:
        """The exporter's parts and the runtime."""
        names = ("torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime")
        return {name: importlib.metadata.version(name).split("+")[0] for name in names}
