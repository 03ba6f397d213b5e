"""Facts: named predicates that hold for a Program, which passes require, establish or break.

A fact without a predicate does not exist; the runner evaluates what a pass claims to establish.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

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


def no_foldable_batch_norm(program: Program) -> bool:
    """No batch norm reads the only use of a convolution or linear."""
    for node in program.calls("aten.batch_norm.default"):
        producer = node.args[0]
        if (
            isinstance(producer, torch.fx.Node)
            and dialect.op_name(producer) in ("aten.conv1d.default", "aten.conv2d.default", "aten.conv3d.default")
            and len(producer.users) == 1
            and all(program.tensor_of(a) is not None for a in producer.args[1:2])
        ):
            return False
    return True


FACTS: dict[str, Predicate] = {
    "canonical": canonical,
    "no-foldable-batch-norm": no_foldable_batch_norm,
}
"""Name → predicate."""
