"""Program → ONNX through torch's dynamo exporter, with metadata that names a machine or torch's internals taken out.

One file up to :data:`EXTERNAL_ABOVE_BYTES` of weights; above it the weights lie in ``weights.bin`` beside the graph,
where a runtime maps them instead of parsing them.
"""

from __future__ import annotations

import contextlib
import io
import logging
import operator
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir
import torch
from torch.fx import Node

from vlexport.core.artifact import Signature
from vlexport.core.errors import CapabilityError
from vlexport.ir import dialect, provenance
from vlexport.ir.exported import exported_from_program
from vlexport.ir.program import Program
from vlexport.targets.onnx.quantized import store_int4, translations, unexpressible

EXTERNAL_ABOVE_BYTES = 256 << 20
MAIN_FILE = "main.onnx"
WEIGHTS_FILE = "weights.bin"
_LINE = "pkg.torch.onnx.stack_trace"
_DROPPED = (_LINE, "pkg.torch.onnx.fx_node", "namespace", "pkg.torch.onnx.class_hierarchy")
_PRODUCER = "vlexport"


def onnx_from_program(program: Program, *, opset: int) -> onnx_ir.Model:
    """Lower without optimising beyond the exporter's own clean-up.

    Args:
        program: In the dialect.
        opset: Version of the standard domain.

    Raises:
        CapabilityError: VLX0503 naming the operator, its module path and source line.
    """
    return onnx_with_lines(program, opset=opset)[0]


