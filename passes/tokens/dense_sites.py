"""Which dense masks of a Program become selections: those whose rebuild is proven, and spares multiplications."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from vlexport.ir.cost import cost
from vlexport.ir.program import Program
from vlexport.passes.tokens.counts import LEAST_PLACES
from vlexport.passes.tokens.dense_masks import candidates
from vlexport.passes.tokens.freezing import freeze
from vlexport.passes.tokens.values import CannotFreeze


@dataclass(frozen=True)
class DenseSites:
    """What was found.

    Attributes:
        masks: Calls whose masks become selections, in their order.
        refused: Calls at which the proof of another one failed, with the reason.
    """

    masks: tuple[Node, ...]
    refused: tuple[tuple[Node, str], ...]


def dense_sites(program: Program) -> DenseSites:
    """Try every mask beside those taken before; the Program is not changed.

    Args:
        program: Of batch 1 and fixed sizes.
    """  # each mask takes one token more away, so that what it spares is seen
    least = cost(program).macs
    masks: list[Node] = []
    refused: list[tuple[Node, str]] = []
    for mask in candidates(program):
        copy = program.copy()
        twins = dict(zip(program.graph.nodes, copy.graph.nodes, strict=True))
        trial = [twins[each] for each in (*masks, mask)]
        places = {each: max(each.meta["val"].numel() - number, LEAST_PLACES) for number, each in enumerate(trial, 1)}
        try:
            freeze(copy, places, batch=1, by_score=False, overflow=False, dense=trial)
        except CannotFreeze as error:
            name = error.node.name if error.node is not None else ""
            at = next((n for n in program.graph.nodes if n.name == name), mask)
            refused.append((at, error.reason))
            continue
        macs = cost(copy).macs
        if macs < least:
            least = macs
            masks.append(mask)
    return DenseSites(tuple(masks), tuple(refused))
