"""places: each operator that a pass has written, alone: given what stood before it, does it make what was made there?

Behind many layers that round, a difference in the last digit tips integers over and grows to noise like that of
quantization itself, so that outputs prove little of an operator. Here every new operator reads the values of the graph
before the pass, and none reads what another new one made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx_ir

from vlexport.core.artifact import Array
from vlexport.targets.onnx.model import OnnxModel, describe


def places(before: OnnxModel, after: OnnxModel, inputs: Mapping[str, Array]) -> Iterator[tuple[str, Array, Array]]:
    """Every value that is made in another way than before.

    Args:
        before: Graph before the pass.
        after: Graph behind it; a value of the same name stands for the same.
        inputs: Of either graph, by the signature's names.

    Yields:
        The node described, what it makes of the values before the pass, and what was made there.

    Raises:
        CapabilityError: VLX0505, VLX0506 when ONNX Runtime refuses a graph or dies on it.
    """
    made = {str(value.name): node for node in before.model.graph for value in node.outputs}
    new = {str(n.outputs[0].name): describe(n) for n in after.model.graph if _is_new(n, made)}
    if not new:
        return
    cut = after.copy()
    known = _cut(cut.model.graph, [*new], [*made])
    was = before.observe(inputs, names=[*new, *known])
    given = {f"{name}{_GIVEN}": was[name] for name in known}
    for value in cut.model.graph.inputs:
        if value.name in given:
            array = given[value.name]
            value.type, value.shape = onnx_ir.TensorType(onnx_ir.DataType.from_numpy(array.dtype)), _shape(array)
    found = cut.forced({**inputs, **given})
    for name, where in new.items():
        yield where, found[name], was[name]


_GIVEN = "_given"


def _is_new(node: onnx_ir.Node, made: Mapping[str, onnx_ir.Node]) -> bool:
    """Whether a node makes a value of the graph before, and is another operator than made it there, or reads one."""
    old = made.get(str(node.outputs[0].name))
    if old is None:
        return False
    makers = [value.producer() for value in node.inputs if value is not None]
    strange = any(maker is not None and str(maker.outputs[0].name) not in made for maker in makers)
    return strange or (old.domain, old.op_type) != (node.domain, node.op_type)


def _cut(graph: onnx_ir.Graph, wanted: list[str], made: list[str]) -> list[str]:
    """Let every reader of a value that was there before read an input in its place; the names of those that are."""
    graph.outputs[:] = []
    values = {str(value.name): value for node in graph for value in node.outputs}
    given = {name: onnx_ir.Value(name=f"{name}{_GIVEN}") for name in made if name in values and values[name].uses()}
    for name, value in given.items():
        values[name].replace_all_uses_with(value)
    graph.outputs[:] = [values[name] for name in wanted]
    for node in reversed(list(graph)):
        if not any(value.uses() or value.is_graph_output() for value in node.outputs):
            graph.remove(node, safe=True)
    read = [name for name, value in given.items() if value.uses()]
    graph.inputs.extend(given[name] for name in read)
    return read


def _shape(array: Array) -> onnx_ir.Shape:
    return onnx_ir.Shape(array.shape)
