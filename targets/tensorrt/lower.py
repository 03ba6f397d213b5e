"""Program → typed ONNX, an engine where one can be compiled, and the command lines for the device."""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path
from typing import cast

import onnx_ir

from vlexport.core.artifact import Artifact
from vlexport.core.device_profiles import DeviceProfile
from vlexport.core.errors import CapabilityError, UsageError, VlexportError
from vlexport.core.scheme import QUANTIZED
from vlexport.ir.program import Program
from vlexport.targets.base import Brief
from vlexport.targets.onnx.lower import onnx_with_lines, write_onnx
from vlexport.targets.onnx.model import describe
from vlexport.targets.onnx.op_limits import refused
from vlexport.targets.onnx.quantized import unexpressible
from vlexport.targets.tensorrt.commands import device_commands
from vlexport.targets.tensorrt.compiler import Refusal
from vlexport.targets.tensorrt.engine import (
    RTX_DEFAULT,
    EngineChoice,
    EngineRefusedError,
    choose_engine,
    compile_engine,
)
from vlexport.targets.tensorrt.engine_ledger import remember_engine
from vlexport.targets.tensorrt.op_support import Problem, largest_opset, runtime_of, unsupported
from vlexport.targets.tensorrt.options import TensorRTOptions

PREFERRED_OPSET = 20
"""What every TensorRT of version 10 and later reads."""
FALLBACK_FILE = "fallback.onnx"
AS_WRITTEN: dict[str, str | int | float | bool] = {"graph_optimization": "none"}
"""How ONNX Runtime stands in for TensorRT where values are rounded: its integer kernels saturate on some processors,
and its ReluQuantRewrite is wrong for float8 (measured)."""
_NEEDS_GPU = "CUDA_SUCCESS"


def choose_opset(options: TensorRTOptions, device: DeviceProfile) -> int:
    """The opset to lower to.

    Raises:
        UsageError: VLX0703 when one is asked for that the device does not read.
    """
    newest = largest_opset(device)
    if options.opset == "auto":
        return min(PREFERRED_OPSET, newest)
    if options.opset > newest:
        raise UsageError(
            "VLX0703", f"{runtime_of(device)} reads opsets up to {newest}, not {options.opset}",
            where="--set tensorrt.opset", hint=f"ask for {newest} or less, or leave it out",
        )  # fmt: skip
    return options.opset


def problems_of(program: Program, brief: Brief) -> list[VlexportError]:
    """What lowering would stop at, or TensorRT would refuse, found without writing or compiling anything."""
    options = cast("TensorRTOptions", brief.options)
    try:
        opset = choose_opset(options, brief.device)
        choose_engine(options, brief.device, program.signature, precision=brief.precision)
        if stopping := [*refused(program), *unexpressible(program, opset=opset)]:
            return stopping
        model, lines = onnx_with_lines(program, opset=opset)
    except VlexportError as error:
        return [error]
    return [each.error(brief.device) for each in unsupported(model, brief.device, lines)]


