"""fold-constants: what depends on stored tensors alone is computed once, now.

Before → after::

    %0 = exp(@table: f32[12])
    %1 = mul(x, %0)                →    %0 = mul(x, @table_folded: f32[12])

Does not apply when: an operand is an input, a size that the input decides, or random; the operator is opaque or one of
our quantization operators (a folded dequantize would undo the quantization); the result is no tensor; nobody reads it;
the model would grow by more than a quarter of a million elements, because the result is larger than what it makes
unread (an expanded mask is cheaper to compute than to ship, and so is the transpose of a weight that others read).
Numerical effect: none, bit for bit, on the value: the same kernel computes it. It is stored row by row, so an operator
that reads it may sum in another order than it did on a transposed view.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from vlexport.ir import dialect, provenance
from vlexport.ir.cost import saving
from vlexport.ir.program import Program
from vlexport.passes.base import Change, Effect, Match, NearMiss, Pass, Stage

GROWTH_LIMIT = 1 << 18
"""Elements by which one fold may enlarge the model: 1 MB of float32. Not bytes, so that the gate's float64 copy of a
Program is folded in the same places."""
_PATTERN = "operator on stored tensors"
_FOLDED = re.compile(r"_folded(_\d+)?$")


class FoldConstants(Pass[Program]):
    """What depends on stored tensors alone is computed once, now."""

    name: ClassVar[str] = "fold-constants"
    stage: ClassVar[Stage] = "normalize"
    effect: ClassVar[Effect] = "exact"

    def find(self, ir: Program) -> Iterator[Match | NearMiss]:
        for node in ir.calls():
            if not _is_constant(node):
                continue
            growth = node.meta["val"].numel() - _freed(ir, node)
            if growth > GROWTH_LIMIT:
                reason = f"the model would grow by {growth / 1e6:.1f} million elements"
                yield NearMiss(_PATTERN, node, reason)
            else:
                yield Match(node, (node,))

    def apply(self, ir: Program, match: Match) -> Change:
        node = match.node
        what = f"{dialect.plain_name(node)} of constants computed"
        where = (provenance.module_path(node),)
        value = _value(ir, node)
        stem = next((str(n.target) for n in node.all_input_nodes), provenance.module_path(node) or "constant")
        saved = saving(ir, node)
        # No dot before "folded": "table.folded" cannot be stored beside "table" where modules are nested by name.
        folded = ir.add_tensor(f"{_FOLDED.sub('', stem)}_folded", value, before=node, kind="constant")
        ir.replace(node, folded)
        added = value.numel() if value.is_floating_point() else 0
        return Change(
            what=what, where=where, saved_nodes=saved.calls, saved_parameters=saved.parameters - added,
            saved_macs=saved.macs,
        )  # fmt: skip


def _is_constant(node: Node) -> bool:
    """Whether ``node`` computes, from stored tensors or from nothing, a tensor that is always the same and is read."""
    row = dialect.info(node)
    value = node.meta["val"]
    if not node.users or any(n.op != "get_attr" for n in node.all_input_nodes):
        return False
    if row is None or row.category in ("quant", "shape") or dialect.checks_at_run_time(node) or dialect.is_random(node):
        return False
    return isinstance(value, torch.Tensor) and not any(isinstance(size, torch.SymInt) for size in value.shape)


def _freed(ir: Program, node: Node) -> int:
    """Elements of the operands that nothing else reads."""
    mine = set(node.all_input_nodes)
    names = {str(n.target) for n in mine if set(n.users) == {node}}
    if names:
        names -= {str(n.target) for n in ir.graph.nodes if n.op == "get_attr" and n.users and set(n.users) != {node}}
    return sum(ir.tensors[name].numel() for name in names)


def _value(ir: Program, node: Node) -> torch.Tensor:
    args: Any
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: ir.tensors[str(n.target)])
    with torch.inference_mode(False), torch.no_grad():
        value: torch.Tensor = node.target(*args, **kwargs)  # type: ignore[operator]
        # A view of a stored tensor would keep the whole of it alive, and a later edit of one would show in the other.
        return value.clone(memory_format=torch.contiguous_format)
