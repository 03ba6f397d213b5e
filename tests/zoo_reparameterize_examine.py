"""One model of the reparameterization zoo: captured, merged by the pass and by hand, lowered, run and counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from torch import Tensor

from tests.zoo_reparameterize import OTHERS, Row
from tests.zoo_reparameterize_models import pictures, subject
from vlexport.core.artifact import DimRange
from vlexport.core.bundle_schema import PassRecord
from vlexport.core.errors import VlexportError
from vlexport.frontends.capture import capture
from vlexport.ir import dialect
from vlexport.ir.cost import cost
from vlexport.ir.narrow import narrowed
from vlexport.ir.program import Program
from vlexport.passes import CATALOGUE, pass_class
from vlexport.passes.base import Pass
from vlexport.passes.pipeline import TimingHook, run_pipeline
from vlexport.targets import open_target
from vlexport.targets.base import Brief, Target

CHEAP_MACS = 3_000_000_000
"""Up to so many MACs a model is run in float64 as well."""
PASS = "reparameterize"
_NORM = "aten.batch_norm.default"
_PRODUCTS = (
    "Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "Attention", "TransposeMatMul",
)  # fmt: skip


def examine(name: str, folder: Path, *, others: Sequence[str] = OTHERS) -> Row:
    """Reparameterize a model, merge it by hand, and compare.

    Args:
        name: Of the model.
        folder: Existing, for artifacts.
        others: Targets to lower for beside ONNX Runtime.
    """
    made = subject(name)
    try:
        source, by_hand = (
            capture(each, torch.zeros(1, *made.shape), own=False).program
            for each in (made.module, made.oracle(made.module))
        )
    except VlexportError as error:
        return Row(name, "refused", reason=_said(error))
    timing, costs = TimingHook(), CostHook()
    passes = considered()
    try:
        ours, _ = run_pipeline(source, passes, gate=None, hooks=[timing, costs])
    except Exception as error:
        return Row(name, "crashed", reason=f"{type(error).__name__}: {error}"[:400])
    before, after = costs.before, cost(ours)
    given = pictures(made.shape)
    with torch.no_grad():
        wanted, merged = _first(made.module(given)), _first(made.oracle(made.module)(given))
    runs = {
        "plain": optimized_by_runtime(folder / "plain", source, given, naive=True),
        "by hand": optimized_by_runtime(folder / "by_hand", by_hand, given, naive=True),
        "ours": optimized_by_runtime(folder / "ours", ours, given, naive=False),
    }
    return Row(
        name,
        "done",
        switch=made.switch,
        layers=(layers(source), layers(by_hand), layers(ours)),
        norms=(len(source.calls(_NORM)), len(ours.calls(_NORM))),
        layers_run=tuple(each.layers for each in runs.values()),  # type: ignore[arg-type]
        norms_run=tuple(each.norms for each in runs.values()),  # type: ignore[arg-type]
        parameters=(before.parameters, after.parameters),
        macs=(before.macs, after.macs),
        macs_oracle=cost(by_hand).macs,
        variation=_short((wanted.std(0).mean() / wanted.abs().max()).item()),
        error=_difference(runs["ours"].output, wanted),
        error_oracle=_difference(merged, wanted),
        error64=_error64(source, passes, given[:2]) if before.macs <= CHEAP_MACS else None,
        seconds=round(timing.seconds.get(PASS, 0.0), 2),
        lowered={target: _lowered(target, ours, folder / target) for target in others},
    )


class CostHook:
    """What the Program costs when the pass begins: passes before it may store more, as tables that are looked up."""

    def before_pass(self, applied: Pass[Any], program: Program) -> None:
        """Count."""
        if applied.name == PASS:
            self.before = cost(program)

    def after_pass(self, applied: Pass[Any], program: Program, record: PassRecord) -> None:
        """Nothing."""


def considered() -> list[Pass[Program]]:
    """Passes in pipeline order up to the one under test; those that merge more behind it would flatter its counts."""
    names = list(CATALOGUE)
    found = [pass_class(each)() for each in names]
    return [each for each in found if each.name == PASS or each.stage in ("normalize", "raise")]


def layers(program: Program) -> int:
    """Calls that multiply by a stored matrix or kernel."""
    products = (
        *dialect.CONVOLUTIONS, *dialect.TRANSPOSED_CONVOLUTIONS, "aten.linear.default", "aten.addmm.default",
        "aten.matmul.default", "aten.mm.default", "aten.bmm.default",
    )  # fmt: skip
    return sum(
        any(each.op == "get_attr" and program.tensors[each.target].ndim > 1 for each in node.all_input_nodes)
        for node in program.calls(*products)
    )


@dataclass(frozen=True)
class Run:
    """What ONNX Runtime makes of an artifact: layers and batch norms of what it runs, and the first output."""

    layers: int
    norms: int
    output: Tensor


def optimized_by_runtime(folder: Path, program: Program, given: Tensor, *, naive: bool) -> Run:
    """Lower a Program, let ONNX Runtime optimise it at its highest level, look at what it runs, and run it.

    Args:
        folder: Not existing yet.
        program: One input.
        given: Values of it.
        naive: Lower as PyTorch's exporter does by itself.
    """
    target = open_target("onnxruntime")
    folder.mkdir()
    if naive:
        artifact = target.lower_naive(program, folder)
    else:
        brief = Brief(target.Options())
        artifact = target.lower(_spelled(target, program, brief), folder, brief)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # it warns that the saved graph is for this machine
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    session = onnxruntime.InferenceSession(str(folder / artifact.path), options, providers=["CPUExecutionProvider"])
    whole = session.run(None, {session.get_inputs()[0].name: given.numpy()})
    graph = onnx.load(folder / "optimized.onnx", load_external_data=False).graph
    stored = {each.name for each in graph.initializer if len(each.dims) > 1}
    matrices = sum(node.op_type in _PRODUCTS and bool(stored & {*node.input[:2]}) for node in graph.node)
    return Run(matrices, sum(node.op_type == "BatchNormalization" for node in graph.node), torch.from_numpy(whole[0]))


def _spelled(target: Target, program: Program, brief: Brief) -> Program:
    """The Program as a target wants it."""
    return run_pipeline(program, target.program_passes(brief), gate=None)[0]


def _lowered(name: str, ours: Program, folder: Path) -> str:
    """``yes``, or why the target does not take the graph; in fp32, at the batch that it is built for."""
    target = open_target(name)
    without_engine = {"engine": "off"} if name == "tensorrt" else {}
    brief = Brief(target.check_options(without_engine), precision="fp32")
    program = narrowed(ours, dict.fromkeys(ours.signature.dims, DimRange(min=1, max=1)))
    try:
        program = _spelled(target, program, brief)
        for problem in target.problems(program, brief):
            return _said(problem)
        target.lower(program, folder, brief)
    except VlexportError as error:
        return _said(error)
    return "yes"


def _said(error: VlexportError) -> str:
    return f"{error.code}: {error.message}" + (f" ({error.where})" if error.where else "")


def _first(outputs: Any) -> Tensor:
    return outputs[0] if isinstance(outputs, (tuple, list)) else outputs


def _difference(found: Tensor, wanted: Tensor) -> float:
    return _short(((found - wanted).abs().max() / wanted.abs().max()).item())


def _short(value: float) -> float:
    return float(f"{value:.1e}")


def _error64(source: Program, passes: Sequence[Pass[Program]], given: Tensor) -> float:
    """Of the passes applied to a float64 copy: merged weights are rounded to float64 then."""
    twin = source.double()
    after, _ = run_pipeline(twin, passes, gate=None)
    return _difference(after.run(given.double())[0], twin.run(given.double())[0])
