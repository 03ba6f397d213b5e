"""Heads of residual streams: results that a kernel would round, and that nothing rounds again.

A convolution with integers rounds its result, since its kernel needs that. Where another such call reads it, nothing
more is lost: it would be rounded there. Where it begins a stream that norms and sums alone read, as behind a patch
embedding, every block adds to what was rounded first, and the end of the model has that noise in it::

    x = conv(image)     x = reshape, permute, cat, sum with positions
    y = x + branch(norm(x))

On a trained ViT-S/14 that one rounding was the largest part of all noise in the features: 28.6 dB with it, 31.1 dB
without. Such a call stays in float, as long as all of them together are few of the model's multiplications.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.fx import Node

from vlexport.ir import dialect
from vlexport.ir.cost import cost, node_macs
from vlexport.ir.program import Program

LARGEST_SHARE = 0.05
"""Of the model's multiply-accumulates, what may stay in float for this: beyond it, speed is worth more."""
WHY = "its result begins a residual stream, which would carry the rounding to its end"
_NORMS = ("layer_norm", "rms_norm", "group_norm")


def heads_of_streams(program: Program, rounded: Sequence[tuple[Node, Node]]) -> set[Node]:
    """Calls that had better not round their results.

    Args:
        program: In float.
        rounded: Call → the value behind it that would be rounded, in order.
    """
    found = [call for call, value in rounded if _begins_stream(value)]
    room = LARGEST_SHARE * cost(program).macs if found else 0.0
    kept: set[Node] = set()
    for call in found:
        room -= node_macs(program, call, {})
        if room < 0.0:
            break
        kept.add(call)
    return kept


def _begins_stream(head: Node) -> bool:
    """Whether norms and sums alone read a value, through views, and one of the sums adds what was computed from it."""
    pending, seen, norms, returns = [head], {head}, [], False
    below: set[Node] = set()
    while pending:
        value = pending.pop()
        for reader in value.users:
            row = dialect.info(reader) if reader.op == "call_function" else None
            name = dialect.plain_name(reader) if row is not None else ""
            if row is not None and row.category == "shape":
                continue
            if name == "add" and not below:  # asked for late: most values are read by something else
                below = _computed_from(head)
            if name in _NORMS:
                norms.append(reader)
            elif name == "add" and any(each is not value and each in below for each in _tensors(reader) - seen):
                returns = True
            elif row is not None and (row.category == "view" or name == "add"):
                if reader not in seen:
                    seen.add(reader)
                    pending.append(reader)
            else:
                return False
    if not returns and len(norms) == 1:  # a norm at the stem: what it makes begins the stream
        return _begins_stream(norms[0])
    return returns and bool(norms)


def _computed_from(value: Node) -> set[Node]:
    """All values below one."""
    found: set[Node] = set()
    pending = [value]
    while pending:
        for reader in pending.pop().users:
            if reader not in found:
                found.add(reader)
                pending.append(reader)
    return found


def _tensors(node: Node) -> set[Node]:
    return {each for each in node.all_input_nodes if isinstance(each.meta.get("val"), Tensor)}
