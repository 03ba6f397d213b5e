"""Which dense masks of a Program become selections: those whose rebuild is proven, and spares multiplications."""

from __future__ import annotations

from collections.abc import Mapping
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

    A mask that only makes a smaller one, with nothing multiplied between, is left out again.

    Args:
        program: Of batch 1 and fixed sizes.
    """
    least = cost(program).macs
    places: dict[Node, int] = {}
    refused: list[tuple[Node, str]] = []
    for mask in candidates(program):
        # one token fewer at each mask, so that what it spares is seen
        tokens: int = mask.meta["val"].numel()
        beside = places | {mask: max(min([tokens, *places.values()]) - 1, LEAST_PLACES)}
        try:
            macs = _macs(program, beside)
        except CannotFreeze as error:
            name = error.node.name if error.node is not None else ""
            at = next((n for n in program.graph.nodes if n.name == name), mask)
            refused.append((at, error.reason))
            continue
        if macs >= least:
            continue
        without = {each: k for each, k in beside.items() if each not in list(places)[-1:]}
        if places and _spares(program, without, macs):
            beside = without
        least, places = macs, beside
    return DenseSites(tuple(places), tuple(refused))


def _spares(program: Program, places: Mapping[Node, int], macs: int) -> bool:
    """Whether these masks alone spare as much."""
    try:
        return _macs(program, places) <= macs
    except CannotFreeze:
        return False


def _macs(program: Program, places: Mapping[Node, int]) -> int:
    """Of a copy that is rebuilt with these numbers of tokens.

    Raises:
        CannotFreeze: Where the proof fails.
    """
    copy = program.copy()
    twins = dict(zip(program.graph.nodes, copy.graph.nodes, strict=True))
    trial = {twins[mask]: k for mask, k in places.items()}
    freeze(copy, trial, batch=1, by_score=False, overflow=False, dense=tuple(trial))
    return cost(copy).macs
