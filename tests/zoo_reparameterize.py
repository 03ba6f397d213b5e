"""The reparameterization zoo: what the pass makes of models in the form in which they are trained, held against hands.

``python -m tests.zoo_reparameterize --record FILE.json [--only NAME] [--again] [--docs FILE.md]`` gives each model a
process of its own and records its row as it finishes; what the file holds for the same versions and code is not done
again. The oracle of a model is what its authors wrote to merge it: timm's ``reparameterize_model``, or the sample's
own.
Exits with 1 when a row breaks the zoo's promise (see :func:`failures`) and is not one of :data:`KNOWN`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.record import write_rows
from tests.zoo_child import run_alone
from tests.zoo_targets import page

MAX_ERROR32, MAX_ERROR64 = 1e-4, 1e-9
"""Largest errors against eager, of the largest output: in float32, and of the passes applied to a float64 copy."""
MIN_VARIATION = 1e-2
"""Of the largest output: the standard deviation over pictures, mean of all outputs. Less, and an error says nothing."""
OTHERS = ("tensorrt", "coreml")
"""Targets beside the one that is run here."""
TIMEOUT_S, MEMORY_BYTES = 900, 20 << 30
CODE = (
    "vlexport.passes", "vlexport.ir", "vlexport.targets", "tests.zoo_reparameterize_examine",
    "tests.zoo_reparameterize_models", "samples.zoo.fmvit.model",
)  # fmt: skip
KNOWN: dict[str, str] = {
    "fmvit_small": "in ONNX Runtime", "fmvit_tiny": "in ONNX Runtime", "nextvit_small": "in ONNX Runtime",
}  # fmt: skip
"""Model → part of what :func:`failures` says: rows that break the promise, for a reason on the page."""


@dataclass(frozen=True)
class Row:
    """One model.

    Layers are calls with a stored matrix or kernel: convolutions, linears, products. What stands ``in ONNX Runtime`` is
    counted in the graph that it runs, after its own optimisation at the highest level.

    Attributes:
        outcome: ``done``, ``refused`` (at capture), ``crashed`` or ``died`` (the process).
        reason: Of any outcome but the first.
        switch: What merges the model by hand.
        layers: As captured, merged by hand, and by us.
        norms: Batch norms left, of the same three; by hand those that ONNX Runtime leaves.
        layers_run: In ONNX Runtime: of the plain export, of the plain export of what was merged by hand, of ours.
        norms_run: Batch norms in the same three.
        parameters: Before and after the pass.
        macs: Of one picture, likewise.
        macs_oracle: When merged by hand.
        variation: Standard deviation of outputs over pictures, relative to the largest output.
        error: Largest difference of our artifact in ONNX Runtime from eager, relative to the largest output.
        error_oracle: The same of what was merged by hand, in eager.
        error64: Of the passes applied to a float64 copy; None where that is too much work.
        seconds: Of the pass, with the runner's checks, without the numeric gate.
        lowered: Target → ``yes``, or why it does not take the graph.
        versions: Of what took part.
        code: Digest of the code that made the row.
    """

    model: str
    outcome: str
    reason: str = ""
    switch: str = ""
    layers: tuple[int, int, int] = (0, 0, 0)
    norms: tuple[int, int] = (0, 0)
    layers_run: tuple[int, int, int] = (0, 0, 0)
    norms_run: tuple[int, int, int] = (0, 0, 0)
    parameters: tuple[int, int] = (0, 0)
    macs: tuple[int, int] = (0, 0)
    macs_oracle: int = 0
    variation: float | None = None
    error: float | None = None
    error_oracle: float | None = None
    error64: float | None = None
    seconds: float = 0.0
    lowered: Mapping[str, str] = field(default_factory=dict)
    versions: str = ""
    code: str = ""


def versions() -> str:
    """Of everything that rows depend on beside our own code."""
    import importlib.metadata

    names = ("torch", "timm", "onnx", "onnxscript", "onnxruntime", "coremltools")
    return ", ".join(f"{name} {importlib.metadata.version(name).split('+')[0]}" for name in names)


def code() -> str:
    """Digest of our own code that rows depend on."""
    import hashlib

    from vlexport.core.code_identity import code_digest

    return hashlib.sha256(" ".join(str(code_digest(each)) for each in CODE).encode()).hexdigest()[:12]


def run_child(name: str, timeout_s: float) -> Row:
    """Examine a model in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="vlexport-zoo-") as place:
        out = Path(place) / "row.json"
        words = ["-m", "tests.zoo_reparameterize", "--child", name, place, str(out)]
        why = run_alone(words, Path(place), timeout_s=timeout_s, memory_bytes=MEMORY_BYTES)
        if out.is_file():
            return rows_of({"rows": [json.loads(out.read_text(encoding="utf-8"))]})[0]
    return Row(name, "died", reason=why)


def rows_of(record: dict[str, Any]) -> list[Row]:
    """Rows of a record."""
    return [
        Row(**{key: tuple(value) if isinstance(value, list) else value for key, value in each.items()})
        for each in record["rows"]
    ]


def failures(rows: Sequence[Row]) -> list[str]:
    """What breaks the zoo's promise, one line each.

    Outputs agree with eager where they vary; no more layers than merging by hand leaves, in our graph and in that which
    ONNX Runtime runs; no more work and no more parameters than in training; every target takes the graph.
    """
    return [said for row in rows for said in _failures(row) if KNOWN.get(row.model, "\0") not in said]


