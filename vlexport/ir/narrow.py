"""Narrowing dynamic dims: to one size, which becomes a constant of the graph, or to a smaller range.

Nothing is traced again. Shapes are propagated once from the narrowed inputs; a size that becomes a number replaces its
node. Widening is impossible: what capture has seen decides what a graph can take.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from vlexport.core.artifact import DimRange, Signature, TensorSpec
from vlexport.ir import compat
from vlexport.ir.program import Program


def narrowed(program: Program, dims: Mapping[str, DimRange]) -> Program:
    """A Program whose dynamic dims take fewer sizes.

    Args:
        program: Left as it is; tensors are shared.
        dims: Name → range within the Program's own; a range of one size makes the dim a constant. Others stay.

    Returns:
        A Program with the same inputs and outputs, its example cut or repeated to sizes that fit.
    """
    found = program.copy()
    fixed = {name: each.min for name, each in dims.items() if each.min == each.max}
    found.example = tuple(
        _sized(value, spec, dims) for value, spec in zip(found.example, found.signature.inputs, strict=True)
    )
    symbols = {symbol: name for symbol, name in program.symbol_names().items() if name in dims}
    inputs = tuple(_spec(spec, fixed) for spec in found.signature.inputs)
    if fixed:
        _propagate(found, inputs)
    for symbol, name in symbols.items():
        if name in fixed:
            found.ranges.pop(symbol, None)
        elif symbol in found.ranges:
            found.ranges[symbol] = compat.value_range(dims[name].min, dims[name].max)
    outputs = tuple(
        _result(spec, node.meta["val"]) for spec, node in zip(found.signature.outputs, found.results, strict=True)
    )
    kept = {name: dims.get(name, each) for name, each in found.signature.dims.items() if name not in fixed}
    found.signature = Signature(inputs=inputs, outputs=outputs, dims=kept)
    return found


def _propagate(program: Program, inputs: tuple[TensorSpec, ...]) -> None:
    """Compute every shape again from the inputs', and put numbers where sizes have become numbers."""
    mode = compat.fake_mode_of([n.meta["val"] for n in program.placeholders])
    assert mode is not None
    specs = iter(inputs)
    with compat.quiet_fake(mode):
        for node in list(program.graph.nodes):
            if node.op == "placeholder":
                node.meta["val"] = _fake(node.meta["val"], next(specs))
            elif node.op == "call_function":
                args, kwargs = map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
                value = node.target(*args, **kwargs)
                node.meta["val"] = value
                if isinstance(value, (int, float)):
                    _replace_by_number(node, value)
                    program.graph.erase_node(node)


def _fake(old: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    sizes = [size if isinstance(dim, str) else dim for size, dim in zip(old.shape, spec.shape, strict=True)]
    return torch.empty(sizes, dtype=old.dtype, device=old.device)


def _replace_by_number(node: Node, value: int | float) -> None:
    def swap(each: Node) -> Any:
        return value if each is node else each

    for user in list(node.users):
        user.args, user.kwargs = map_arg(user.args, swap), map_arg(user.kwargs, swap)


def _spec(spec: TensorSpec, fixed: Mapping[str, int]) -> TensorSpec:
    shape = tuple(fixed.get(dim, dim) if isinstance(dim, str) else dim for dim in spec.shape)
    return spec.model_copy(update={"shape": shape})


def _result(spec: TensorSpec, value: torch.Tensor) -> TensorSpec:
    """An output's spec: a dim that depended on a narrowed one has a number now."""
    sizes = zip(value.shape, spec.shape, strict=True)
    return spec.model_copy(update={"shape": tuple(d if isinstance(s, torch.SymInt) else int(s) for s, d in sizes)})


def _sized(value: torch.Tensor, spec: TensorSpec, dims: Mapping[str, DimRange]) -> torch.Tensor:
    """An example whose narrowed dims are cut to the largest size, or repeated up to the smallest."""
    for axis, dim in enumerate(spec.shape):
        if not isinstance(dim, str) or dim not in dims:
            continue
        have, wanted = value.shape[axis], dims[dim]
        size = max(have if wanted.max is None else min(have, wanted.max), wanted.min)
        if size != have:
            value = value.index_select(axis, torch.arange(size) % have)
    return value
