"""The merges of a whole graph.

Readers are asked before operands, so that what a merge no longer reads is not written either.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Node

from vlexport.passes.affine.analysis import Analysis, Miss
from vlexport.passes.affine.choice import Merge, best
from vlexport.passes.affine.reading import Rescaled
from vlexport.passes.affine.reasons import reason_for
from vlexport.passes.affine.sharing import Shared, shared


def merges(analysis: Analysis) -> Iterator[Merge | Shared | tuple[Node, Miss]]:
    """Every merge, readers before operands, and every call that stays as it is though it is part of a map."""
    asked: set[Node] = set()
    for node in reversed(analysis.program.graph.nodes):
        if node.op in ("placeholder", "get_attr"):
            continue
        reading = analysis.readings.get(node)
        if reading is not None and node not in asked:
            continue
        found: Merge | Shared | Miss | None = best(analysis, node) if reading is not None else None
        if isinstance(found, Merge):
            asked.add(found.form.root)
            yield found
            continue
        asked.update(node.all_input_nodes)
        if isinstance(reading, Rescaled):
            found = shared(analysis, node) or found
        if isinstance(found, Shared):
            yield found
            continue
        miss = found or analysis.misses.get(node) or reason_for(analysis, node)
        if miss is not None:
            yield node, miss
