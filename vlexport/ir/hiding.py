"""Which boolean inputs hide what they are true for.

Frameworks disagree: ``attn_mask`` of ``scaled_dot_product_attention`` is true for what may be looked at,
``key_padding_mask`` of ``nn.MultiheadAttention`` for what may not. The graph tells by what it writes there::

    masked_fill(scores, pad, -inf)              true hides
    masked_fill(scores, logical_not(m), -inf)   true keeps
    where(m, scores, -1e9)                      true keeps
"""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from vlexport.ir import dialect
from vlexport.ir.program import Program

_HIDDEN = -1e4
"""A score of this or less weighs nothing behind a softmax, in float16 too."""
_NEGATIONS = ("aten.logical_not.default", "aten.bitwise_not.default")


def hides(program: Program, mask: Node) -> bool:
    """Whether true of a boolean input means that something is left out; false where nothing tells.

    Args:
        program: Where it is read.
        mask: The input.
    """
    pending, seen = [(mask, True)], {mask}
    while pending:
        value, straight = pending.pop()
        for user in value.users:
            filled = _fills_where(program, user, value)
            if filled is not None:
                return filled == straight
            if user not in seen and dialect.carries_on(user):
                seen.add(user)
                pending.append((user, straight != (dialect.op_name(user) in _NEGATIONS)))
    return False


def _fills_where(program: Program, user: Node, mask: Node) -> bool | None:
    """Whether ``user`` hides what ``mask`` is true for; False if what it is false for; None if it does neither."""
    name, args = dialect.op_name(user), user.args
    if name.startswith("aten.masked_fill.") and args[1] is mask:
        return True if _is_hidden(program, args[2]) else None
    if name.startswith("aten.where.") and args[0] is mask:
        chosen = [_is_hidden(program, each) for each in args[1:3]]
        return chosen[0] if chosen[0] != chosen[1] else None
    return None


def _is_hidden(program: Program, value: Any) -> bool:
    """Whether a number, a stored tensor or one that is filled with a number is a score that hides."""
    if isinstance(value, Node) and value.op == "get_attr":
        stored = program.tensors[str(value.target)]
        return stored.numel() > 0 and bool((stored <= _HIDDEN).all())
    if isinstance(value, Node) and dialect.op_name(value) in ("aten.full.default", "aten.scalar_tensor.default"):
        value = value.args[-1]
    return isinstance(value, int | float) and not isinstance(value, bool) and value <= _HIDDEN
