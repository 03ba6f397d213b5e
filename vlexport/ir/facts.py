"""Facts: named predicates that hold for a Program, which passes require, establish or break.

A fact without a predicate does not exist; the runner evaluates what a pass claims to establish.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from torch.fx import Node

from vlexport.ir import dialect
from vlexport.ir.program import Program

Predicate = Callable[[Program], bool]

_SPELLINGS = (*itertools.chain(*dialect.SECOND_SPELLINGS.values()), *dialect.COPIES, "aten.dropout.default")


def canonical(program: Program) -> bool:
    """No second spelling of permute, reshape or expand is left."""
    return not program.calls(*_SPELLINGS)


_BEFORE_BATCH_NORM = (*dialect.CONVOLUTIONS, *dialect.TRANSPOSED_CONVOLUTIONS, "aten.linear.default")


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
