"""Program: the one graph that every pass reads and writes.

A functional ``torch.fx.Graph`` in the vlexport dialect, its named tensors, and its public signature. Placeholders are
the user's inputs, ``get_attr`` nodes name entries of ``tensors``. It runs in PyTorch at every moment, so that each pass
can be checked by executing it.

Tensors are never edited: a pass adds a new one, untouched ones are shared between copies, so keeping "before" costs
nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from vlexport.core.artifact import Signature
from vlexport.core.errors import InternalError, RefusedInputError
from vlexport.ir import compat, dialect, provenance

Kind = Literal["parameter", "buffer", "constant"]
Observer = Callable[[Node, Any], None]
_DOUBLED = {torch.float32: torch.float64, torch.float16: torch.float64, torch.bfloat16: torch.float64}


def _doubled(value: Tensor) -> Tensor:
    return value.to(_DOUBLED.get(value.dtype, value.dtype))


def _made_dtype(node: Node) -> dict[str, torch.dtype]:
    """The dtype to write at an op that makes floats (``full``, ``eye``) and leaves theirs to torch's default."""
    row = dialect.info(node)
    if row is None or row.category != "make" or not isinstance(node.target, torch._ops.OpOverload):
        return {}
    takes = any(a.name == "dtype" and a.kwarg_only for a in node.target._schema.arguments)
    value = node.meta.get("val")
    silent = node.kwargs.get("dtype") is None and isinstance(value, Tensor) and value.dtype is torch.float64
    return {"dtype": torch.float64} if takes and silent else {}


