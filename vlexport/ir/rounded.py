"""The rounded twin: how a Program that computes in half precision is run on a CPU.

Native half kernels on a CPU are slow, and sum in an order and a precision of no target. The twin computes in float32
and rounds at the same places: every stored half tensor becomes float32 with the same values, every cast to a half type
rounds, and so does the result of every call of a half type. An overflow shows as infinity, as it does on the target.

Two calls have an inside that may overflow although operands and result fit: a norm of a half type squares its operand,
an attention multiplies queries and keys. The twin computes those as well, and gives NaN where they leave the type.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from vlexport.ir import compat, dialect
from vlexport.ir.program import Program

HALF_DTYPES = (torch.float16, torch.bfloat16)
aten = torch.ops.aten
_copy = aten._to_copy.default
_NORMS = ("aten.layer_norm.default", "aten.group_norm.default", "aten.rms_norm.default", "aten.instance_norm.default")
_ATTENTION = "aten.scaled_dot_product_attention.default"


def holds_half(program: Program) -> bool:
    """Whether a call computes in a half type, or a tensor is stored in one. Casts alone do not count."""
    if any(t.dtype in HALF_DTYPES for t in program.used_tensors().values()):
        return True
    return any(_half_leaves(node) for node in program.calls() if not dialect.is_cast(node))


def rounded_twin(program: Program) -> Program:
    """A Program of the same inputs and outputs that computes in float32 and rounds where ``program`` would.

    Args:
        program: Left as it is; tensors of other dtypes are shared.
    """
    graph = Graph()
    mapping: dict[Node, Node] = {}
    tensors = {k: t.float() if t.dtype in HALF_DTYPES else t for k, t in program.tensors.items()}
    mode = compat.fake_mode_of([n.meta["val"] for n in program.placeholders])
    with compat.quiet_fake(mode) if mode is not None else contextlib.nullcontext():
        for node in program.graph.nodes:
            if node.op == "output":
                graph.output(tuple(_returned(graph, n, mapping[n]) for n in program.results))
            elif node.op == "call_function" and dialect.is_cast(node):
                mapping[node] = _cast(graph, node, mapping)
            elif node.op == "call_function":
                mapping[node] = _call(graph, node, mapping)
            else:
                mapping[node] = graph.node_copy(node)
                mapping[node].meta = dict(node.meta)
                if node.op == "placeholder" and _half_leaves(node):
                    mapping[node] = _made(graph, node, mapping[node], torch.float32)
                elif node.op == "get_attr":
                    mapping[node].meta["val"] = _single(node)
    signature, ranges = program.signature, dict(program.ranges)
    return Program(graph, tensors, dict(program.kinds), signature, ranges, program.example)


def _half_leaves(node: Node) -> list[Tensor]:
    found = compat.leaves(node.meta["val"])
    return [leaf for leaf in found if isinstance(leaf, Tensor) and leaf.dtype in HALF_DTYPES]


def _single(node: Node) -> Any:
    return compat.map_tensors(lambda t: t.float() if t.dtype in HALF_DTYPES else t, node.meta["val"])


def _made(graph: Graph, like: Node, source: Node, dtype: torch.dtype) -> Node:
    """A cast of ``source``, with the shape and provenance of ``like``."""
    made = graph.call_function(_copy, (source,), {"dtype": dtype})
    made.meta = dict(like.meta)
    made.meta["val"] = compat.map_tensors(lambda t: t.to(dtype), like.meta["val"])
    return made


def _rounded(graph: Graph, node: Node, source: Node) -> Node:
    return _made(graph, node, _made(graph, node, source, node.meta["val"].dtype), torch.float32)


def _cast(graph: Graph, node: Node, mapping: dict[Node, Node]) -> Node:
    source: Any = node.args[0]
    dtype = node.meta["val"].dtype
    if dtype in HALF_DTYPES:
        return _rounded(graph, node, mapping[source])
    if dtype is torch.float32 and _half_leaves(source):
        return mapping[source]
    return _copied(graph, node, mapping)


def _copied(graph: Graph, node: Node, mapping: dict[Node, Node]) -> Node:
    made = graph.node_copy(node, mapping.__getitem__)
    made.meta = dict(node.meta)
    return made


def _call(graph: Graph, node: Node, mapping: dict[Node, Node]) -> Node:
    made = _copied(graph, node, mapping)
    halves = _half_leaves(node)
    if not halves:
        return made
    dtype = halves[0].dtype
    made.args = tuple(_plain(a) for a in made.args)
    made.kwargs = {key: _plain(value) for key, value in made.kwargs.items()}
    if dialect.stores_scalars(node):
        made.args = tuple(_nearest(a, dtype) for a in made.args)
        made.kwargs = {key: _nearest(value, dtype) for key, value in made.kwargs.items()}
    made.meta["val"] = _single(node)
    inside = _inside(graph, node, mapping)
    if inside is not None:
        watched = _new(graph, aten.mul.Tensor, _rounded_to(graph, inside, dtype), 0.0)  # 0, or NaN where it overflows
        made = _new(graph, aten.add.Tensor, made, watched)
        made.meta = dict(node.meta)
        made.meta["val"] = _single(node)
    return _rounded(graph, node, made) if isinstance(node.meta["val"], Tensor) else made


def _inside(graph: Graph, node: Node, mapping: dict[Node, Node]) -> Node | None:
    """What a call computes on the way and a half type may not hold; of a shape that the result's is made from."""
    name = dialect.op_name(node)
    if name in _NORMS:
        operand: Any = node.args[0]
        return _new(graph, aten.square.default, mapping[operand])
    if name != _ATTENTION:
        return None
    query, key = (mapping[n] for n in node.args[:2])  # type: ignore[index]
    if query.meta["val"].shape[:-2] != key.meta["val"].shape[:-2]:
        return None  # grouped heads
    scores = _new(graph, aten.matmul.default, query, _new(graph, aten.transpose.int, key, -2, -1))
    return _new(graph, aten.amax.default, _new(graph, aten.abs.default, scores), [-1], True)


def _new(graph: Graph, target: Any, *args: Any, **kwargs: Any) -> Node:
    """A call that stands for no node of the Program."""
    made = graph.call_function(target, args, kwargs)
    given, named = map_arg((args, kwargs), lambda n: n.meta["val"])
    made.meta["val"] = target(*given, **named)
    return made


def _rounded_to(graph: Graph, source: Node, dtype: torch.dtype) -> Node:
    return _new(graph, _copy, _new(graph, _copy, source, dtype=dtype), dtype=torch.float32)


def _plain(value: Any) -> Any:
    return torch.float32 if isinstance(value, torch.dtype) and value in HALF_DTYPES else value


def _nearest(value: Any, dtype: torch.dtype) -> Any:
    return nearest_half(value, dtype) if isinstance(value, float) else value


def nearest_half(value: float, dtype: torch.dtype) -> float:
    """The number of a half type nearest to ``value``; infinite where it overflows."""
    return float(torch.tensor(value, dtype=torch.float64).to(dtype))


def _returned(graph: Graph, node: Node, mapped: Node) -> Node:
    """Public dtypes stay as they are."""
    return _made(graph, node, mapped, node.meta["val"].dtype) if _half_leaves(node) else mapped
