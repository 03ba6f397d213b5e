"""A batch norm or scale in front of several operators goes into all of them, or into none.

One reader alone saves nothing: the norm stays for the others. So all readers are looked at together, also through
further scales, reshapes and permutes, and the norm goes where each of them can take it at no more MACs, and all of them
together at no more weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from vlexport.ir import dialect
from vlexport.ir.program import Program
from vlexport.passes.affine.analysis import Analysis, Form, Miss
from vlexport.passes.affine.choice import Merge, weights_read, written
from vlexport.passes.affine.expression import is_identity

PATTERN = "scale → several operators"


@dataclass(frozen=True)
class Shared:
    """Several merges that only pay together.

    Attributes:
        value: The scaled value that goes.
        merges: One for every operator that reads it, in the order of the graph.
        consumed: All calls that nobody reads afterwards.
    """

    value: Node
    merges: tuple[Merge, ...]
    consumed: tuple[Node, ...]


def shared(analysis: Analysis, node: Node) -> Shared | Miss | None:
    """The merges of all readers of a scaled value, or why one of them cannot take the scale."""
    own = next((form for form in analysis.forms[node] if is_identity(form.expression)), None)
    if own is None:
        return None
    inside: dict[Node, None] = {node: None}
    found: dict[Node, Form] = {}
    pending = [node]
    while pending:
        for user in pending.pop().users:
            form = next((form for form in analysis.forms.get(user, ()) if form.root is own.root), None)
            if form is None:
                return _kept(analysis, user)
            if is_identity(form.expression):
                if user not in inside:
                    inside[user] = None
                    pending.append(user)
            else:
                found[user] = form
    consumed = (*inside, *found)
    merges = []
    for user, form in sorted(found.items(), key=lambda pair: analysis.place[pair[0]]):
        reads = [each for each in user.all_input_nodes if each.op != "get_attr"]
        merge = written(analysis, user, form, (*inside, user)) if inside.keys() >= set(reads) else None
        if not isinstance(merge, Merge):
            return merge or _kept(analysis, user)
        if merge.macs[1] > merge.macs[0]:
            return Miss(PATTERN, f"behind it the {dialect.plain_name(user)} would cost {merge.macs[1]:,} MACs")
        merges.append(merge)
    return _worth(analysis.program, node, tuple(merges), consumed)


def _worth(program: Program, node: Node, merges: tuple[Merge, ...], consumed: tuple[Node, ...]) -> Shared | Miss | None:
    views = {merge.form.start: len(merge.views) for merge in merges}  # the same arrangement is made once
    calls = len(merges) + sum(views.values())
    weights, own = sum(weights_read(program, each) for each in consumed), sum(merge.weights[1] for merge in merges)
    if own > weights:
        return Miss(PATTERN, f"its {len(merges)} readers would need {own:,} weights for {weights:,}, and no fewer MACs")
    return Shared(node, merges, consumed) if calls < len(consumed) else None


def _kept(analysis: Analysis, user: Node) -> Miss | None:
    miss = analysis.misses.get(user)
    return Miss(PATTERN, f"one of its readers cannot take it: {miss.reason}") if miss is not None else None
