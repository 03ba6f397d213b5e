"""narrow-to-demand: only what the outputs read is computed.

Before → after (the last block of a ViT; the head reads the class token)::

    %1 = linear(x, @qkv) → q, k, v                     %0 = slice(x, 1, 0, 1)
    %2 = attention(q, k, v)     [b,h,197,64]           %1 = linear(%0, @qkv_narrowed)   → q of one token
    %3 = linear(%2, @proj)      [b,197,384]            %2 = linear(x, @qkv_narrowed_1)  → k, v of all
    %4 = add(x, %3)                             →      %3 = attention(q, k, v)          [b,h,1,64]
    %5 = add(%4, mlp(norm(%4)))                        %4 = linear(%3, @proj)           [b,1,384]
    %6 = norm(%5)                                      %5 = add(%0, %4)
    %7 = select(%6, 1, 0)                              %6 = norm(add(%5, mlp(norm(%5)))) …

Equation: ``f(x)[rows] = f(x[rows])`` for whatever treats the rows of an axis apart. Rows of a product are rows of its
left factor, columns are columns of its right one: ``(A·B)[I, J] = A[I, :] · B[:, J]``; so a linear of which half of the
features are read gets half of its stored weight, and attention for one token takes one query, all keys and all values.

What is asked of a value is collected from its readers, from the outputs upwards: on each axis all, or some indices
(one token, a class and a distillation token, all but the registers, some channels). Where readers ask for parts whose
union is no such box, the value is computed in pieces, each once. One row a sample, at the argmax of whole numbers that
follow from the inputs (the end token of a text tower), is moved up in the same way, as the index that it is.

Does not apply when: another reader needs the whole value; an operator on the way mixes the axis (a softmax or norm
along it, a convolution over neighbours, a roll, a reshape that merges it with another); which part is read is decided
by the input otherwise; nothing that multiplies lies above, for a slice that only moves up through cheap operators is no
gain; a permute, reshape or expand has no canonical spelling. A model that pools over all tokens is left as it is.

Numerical effect: none in exact arithmetic; a kernel for other sizes may sum in another order. Never more
multiply-accumulates, and fewer for every change. A weight that is also used elsewhere is stored a second time,
narrowed.

Source: our own; the dual of dead code elimination, for parts of values.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from vlexport.ir import dialect, provenance
from vlexport.ir.cost import cost
from vlexport.ir.program import Program
from vlexport.passes.base import Change, Effect, Match, NearMiss, Pass, Stage
from vlexport.passes.demand.analysis import Demand
from vlexport.passes.demand.rewrite import Rewrite

_PATTERN = "value of which a part is read"


class NarrowToDemand(Pass[Program]):
    """Only what the outputs read is computed."""

    name: ClassVar[str] = "narrow-to-demand"
    stage: ClassVar[Stage] = "narrow"
    effect: ClassVar[Effect] = "exact"

    def find(self, ir: Program) -> Iterator[Match | NearMiss]:
        demand = Demand(ir)
        for region in demand.regions():
            yield Match(region.ends[0], region.nodes, region)
        for stop in demand.stops():
            yield NearMiss(_PATTERN, stop.node, stop.reason)

    def apply(self, ir: Program, match: Match) -> Change:
        region = match.data
        what = _what(region.gaining)
        where = tuple(dict.fromkeys(provenance.module_path(node) for node in region.gaining))
        was, calls = cost(ir), len(ir.calls())
        Rewrite(ir, region).run()
        now = cost(ir)
        return Change(
            what=what, where=where, saved_nodes=calls - len(ir.calls()),
            saved_parameters=was.parameters - now.parameters, saved_macs=was.macs - now.macs,
        )  # fmt: skip


def _what(gaining: Any) -> str:
    names = sorted({dialect.plain_name(node).replace("scaled_dot_product_attention", "attention") for node in gaining})
    return f"only the part that is read computed of {', '.join(names)}"
