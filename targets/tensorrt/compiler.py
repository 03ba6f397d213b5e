"""TensorRT for RTX's parser and builder behind the channel of ``core/isolate``: an ONNX file becomes an engine.

It runs in a child process, for it is a C++ compiler that may abort or never end. It needs no GPU. No torch.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from vlexport.core.artifact import Array, Artifact, Frozen, Session, artifact_file
from vlexport.targets.tensorrt.engine_layers import products
from vlexport.targets.tensorrt.profile import InputRange

MODULE = "tensorrt_rtx"
REQUEST = "request"


class Request(Frozen):
    """What to compile.

    Attributes:
        compute_capabilities: ``8.9`` and so on; empty: what the compiler covers by default.
        profile: Shapes of the inputs with dynamic dims.
        refittable: As the option.
        strip_weights: As the option.
        tf32: As the option.
        inspect: Report which types the layers of the engine multiply.
    """

    compute_capabilities: tuple[str, ...] = ()
    profile: tuple[InputRange, ...] = ()
    refittable: bool = False
    strip_weights: bool = False
    tf32: bool = False
    inspect: bool = False


class Refusal(Frozen):
    """Something that the parser or the builder said.

    Attributes:
        node: Name of the node in the graph, where it says so.
        operator: Its operator, where it says so.
        reason: First line of what it said.
    """

    node: str = ""
    operator: str = ""
    reason: str


class Report(Frozen):
    """What came of it.

    Attributes:
        version: Of the compiler.
        refusals: Empty when there is an engine.
        products: Types that a layer multiplies → how many do; empty unless it was asked for.
    """

    version: str
    refusals: tuple[Refusal, ...] = ()
    products: dict[str, int] = Field(default_factory=dict)


class CompilerSession(Session):
    """Compiles the ONNX file of an artifact whose ``request`` option is a :class:`Request` as JSON."""

    def __init__(self, folder: Path, artifact: Artifact) -> None:
        super().__init__((), ())
        self._file = artifact_file(folder, artifact)
        self._request = Request.model_validate_json(str(artifact.session_options[REQUEST]))

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """``engine`` and ``report`` (JSON), both uint8[bytes]; the engine is empty where there is none."""
        engine, report = _compiled(self._file, self._request)
        return {
            "engine": np.frombuffer(engine, np.uint8),
            "report": np.frombuffer(json.dumps(report.model_dump()).encode(), np.uint8),
        }

    def close(self) -> None:
        """Nothing is held."""


def open_session(folder: Path, artifact: Artifact, threads: int) -> Session:
    """Ready to compile; the compiler is imported here, so that its absence is told as a refusal."""
    importlib.import_module(MODULE)
    return CompilerSession(folder, artifact)


def configured(trt: Any, builder: Any, request: Request) -> Any:
    """A builder configuration for a request."""
    config = builder.create_builder_config()
    if request.inspect:
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    flags = trt.BuilderFlag
    if not request.tf32:
        config.clear_flag(flags.TF32)
    if request.strip_weights:
        config.set_flag(flags.STRIP_PLAN)
    if request.refittable:
        config.set_flag(flags.REFIT)
    elif request.strip_weights:  # the weights come back as they were
        config.set_flag(flags.REFIT_IDENTICAL)
    if request.compute_capabilities:
        config.num_compute_capabilities = len(request.compute_capabilities)
        for position, found in enumerate(request.compute_capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, "SM" + found.replace(".", "")), position)
    if request.profile:
        profile = builder.create_optimization_profile()
        for each in request.profile:
            profile.set_shape(each.name, each.min, each.opt, each.max)
        config.add_optimization_profile(profile)
    return config


def _compiled(file: Path, request: Request) -> tuple[bytes, Report]:
    trt = importlib.import_module(MODULE)
    said: list[str] = []
    detailed: list[str] = []

    class Log(trt.ILogger):  # type: ignore[name-defined]
        """Keeps errors: the builder tells its reasons nowhere else. The layers of an engine, too."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                said.append(message)
            elif request.inspect and severity == trt.ILogger.Severity.VERBOSE:
                detailed.append(message)

    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    version = str(trt.__version__)
    if not parser.parse_from_file(str(file)):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        refusals = tuple(
            Refusal(
                node=error.node_name(),
                operator=error.node_operator() or error.func().removeprefix("import"),
                reason=_plain(error.desc(), file),
            )
            for error in errors
        )
        return b"", Report(version=version, refusals=refusals or (_said(said, file),))
    engine = builder.build_serialized_network(network, configured(trt, builder, request))
    if engine is None:
        return b"", Report(version=version, refusals=(_said(said, file),))
    return bytes(memoryview(engine)), Report(version=version, products=products(detailed))


def _said(messages: list[str], file: Path) -> Refusal:
    return Refusal(reason=_plain(messages[0], file) if messages else "it gave no reason")


def _plain(message: str, file: Path) -> str:
    """The first line that says something, without the place of the file on this machine."""
    lines = [line.strip() for line in message.replace(f"{file.parent}/", "").splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith("Invalid Node - ")]
    return (telling or lines or [""])[0][:400]
