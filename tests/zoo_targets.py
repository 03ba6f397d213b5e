"""The zoo for all targets: every model saved, built for every target with the gate on, and compared with eager.

``python -m tests.zoo_targets --record FILE.json [--only NAME] [--target T] [--again] [--docs FILE.md]`` gives each
model a process of its own, so that a runtime that aborts costs rows and not the run; what the file holds for the same
versions is not done again. Exits with 1 when a row breaks the zoo's promise (see :func:`failures`) and is not one of
:data:`KNOWN`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tests.record import write_rows
from tests.zoo_child import run_alone

TARGETS = ("onnxruntime", "tensorrt", "coreml")
RANGE = "1:2:4"
"""Batch sizes of the second build, for targets that fix the batch otherwise."""
RANGED = (
    "clip_vision", "detr", "videomae", "repvgg_a0", "levit_128s", "convnext_atto", "deit_tiny_patch16_224",
    "swin_tiny_patch4_window7_224",
)  # fmt: skip
MAX_ERROR = 1e-4
MIN_VARIATION = 5e-3
"""Less than this from one input to the next, 50 times the largest error allowed, and a small error says nothing."""
TIMEOUT_S = 900
KNOWN: dict[tuple[str, str, str], str] = {
    ("deformable_detr", "coreml", ""): "outputs a rank 6 tensor",
}
"""Model, target, range → part of what :func:`failures` says: rows that break the promise, for a reason in the table."""


@dataclass(frozen=True)
class Row:
    """One model on one target.

    Attributes:
        batch: ``dynamic``, ``fixed`` or a range ``MIN:OPT:MAX``.
        outcome: ``built``, ``refused`` (an error with a code), ``crashed`` (any other) or ``died`` (the process).
        reason: Code, message and place of the error; of a row that was built in fp32, why it was not in fp16.
        seconds: The target's own passes, lowering and golden check.
        gate: Worst figure of exact passes; of approximate ones the least signal to noise ratio.
        error: Largest relative error of the artifact, run here, against eager; None where it does not run here.
        variation: Least relative difference of an output between inputs.
        engine: ``yes``, or why there is none.
        refused_ops: Nodes that the target is known to refuse, and why.
        loaded_back: The package was read back, and holds what was asked for.
        note: What capture said.
        versions: Of what took part.
    """

    model: str
    target: str
    batch: str
    outcome: str
    reason: str = ""
    precision: str = ""
    seconds: float = 0.0
    gate: str = ""
    error: float | None = None
    variation: float | None = None
    engine: str = ""
    refused_ops: str = ""
    loaded_back: bool = False
    note: str = ""
    versions: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        """What names it, whatever came of it."""
        return self.model, self.target, self.batch if ":" in self.batch else ""


def versions() -> str:
    """Of everything that rows depend on, in one line."""
    names = ("torch", "timm", "transformers", "onnx", "onnxscript", "onnxruntime", "coremltools", "tensorrt-rtx-cu12")
    return ", ".join(f"{name} {importlib.metadata.version(name).split('+')[0]}" for name in names)


def examine(name: str, targets: Sequence[str], dims: str = "") -> list[Row]:
    """Save a model, build it for some targets, run what runs here.

    Args:
        name: Of the model.
        targets: To build for.
        dims: Range of the batch; empty leaves it to the targets.
    """
    from tests.zoo_target_models import zoo_model
    from vlexport.core.errors import VlexportError
    from vlexport.frontends.save import save

    made = zoo_model(name)
    with tempfile.TemporaryDirectory(prefix="vlexport-zoo-") as place:
        file = Path(place) / "model.pt"
        try:
            captured = save(made.module, file, inputs=made.example())
        except VlexportError as error:
            return [Row(name, t, dims, "refused", reason=_said(error)) for t in targets]
        if dims and "batch" not in captured.program.signature.dims:
            return []
        rows = _built(name, made, file, targets, dims)
        return [replace(row, note="; ".join(captured.notes)) for row in rows]


def _built(
    name: str, made: Any, file: Path, targets: Sequence[str], dims: str, precision: str | None = None
) -> list[Row]:
    from vlexport.core.config import BuildConfig
    from vlexport.core.errors import VlexportError
    from vlexport.stages.build_each import build_each

    config = BuildConfig(
        model=str(file), target=",".join(targets), output=str(file.parent / "out"), profile=False, numeric_gate=True,
        dynamic=(f"batch={dims}",) if dims else (), force=True, precision=precision,
    )  # fmt: skip
    try:
        built = build_each(config)
    except VlexportError as error:
        if len(targets) > 1:  # which of them it was is not said
            return [row for target in targets for row in _built(name, made, file, [target], dims)]
        return [_refused(name, made, file, targets[0], dims, error, precision)]
    except Exception as error:
        if len(targets) > 1:
            return [row for target in targets for row in _built(name, made, file, [target], dims)]
        return [Row(name, targets[0], dims, "crashed", reason=f"{type(error).__name__}: {error}"[:400])]
    rows = [_refused(name, made, file, t, dims, error, precision) for t, error in built.refused.items()]
    return [*rows, *(_row(name, made, t, result, dims) for t, result in built.results.items())]


def _refused(name: str, made: Any, file: Path, target: str, dims: str, error: Any, precision: str | None) -> Row:
    """The row of a refusal; where half precision alone is refused, that of a build in fp32 which says so."""
    if precision is None and error.code == "VLX0401" and "cast-floats" in error.message:
        from tests.zoo_half import cause

        (row,) = _built(name, made, file, [target], dims, "fp32")
        reason = f"fp16: {_said(error)}; {cause(made)}"
        return replace(row, reason=reason) if row.outcome == "built" else row
    return Row(name, target, dims, "refused", reason=_said(error))


def _said(error: Any) -> str:
    return f"{error.code}: {error.message}" + (f" ({error.where})" if error.where else "")


def _row(name: str, made: Any, target: str, result: Any, dims: str) -> Row:
    main, facts = result.bundle.main, result.bundle.main.artifact.facts
    stages = (f"passes for {target}", f"lower to {target}", "golden check")
    row = Row(
        name,
        target,
        dims or ("dynamic" if main.dims else "fixed"),
        "built",
        precision=result.bundle.precision,
        seconds=round(sum(result.seconds.get(stage, 0.0) for stage in stages), 1),
        gate=_gate(main.passes),
        engine="" if "engine" not in facts else "yes" if facts["engine"] != "none" else facts["engine_reason"],
        refused_ops=facts.get("refused_by_tensorrt", ""),
        loaded_back=target == "coreml",  # the target reads the package back and compares, or refuses
    )
    if result.bundle.state != "verified" and target == "coreml":
        return row
    error, variation = _compared(made, result, main)
    return replace(row, error=float(f"{error:.1e}"), variation=float(f"{variation:.1e}"))


def _gate(records: Any) -> str:
    exact = [r.gate.worst for r in records if r.gate.statistic is None and r.gate.proof != "off"]
    decibels = [r.gate.value for r in records if r.gate.statistic == "sqnr_db" and r.gate.value is not None]
    said = f"{max(exact, default=0.0):.0e}"
    return f"{said}, {min(decibels):.0f} dB" if decibels else said


def _compared(made: Any, result: Any, main: Any) -> tuple[float, float]:
    """Largest error of the artifact against eager over several draws, and the least difference between draws."""
    import numpy as np
    import torch

    from vlexport.core.bundle import artifact_folder
    from vlexport.core.numerics import relative_error
    from vlexport.targets import open_target

    generator = torch.Generator().manual_seed(7)
    largest = 3 if main.dims else 1
    worst, least = 0.0, float("inf")
    seen: dict[str, Any] = {}
    folder = result.output / artifact_folder(result.bundle.components, "main")
    with open_target(result.bundle.target).open(folder, main.artifact, threads=2) as session:
        for batch in (1, largest, 1):
            values = made.draw(batch, generator)
            with torch.no_grad():
                expected = made.named(made.module(**values))
            found = session.run({key: value.numpy() for key, value in values.items()})
            for key, tensor in expected.items():
                worst = max(worst, relative_error(found[key], tensor.numpy()))
                first = np.asarray(tensor.numpy()[:1])
                if key in seen:
                    least = min(least, relative_error(first, seen[key]))
                seen[key] = first
    return worst, least


def run_child(name: str, targets: Sequence[str], dims: str, timeout_s: float) -> list[Row]:
    """:func:`examine` in a process of its own; targets are tried one by one where it dies."""
    with tempfile.TemporaryDirectory(prefix="vlexport-zoo-") as place:
        out = Path(place) / "rows.json"
        words = ["-m", "tests.zoo_targets", "--child", name, ",".join(targets), dims, str(out)]
        why = run_alone(words, Path(place), timeout_s=timeout_s)
        if out.is_file():
            return [Row(**values) for values in json.loads(out.read_text(encoding="utf-8"))]
    if len(targets) > 1:
        return [row for target in targets for row in run_child(name, [target], dims, timeout_s)]
    return [Row(name, targets[0], dims, "died", reason=why)]


def failures(rows: Sequence[Row]) -> list[str]:
    """What breaks the zoo's promise, one line each.

    Every row is built; onnxruntime in fp32 agrees with eager to 1e-4 where outputs vary; a graph for TensorRT has an
    engine or a named operator that stops it; a package is read back.
    """
    return [said for row in rows for said in _failures(row) if KNOWN.get(row.key, "\0") not in said]


def _failures(row: Row) -> list[str]:
    name = "/".join(filter(None, (row.model, row.target, row.batch)))
    if row.outcome != "built":
        return [f"{name}: {row.outcome}: {row.reason}"]
    found = []
    if row.target == "onnxruntime" and not (row.error is not None and row.error <= MAX_ERROR):
        found.append(f"{name}: differs from eager by {row.error}")
    if row.variation is not None and row.variation < MIN_VARIATION:
        found.append(f"{name}: its outputs do not vary ({row.variation})")
    if row.target == "tensorrt" and not row.engine:
        found.append(f"{name}: neither an engine nor a reason")
    if row.target == "coreml" and not row.loaded_back:
        found.append(f"{name}: the package was not read back")
    return found


def table(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    rows = [Row(**values) for values in record["rows"]]
    by_key = {row.key: row for row in rows}
    lines = [
        "| model | onnxruntime, fp32 | batch | error | tensorrt, fp16 | engine | batch 1 to 4 | coreml, fp16 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    remarks: list[str] = []

    def remark(text: str) -> str:
        if text not in remarks:
            remarks.append(text)
        return f"[{remarks.index(text) + 1}]"

    for model in dict.fromkeys(row.model for row in rows):
        cells = [model]
        for target, dims in (("onnxruntime", ""), ("tensorrt", ""), ("tensorrt", RANGE), ("coreml", "")):
            row = by_key.get((model, target, dims))
            if row is None:
                cells += ["-"] * (3 if target == "onnxruntime" else 1 if dims or target == "coreml" else 2)
                continue
            state = row.outcome if row.outcome != "built" or not row.reason else f"built in {row.precision}"
            state += f" {remark(row.reason)}" if row.reason else ""
            if target == "onnxruntime":
                batch = row.batch + (f" {remark(row.note)}" if row.note else "") if row.outcome == "built" else "-"
                cells += [state, batch, f"{row.error:.0e}" if row.error is not None else "-"]
            elif target == "tensorrt":
                engine = "-" if row.outcome != "built" else "yes" if row.engine == "yes" else f"no {remark(row.engine)}"
                gate = f", {row.gate.partition(', ')[2]}" if ", " in row.gate else ""
                cells += [(f"engine {engine}" if row.outcome == "built" else state)] if dims else [state + gate, engine]
            else:
                gate = f", {row.gate.partition(', ')[2]}" if ", " in row.gate else ""
                cells.append(f"{state}{', read back' if row.loaded_back else ''}{gate}")
        lines.append("| " + " | ".join(cells) + " |")
    notes = [f"{i + 1}. {_safe(text)}" for i, text in enumerate(remarks)]
    return "\n".join([*lines, "", *notes]).rstrip() + "\n"


def _safe(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def page(
    before: str,
    record: dict[str, Any],
    models: Sequence[str],
    render: Callable[[dict[str, Any]], str] = table,
) -> str:
    """A page with the table between its two markers replaced; it names those of ``models`` that have no row.

    Raises:
        ValueError: The page holds no markers.
    """
    head, opening, rest = before.partition(OPENING)
    _, closing, tail = rest.partition(CLOSING)
    if not opening or not closing:
        raise ValueError(f"the page holds no {OPENING} … {CLOSING}")
    machine = record["machine"]
    source = f"{record['date']}, {machine['cpu']} ({machine['cores']} cores), by `{record['command']}`, with "
    missing = [name for name in models if name not in {row["model"] for row in record["rows"]}]
    left = f"\nNot run with these versions: {', '.join(missing)}.\n" if missing else ""
    return f"{head}{opening}\n{source}{record['versions']}.\n\n{render(record)}{left}{closing}{tail}"


OPENING, CLOSING = "<!-- zoo -->", "<!-- /zoo -->"


def main() -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, help="JSON file with the rows")
    parser.add_argument("--docs", type=Path, help="page whose table is rendered from the record")
    parser.add_argument("--only", action="append", default=[], help="a model; repeatable")
    parser.add_argument("--target", action="append", default=[], choices=TARGETS, help="a target; repeatable")
    parser.add_argument("--again", action="store_true", help="do what the record holds already, too")
    parser.add_argument("--render", action="store_true", help="only render the page")
    parser.add_argument("--timeout", type=float, default=TIMEOUT_S, help="seconds for one model")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        name, targets, dims, out = given.child
        rows = [asdict(row) for row in examine(name, targets.split(","), dims)]
        Path(out).write_text(json.dumps(rows), encoding="utf-8")
        return 0
    kept: dict[tuple[str, str, str], Row] = {}
    if given.record is not None and given.record.is_file():
        kept = {r.key: r for r in (Row(**v) for v in json.loads(given.record.read_text(encoding="utf-8"))["rows"])}
    if not given.render:
        _run(given, kept)
    if given.docs is not None:
        from tests.zoo_target_models import MODELS

        record = json.loads(given.record.read_text(encoding="utf-8"))
        text = page(given.docs.read_text(encoding="utf-8"), record, MODELS)
        given.docs.write_text(text, encoding="utf-8")
    bad = failures(list(kept.values()))
    print("\n".join(bad) or f"{len(kept)} rows, all as promised")
    return int(bool(bad))


def _run(given: argparse.Namespace, kept: dict[tuple[str, str, str], Row]) -> None:
    from tests.zoo_target_models import MODELS

    now = versions()
    targets = tuple(given.target) or TARGETS
    for model in MODELS:
        if given.only and model not in given.only:
            continue
        for dims in ("", RANGE) if model in RANGED else ("",):
            wanted = [t for t in targets if not dims or t == "tensorrt"]
            if not given.again:
                wanted = [t for t in wanted if kept.get((model, t, dims), Row("", "", "", "")).versions != now]
            if not wanted:
                continue
            started = time.perf_counter()
            for row in run_child(model, wanted, dims, given.timeout):
                kept[row.key] = replace(row, versions=now)
                print(f"{row.model:34} {row.target:12} {row.batch:8} {row.outcome:8} error {row.error} {row.reason}")
            print(f"{model:34} {time.perf_counter() - started:.0f} s", flush=True)
            if given.record is not None:
                _write(given.record, kept, MODELS, now)


def _write(file: Path, kept: dict[tuple[str, str, str], Row], models: Sequence[str], now: str) -> None:
    rows = sorted(kept.values(), key=lambda r: (models.index(r.model), r.key[2], TARGETS.index(r.target)))
    write_rows(file, "python -m tests.zoo_targets", now, rows)


if __name__ == "__main__":
    sys.exit(main())
