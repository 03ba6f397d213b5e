"""reparameterize: branches, batch norms and convolutions in a row become the one convolution that they compute.

Before → after::

    %1 = conv2d(x, W1, padding 1)
    %2 = batch_norm(%1, …)
    %3 = conv2d(x, W2)                            %1 = conv2d(x, W', b', padding 1)
    %4 = batch_norm(%3, …)
    %5 = batch_norm(x, …)
    %6 = add(add(%2, %4), %5)

Equation: ``y[o, i] = Σ W[o, c, t] · x0[c, stride · i + t] + b[o]``, where ``x0`` is ``x`` with zeros on all sides, is
closed under sums, per-channel scales, joins along the channels and, where the border allows it, composition. Every
value is carried as such an expression of the values before it (``passes/affine``); the weights of the ones that are
written are computed in float64 and cast once. A batch norm is ``s = gamma / sqrt(var + eps)`` times its input plus
``beta − s · mean``.

What is written costs no more MACs than what it replaces, and reads no more weights unless MACs fall.

Does not apply when: something that is not affine stands between; a bias stands before zero padding, or padding between
two kernels, so that the border is no convolution; strides of branches differ; a value is used elsewhere; a weight is
computed, dequantized ones included; one operator would cost more.
Numerical effect: exact up to rounding of the weights.
Source: Jacob et al. 2018, arXiv 1712.05877, section 3.2 (batch norm); Ding et al. 2021, arXiv 2101.03697 (branches).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

from torch.fx import Node

from vlexport.ir import dialect, provenance
from vlexport.ir.program import Program
from vlexport.passes.affine.analysis import Analysis
from vlexport.passes.affine.choice import Merge
from vlexport.passes.affine.emit import Arranged, write
from vlexport.passes.affine.reading import BATCH_NORM
from vlexport.passes.affine.search import merges
from vlexport.passes.affine.sharing import Shared
from vlexport.passes.base import Change, Effect, Match, NearMiss, Pass, Stage


class Reparameterize(Pass[Program]):
    """Branches, batch norms and convolutions in a row become the one convolution that they compute."""

    name: ClassVar[str] = "reparameterize"
    stage: ClassVar[Stage] = "reparameterize"
    effect: ClassVar[Effect] = "exact"
    establishes: ClassVar[frozenset[str]] = frozenset({"no-foldable-batch-norm"})

    def find(self, ir: Program) -> Iterator[Match | NearMiss]:
        for found in merges(Analysis(ir)):
            if isinstance(found, (Merge, Shared)):
                yield Match(found.value, found.consumed, found)
            else:
                node, miss = found
                yield NearMiss(miss.pattern, node, miss.reason)

    def apply(self, ir: Program, match: Match) -> Change:
        found: Merge | Shared = match.data
        read = _stored(ir, found.consumed)
        where = tuple(dict.fromkeys(provenance.module_path(node) for node in found.consumed))
        parts = found.merges if isinstance(found, Shared) else (found,)
        macs = sum(merge.macs[0] - merge.macs[1] for merge in parts)
        saved_nodes, arranged, written = 0, Arranged(), []
        for merge in parts:
            new, added = write(ir, merge, arranged)
            written.append(new)
            what = _what(merge, new)
            saved_nodes += ir.replace(merge.value, new) - added
        if isinstance(found, Shared):
            what = f"{dialect.plain_name(found.value)} folded into the {len(parts)} operators that read it"
        gone = sum(size for name, size in read.items() if name not in ir.tensors)
        parameters = gone - sum(_stored(ir, written).values())
        return Change(what=what, where=where, saved_nodes=saved_nodes, saved_parameters=parameters, saved_macs=macs)


def _stored(ir: Program, calls: Sequence[Node]) -> dict[str, int]:
    """Name → elements of the floating tensors that calls read."""
    found = {str(operand.target): ir.tensor_of(operand) for call in calls for operand in call.all_input_nodes}
    return {name: t.numel() for name, t in found.items() if t is not None and t.is_floating_point()}


def _what(merge: Merge, new: Node) -> str:
    name = dialect.plain_name(new)
    names = [dialect.op_name(node) for node in merge.consumed]
    if names.count(BATCH_NORM) == len(names) - 1:
        return f"batch norm folded into {name}"
    parameters, macs = (f"{before:,} → {after:,}" for before, after in (merge.weights, merge.macs))
    return f"{len(names)} operators merged into {name}, weights {parameters}, MACs {macs}"
