"""Every rewrite of ONNX graphs over random graphs and over the backend node tests of the onnx wheel.

    python -m tests.benchmarks.rewrite_random                                             # 200 random graphs
    python -m tests.benchmarks.rewrite_random --nodes --record docs/measured/rewrites.json
    python -m tests.benchmarks.rewrite_random --nodes --record docs/measured/rewrites.json --seconds 150    # a part

A rewrite runs alone on a copy of each graph, and all of them one after the other on another. What it makes has to pass
the checks of its level, keep names, dtypes and opset, compute what the graph computed at ONNX Runtime's lowest level,
and differ exactly where it says that it changed something. Bounds: ``max|a-b| / max|b|`` of 1e-5 of each output where a
rewrite is exact, of 2e-3 (two units in the last place) where the output is fp16; where integers may be tipped over, the
signal to noise ratio that the rewrite itself promises of a place. A graph that ONNX Runtime does not run is rewritten
and checked, not compared. The counts say how often each rewrite found something; a failure names the seed or the test
and ends the run with exit code 1. With ``--record`` a run goes on where the record ends.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime

from tests.onnx_grammar import random_graph
from tests.record import write_rows
from vlexport.core.artifact import Signature, TensorSpec
from vlexport.core.errors import CapabilityError
from vlexport.core.isolate import reused_children
from vlexport.core.numerics import relative_error, sqnr_db
from vlexport.passes.base import Pass
from vlexport.targets.onnx.level import ONNX
from vlexport.targets.onnx.model import OnnxModel
from vlexport.targets.onnxruntime import OnnxRuntimeTarget
from vlexport.targets.onnxruntime.integer_linear import IntegerFusion

GRAPHS = 200
EXACT = 1e-5
HALF = 2 * float(np.finfo(np.float16).eps)
ALL = "all"
_TOLD = 100
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Row:
    """Counts as the record holds them; see :class:`Counts`."""

    what: str
    graphs: int
    compared: int
    changed: dict[str, int]
    fused: dict[str, int]
    refused: dict[str, int]
    why: dict[str, int]
    misses: int
    worst_relative: float
    worst_sqnr_db: int | None
    failures: list[str]


@dataclass
class Counts:
    """What came of a set of graphs.

    Attributes:
        graphs: Their number.
        compared: Of these, run before and after a rewrite that changed something.
        changed: Rewrite → graphs that it changed.
        fused: Rewrite → changes that it made.
        refused: Rewrite → graphs that its tool gave up on, told as an error of ours.
        why: What was told → how often.
        misses: Near misses, all rewrites together.
        worst: Largest relative error of an output behind an exact rewrite, fp16 left out.
        worst_db: Smallest signal to noise ratio behind a rewrite of integers; None where none changed anything.
        failures: Graph, rewrite and what was wrong.
    """

    graphs: int = 0
    compared: int = 0
    changed: Counter[str] = field(default_factory=Counter)
    fused: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    why: Counter[str] = field(default_factory=Counter)
    misses: int = 0
    worst: float = 0.0
    worst_db: float | None = None
    failures: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, row: Row) -> Counts:
        """What a record tells, to be added to."""
        return cls(
            row.graphs, row.compared, Counter(row.changed), Counter(row.fused), Counter(row.refused), Counter(row.why),
            row.misses, row.worst_relative, row.worst_sqnr_db, list(row.failures),
        )  # fmt: skip

    def row(self, what: str) -> Row:
        """For the record."""
        worst_db = None if self.worst_db is None else int(self.worst_db)
        counters = (self.changed, self.fused, self.refused, self.why)
        changed, fused, refused, why = (dict(sorted(each.items())) for each in counters)
        worst, failures = float(f"{self.worst:.1e}"), list(self.failures)
        return Row(
            what, self.graphs, self.compared, changed, fused, refused, why, self.misses, worst, worst_db, failures
        )  # fmt: skip


def rewrites(without: Sequence[str] = ()) -> dict[str, list[Pass[Any]]]:
    """Rewrites to run: each alone, and all in the target's order."""
    found = {each.name: each.kind() for each in OnnxRuntimeTarget.lowered if each.name not in without}
    return {**{name: [kind()] for name, kind in found.items()}, ALL: [kind() for kind in found.values()]}


