"""Rewrites of ONNX graphs over random graphs: the same outputs, and enough of them found."""

from __future__ import annotations

from tests.benchmarks.rewrite_random import SLOW, Counts, examine, random_counts, rewrites
from tests.onnx_grammar import random_graph
from vlexport.passes.base import Change, Match, Pass
from vlexport.targets.onnx.model import OnnxModel


def test_rewrites_compute_the_same_when_graphs_are_random() -> None:
    counts = random_counts(range(1000, 1020), rewrites((*SLOW, "optimize-onnx")))
    assert counts.failures == []
    assert counts.refused == {}
    for name in ("fuse-attention", "fuse-qattention", "fuse-biased-attention", "fuse-dynamic-linear"):
        assert counts.fused[name] > 0, name
    assert counts.misses > 20


class Broken(Pass[OnnxModel]):
    """Every sum becomes a difference."""

    name = "break-lowered"
    stage = "legalize"

    def find(self, ir: OnnxModel):  # type: ignore[no-untyped-def]
        for node in ir.nodes("Add"):
            yield Match(node, (node,))

    def apply(self, ir: OnnxModel, match: Match[object]) -> Change:
        match.node.op_type = "Sub"  # type: ignore[attr-defined]
        return Change(what="a difference")


def test_examination_names_the_graph_when_a_rewrite_is_wrong() -> None:
    counts, graph = Counts(), next(g for g in map(random_graph, range(50)) if g.model.nodes("Add"))
    examine("seed", graph.model, graph.inputs, {"break-lowered": [Broken()]}, counts)
    (said,) = counts.failures
    assert said.startswith("seed, break-lowered: ")
    assert "relative error" in said
