"""fold-constants: what depends on stored tensors alone is computed once, now.

Before → after::

    %1 = exp(@table: f32[12])
    %2 = mul(x, %1)                →    %1 = mul(x, @table.folded: f32[12])

Does not apply when: an operand is an input, a size that the input decides, or random; the result would be larger than
both its operands together and a megabyte (an expanded mask is cheaper to compute than to ship); the operator is opaque
or one of our quantization operators (a folded dequantize would undo the quantization); the result is no tensor.
Numerical effect: none, bit for bit: the same kernel computes the same value.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from vlexport.ir import dialect, provenance
from vlexport.ir.program import Program
from vlexport.passes.base import Change, Effect, Match, NearMiss, Pass, Stage

GROWTH_LIMIT_BYTES = 1 << 20
_PATTERN = "operator on stored tensors"


class FoldConstants(Pass[Program]):
    """What depends on stored tensors alone is computed once, now."""

    name: ClassVar[str] = "fold-constants"
    stage: ClassVar[Stage] = "normalize"
    effect: ClassVar[Effect] = "exact"

    def find(self, ir: Program) -> Iterator[Match | NearMiss]:
        for node in ir.calls():
            reason = unfoldable(ir, node)
            if reason is None:
                continue
            if reason:
                yield NearMiss(_PATTERN, node, reason)
            else:
                yield Match(node, (node,))

    def apply(self, ir: Program, match: Match) -> Change:
        node = match.node
        value = _value(ir, node)
        stem = next((str(n.target) for n in node.all_input_nodes), provenance.module_path(node) or "constant")
        folded = ir.add_tensor(f"{stem.removesuffix('.folded')}.folded", value, before=node, kind="constant")
        what = f"{dialect.op_name(node).removeprefix('aten.').partition('.')[0]} of constants computed"
        where = (provenance.module_path(node),)
        before = sum(t.numel() for t in ir.used_tensors().values())
        saved = ir.replace(node, folded)
        after = sum(t.numel() for t in ir.used_tensors().values())
        return Change(what=what, where=where, saved_nodes=saved, saved_parameters=before - after)


def unfoldable(ir: Program, node: Node) -> str | None:
    """Empty when ``node`` can be computed now, a reason when it nearly can, None when it reads anything else."""
    operands = node.all_input_nodes
    if not all(n.op == "get_attr" for n in operands):
        return None
    row = dialect.info(node)
    if row is None or row.category in ("quant", "shape") or dialect.checks_at_run_time(node):
        return None
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor):
        return None
    if any(isinstance(size, torch.SymInt) for size in value.shape):
        return None
    if not operands and row.category != "make":
        return None
    if not operands and value.numel() > 1 and node.users and all(_is_shape_only(u) for u in node.users):
        return None
    size = value.numel() * value.element_size()
    read = sum(ir.tensors[str(n.target)].numel() * ir.tensors[str(n.target)].element_size() for n in operands)
    if size > read + GROWTH_LIMIT_BYTES:
        return f"its result would take {size / 1e6:.1f} MB, its operands take {read / 1e6:.1f} MB"
    return ""


def _is_shape_only(node: Node) -> bool:
    row = dialect.info(node)
    return row is not None and row.category == "shape"


def _value(ir: Program, node: Node) -> torch.Tensor:
    args: Any
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: ir.tensors[str(n.target)])
    with torch.inference_mode(False), torch.no_grad():
        value: torch.Tensor = node.target(*args, **kwargs)  # type: ignore[operator]
    # A view of a stored tensor would keep the whole of it alive, and a later edit of one would show in the other.
    return value.contiguous().clone()