def examine(name: str, model: OnnxModel, inputs: Mapping[str, Array] | None, passes: Mapping[str, Sequence[Pass[Any]]],
            counts: Counts) -> None:  # fmt: skip
    """Run rewrites on copies of one graph and count what they did.

    Args:
        name: Of the graph, in failures.
        model: Left as it is.
        inputs: By the graph's own names; None where it is not to be run.
        passes: What :func:`rewrites` gives.
        counts: Added to.
    """
    counts.graphs += 1
    before, was = ONNX.fingerprint(model), None
    for rewrite, each in passes.items():
        made, changes = model.copy(), 0
        for step in each:
            try:
                done, misses = step.run(made)
            except CapabilityError as error:
                counts.refused[rewrite] += 1
                counts.why[_kind(error)] += 1
                changes = 0
                made = model.copy()
                break
            changes += len(done)
            if rewrite != ALL:
                counts.misses += len(misses)
                counts.fused[rewrite] += len(done)
        wrong = _broken(model, made, before, changes)
        if changes and not wrong:
            counts.changed[rewrite] += 1
            if inputs is not None:
                was = was or computed(model, inputs)
                wrong = _compared(each, was, computed(made, inputs), counts) if was else ""
                if wrong and _draws(model):
                    wrong = ""
        if wrong:
            counts.failures.append(f"{name}, {rewrite}: {wrong}")


