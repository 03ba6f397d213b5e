"""Dense masks: calls that say 0 or 1 of every token, and leave all tokens in their places."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Node

from vlexport.ir import dialect
from vlexport.ir.cost import node_macs
from vlexport.ir.program import Program
from vlexport.passes.tokens.left_out import LeftOut, token_axis
from vlexport.passes.tokens.survivors import root_of

LEAST_TOKENS = 4
"""A row of fewer is hardly one of tokens."""
_BINARY = ("mul", "maximum", "minimum", "cat", "reshape", "unsqueeze", "squeeze", "expand", "permute", "slice")
"""What gives 0 and 1 from operands of 0 and 1."""


def candidates(program: Program) -> Iterator[Node]:
    """Calls that may be the mask of a selection: 0 or 1 for each place of one axis, where 0 silences factors."""
    computed: set[Node] = set(program.placeholders)
    for node in program.calls():
        if computed.isdisjoint(node.all_input_nodes):
            continue
        computed.add(node)
        if not isinstance(node.meta.get("val"), torch.Tensor) or not _is_row(node) or not is_binary(program, node):
            continue
        if root_of(node) is node and not _is_view(node) and silences(program, node):
            yield node


def silences(program: Program, mask: Node) -> bool:
    """Whether calls that multiply read rows of tokens that hold a known number wherever the mask is 0."""
    tokens = mask.meta["val"].numel()
    left_out = LeftOut(program, mask)
    if left_out.at(mask, None).constant is not None:
        return False
    pending = [node for node in left_out.silent() if _numel(node) > tokens]
    seen = set(pending)
    while pending:
        for user in pending.pop().users:
            if not _has_rows(user, tokens):
                continue
            if node_macs(program, user, {}):
                return True
            if user not in seen:
                seen.add(user)
                pending.append(user)
    return False


def _has_rows(node: Node, tokens: int) -> bool:
    """Whether an axis of its value, or of one of its values, has so many places."""
    values = node.meta.get("val")
    found = values if isinstance(values, (tuple, list)) else [values]
    return any(isinstance(v, torch.Tensor) and tokens in v.shape for v in found)


def is_binary(program: Program, node: Node) -> bool:
    """Whether a value holds nothing but 0 and 1."""
    if node.meta["val"].dtype is torch.bool:
        return True
    stored = program.tensor_of(node)
    if stored is not None:
        return bool(((stored == 0) | (stored == 1)).all())
    name = dialect.plain_name(node)
    if name in ("ones", "zeros", "ones_like", "zeros_like"):
        return True
    if name in ("full", "full_like"):
        return dialect.operands(node)[1] in (0, 1)
    if name in ("rsub", "sub"):
        numbers = [each for each in dialect.operands(node)[:2] if not isinstance(each, Node)]
        first = dialect.operands(node)[int(name == "rsub")]
        return numbers == [first] == [1] and all(is_binary(program, n) for n in node.all_input_nodes)
    if dialect.is_cast(node) or name in _BINARY:
        read = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
        return len(read) > 0 and not _numbers(node) and all(is_binary(program, n) for n in read)
    return False


def always_live(program: Program, mask: Node) -> int:
    """How many tokens at the front a mask keeps whatever the input is: those of stored ones in front of the others."""
    if dialect.plain_name(mask) != "cat" or dialect.operands(mask)[1] % mask.meta["val"].ndim != token_axis(mask):
        return 0
    bounds, count = LeftOut(program, None), 0
    for piece in dialect.operands(mask)[0]:
        if bounds.at(piece, None).constant != 1.0:
            break
        count += piece.meta["val"].numel()
    return count


def _is_row(node: Node) -> bool:
    shape = node.meta["val"].shape
    if any(isinstance(size, torch.SymInt) for size in shape):
        return False
    return [int(size) for size in shape if size != 1] == [_numel(node)] and _numel(node) >= LEAST_TOKENS


def _is_view(node: Node) -> bool:
    row = dialect.info(node)
    return (row is not None and row.category == "view" and dialect.plain_name(node) != "cat") or dialect.is_cast(node)


def _numel(node: Node) -> int:
    size: Any = node.meta["val"].numel()
    return size if isinstance(size, int) else 0


def _numbers(node: Node) -> bool:
    """Whether a product is by a number."""
    return dialect.plain_name(node) == "mul" and any(isinstance(e, (int, float)) for e in dialect.operands(node)[:2])
