"""The level of ONNX models: what the runner and the gate of passes must know about them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import onnx_ir

from vlexport.core.artifact import Array
from vlexport.core.errors import VlexportError
from vlexport.passes.level import Differs, Failure, Level, Outputs
from vlexport.passes.probes import Probe, as_array
from vlexport.targets.onnx.model import OnnxModel, describe
from vlexport.targets.onnx.places import places

CONSTANT_LIMIT_BYTES = 1 << 20
"""A larger constant belongs among the initializers, which runtimes share and map, not inside a node."""


def no_unread_nodes(model: OnnxModel) -> bool:
    """Every node has a reader, or makes an output."""
    return all(any(v.uses() or v.is_graph_output() for v in node.outputs) for node in model.nodes())


class OnnxLevel(Level[OnnxModel]):
    """ONNX models, run by ONNX Runtime on the CPU.

    Its float64 kernels are few (no convolution): most graphs have no twin that runs, and rounding above the float32
    bound is then recorded as unproved.
    """

    runs_float64: ClassVar[bool] = False

    @property
    def facts(self) -> Mapping[str, Callable[[OnnxModel], bool]]:
        """Facts of ONNX models."""
        return {"no-unread-nodes": no_unread_nodes}

    def copy(self, ir: OnnxModel) -> OnnxModel:
        """Tensors are shared."""
        return ir.copy()

    def text(self, ir: OnnxModel) -> str:
        """One line a node."""
        return ir.text()

    def fingerprint(self, ir: OnnxModel) -> str:
        """Of text and initializers."""
        return ir.fingerprint()

    def face(self, ir: OnnxModel) -> dict[str, object]:
        """Names, dtypes and dynamic dims of inputs and outputs, opset, quantization."""
        graph, dims = ir.model.graph, ir.signature.dims
        values = [(v.name, v.dtype, _dynamic(v, dims)) for v in (*graph.inputs, *graph.outputs)]
        return {
            "the names, dtypes or dynamic dims of inputs or outputs": (len(graph.inputs), values),
            "the opset": ir.model.opset_imports.get(""),
            "the number of quantize and dequantize nodes": ir.quantizing,
        }

    def problems(self, ir: OnnxModel) -> Iterator[tuple[str, str]]:
        """Topological order, one value a name, content of initializers, size of constants, number of outputs."""
        yield from _problems(ir.model.graph, set(), set())
        if len(ir.model.graph.outputs) != len(ir.signature.outputs):
            yield "", "the number of outputs has changed"

    def describe(self, node: onnx_ir.Node) -> str:
        """Operator, module path and name."""
        return describe(node)

    def weights(self, ir: OnnxModel) -> list[tuple[str, Any]]:
        """Initializers, each with the model that keeps its digest."""
        return [(name, (ir, tensor)) for name, tensor in ir.weights().items()]

    def digest(self, weight: Any, *, fresh: bool = False) -> str:
        """Kept by the model and its copies."""
        model, tensor = weight
        return str(model.digest(tensor, fresh=fresh))

    def size_bytes(self, ir: OnnxModel) -> int:
        """Bytes of the initializers."""
        return ir.size_bytes

    def double(self, ir: OnnxModel) -> OnnxModel | None:
        """A twin in float64; it may not run."""
        return ir.double()

    def run(self, ir: OnnxModel, probes: Sequence[Probe]) -> Iterator[Outputs | Failure]:
        """One child process for all probes; what it says of the node is in its reason."""
        try:
            with ir.session() as session:
                for probe in probes:
                    found = session.run(_named(ir, probe))
                    yield tuple(found[spec.name] for spec in ir.signature.outputs)
        except VlexportError as error:
            yield Failure(error.message, "", error)

    def places(self, before: OnnxModel, after: OnnxModel, probe: Probe) -> Iterator[tuple[str, Array, Array]]:
        """Every operator that a pass has written, fed with what the graph before it computed."""
        return places(before, after, _named(before, probe))

    def first_difference(self, before: OnnxModel, after: OnnxModel, probe: Probe, differs: Differs) -> str:
        """Values are compared by name; where only readers of a new value differ, its maker is named."""
        try:
            was, now = before.observe(_named(before, probe)), after.observe(_named(after, probe))
        except VlexportError:  # a value that cannot be an output; the pass is named all the same
            return "an output"
        for node in after.model.graph:
            for value in node.outputs:
                name = str(value.name)
                if name in was and differs(now[name], was[name]):
                    return describe(_maker(before, node, was))
        return "an output"


def _maker(before: OnnxModel, node: onnx_ir.Node, known: Mapping[str, Array]) -> onnx_ir.Node:
    """The nearest node above ``node`` that is new, where ``node`` itself is as it was."""
    old = next((n for n in before.model.graph if n.outputs[0].name == node.outputs[0].name), None)
    if old is None or old.op_type != node.op_type:
        return node
    makers = [v.producer() for v in node.inputs if v is not None and v.name not in known]
    return next((maker for maker in makers if maker is not None), node)


def _named(ir: OnnxModel, probe: Probe) -> dict[str, Array]:
    return {spec.name: as_array(v) for spec, v in zip(ir.signature.inputs, probe.values, strict=True)}


def _dynamic(value: onnx_ir.Value, dims: Mapping[str, object]) -> tuple[tuple[int, str], ...]:
    """Positions that a named dynamic dim of the signature stands at."""
    shape = value.shape or ()
    return tuple((i, str(d.value)) for i, d in enumerate(shape) if not isinstance(d, int) and d.value in dims)


def _problems(graph: onnx_ir.Graph, outer: set[onnx_ir.Value], names: set[str]) -> Iterator[tuple[str, str]]:
    known = outer | set(graph.inputs) | set(graph.initializers.values())
    names.update(str(value.name) for value in {*graph.inputs, *graph.initializers.values()})
    for name, value in graph.initializers.items():
        if value.const_value is None:
            yield name, "an initializer has no content"
    for node in graph:
        for read in node.inputs:
            if read is not None and read not in known:
                yield describe(node), f"it reads {read.name} before it is made"
        for attribute in node.attributes.values():
            if attribute.type is onnx_ir.AttributeType.GRAPH and not attribute.is_ref():
                yield from _problems(attribute.as_graph(), known, names)
            elif attribute.type is onnx_ir.AttributeType.TENSOR and not attribute.is_ref():
                size = attribute.as_tensor().nbytes
                if size > CONSTANT_LIMIT_BYTES:
                    yield describe(node), f"a constant of {size / 1e6:.1f} MB lies inside a node"
        for made in node.outputs:
            if made.name and made.name in names:
                yield describe(node), f"two values are called {made.name}"
            names.add(str(made.name))
            known.add(made)
    for returned in graph.outputs:
        if returned not in known:
            yield str(returned.name), "nothing makes this output"


ONNX = OnnxLevel()
"""The level of lowered passes of every target that reads ONNX."""
