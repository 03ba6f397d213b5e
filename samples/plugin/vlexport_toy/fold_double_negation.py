"""fold-double-negation: a value that is negated twice is the value.

Before → after::

    %1 = neg(x)
    %2 = neg(%1)            →    %3 = relu(x)
    %3 = relu(%2)

Equation: ``-(-x) = x``, for floats of any kind (the sign bit flips twice) and for integers that wrap around.

Does not apply when: another operator stands between the two negations, as a reshape does; that place is a near miss.
Where the inner negation has other readers it stays for them, and only the outer one goes.

Numerical effect: none, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from torch.fx import Node

from vlexport.ir import dialect, provenance
from vlexport.ir.program import Program
from vlexport.passes.base import Change, Effect, Match, NearMiss, Pass, Stage

API_VERSION = 1
"""The version of vlexport's interface that this was written for. A number: what is imported would always fit."""

NEGATION = "aten.neg.default"


class FoldDoubleNegation(Pass[Program]):
    """A value that is negated twice is the value."""

    name: ClassVar[str] = "fold-double-negation"
    stage: ClassVar[Stage] = "normalize"
    effect: ClassVar[Effect] = "exact"

    def find(self, ir: Program) -> Iterator[Match | NearMiss]:
        for outer in ir.calls(NEGATION):
            inner: Any = outer.args[0]
            if dialect.op_name(inner) == NEGATION:
                yield Match(outer, (outer, inner), inner)
            elif _is_view_of_negation(inner):
                between = dialect.op_name(inner).removeprefix("aten.")
                yield NearMiss("neg → neg", outer, f"{between} stands between the two negations")

    def apply(self, ir: Program, match: Match) -> Change:
        inner: Node = match.data
        where = (provenance.module_path(match.node),)
        source: Any = inner.args[0]
        saved = ir.replace(match.node, source)
        return Change(what="double negation removed", where=where, saved_nodes=saved)


def _is_view_of_negation(node: Any) -> bool:
    about = dialect.info(node)
    if node.op != "call_function" or about is None or about.category != "view":
        return False
    return any(dialect.op_name(operand) == NEGATION for operand in node.all_input_nodes)
