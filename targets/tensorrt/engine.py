"""Whether an engine is compiled, for which GPUs, and compiling it. No torch.

The compiler is TensorRT for RTX, which needs no GPU; its engines fit the GPUs that it supports and no others, so a
device profile with another compute capability gets none. TensorRT itself compiles on the device.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

from vlexport.core.artifact import Artifact, Signature
from vlexport.core.device_profiles import DeviceProfile
from vlexport.core.errors import CapabilityError, UsageError
from vlexport.core.isolate import IsolatedSession
from vlexport.targets.tensorrt import compiler
from vlexport.targets.tensorrt.options import TensorRTOptions
from vlexport.targets.tensorrt.profile import profile_of, unbounded_dims

RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
"""What TensorRT for RTX can be told to compile for. Source: tensorrt_rtx 1.7.1, enum ComputeCapability."""
RTX_DEFAULT = "8.0, 8.6, 8.9, 12.0 and later"
"""What an engine fits that was compiled for nothing in particular. Source: TensorRT for RTX documentation, CPU-only AOT
engines."""

FLOAT8_CAPABILITY = 8.9
"""The first that multiplies FP8. Source: TensorRT support matrix, hardware and precision."""
_COMPILER = "vlexport.targets.tensorrt.compiler:open_session"
_PACKAGES = ("tensorrt-rtx-cu12", "tensorrt-rtx-cu13", "tensorrt-rtx")
_INSTALL = "pip install 'vlexport[tensorrt]'"


@dataclass(frozen=True)
class EngineChoice:
    """Whether an engine is compiled.

    Attributes:
        wanted: Whether one is.
        capabilities: Compute capabilities to compile for; empty leaves them to the compiler.
        reason: Why none is.
    """

    wanted: bool
    capabilities: tuple[str, ...] = ()
    reason: str = ""


def compiler_version() -> str:
    """Version of the installed compiler, or an empty string; ``0`` where no package tells it."""
    if importlib.util.find_spec(compiler.MODULE) is None:
        return ""
    packages = (found for name in _PACKAGES for found in importlib.metadata.distributions(name=name))
    return next((found.version for found in packages), "0")


def choose_engine(
    options: TensorRTOptions, device: DeviceProfile, signature: Signature | None = None, *, precision: str = ""
) -> EngineChoice:
    """Decide from options, device, dims and precision.

    Args:
        options: Of the target.
        device: Its compute capabilities decide.
        signature: Left out where dims are not known yet.
        precision: fp8 leaves out capabilities that do not have it.

    Raises:
        UsageError: VLX0703 for compute capabilities that the compiler or the device does not have.
        CapabilityError: VLX0510 when an engine must be compiled and cannot be.
    """
    asked = tuple(filter(None, options.compute_capabilities.split(",")))
    own = tuple(device.facts["compute-capability"].value.split()) if "compute-capability" in device.facts else ()
    least = FLOAT8_CAPABILITY if precision == "fp8" else 0.0
    known = [each for each in RTX_CAPABILITIES if (not own or each in own) and float(each) >= least]
    for each in asked:
        if each not in known:
            raise UsageError(
                "VLX0703", f"no engine can be compiled for compute capability {each}",
                where="--set tensorrt.compute_capabilities", hint=f"known here: {', '.join(known) or 'none'}",
            )  # fmt: skip
    reason = _why_none(options, device, own, signature)
    if not reason:
        return EngineChoice(True, asked or (tuple(known) if own or least else ()))
    if options.engine == "on":
        raise CapabilityError("VLX0510", f"no engine: {reason}", where="--set tensorrt.engine=on",
                              hint="leave that option out: the ONNX file is made without an engine")  # fmt: skip
    return EngineChoice(False, reason=reason)


def _why_none(
    options: TensorRTOptions, device: DeviceProfile, own: tuple[str, ...], signature: Signature | None
) -> str:
    if options.engine == "off":
        return "switched off by tensorrt.engine=off"
    if own and "tensorrt-rtx" not in device.facts:
        return (
            f"{device.id} has compute capability {', '.join(own)} and runs TensorRT itself, which compiles on the "
            f"device; engines of TensorRT for RTX do not run there"
        )
    if not compiler_version():
        return f"the compiler is not installed: {_INSTALL}"
    if signature is not None and (unbounded := unbounded_dims(signature)):
        return f"{', '.join(unbounded)} has no largest size, which an engine needs: give the dim a range when saving"
    return ""


def missing_compiler(options: TensorRTOptions) -> str:
    """What an engine that must be compiled lacks here, or an empty string."""
    return f"tensorrt_rtx is missing: {_INSTALL}" if options.engine == "on" and not compiler_version() else ""


class EngineRefusedError(Exception):
    """The compiler made no engine.

    Attributes:
        refusals: What it said; a crash or a lack of time is one, too.
    """

    def __init__(self, refusals: tuple[compiler.Refusal, ...]) -> None:
        super().__init__(refusals[0].reason)
        self.refusals = refusals


def compile_engine(
    folder: Path,
    file: str,
    signature: Signature,
    choice: EngineChoice,
    options: TensorRTOptions,
    *,
    inspect: bool = False,
) -> tuple[bytes, compiler.Report]:
    """Compile an ONNX file in a child process.

    Args:
        folder: Where the file and its weights lie.
        file: Its name.
        signature: Gives the optimization profile.
        choice: What to compile for.
        options: Of the target.
        inspect: Have the engine's layers looked at.

    Returns:
        The engine, and what the compiler reports.

    Raises:
        EngineRefusedError: When the compiler refuses the graph, dies or takes too long.
    """
    request = compiler.Request(
        compute_capabilities=choice.capabilities, profile=profile_of(signature), refittable=options.refittable,
        strip_weights=options.strip_weights, tf32=options.tf32, inspect=inspect,
    )  # fmt: skip
    artifact = Artifact(
        target="tensorrt", path=file, inputs=(), outputs=(),
        session_options={compiler.REQUEST: request.model_dump_json()},
    )  # fmt: skip
    try:
        with IsolatedSession(_COMPILER, folder, artifact, timeout_s=options.timeout_s) as session:
            made = session.run({})
    except CapabilityError as error:
        raise EngineRefusedError((compiler.Refusal(reason=error.message),)) from error
    report = compiler.Report.model_validate(json.loads(made["report"].tobytes()))
    if report.refusals:
        raise EngineRefusedError(report.refusals)
    return made["engine"].tobytes(), report
