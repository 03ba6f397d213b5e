"""Running ONNX with ONNX Runtime: artifacts of any target that reads ONNX, and graphs between passes. No torch."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnxruntime

from vlexport.core.artifact import Array, Artifact, Session, Timing, artifact_file
from vlexport.core.errors import CapabilityError
from vlexport.targets.onnx.guard import require_contained
from vlexport.targets.onnx.operator_times import operator_times
from vlexport.targets.onnx.providers import CPU, FLOATS, PROVIDERS, Opened, missing_provider, wanted_providers

_LEVELS = {
    "none": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
_ERRORS_ONLY = 3
MAX_THREADS = 1024
_MAX_BLOCKS = 1 << 20


class OnnxRuntimeSession(Session):
    """One ONNX Runtime session on the recorded provider, by default the CPU's.

    Where a provider is missing and the artifact allows the CPU to stand in, numbers are right and times mean nothing.

    Raises:
        BundleError: VLX0605 when the artifact keeps weights outside its folder.
        CapabilityError: VLX0505 when the runtime refuses the artifact, VLX0508 when it lacks the provider, VLX0509 when
            the artifact holds compiled code.
    """

    timing: Timing = "real"

    def __init__(self, folder: Path, artifact: Artifact, threads: int) -> None:
        super().__init__(artifact.inputs, artifact.outputs)
        require_contained(folder, artifact.path)
        self._file, self._recorded = artifact_file(folder, artifact), (artifact, threads)
        options = _options(artifact, threads)
        recorded = artifact.session_options
        provider = str(recorded.get("provider", CPU))
        stand_in = bool(recorded.get("provider_fallback", False))
        missing = missing_provider(provider, onnxruntime.get_available_providers())
        if missing is not None and not stand_in:
            raise missing
        self._providers = _providers(artifact, CPU if missing else provider, threads)
        try:
            self._session = onnxruntime.InferenceSession(str(self._file), options, providers=self._providers)
        except Exception as error:  # onnxruntime's exceptions share no public base class
            raise CapabilityError(
                "VLX0505", f"ONNX Runtime {onnxruntime.__version__} refuses {artifact.path}: {_said(error, folder)}",
                where=artifact.path, hint="see `vlexport verify` for whether the file is intact",
            ) from error  # fmt: skip
        missing = missing_provider(provider, self._session.get_providers())
        if missing is not None and not stand_in:  # its libraries did not load: ONNX Runtime goes on with the CPU
            raise missing
        if missing is not None:
            self.timing = "emulated"
        self._names = [spec.name for spec in artifact.outputs]

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run once."""
        if self._session is None:
            raise CapabilityError("VLX0506", "the session is closed")
        return dict(zip(self._names, self._session.run(None, self.checked(inputs)), strict=True))

    def operator_times(self, inputs: Mapping[str, Array], *, runs: int) -> dict[str, tuple[int, float]]:
        """By a second session that is opened with the profiler on, on the same provider."""
        if self._session is None:
            raise CapabilityError("VLX0506", "the session is closed")
        values = self.checked(inputs)
        with tempfile.TemporaryDirectory(prefix="vlexport-") as scratch:
            options = _options(*self._recorded)
            options.enable_profiling, options.profile_file_prefix = True, str(Path(scratch) / "trace")
            watched = onnxruntime.InferenceSession(str(self._file), options, providers=self._providers)
            for _ in range(runs):
                watched.run(None, values)
            return operator_times(Path(watched.end_profiling()), runs=runs)

    def close(self) -> None:
        """Drop the session; ONNX Runtime frees its memory with it."""
        self._session = None


def open_session(folder: Path, artifact: Artifact, threads: int) -> Session:
    """Open an artifact in this process."""
    return OnnxRuntimeSession(folder, artifact, threads)


def _providers(artifact: Artifact, name: str, threads: int) -> Opened:
    """What is opened, as the artifact records it."""
    recorded = artifact.session_options
    return wanted_providers(
        name, threads=threads or int(recorded.get("threads", 0)), floats=str(recorded.get("provider_floats", FLOATS[0]))
    )


def _options(artifact: Artifact, threads: int) -> onnxruntime.SessionOptions:
    """Session options as the artifact records them."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.add_session_config_entry("session.load_model_format", "ONNX")  # also of a file that ends in .ort
    recorded = artifact.session_options
    _require_known(artifact)
    options.intra_op_num_threads = threads or int(recorded.get("threads", 0))
    options.graph_optimization_level = _LEVELS[str(recorded.get("graph_optimization", "all"))]
    options.enable_cpu_mem_arena = bool(recorded.get("memory_arena", True))
    options.enable_mem_pattern = bool(recorded.get("memory_pattern", True))
    spinning = "1" if recorded.get("allow_spinning", True) else "0"
    options.add_session_config_entry("session.intra_op.allow_spinning", spinning)
    options.add_session_config_entry("session.dynamic_block_base", str(recorded.get("dynamic_block_base", 0)))
    return options


def _require_known(artifact: Artifact) -> None:
    """A bundle from elsewhere may record anything: refuse what would be no option, or start a million threads."""
    recorded = artifact.session_options
    checks: dict[str, Callable[[Any], bool]] = {
        "threads": lambda value: type(value) is int and 0 <= value <= MAX_THREADS,
        "dynamic_block_base": lambda value: type(value) is int and 0 <= value <= _MAX_BLOCKS,
        "graph_optimization": lambda value: value in _LEVELS,
        "provider": lambda value: value in PROVIDERS,
        "provider_floats": lambda value: value in FLOATS,
    }
    for name, holds in checks.items():
        if name in recorded and not holds(recorded[name]):
            raise CapabilityError(
                "VLX0505", f"the artifact records {name}={str(recorded[name])[:40]!r}, which is no such option",
                where=artifact.path, hint="build the bundle again",
            )  # fmt: skip


def _said(error: Exception, folder: Path) -> str:
    """What the runtime says, without the place of the artifact on this machine."""
    said = str(error).strip().replace(f"{folder}{os.sep}", "")
    return said.splitlines()[0] if said else type(error).__name__