def _failures(row: Row) -> Iterator[str]:
    name = row.model
    if row.outcome != "done":
        yield f"{name}: {row.outcome}: {row.reason}"
        return
    for error, most in ((row.error, MAX_ERROR32), (row.error64, MAX_ERROR64)):
        if error is not None and not error <= most:
            yield f"{name}: differs from eager by {error}"
    if row.error is None:
        yield f"{name}: was not run"
    if not (row.variation or 0) >= MIN_VARIATION:
        yield f"{name}: its outputs do not vary ({row.variation})"
    if row.layers[2] > row.layers[1]:
        yield f"{name}: {row.layers[2]} layers, by hand {row.layers[1]}"
    if row.layers_run[2] > row.layers_run[1]:
        yield f"{name}: {row.layers_run[2]} layers in ONNX Runtime, by hand {row.layers_run[1]}"
    if row.norms_run[2] > row.norms_run[1]:
        yield f"{name}: {row.norms_run[2]} batch norms in ONNX Runtime, by hand {row.norms_run[1]}"
    for what, (before, after) in (("MACs", row.macs), ("parameters", row.parameters)):
        if after > before:
            yield f"{name}: {after - before} {what} more than before the pass"
    for target, said in row.lowered.items():
        if said != "yes":
            yield f"{name}: {target} does not take it: {said}"


def table(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    remarks: list[str] = []

    def remark(text: str) -> str:
        if text not in remarks:
            remarks.append(text)
        return f"[{remarks.index(text) + 1}]"

    lines = [
        "| model | layers | in ONNX Runtime | norms there | error | float64 | by hand | varies | Mparams | GMACs | s "
        "| tensorrt | coreml |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows_of(record):
        if row.outcome != "done":
            lines.append(f"| {row.model} | {row.outcome} {remark(row.reason)} |" + " - |" * 11)
            continue
        cells = [
            row.model,
            _three(row.layers),
            _three(row.layers_run),
            _three(row.norms_run),
            *(f"{each:.0e}" if each is not None else "-" for each in (row.error, row.error64, row.error_oracle)),
            f"{100 * row.variation:.0f} %" if row.variation is not None else "-",
            " → ".join(f"{each / 1e6:.2f}" for each in row.parameters),
            " → ".join(f"{each / 1e9:.3f}" for each in row.macs),
            f"{row.seconds:.1f}",
            *(said if said == "yes" else f"no {remark(said)}" for said in (row.lowered.get(t, "-") for t in OTHERS)),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    notes = [f"{i + 1}. {_safe(text)}" for i, text in enumerate(remarks)]
    return "\n".join([*lines, "", *notes]).rstrip() + "\n"


def _three(counts: tuple[int, int, int]) -> str:
    before, by_hand, ours = counts
    return f"{before} → {ours} ({by_hand})"


def _safe(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def rendered(before: str, record: dict[str, Any]) -> str:
    """The page with the table of a record."""
    from tests.zoo_reparameterize_models import MODELS

    return page(before, record, MODELS, table)


def main() -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, help="JSON file with the rows")
    parser.add_argument("--docs", type=Path, help="page whose table is rendered from the record")
    parser.add_argument("--only", action="append", default=[], help="a model; repeatable")
    parser.add_argument("--again", action="store_true", help="do what the record holds already, too")
    parser.add_argument("--render", action="store_true", help="only render the page")
    parser.add_argument("--timeout", type=float, default=TIMEOUT_S, help="seconds for one model")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        from tests.zoo_reparameterize_examine import examine

        name, folder, out = given.child
        Path(out).write_text(json.dumps(asdict(examine(name, Path(folder)))), encoding="utf-8")
        return 0
    kept: dict[str, Row] = {}
    if given.record is not None and given.record.is_file():
        kept = {row.model: row for row in rows_of(json.loads(given.record.read_text(encoding="utf-8")))}
    if not given.render:
        _run_models(given, kept)
    if given.docs is not None:
        record = json.loads(given.record.read_text(encoding="utf-8"))
        given.docs.write_text(rendered(given.docs.read_text(encoding="utf-8"), record), encoding="utf-8")
    bad = failures(list(kept.values()))
    print("\n".join(bad) or f"{len(kept)} rows, all as promised")
    return int(bool(bad))


def _run_models(given: argparse.Namespace, kept: dict[str, Row]) -> None:
    from tests.zoo_reparameterize_models import MODELS

    now = (versions(), code())
    for model in MODELS:
        known = kept.get(model)
        done = known is not None and (known.versions, known.code) == now
        if (given.only and model not in given.only) or (done and not given.again):
            continue
        started = time.perf_counter()
        row = replace(run_child(model, given.timeout), versions=now[0], code=now[1])
        kept[model] = row
        spent = time.perf_counter() - started
        said = f"layers {row.layers} run {row.layers_run} norms {row.norms_run} error {row.error} {row.error64}"
        print(f"{model:26} {row.outcome} {said} {dict(row.lowered)} {row.reason} {spent:.0f} s", flush=True)
        if given.record is not None:
            rows = sorted(kept.values(), key=lambda each: MODELS.index(each.model))
            write_rows(given.record, "python -m tests.zoo_reparameterize", now[0], rows)


if __name__ == "__main__":
    sys.exit(main())
