"""OnnxModel: the graph that lowered passes read and write.

A thin wrapper over an ``onnx_ir.Model`` with the public signature of the Program it was lowered from. Weights are never
edited: a pass replaces ``const_value``, untouched ones are shared between copies.

It runs in a child process, at ONNX Runtime's lowest optimisation level: a graph that a pass broke may take the whole
process down, and higher levels would repair or repeat what a pass did before it could be compared.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import onnx_ir

from vlexport.core.artifact import Array, Artifact, Signature, TensorSpec
from vlexport.core.isolate import IsolatedSession
from vlexport.targets.onnx.lower import MAIN_FILE, write_onnx
from vlexport.targets.onnx.text import tensor_digest, text

_SESSION = "vlexport.targets.onnx.session:open_session"
_SCOPES = "pkg.torch.onnx.name_scopes"
_QUANTIZING = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
STANDS_FOR = "vlexport.stands_for"
"""Metadata of a node that quantizes on its own: how many quantize and dequantize nodes it took the place of."""
_FLOATS = (onnx_ir.DataType.FLOAT, onnx_ir.DataType.FLOAT16, onnx_ir.DataType.BFLOAT16)
_DTYPE_ATTRIBUTES = ("to", "dtype")
_FAST_INSIDE_BYTES = 1 << 20
"""More weights than that are written faster beside a graph than inside it: protobuf copies them several times."""


class OnnxModel:
    """A runnable ONNX graph.

    Args:
        model: Owned by this object from here on.
        signature: Public names, shapes and dims; outputs belong to the graph's by order.
        digests: Tensor → digest that copies share; left out for a fresh model.
    """

    def __init__(
        self,
        model: onnx_ir.Model,
        signature: Signature,
        digests: dict[int, tuple[onnx_ir.TensorProtocol, str]] | None = None,
    ) -> None:
        self.model = model
        self.signature = signature
        self._digests = {} if digests is None else digests

    # -- reading -------------------------------------------------------------------------------------------------

    def nodes(self, *op_types: str) -> list[onnx_ir.Node]:
        """Nodes in topological order, those of inner graphs included; with ``op_types`` only those."""
        found = onnx_ir.traversal.RecursiveGraphIterator(self.model.graph)
        return [node for node in found if not op_types or node.op_type in op_types]

    def weights(self) -> dict[str, onnx_ir.TensorProtocol]:
        """Name → content of every initializer."""
        found = self.model.graph.initializers.items()
        return {name: value.const_value for name, value in found if value.const_value is not None}

    @property
    def size_bytes(self) -> int:
        """Bytes of all initializers."""
        return sum(tensor.nbytes for tensor in self.weights().values())

    @property
    def quantizing(self) -> int:
        """Number of quantize and dequantize nodes, those included that an operator stands for."""
        stood_for = (int(node.metadata_props.get(STANDS_FOR, "0")) for node in self.nodes())
        return len(self.nodes(*_QUANTIZING)) + sum(stood_for)

    def text(self) -> str:
        """One line a node, as golden files and diffs use it."""
        return text(self.model)

    def digest(self, tensor: onnx_ir.TensorProtocol, *, fresh: bool = False) -> str:
        """SHA-256 of a tensor, kept with the tensor itself; ``fresh`` computes it again."""
        kept = self._digests.get(id(tensor))
        if kept is None or kept[0] is not tensor or fresh:
            kept = (tensor, tensor_digest(tensor))
            self._digests.setdefault(id(tensor), kept)
        return kept[1]

    def fingerprint(self) -> str:
        """SHA-256 over the text and the content of every initializer."""
        whole = hashlib.sha256(self.text().encode())
        for name, tensor in sorted(self.weights().items()):
            whole.update(f"{name}={self.digest(tensor)}\n".encode())
        return whole.hexdigest()

    # -- running -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def session(self) -> Iterator[IsolatedSession]:
        """A session on this graph, presenting the signature's names.

        Raises:
            CapabilityError: VLX0505, VLX0506 when ONNX Runtime refuses the graph or dies on it.
        """
        with _opened(self.model, self.signature.inputs, self.signature.outputs) as session:
            yield session

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run once; arrays are keyed by the signature's names.

        Raises:
            CapabilityError: VLX0505, VLX0506 when ONNX Runtime refuses the graph or dies on it.
            InputError: VLX0507 when an input does not fit.
        """
        with self.session() as session:
            return session.run(inputs)

    def observe(self, inputs: Mapping[str, Array], *, names: Collection[str] | None = None) -> dict[str, Array]:
        """Run once; values of the main graph's nodes, keyed by the value's own name: all, or those of ``names``."""
        watched = self.copy().model
        outputs = watched.graph.outputs
        returned = set(outputs)
        for node in watched.graph:
            values = [value for value in node.outputs if names is None or value.name in names]
            outputs.extend(value for value in values if value.name and value not in returned)
        specs = tuple(TensorSpec(name=str(value.name), dtype="", shape=()) for value in outputs)
        with _opened(watched, self.signature.inputs, specs) as session:
            return session.run(inputs)

    def forced(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run a graph with other inputs than the signature's behind those; its outputs, keyed by their own names."""
        behind = [str(each.name) for each in self.model.graph.inputs[len(self.signature.inputs) :]]
        given = [TensorSpec(name=n, dtype=inputs[n].dtype.name, shape=inputs[n].shape) for n in behind]
        returned = tuple(TensorSpec(name=str(v.name), dtype="", shape=()) for v in self.model.graph.outputs)
        with _opened(self.model, (*self.signature.inputs, *given), returned) as session:
            return session.run(inputs)

    # -- copying -------------------------------------------------------------------------------------------------

    def copy(self) -> OnnxModel:
        """A model with its own graph and the same tensors."""
        return OnnxModel(self.model.clone(), self.signature, self._digests)

    def double(self) -> OnnxModel | None:
        """A float64 copy, or None for a model with functions. Running it shows whether ONNX Runtime has the kernels."""
        if self.model.functions:
            return None
        twin = OnnxModel(self.model.clone(), _doubled_signature(self.signature))
        graph = twin.model.graph
        for value in (*graph.inputs, *graph.initializers.values()):
            _double_value(value)
        for node in twin.nodes():
            for inner in (a.as_graph() for a in node.attributes.values() if a.type is onnx_ir.AttributeType.GRAPH):
                for value in (*inner.inputs, *inner.initializers.values()):
                    _double_value(value)
            for value in node.outputs:
                _double_value(value)
            for attribute in list(node.attributes.values()):
                _double_attribute(node, attribute)
        return twin


def module_path(node: onnx_ir.Node) -> str:
    """The module of the user's model that a node comes from (``blocks.3.attn``), or an empty string."""
    try:
        scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
    except (ValueError, SyntaxError):
        return ""
    paths = [str(scope) for scope in scopes[:-1]]  # the last one names the call itself
    return paths[-1] if paths and not paths[-1].startswith("_empty_nn_module_stack") else ""


def describe(node: onnx_ir.Node) -> str:
    """One phrase for messages: operator, module path, and the node's name, which viewers show."""
    path = module_path(node)
    return node.op_type + (f" in {path}" if path else "") + (f" ({node.name})" if node.name else "")


def inherit(new: onnx_ir.Node, from_: onnx_ir.Node) -> None:
    """Give a node that a pass made the module path of the node it stands for."""
    if _SCOPES in from_.metadata_props:
        new.metadata_props[_SCOPES] = from_.metadata_props[_SCOPES]


def has_origin(node: onnx_ir.Node) -> bool:
    """Whether a node says which module it comes from."""
    return _SCOPES in node.metadata_props


@contextlib.contextmanager
def _opened(
    model: onnx_ir.Model, inputs: tuple[TensorSpec, ...], outputs: Sequence[TensorSpec]
) -> Iterator[IsolatedSession]:
    with tempfile.TemporaryDirectory(prefix="vlexport-") as folder:
        write_onnx(model, Path(folder), external_above=_FAST_INSIDE_BYTES)
        artifact = Artifact(
            target="onnx", path=MAIN_FILE, inputs=inputs, outputs=tuple(outputs),
            session_options={"graph_optimization": "none"},
        )  # fmt: skip
        with IsolatedSession(_SESSION, Path(folder), artifact, reuse=True) as session:
            yield session


def _doubled_signature(signature: Signature) -> Signature:
    def doubled(spec: TensorSpec) -> TensorSpec:
        return spec.model_copy(update={"dtype": "float64"}) if spec.dtype.startswith(("float", "bfloat")) else spec

    inputs, outputs = tuple(map(doubled, signature.inputs)), tuple(map(doubled, signature.outputs))
    return signature.model_copy(update={"inputs": inputs, "outputs": outputs})


def _double_tensor(tensor: onnx_ir.TensorProtocol) -> onnx_ir.TensorProtocol:
    return onnx_ir.tensor(tensor.numpy().astype("float64"), name=tensor.name) if tensor.dtype in _FLOATS else tensor


def _double_value(value: onnx_ir.Value) -> None:
    if value.const_value is not None:
        value.const_value = _double_tensor(value.const_value)
    if value.dtype in _FLOATS:
        value.type = onnx_ir.TensorType(onnx_ir.DataType.DOUBLE)


def _double_attribute(node: onnx_ir.Node, attribute: onnx_ir.Attr) -> None:
    if attribute.is_ref():
        return
    if attribute.type is onnx_ir.AttributeType.TENSOR:
        node.attributes[attribute.name] = onnx_ir.AttrTensor(attribute.name, _double_tensor(attribute.as_tensor()))
    elif attribute.name in _DTYPE_ATTRIBUTES and attribute.value in _FLOATS:
        node.attributes[attribute.name] = onnx_ir.AttrInt64(attribute.name, int(onnx_ir.DataType.DOUBLE))