def computed(model: OnnxModel, inputs: Mapping[str, Array]) -> list[Array] | None:
    """Outputs at ONNX Runtime's lowest level; None where it does not take the graph."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    proto = onnx_ir.to_proto(model.model).SerializeToString()
    try:
        session = onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
        found: list[Array] = session.run(None, dict(inputs))
    except (*_REFUSED, RuntimeError, ValueError):  # also values that its binding does not take
        return None
    return found if all(isinstance(each, np.ndarray) for each in found) else None


_states = onnxruntime.capi.onnxruntime_pybind11_state
_REFUSED = (
    _states.Fail,
    _states.InvalidArgument,
    _states.InvalidGraph,
    _states.NotImplemented,
    _states.RuntimeException,
)


def _kind(error: CapabilityError) -> str:
    """What a tool said, without what belongs to one graph."""
    said = re.sub(r"'[^']*'|\"[^\"]*\"|[0-9]+(\.[0-9]+)?|/\S+", "…", error.message.splitlines()[0])
    return said if len(said) <= _TOLD else f"{said[:_TOLD]}…"


def _draws(model: OnnxModel) -> bool:
    """Whether a graph is random, so that two runs of it differ."""
    return bool(model.nodes("Bernoulli", "Dropout", "Multinomial", "RandomNormal", "RandomUniform"))


def _broken(model: OnnxModel, made: OnnxModel, before: str, changes: int) -> str:
    if (ONNX.fingerprint(made) != before) != bool(changes):
        return f"{changes} changes are told, and the graph says otherwise"
    if not changes:
        return ""
    problems = [f"{where}: {what}" for where, what in ONNX.problems(made)]
    was, now = ONNX.face(model), ONNX.face(made)
    return "; ".join([*problems, *(f"changed: {what}" for what in was if was[what] != now[what])])


def _compared(passes: Sequence[Pass[Any]], was: list[Array], now: list[Array] | None, counts: Counts) -> str:
    if now is None:
        return "ONNX Runtime refuses it now"
    counts.compared += 1
    integers = [each for each in passes if isinstance(each, IntegerFusion)]
    for a, b in zip(now, was, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"{a.dtype}{a.shape} in place of {b.dtype}{b.shape}"
        if a.dtype.kind != "f":
            if not np.array_equal(a, b):
                return "other values"
        elif integers and relative_error(a, b) > EXACT:
            ratio, bound = sqnr_db(a, b), integers[0].statistic.place or 0.0
            counts.worst_db = min(ratio, counts.worst_db if counts.worst_db is not None else ratio)
            if not ratio >= bound:
                return f"{ratio:.1f} dB of {bound:.0f}"
        elif np.isfinite(b).all() or not np.array_equal(a, b, equal_nan=True):
            error = relative_error(a, b)
            counts.worst = max(counts.worst, error if b.dtype != np.float16 else 0.0)
            if not error <= (HALF if b.dtype == np.float16 else EXACT):
                return f"relative error {error:.1e}"
    return ""


Graph = tuple[str, OnnxModel, dict[str, Array] | None]
"""Name, model, and inputs where it is to be run."""


def random_graphs(seeds: Iterable[int]) -> Iterator[Graph]:
    """Random graphs of these seeds."""
    for seed in seeds:
        graph = random_graph(seed)
        yield f"seed {seed} ({', '.join(graph.blocks)})", graph.model, graph.inputs


def add(counts: Counts, graphs: Iterable[Graph], passes: Mapping[str, Sequence[Pass[Any]]], until: float) -> bool:
    """Examine graphs; what is counted already is left out.

    Args:
        counts: Added to.
        graphs: From the first on, whatever is counted.
        passes: What :func:`rewrites` gives.
        until: By ``time.monotonic``: no graph is begun behind it.

    Returns:
        Whether all of them are counted.
    """
    for name, model, inputs in itertools.islice(graphs, counts.graphs, None):
        if time.monotonic() > until:
            return False
        examine(name, model, inputs, passes, counts)
    return True


def node_tests() -> Iterator[Graph]:
    """The backend node tests of the installed onnx."""
    from onnx.backend.test.case.node import collect_testcases

    for case in collect_testcases(None):  # type: ignore[arg-type]
        if case.model is None:
            continue
        outputs = tuple(TensorSpec(name=value.name, dtype="", shape=()) for value in case.model.graph.output)
        model = OnnxModel(onnx_ir.from_proto(case.model), Signature(inputs=(), outputs=outputs, dims={}))
        names = [value.name for value in case.model.graph.input]
        given = case.data_sets[0][0] if case.data_sets else ()
        plain = len(given) == len(names) and all(isinstance(each, np.ndarray) for each in given)
        yield case.name, model, dict(zip(names, given, strict=True)) if plain else None


def table(record: Mapping[str, Any]) -> str:
    """The counts as markdown."""
    rows = [
        f"{record['date']}, {record['machine']['cpu']}, {record['versions']}.", "",
        "| rewrite | random graphs changed | changes in them | node tests changed |", "|---|---|---|---|",
    ]  # fmt: skip
    drawn, nodes = ({row["what"]: row for row in record["rows"]}[what] for what in ("random", "nodes"))
    names = [*(each.name for each in OnnxRuntimeTarget.lowered), ALL]
    for name in names:
        fused = drawn["fused"].get(name, "") if name != ALL else ""
        rows.append(f"| {name} | {drawn['changed'].get(name, 0)} | {fused} | {nodes['changed'].get(name, 0)} |")
    worst = drawn["worst_sqnr_db"]
    why: Counter[str] = Counter(drawn["why"]) + Counter(nodes["why"])
    refused, told = why.total(), "; ".join(f"{what} ({count})" for what, count in why.most_common())
    pairs, failures = drawn["compared"] + nodes["compared"], len(drawn["failures"]) + len(nodes["failures"])
    said = [
        f"{drawn['graphs']} random graphs and {nodes['graphs']} node tests: {pairs} comparisons, {refused} rewrites",
        f"given up by the tool that they call, {failures} failures. Largest relative error of an exact rewrite,",
        "fp16 left out:",
        f"{max(drawn['worst_relative'], nodes['worst_relative']):.0e}; of one with integers:",
        "no more than 1e-05." if worst is None else f"{worst} dB of signal to noise.",
    ]
    rows += ["", " ".join(said), *(["", f"Given up: {told}."] if told else [])]
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graphs", type=int, default=GRAPHS)
    parser.add_argument("--nodes", action="store_true", help="the node tests, too")
    parser.add_argument("--record", type=Path, help="write the counts as JSON; needs --nodes")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop behind the graph that ends then")
    options = parser.parse_args()
    if options.record is not None and not options.nodes:
        parser.error("--record needs --nodes")
    known: dict[str, Row] = {}
    if options.record is not None and options.record.is_file():
        known = {each["what"]: Row(**each) for each in json.loads(options.record.read_text(encoding="utf-8"))["rows"]}
        if any({*each.fused} != {*rewrites()} - {ALL} for each in known.values()):
            known = {}  # of other rewrites
    until, done = time.monotonic() + options.seconds, True
    whole = {"random": (random_graphs(range(options.graphs)), rewrites())}
    if options.nodes:
        whole["nodes"] = (node_tests(), rewrites())
    rows = []
    for what, (graphs, passes) in whole.items():
        counts = Counts.of(known[what]) if what in known else Counts()
        with reused_children():
            done = add(counts, graphs, passes, until) and done
        rows.append(counts.row(what))
        print(rows[-1])
    if options.record is not None:
        command = "python -m tests.benchmarks.rewrite_random --nodes --record docs/measured/rewrites.json"
        versions = f"onnx {onnx.__version__}, onnxruntime {onnxruntime.__version__}"
        write_rows(options.record, command, versions, rows)
    print("all of them" if done else "not all of them yet: run it again")
    return 1 if any(row.failures for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