def lower_program(program: Program, folder: Path, brief: Brief) -> Artifact:
    """Write ``NAME.onnx`` (with ``weights.bin`` when large), ``NAME.engine`` and ``NAME.commands.txt``.

    Beside a quantized graph lies ``fallback.onnx``, where the brief brings one.

    Raises:
        CapabilityError: VLX0503 when an operator cannot be expressed, or the device's TensorRT is known to refuse it;
            VLX0510 when an engine must be compiled and cannot be.
        UsageError: VLX0703 when options and device do not fit.
    """
    options = cast("TensorRTOptions", brief.options)
    device, signature, name = brief.device, program.signature, brief.name
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise UsageError("VLX0703", f"a component cannot be called {name!r}", hint="use letters, digits, '_', '.', '-'")
    opset = choose_opset(options, device)
    choice = choose_engine(options, device, signature, precision=brief.precision)
    quantized = brief.precision in QUANTIZED
    model, lines = onnx_with_lines(program, opset=opset)
    problems = unsupported(model, device, lines)
    if problems and options.check_operators and _is_known(device):
        raise problems[0].error(device)
    facts = {"refused_by_tensorrt": _listed(problems)} if problems else {}
    with tempfile.TemporaryDirectory(prefix="vlexport-") as place:
        scratch = Path(place)
        file = write_onnx(model, scratch, file=f"{name}.onnx").name
        engine = f"{name}.engine"
        if choice.wanted:
            try:
                data, report = compile_engine(scratch, file, signature, choice, options, inspect=quantized)
            except EngineRefusedError as refusal:
                error = _engine_error(refusal.refusals, model, lines, options)
                if options.engine == "on":
                    raise error from refusal
                choice = EngineChoice(False, reason=error.message + (f" ({error.where})" if error.where else ""))
            else:
                (scratch / engine).write_bytes(data)
                remember_engine(data)
                facts |= {
                    "engine": engine,
                    "engine_kind": "rtx",
                    "engine_compiler": f"tensorrt_rtx {report.version}",
                    "engine_compute_capabilities": ", ".join(choice.capabilities) or RTX_DEFAULT,
                }
                if report.products:
                    facts["engine_products"] = ", ".join(f"{n} {types}" for types, n in report.products.items())
        if not choice.wanted:
            facts |= {"engine": "none", "engine_reason": choice.reason}
        made = engine if choice.wanted else ""
        if brief.fallback is not None:
            beside, _ = onnx_with_lines(brief.fallback, opset=opset)
            write_onnx(beside, scratch, file=FALLBACK_FILE, weights="fallback.bin")
            facts["fallback"] = f"{FALLBACK_FILE}, the same in fp16"
        commands = device_commands(
            name, file, signature, options, device, engine=made, fallback=FALLBACK_FILE if brief.fallback else ""
        )
        (scratch / f"{name}.commands.txt").write_text(commands, encoding="utf-8", newline="\n")
        folder.mkdir(parents=True, exist_ok=True)
        for each in sorted(scratch.iterdir()):
            shutil.move(each, folder / each.name)
    return Artifact(
        target="tensorrt",
        path=file,
        inputs=signature.inputs,
        outputs=signature.outputs,
        session_options={"threads": brief.threads, **(AS_WRITTEN if quantized else {})},
        facts=facts,
    )


def _is_known(device: DeviceProfile) -> bool:
    """Whether it is known which TensorRT reads the graph; a portable file may meet a newer one."""
    return "tensorrt" in device.facts or "tensorrt-rtx" in device.facts


def _listed(problems: list[Problem]) -> str:
    more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
    return "; ".join(f"{each.where}: {each.reason}" for each in problems[:3]) + more


def _engine_error(
    refusals: tuple[Refusal, ...], model: onnx_ir.Model, lines: dict[str, str], options: TensorRTOptions
) -> CapabilityError:
    first = refusals[0]
    hint = "leave tensorrt.engine=on out: the ONNX file is made without an engine"
    if (options.refittable or options.strip_weights) and _NEEDS_GPU in first.reason:
        return CapabilityError(
            "VLX0510", "TensorRT for RTX needs a GPU to compile an engine that is refittable or without weights",
            where="--set tensorrt.strip_weights" if options.strip_weights else "--set tensorrt.refittable", hint=hint,
        )  # fmt: skip
    node = _concerned(first, model)
    where = describe(node) if node is not None else first.operator
    if node is not None and (line := lines.get(str(node.name))):
        where += f", {line}"
    more = f" (and {len(refusals) - 1} more)" if len(refusals) > 1 else ""
    return CapabilityError(
        "VLX0510", f"TensorRT for RTX compiled no engine: {first.reason}{more}", where=where, hint=hint
    )


def _concerned(refusal: Refusal, model: onnx_ir.Model) -> onnx_ir.Node | None:
    """The node that a refusal is about: the one it names, or names in its text, or the only one of its operator."""
    nodes = list(onnx_ir.traversal.RecursiveGraphIterator(model.graph))
    if refusal.node:
        return next((node for node in nodes if node.name == refusal.node), None)
    words = set(re.findall(r"[\w.]+", refusal.reason))
    named = [node for node in nodes if node.name in words]
    same = [node for node in nodes if node.op_type == refusal.operator]
    return named[0] if named else same[0] if len(same) == 1 else None
