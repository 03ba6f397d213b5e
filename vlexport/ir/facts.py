"""Facts: named predicates that hold for a Program, which passes require, establish or break.

A fact without a predicate does not exist; the runner evaluates what a pass claims to establish.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import Node

from vlexport.ir import dialect
from vlexport.ir.program import Program

Predicate = Callable[[Program], bool]

_SPELLINGS = (
    "aten.transpose.int", "aten.t.default", "aten.mT.default", "aten.numpy_T.default", "aten.swapaxes.default",
    "aten.swapdims.default", "aten.movedim.int", "aten.movedim.intlist", "aten.view.default", "aten.flatten.using_ints",
    "aten.unflatten.int", "aten._unsafe_view.default", "aten.view_as.default", "aten.reshape_as.default",
    "aten.contiguous.default", "aten.clone.default", "aten.expand_as.default", "aten.dropout.default",
)  # fmt: skip
"""Second spellings of an idea that ``canonicalize`` removes."""


def canonical(program: Program) -> bool:
    """No second spelling of permute, reshape or expand is left."""
    return not program.calls(*_SPELLINGS)


_BEFORE_BATCH_NORM = (
    "aten.conv1d.default", "aten.conv2d.default", "aten.conv3d.default", "aten.conv1d.padding", "aten.conv2d.padding",
    "aten.conv3d.padding", "aten.conv_transpose1d.default", "aten.conv_transpose2d.input",
    "aten.conv_transpose3d.input", "aten.linear.default",
)  # fmt: skip


def no_foldable_batch_norm(program: Program) -> bool:
    """No inference batch norm with stored statistics is the only reader of a convolution or linear with stored weights.

    The channels of that convolution or linear are axis 1, as batch norm takes them.
    """
    return not any(_is_foldable(program, node) for node in program.calls("aten.batch_norm.default"))


def _is_foldable(program: Program, node: Node) -> bool:
    _, gamma, beta, mean, variance, training, *_ = dialect.operands(node)
    producer: Any = node.args[0]
    if training or dialect.op_name(producer) not in _BEFORE_BATCH_NORM or len(producer.users) != 1:
        return False
    weight, bias = dialect.operands(producer)[1:3]
    stored = all(program.tensor_of(each) is not None for each in (weight, mean, variance))
    optional = all(each is None or program.tensor_of(each) is not None for each in (bias, gamma, beta))
    return stored and optional and producer.meta["val"].ndim == weight.meta["val"].ndim


def no_dead_calls(program: Program) -> bool:
    """Every call is read, or is there for what it refuses."""
    return all(n.users or dialect.checks_at_run_time(n) for n in program.calls())


FACTS: dict[str, Predicate] = {
    "canonical": canonical,
    "no-dead-calls": no_dead_calls,
    "no-foldable-batch-norm": no_foldable_batch_norm,
}
"""Name → predicate."""