def onnx_with_lines(program: Program, *, opset: int) -> tuple[onnx_ir.Model, dict[str, str]]:
    """As :func:`onnx_from_program`, and node name → ``file.py:LINE`` of the user's code, which no artifact may hold."""
    signature = program.signature
    for error in unexpressible(program, opset=opset):
        raise error
    exported = exported_from_program(_with_copies(program))
    provenance.lend_source_lines(exported.graph)
    with _quiet():
        try:
            made = torch.onnx.export(
                exported,
                dynamo=True,
                opset_version=opset,
                input_names=[s.name for s in signature.inputs],
                output_names=_output_names(signature),
                dynamic_shapes=_dynamic_shapes(signature),
                external_data=False,
                verbose=False,
                custom_translation_table=translations(opset),
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise _refused(program, error) from error
    assert made is not None
    store_int4(made.model)
    _lay_out(made.model)
    nodes = onnx_ir.traversal.RecursiveGraphIterator(made.model.graph)
    lines = {str(node.name): node.metadata_props[_LINE] for node in nodes if node.metadata_props.get(_LINE)}
    return _anonymous(made.model), lines


def write_plain_export(program: Program, folder: Path) -> Path:
    """What a user gets from ``torch.onnx.export(dynamo=True)`` with its defaults, of the same captured graph.

    Raises:
        CapabilityError: VLX0503 naming the operator, its module path and source line.
    """
    folder.mkdir(parents=True, exist_ok=True)
    signature = program.signature
    with _quiet():
        try:
            made = torch.onnx.export(
                exported_from_program(program),
                dynamo=True,
                input_names=[s.name for s in signature.inputs],
                output_names=_output_names(signature),
                dynamic_shapes=_dynamic_shapes(signature),
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise _refused(program, error) from error
    assert made is not None
    made.save(folder / MAIN_FILE)
    return folder / MAIN_FILE


def write_onnx(
    model: onnx_ir.Model,
    folder: Path,
    *,
    file: str = MAIN_FILE,
    weights: str = WEIGHTS_FILE,
    external_above: int | None = None,
) -> Path:
    """Write a model as ``file``; returns it.

    Args:
        model: Not changed.
        folder: Made where it does not exist.
        file: Name of the graph's file.
        weights: Name of the weights' file.
        external_above: Bytes of weights above which they lie beside the graph; None for what artifacts have.
    """
    folder.mkdir(parents=True, exist_ok=True)
    limit = EXTERNAL_ABOVE_BYTES if external_above is None else external_above
    external = weights if _weights_bytes(model) > limit else None
    onnx_ir.save(model, folder / file, external_data=external)
    return folder / file


def _with_copies(program: Program) -> Program:
    """A copy of the Program in which every reshape reads a contiguous copy, and every getitem is returned as a copy.

    The exporter turns reshape into view by the strides of one trace and runs the result with those of another: without
    the copy, which becomes nothing in ONNX, it stops at a view that the second layout cannot express. It also renames
    every getitem and then looks for an output by the old name.
    """
    spelled = program.copy()
    for node in spelled.calls("aten.reshape.default"):
        source = node.args[0]
        assert isinstance(source, Node)
        contiguous = {"memory_format": torch.contiguous_format}
        copied = spelled.add_call(torch.ops.aten.clone.default, (source,), contiguous, before=node, value_of=source)
        node.replace_input_with(source, copied)
    for result in dict.fromkeys(spelled.results):
        if result.target is operator.getitem:
            copied = spelled.add_call(torch.ops.aten.clone.default, (result,), before=spelled.output, value_of=result)
            spelled.output.replace_input_with(result, copied)
    return spelled


def _output_names(signature: Signature) -> list[str]:
    """Public names, but ONNX wants no two values of one name: an output called as an input gets a suffix.

    Sessions read outputs by their order.
    """
    taken = {spec.name for spec in signature.inputs}
    names = []
    for spec in signature.outputs:
        name = spec.name
        while name in taken:
            name += ".out"
        taken.add(name)
        names.append(name)
    return names


def _dynamic_shapes(signature: Signature) -> tuple[dict[int, str], ...]:
    return tuple({i: d for i, d in enumerate(s.shape) if isinstance(d, str)} for s in signature.inputs)


def _lay_out(model: onnx_ir.Model) -> None:
    """Copy weights that are strided views into the order of their elements: else every digest and every file does so.

    Not those of a large model, whose copies would take more memory than their time is worth.
    """
    if _weights_bytes(model) > EXTERNAL_ABOVE_BYTES:
        return
    for value in model.graph.initializers.values():
        held = value.const_value
        if held is not None and not (laid := held.numpy()).flags.c_contiguous:
            value.const_value = onnx_ir.tensor(np.ascontiguousarray(laid), dtype=held.dtype, name=value.name)


def _weights_bytes(model: onnx_ir.Model) -> int:
    return sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)


def _anonymous(model: onnx_ir.Model) -> onnx_ir.Model:
    """Drop what names paths, FX nodes or the moment of export; module paths stay in ``name_scopes``."""
    model.producer_name, model.producer_version = _PRODUCER, None
    model.graph.name = "main"
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    graphs = [model.graph, *(f.graph for f in model.functions.values())]
    for graph in graphs:
        for node in onnx_ir.traversal.RecursiveGraphIterator(graph):
            for key in _DROPPED:
                node.metadata_props.pop(key, None)
            for value in node.outputs:
                value.metadata_props.clear()
        for value in (*graph.inputs, *getattr(graph, "initializers", {}).values()):
            value.metadata_props.clear()
    return model


def _refused(program: Program, error: Exception) -> CapabilityError:
    text = str(error)
    node = next((n for n in program.calls() if dialect.op_name(n) in text or dialect.is_opaque(n)), None)
    reason = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    cause = error.__cause__
    while cause is not None and cause.__cause__ is not None:
        cause = cause.__cause__
    if cause is not None and str(cause).strip():
        reason = str(cause).strip().splitlines()[0]
    return CapabilityError(
        "VLX0503", f"ONNX cannot express the program: {reason}",
        where=provenance.describe(node) if node is not None else "",
        hint="rewrite that operator in the model, or export the part before and after it",
    )  # fmt: skip


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints progress and warns about its own internals."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)
