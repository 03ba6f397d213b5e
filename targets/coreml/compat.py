"""The private or moving parts of coremltools, in one place. Checked on coremltools 9.0. No torch.

coremltools reports on standard error: at import that prediction needs macOS and that this torch is newer than the one
it was tested with, later progress bars and every integer that it stores in 32 bits. Nothing of it concerns a user.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

CONVERSION_ERRORS = (
    NotImplementedError, ValueError, RuntimeError, TypeError, KeyError, IndexError, AttributeError, AssertionError,
)  # fmt: skip
"""What coremltools raises on an operator that it does not take."""

INEXACT_PASSES = ("common::fuse_elementwise_to_batchnorm",)
"""Passes of its pipeline that change what is computed. This one makes ``x·a + b`` a batch_norm with variance 1 and
epsilon 1e-5, which scales by 0.999995."""

_NODE_NAMES = (re.compile(r"Unsupported fx node (\S+), kind"), re.compile(r"^node (\S+) \("))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what coremltools prints, logs and warns of."""
    logger = logging.getLogger("coremltools")
    level, propagates = logger.level, logger.propagate
    logger.setLevel(logging.CRITICAL)
    logger.propagate = False
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)
            logger.propagate = propagates


def coremltools() -> Any:
    """The module, imported without its messages.

    Raises:
        ImportError: It is not installed.
    """
    with quiet():
        return importlib.import_module("coremltools")


def exact_pipeline(*, copies: bool) -> Any:
    """coremltools' default pipeline without :data:`INEXACT_PASSES`; with ``copies``, ``x · 1`` is not taken for x."""
    pipeline = coremltools().PassPipeline.DEFAULT
    pipeline.remove_passes({*INEXACT_PASSES, *(("common::noop_elimination",) if copies else ())})
    return pipeline


def operator_types() -> frozenset[str]:
    """Names of all operators of MIL (``softmax``)."""
    with quiet():
        registry = importlib.import_module("coremltools.converters.mil.mil.ops.registry").SSAOpRegistry
    return frozenset(name for name in registry.core_ops)


def has_conversion(name: str) -> bool:
    """Whether the installed coremltools has a conversion for an operator, ``aten.relu.default`` or ``mul``."""
    with quiet():
        registry = importlib.import_module("coremltools.converters.mil.frontend.torch.torch_op_registry")
        importlib.import_module("coremltools.converters.mil.frontend.torch.ops")
        return registry._TORCH_OPS_REGISTRY.get_func(name) is not None


def translate(name: str, write: Callable[[Any, str, tuple[Any, ...]], Any]) -> None:
    """Let coremltools convert an operator of ours.

    Args:
        name: ``vlexport.quantize``.
        write: Given the builder of MIL, the name of the result and the operands as variables, makes the result.
    """
    with quiet():
        registry = importlib.import_module("coremltools.converters.mil.frontend.torch.torch_op_registry")
        operators = importlib.import_module("coremltools.converters.mil.frontend.torch.ops")
        builder = importlib.import_module("coremltools.converters.mil.mil").Builder

    def convert(context: Any, node: Any) -> None:
        inputs = operators._get_inputs(context, node)
        context.add(write(builder, node.name, tuple(inputs)), node.name)

    convert.__name__ = name.replace(".", "_")
    registry.register_torch_op(torch_alias=[name, name.replace(".", "::")], override=True)(convert)


def unpacked(stored: Any, zero_point: Any, scale: Any, *, axis: int | None, name: str) -> Any:
    """A constant that is kept in int8 or uint8; in the spelling of the deployment target under way."""
    made = importlib.import_module("coremltools.converters.mil.frontend._utils")
    return made._construct_constexpr_dequant_op(stored, zero_point, scale, axis=axis, name=name)


def blockwise(mb: Any, stored: Any, scale: Any, zero_point: Any, *, bits: int, axis: int | None, name: str) -> Any:
    """A constant whose neighbours on ``axis`` share a scale, or that is kept in 4 bits. From iOS 18 on."""
    types = importlib.import_module("coremltools.converters.mil.mil").types
    kind = types.nptype_from_builtin(types.string_to_builtin(f"int{bits}")) if bits != 8 else stored.dtype
    if scale.ndim != stored.ndim:
        shape = [1] * stored.ndim
        shape[axis or 0] = -1
        scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
    offset = zero_point.astype(kind) if zero_point.any() else None
    return mb.constexpr_blockwise_shift_scale(data=stored.astype(kind), scale=scale, offset=offset, name=name)


def by_palettes(places: Any, tables: Any, *, name: str) -> Any:
    """A constant that is places in tables, each of them for an equal share of dim 0; before iOS 18 one for all."""
    made = importlib.import_module("coremltools.converters.mil.frontend._utils")
    shape = (tables.shape[0], *[1] * (places.ndim - 1), tables.shape[1], 1)
    return made._construct_constexpr_lut_op(places, tables.reshape(shape), name=name)


def load_spec(path: Path) -> Any:
    """The specification of a saved package.

    Raises:
        ValueError: The package is damaged, or none.
    """
    decoding = importlib.import_module("google.protobuf.message").DecodeError
    module = coremltools()
    with quiet():
        try:
            return module.models.MLModel(str(path), skip_model_load=True).get_spec()
        except (*CONVERSION_ERRORS, OSError, decoding) as error:
            raise ValueError(type(error).__name__) from error


def failing_node(error: BaseException) -> str:
    """Name of the node of the exported graph at which a conversion failed; empty when it cannot be told."""
    for pattern in _NODE_NAMES:
        if found := pattern.search(str(error)):
            return found[1]
    trace: TracebackType | None = error.__traceback__
    name = ""
    while trace is not None:
        if trace.tb_frame.f_code.co_name == "convert_single_node":
            name = str(getattr(trace.tb_frame.f_locals.get("node"), "name", ""))
        trace = trace.tb_next
    return name


def data_type_name(number: int) -> str:
    """``FLOAT16`` for the number that a MIL program holds."""
    return str(importlib.import_module("coremltools.proto.MIL_pb2").DataType.Name(number))


def array_type_name(number: int) -> str:
    """``FLOAT32`` for the number that a feature description holds."""
    types = importlib.import_module("coremltools.proto.FeatureTypes_pb2").ArrayFeatureType.ArrayDataType
    return str(types.Name(number))


def forget_build(spec: Any, *, versions: dict[str, str]) -> None:
    """Leave of what coremltools writes about its own run the versions alone: no date, no local build of torch.

    Args:
        spec: A model's specification, altered in place.
        versions: What ``com.github.apple.coremltools.*`` shall say.
    """
    stored = spec.description.metadata.userDefined
    for key in [key for key in stored if key.startswith("com.github.apple.coremltools")]:
        del stored[key]
    for key, value in versions.items():
        stored[f"com.github.apple.coremltools.{key}"] = value
    attributes = spec.mlProgram.attributes
    if "buildInfo" in attributes:
        del attributes["buildInfo"]
