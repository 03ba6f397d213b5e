"""Rewrites of ONNX graphs over random graphs: the same outputs, and enough of them found."""

from __future__ import annotations

import json
import math
from pathlib import Path

from tests.benchmarks.rewrite_random import ALL, GRAPHS, Counts, add, examine, random_graphs, rewrites, table
from tests.figures import require_figures
from tests.onnx_grammar import random_graph
from vlexport.passes.base import Change, Match, Pass
from vlexport.targets.onnx.model import OnnxModel

ROOT = Path(__file__).resolve().parents[1]
RECORD = json.loads((ROOT / "docs/measured/rewrites.json").read_text(encoding="utf-8"))
SLOW = ("simplify-onnx", "optimize-onnx")
"""Left to the benchmark."""


def test_rewrites_compute_the_same_when_graphs_are_random() -> None:
    counts = Counts()
    assert add(counts, random_graphs(range(1000, 1020)), rewrites(SLOW), math.inf)
    assert counts.failures == []
    assert counts.refused == {}
    for name in (
        "fuse-attention",
        "fuse-qattention",
        "fuse-biased-attention",
        "gather-rows",
        "part-norms",
        "fuse-multi-head-attention",
        "fuse-dynamic-linear",
    ):
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


def test_counts_go_on_where_a_record_ends() -> None:
    whole, first, passes = Counts(), Counts(), rewrites(SLOW)
    add(whole, random_graphs(range(4)), passes, math.inf)
    assert not add(first, random_graphs(range(4)), passes, 0.0)
    assert first == Counts()
    add(first, random_graphs(range(2)), passes, math.inf)
    again = Counts.of(first.row("random"))
    assert add(again, random_graphs(range(4)), passes, math.inf)
    assert again.row("random") == whole.row("random")


def test_page_holds_the_table_of_the_record() -> None:
    require_figures(ROOT / "docs/onnxruntime.md", "rewrites", table(RECORD))


def test_record_is_of_all_graphs_and_every_rewrite_and_holds_no_failure() -> None:
    drawn, nodes = RECORD["rows"]
    assert (drawn["what"], drawn["graphs"], nodes["what"]) == ("random", GRAPHS, "nodes")
    assert nodes["graphs"] >= 1884, "as many as onnx 1.23 has"
    assert drawn["failures"] + nodes["failures"] == []
    assert {*drawn["fused"]} == {*nodes["fused"]} == {*rewrites()} - {ALL}
    assert all(count > 0 for count in drawn["fused"].values()), "each was seen to apply"
