"""The same model built by vlexport and by each peer: accuracy, latency, size, build time, memory.

    python -m tests.benchmarks.compare --scratch DIR --stage judge                   # installs, builds, judges
    python -m tests.benchmarks.compare --scratch DIR --record docs/measured/compare.json --page docs/compare.md
    python -m tests.benchmarks.compare --scratch DIR --models all --rows vlexport    # many models, plain export only
    python -m tests.benchmarks.compare --scratch DIR --batch 8 --rows vlexport,ort-dynamic
    python -m tests.benchmarks.compare --render docs/measured/compare.json --page docs/compare.md --figure compare.svg

Every toolchain gets the same weights, the same captured program or its plain export, the same calibration samples and
the same samples to judge. Each peer is installed in an environment of its own under the scratch folder, and its
artifact is built, judged and timed there, each in a fresh process. A ratio is plain export / this one,
measured as ``vlexport profile`` measures: interleaved rounds, the plain export first and last in each, rounds in which
it drifts by more than 5 % repeated. Nothing is done twice: a run that was interrupted goes on where it was, and
``--retry`` tries again what failed. ``--merge`` keeps what the record holds of other rows, each with its day. Take
times on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.benchmarks.compare_cells import Built, Fused, Judged, Place, Timed, build, fused, headroom, judge, time_cell
from tests.benchmarks.compare_models import MODELS, Model, Sizes, folder_name, prepared
from tests.benchmarks.compare_rows import FOR_ALL_MODELS, ROWS, Row, rows_of
from tests.benchmarks.compare_tables import at_batch, comma_separated, machine, points, summary, table
from tests.benchmarks.peers import Environment, PeerError, installed
from vlexport.core.devices import available_cores, this_machine
from vlexport.core.progress import Silent
from vlexport.stages.profile import FULL, Plan

STAGES = ("build", "judge", "time")
MANY = "compare_models.json"
"""The record of many models."""
AT_BATCH = "compare_batch{}.json"
"""The record of more than one sample at once."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """A row of one model; what is None was not reached.

    Attributes:
        failed: Why, in the peer's words; empty when nothing failed.
        date: When it was taken.
        fused: What became one operator of what the model promises, where vlexport built it.
        outside: Of the plain export, the share of time outside products and convolutions.
    """

    model: str
    row: str
    built: Built | None = None
    judged: Judged | None = None
    timed: Timed | None = None
    failed: str = ""
    date: str = ""
    fused: tuple[Fused, ...] = ()
    outside: float | None = None


def cell_of(place: Place, model: Model, row: Row, source: Path, *, stages: int, plan: Plan, threads: int) -> Cell:
    """Build, judge and time, as far as ``stages`` says and as it goes."""
    cell = Cell(model.name, row.name, date=_today())
    try:
        cell = dataclasses.replace(cell, built=build(place, row, source), fused=fused(place, row, source))
        if stages > 1:
            found = judge(place, row, source, embedding=model.embedding, plain=ROWS[0], threads=threads)
            cell = dataclasses.replace(cell, judged=found)
        if stages > 2:
            timed = time_cell(place, row, source, plain=ROWS[0], plan=plan, threads=threads, reporter=Silent())
            cell = dataclasses.replace(cell, timed=timed)
            if row is ROWS[0]:
                cell = dataclasses.replace(cell, outside=headroom(place, row, source, threads).outside)
    except PeerError as error:
        return dataclasses.replace(cell, failed=str(error))
    return cell


def line(cell: Cell) -> str:
    """A cell for the terminal."""
    said = [f"{cell.model} {cell.row}:"]
    if cell.timed is not None:
        ratio = "no ratio" if cell.timed.ratio is None else f"{cell.timed.ratio:.2f}x"
        said.append(f"{cell.timed.p50_ms:.1f} ms, {ratio} ({cell.timed.low} to {cell.timed.high}),")
    if cell.judged is not None:
        right = "" if cell.judged.right is None else f"{cell.judged.right} right, "
        noise = "no noise" if cell.judged.sqnr_db is None else f"{cell.judged.sqnr_db:.1f} dB"
        said.append(f"{right}{cell.judged.agreements} of {cell.judged.samples} the same, {noise},")
    if cell.built is not None:
        said.append(f"{cell.built.size_bytes / 1e6:.0f} MB, built in {cell.built.seconds:.0f} s")
    return " ".join([*said, f"FAILED: {cell.failed}" if cell.failed else ""]).strip()


def recorded(cells: list[Cell], sizes: Sizes, threads: int, before: list[dict[str, Any]]) -> dict[str, Any]:
    """What is written: these cells, each in the place of what ``before`` holds of its model and row."""
    found = {(each["model"], each["row"]): each for each in [*before, *map(dataclasses.asdict, cells)]}
    order = [(model, row.name) for model in MODELS for row in ROWS]
    return {
        "command": " ".join(["python -m tests.benchmarks.compare", *_portable(sys.argv[1:])]),
        "date": _today(),
        "machine": this_machine().model_dump(mode="json"),
        "threads": threads,
        "calibration": sizes.calibration,
        "batch": sizes.batch,
        "cells": [found[key] for key in order if key in found],
    }


def _today() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")


def _portable(arguments: list[str]) -> list[str]:
    """Without where the scratch folder lies."""
    before = ["", *arguments]
    return ["DIR" if last == "--scratch" else each for last, each in zip(before, arguments, strict=False)]


def render(record: dict[str, Any], page: Path | None, figure: Path | None, text: Path | None, scratch: Path) -> None:
    """Write the tables into a page, between its marks; the figure; the CSV."""
    if page is not None:
        whole = page.read_text(encoding="utf-8")
        for name, said in _said(record).items():
            before, mark, rest = whole.partition(f"<!-- {name} -->\n")
            if mark:
                whole = before + mark + said + rest[rest.index(f"\n<!-- /{name} -->") :]
        page.write_text(whole, encoding="utf-8")
    if text is not None:
        text.write_text(comma_separated(record), encoding="utf-8")
    if figure is not None:
        environment = Environment("plot_figure")
        python = installed(environment, scratch / "venvs")
        subprocess.run(
            [str(python), str(environment.script), str(figure)], input=json.dumps(points(record)), text=True, check=True
        )


def _said(record: dict[str, Any]) -> dict[str, str]:
    """Mark of the page → what stands there: a line a model where the peers took no part, else a table a model."""
    if record["batch"] > 1:
        file = AT_BATCH.format(record["batch"])
        return {f"batch{record['batch']}": f"{machine(record, file)}\n\n{at_batch(record)}"}
    if {cell["row"] for cell in record["cells"]} <= set(FOR_ALL_MODELS):
        return {"many": f"{machine(record, MANY)}\n\n{summary(record)}"}
    models = dict.fromkeys(cell["model"] for cell in record["cells"])
    return {"machine": machine(record), **{each: table(record, each) for each in models}}


def main() -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, default=Path("out/compare"), help="folder for all that is made")
    parser.add_argument("--models", default="deit_small,solar_cells", help="names with commas between, or all")
    parser.add_argument("--rows", default="", help="names or parts of names with commas between; default all")
    parser.add_argument("--stage", choices=STAGES, default="time", help="how far to go")
    parser.add_argument("--samples", type=int, default=200, help="that judge")
    parser.add_argument("--calibration", type=int, default=32, help="samples that calibrate")
    parser.add_argument("--batch", type=int, default=1, help="samples that are run at once")
    parser.add_argument("--rounds", type=int, default=FULL.rounds)
    parser.add_argument("--seconds", type=float, default=0.4, help="of one block of runs")
    parser.add_argument("--threads", type=int, default=0, help="of every runtime; 0 takes all cores")
    parser.add_argument("--retry", action="store_true", help="try again what failed before")
    parser.add_argument("--built", action="store_true", help="leave out what no earlier run has built")
    parser.add_argument("--record", type=Path, help="JSON file for the cells")
    parser.add_argument("--merge", action="store_true", help="keep the record's other cells")
    parser.add_argument("--render", type=Path, help="measure nothing: read this record")
    parser.add_argument("--page", type=Path, help="page whose tables are replaced")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--figure", type=Path, help="SVG, drawn by matplotlib in an environment of its own")
    given = parser.parse_args()
    if given.render is not None:
        record = json.loads(given.render.read_text(encoding="utf-8"))
        render(record, given.page, given.figure, given.csv, given.scratch)
        return 0
    here, threads = this_machine(), given.threads or available_cores()
    print(f"{here.cpu} ({', '.join(here.instruction_set)}), {here.cores} cores, {threads} threads", flush=True)
    scratch = given.scratch.resolve()
    place, sizes = Place(scratch, given.retry), Sizes(given.calibration, given.samples, given.batch)
    chosen = list(MODELS) if given.models == "all" else given.models.split(",")
    wanted = tuple(filter(None, given.rows.split(",")))
    plan = dataclasses.replace(FULL, rounds=given.rounds, block_seconds=given.seconds)
    work = [(MODELS[name], row) for name in chosen for row in rows_of(name, MODELS[name].everyone, wanted)]
    if given.built:
        work = [(model, row) for model, row in work if place.is_built(folder_name(model, sizes), row)]
    cells, started = [], time.monotonic()
    for done, (model, row) in enumerate(work, 1):
        source = prepared(model, sizes, scratch)
        stages = STAGES.index(given.stage) + 1
        cells.append(cell_of(place, model, row, source, stages=stages, plan=plan, threads=threads))
        print(f"[{done}/{len(work)}, {time.monotonic() - started:.0f} s] {line(cells[-1])}", flush=True)
    merged = given.merge and given.record is not None and given.record.is_file()
    before = json.loads(given.record.read_text(encoding="utf-8"))["cells"] if merged else []
    record = recorded(cells, sizes, threads, before)
    if given.record is not None:
        half = given.record.with_suffix(".part")
        half.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        half.replace(given.record)
    render(record, given.page, given.figure, given.csv, scratch)
    return 0


if __name__ == "__main__":
    sys.exit(main())