def _called(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    target: Any = node.target
    try:
        return target(*args, **kwargs)
    except RuntimeError as error:
        if not dialect.checks_at_run_time(node):
            raise
        raise RefusedInputError(
            "VLX0302", f"an input breaks a check of the model: {str(error).partition(chr(10))[0]}",
            where=provenance.describe(node),
            hint="a build also runs inputs that it draws: leave out of forward what only some inputs hold to",
        ) from error  # fmt: skip


class Program:
    """A runnable graph with named inputs, outputs and dynamic dims.

    Args:
        graph: Functional graph; owned by the Program from here on.
        tensors: Name → tensor for every ``get_attr`` target.
        kinds: Name → what the tensor was in the user's model.
        signature: Public names, shapes and dims.
        ranges: Symbol → value range, as torch keeps them.
        example: One tensor per input that fits the signature.
    """

    def __init__(
        self,
        graph: Graph,
        tensors: dict[str, Tensor],
        kinds: dict[str, Kind],
        signature: Signature,
        ranges: dict[Any, Any],
        example: tuple[Tensor, ...],
    ) -> None:
        self.graph = graph
        self.tensors = tensors
        self.kinds = kinds
        self.signature = signature
        self.ranges = ranges
        self.example = example

    # -- reading -------------------------------------------------------------------------------------------------

    @property
    def placeholders(self) -> list[Node]:
        """Input nodes, in order."""
        return list(self.graph.find_nodes(op="placeholder"))

    @property
    def output(self) -> Node:
        """The output node."""
        found: Node = next(n for n in reversed(self.graph.nodes) if n.op == "output")
        return found

    @property
    def results(self) -> tuple[Node, ...]:
        """Nodes that are returned, in order."""
        return tuple(self.output.args[0])  # type: ignore[arg-type]

    def calls(self, *names: str) -> list[Node]:
        """Calls in topological order; with ``names`` (``aten.conv2d.default``) only those."""
        return [n for n in self.graph.nodes if n.op == "call_function" and (not names or dialect.op_name(n) in names)]

    def tensor_of(self, node: Any) -> Tensor | None:
        """The stored tensor behind a ``get_attr`` node, or None for anything else."""
        if isinstance(node, Node) and node.op == "get_attr":
            return self.tensors[str(node.target)]
        return None

    def symbol_names(self) -> dict[Any, str]:
        """Symbol → public dim name, read off the inputs' recorded shapes."""
        names: dict[Any, str] = {}
        for node, spec in zip(self.placeholders, self.signature.inputs, strict=True):
            for size, dim in zip(node.meta["val"].shape, spec.shape, strict=True):
                if isinstance(dim, str) and isinstance(size, torch.SymInt):
                    names[size.node.expr] = dim
        return names

    def sizes(self, shape: Sequence[Any], dims: Mapping[str, int]) -> tuple[int, ...]:
        """A recorded shape with every dynamic dim set to ``dims`` (default: its ``opt``).

        Sizes that depend on data are taken as 1.
        """
        values = {symbol: dims.get(name, self.signature.dims[name].opt) for symbol, name in self.symbol_names().items()}
        found = []
        for size in shape:
            if not isinstance(size, torch.SymInt):
                found.append(int(size))
                continue
            value = size.node.expr.subs(values)
            found.append(int(value) if value.is_number else 1)
        return tuple(found)

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors in use."""
        return sum(t.numel() * t.element_size() for t in self.used_tensors().values())

    def used_tensors(self) -> dict[str, Tensor]:
        """Tensors that a node reads, in order of first use."""
        return {str(n.target): self.tensors[str(n.target)] for n in self.graph.nodes if n.op == "get_attr" and n.users}

    # -- running -------------------------------------------------------------------------------------------------

    def run(self, *inputs: Tensor, observe: Observer | None = None) -> tuple[Tensor, ...]:
        """Execute in PyTorch without gradients.

        Args:
            inputs: One tensor per input, shapes as in the signature.
            observe: Called with every call node and its value.

        Returns:
            One tensor per output.

        Raises:
            RefusedInputError: VLX0302, a check in the graph refuses the inputs.
        """
        values: dict[Node, Any] = {}
        last_use = self._last_uses()
        feed = iter(inputs)
        with torch.inference_mode():
            for node in self.graph.nodes:
                if node.op == "placeholder":
                    values[node] = next(feed)
                elif node.op == "get_attr":
                    values[node] = self.tensors[node.target]
                elif node.op == "output":
                    return tuple(values[n] for n in node.args[0])
                else:
                    args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
                    values[node] = _called(node, args, kwargs)
                    if observe is not None:
                        observe(node, values[node])
                for dead in last_use.get(node, ()):
                    del values[dead]
        raise InternalError("VLX0901", "a Program without an output node")

    def _last_uses(self) -> dict[Node, list[Node]]:
        seen: set[Node] = set()
        last: dict[Node, list[Node]] = {}
        for node in reversed(self.graph.nodes):
            for used in node.all_input_nodes:
                if used not in seen:
                    seen.add(used)
                    last.setdefault(node, []).append(used)
        return last

    # -- copying -------------------------------------------------------------------------------------------------

    def copy(self) -> Program:
        """A Program with its own graph and the same tensors."""
        graph = Graph()
        mapping: dict[Node, Node] = {}
        for node in self.graph.nodes:
            mapping[node] = graph.node_copy(node, lambda n: mapping[n])
            mapping[node].meta = dict(node.meta)
        return Program(graph, dict(self.tensors), dict(self.kinds), self.signature, dict(self.ranges), self.example)

    def double(self) -> Program:
        """A float64 copy: every floating tensor, and every dtype argument that names a floating type."""
        twin = self.copy()
        twin.tensors = {k: _doubled(t) for k, t in self.tensors.items()}  # what holds quantized values keeps its dtype
        twin.example = tuple(t.double() if t.is_floating_point() else t for t in self.example)
        mode = compat.fake_mode_of([n.meta["val"] for n in self.placeholders])
        with compat.quiet_fake(mode) if mode is not None else contextlib.nullcontext():
            for node in twin.graph.nodes:
                if "val" in node.meta:  # a pass that runs on the twin computes new shapes from these
                    node.meta["val"] = compat.map_tensors(_doubled, node.meta["val"])
                if node.op == "call_function":
                    swap = {k: _DOUBLED.get(v, v) if isinstance(v, torch.dtype) else v for k, v in node.kwargs.items()}
                    node.kwargs = {**swap, **_made_dtype(node)}
                    node.args = tuple(_DOUBLED.get(a, a) if isinstance(a, torch.dtype) else a for a in node.args)
        return twin

    # -- writing (for passes) ------------------------------------------------------------------------------------

    def add_tensor(self, name: str, tensor: Tensor, *, before: Node, kind: Kind = "parameter") -> Node:
        """Store a new tensor under an unused name near ``name`` and return the node that reads it."""
        unique, n = name, 1
        while unique in self.tensors:
            unique, n = f"{name}_{n}", n + 1
        self.tensors[unique] = tensor.detach()
        self.kinds[unique] = kind
        with self.graph.inserting_before(before):
            node = self.graph.create_node("get_attr", unique)
        mode = compat.fake_mode_of([n.meta["val"] for n in self.placeholders])
        node.meta["val"] = compat.fake_from(mode, self.tensors[unique]) if mode else self.tensors[unique].to("meta")
        return node

    def add_call(
        self,
        target: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None = None,
        *,
        before: Node,
        value_of: Node,
        merges: Sequence[Node] = (),
        value: Any = None,
    ) -> Node:
        """Insert a call, with shape and provenance.

        Args:
            target: ATen overload.
            args: Nodes and constants.
            kwargs: Keyword operands.
            before: Where it goes.
            value_of: The node whose value it computes.
            merges: Further nodes that it stands for.
            value: Its recorded value, where the caller knows it; by default the operator is run on recorded operands.
        """
        kwargs = kwargs or {}
        with self.graph.inserting_before(before):
            node = self.graph.call_function(target, args, kwargs)
        if value is not None:
            node.meta["val"] = value
            provenance.inherit(node, value_of=value_of, merges=merges)
            return node
        fake_args, fake_kwargs = map_arg((args, kwargs), lambda n: n.meta["val"])
        mode = compat.fake_mode_of([n.meta["val"] for n in self.placeholders])
        if mode is None:
            raise InternalError("VLX0901", "a Program whose inputs have no recorded shapes")
        with compat.quiet_fake(mode):
            node.meta["val"] = target(*fake_args, **fake_kwargs)
        provenance.inherit(node, value_of=value_of, merges=merges)
        return node

    def replace(self, old: Node, new: Node) -> int:
        """Let every reader of ``old`` read ``new``, then erase what nobody reads any more, upwards from ``old``.

        Returns:
            How many calls were erased.
        """
        old.replace_all_uses_with(new)
        return self.erase_dead(old)

    def erase_dead(self, node: Node) -> int:
        """Erase ``node`` if nobody reads it, then its operands likewise. Inputs and outputs stay.

        Returns:
            How many calls were erased.
        """
        pending = [node]
        erased: set[Node] = set()  # an operand of two dead nodes is met twice
        while pending:
            current = pending.pop()
            if current in erased or current.users or current.op in ("placeholder", "output"):
                continue
            operands = current.all_input_nodes
            erased.add(current)
            self.graph.erase_node(current)
            pending.extend(operands)
        names = {str(n.target) for n in erased if n.op == "get_attr"}
        if names:
            names -= {str(n.target) for n in self.graph.find_nodes(op="get_attr", sort=False)}
        for name in names:
            del self.tensors[name]
            del self.kinds[name]
        return sum(n.op == "call_function" for n in erased)
