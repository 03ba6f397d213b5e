"""The comparison's record, as a Markdown table, as CSV, and as the points of a figure."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from tests.benchmarks.compare_rows import FOR_ALL_MODELS, MERGED, PLAIN, ROWS
from vlexport.core.huge_pages import ASKED_FOR
from vlexport.core.intervals import wilson
from vlexport.core.verdict import measured_drop

Record = Mapping[str, Any]
_BY_NAME = {row.name: row for row in ROWS}
_ABSENT = "–"
_BUSY = ("", "† Built while the machine did other things: the seconds are too many.")
_COLUMNS = (
    "model", "row", "precision", "failed", "p50_ms", "ratio", "low", "high", "rounds", "samples", "right",
    "agreements", "sqnr_db", "cosine", "size_bytes", "seconds", "build_peak_bytes", "run_peak_bytes", "load_ms",
)  # fmt: skip


def table(record: Record, model: str) -> str:
    """The Markdown table of one model: a line a row, failures at the end."""
    cells = [cell for cell in record["cells"] if cell["model"] == model]
    labelled = any(cell["judged"] and cell["judged"]["right"] is not None for cell in cells)
    timed = any(cell["timed"] for cell in cells)
    heads = ["built by", "precision", *(["median", "ratio (95 %)"] if timed else [])]
    heads += [*(["right", "points lost (95 %)"] if labelled else []), "same answer", "SQNR", "size", "build", "memory"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for cell in cells:
        if cell["built"] is None or cell["judged"] is None:
            continue
        row = _BY_NAME[cell["row"]]
        name = f"**{row.shown}**" if row.ours else row.shown
        found = [name, row.precision, *(_latency(cell["timed"]) if timed else [])]
        found += [
            *(_accuracy(cell["judged"]) if labelled else []),
            *_fidelity(cell),
            *_costs(cell, _busy(record, cell)),
        ]
        lines.append(f"| {' | '.join(found)} |")
    slow = [*_BUSY] if any(_busy(record, cell) for cell in cells) else []
    failed = [f"- {_BY_NAME[cell['row']].shown}: `{cell['failed']}`" for cell in cells if cell["failed"]]
    return "\n".join(lines + slow + (["", "Not there:", "", *failed] if failed else []))


def _latency(timed: Mapping[str, Any] | None) -> list[str]:
    if timed is None:
        return [_ABSENT, _ABSENT]
    ratio = "too noisy to tell" if timed["ratio"] is None else _ratio(timed)
    return [f"{timed['p50_ms']:.1f} ms", ratio]


def _ratio(timed: Mapping[str, Any]) -> str:
    return f"{timed['ratio']:.2f}× ({timed['low']:.2f} to {timed['high']:.2f})"


def _accuracy(judged: Mapping[str, Any]) -> list[str]:
    drop = measured_drop(judged["plain_only"], judged["this_only"], judged["samples"])
    low, high = drop.interval or (math.nan, math.nan)
    return [f"{100 * judged['right'] / judged['samples']:.1f} %", f"{drop.value:.1f} ({low:.1f} to {high:.1f})"]


def _fidelity(cell: Mapping[str, Any]) -> list[str]:
    judged = cell["judged"]
    if cell["row"] == PLAIN:
        return ["reference", "reference"]
    low, _ = wilson(judged["agreements"], judged["samples"])
    same = f"{100 * judged['agreements'] / judged['samples']:.1f} % (≥ {100 * low:.1f})"
    return [same, "∞" if judged["sqnr_db"] is None else f"{judged['sqnr_db']:.1f} dB"]


def summary(record: Record) -> str:
    """A line a model: how much faster vlexport's fp32 artifact is than the plain export, and their geometric mean."""
    heads = (
        "model", "plain export", "outside products", "vlexport", "ratio (95 %)", "plain export against itself", "SQNR",
        "size", "attention", "norms", "activations",
    )  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    plain = {cell["model"]: cell for cell in record["cells"] if cell["row"] == PLAIN}
    for cell in record["cells"]:
        timed, judged, built = cell["timed"], cell["judged"], cell["built"]
        if cell["row"] != FOR_ALL_MODELS[1]:
            continue
        if timed is None or judged is None or built is None:
            lines.append(f"| {cell['model']} | `{cell['failed']}` |{' |' * (len(heads) - 2)}")
            continue
        noise = "∞" if judged["sqnr_db"] is None else f"{judged['sqnr_db']:.0f} dB"
        cells = [
            cell["model"],
            f"{timed['plain_ms']:.1f} ms",
            _share(plain.get(cell["model"], {}).get("outside")),
            *_latency(timed),
            _latency(plain.get(cell["model"], {}).get("timed"))[1],
            noise,
            f"{built['size_bytes'] / 1e6:.1f} MB",
            *_counts(cell.get("fused", ())),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, *_means(record)])


def _means(record: Record) -> list[str]:
    """Geometric means over the models of a record, of vlexport's fp32 artifacts, behind an empty line."""
    ratios: dict[str, list[float]] = {}
    known = {cell["model"] for cell in record["cells"]}
    for cell in record["cells"]:
        if cell["row"] == FOR_ALL_MODELS[1] and cell["timed"] and cell["timed"]["ratio"] is not None:
            ratios.setdefault(_over(cell["model"], known), []).append(cell["timed"]["ratio"])
    said = [
        f"Geometric mean of {len(each)} models{over}: {math.prod(each) ** (1 / len(each)):.2f}×."
        for over, each in sorted(ratios.items())
        if len(each) > 1
    ]
    return ["", *said] if said else []


def _share(value: float | None) -> str:
    return _ABSENT if value is None else f"{100 * value:.0f} %"


def _over(model: str, known: Collection[str]) -> str:
    """What a model's plain export is of, where its authors merge branches before they deploy it."""
    if model.endswith(MERGED):
        return " over the form that their authors merge them to"
    return " over their training form" if f"{model}{MERGED}" in known else ""


def at_batch(record: Record) -> str:
    """A line a model and row, of a record of several samples at once, and the means over its models in fp32."""
    lines = ["| model | built by | plain export | median | ratio (95 %) | same answer | SQNR |", "|" + "---|" * 7]
    for cell in record["cells"]:
        row, timed = _BY_NAME[cell["row"]], cell["timed"]
        if cell["row"] == PLAIN:
            continue
        name = f"**{row.shown}**" if row.ours else row.shown
        if timed is None or cell["judged"] is None:
            lines.append(f"| {cell['model']} | {name} | `{cell['failed']}` | | | | |")
            continue
        cells = [cell["model"], name, f"{timed['plain_ms']:.1f} ms", *_latency(timed), *_fidelity(cell)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, *_means(record)])


def _counts(fused: Sequence[Mapping[str, Any]]) -> list[str]:
    """Found of expected attentions, with those in operators of the runtime's own, norms and activations."""
    known = {each["idea"]: each for each in fused}
    said = [
        f"{known[idea]['found']} of {known[idea]['expected']}" if idea in known else _ABSENT
        for idea in ("attention", "norm", "activation")
    ]
    if "fused attention" in known:
        said[0] += f", {known['fused attention']['found']} in operators of the runtime's own"
    return said


def machine(record: Record, file: str = "compare.json") -> str:
    """The sentence before the tables, which names the record's file."""
    about, count = record["machine"], record["threads"]
    days = sorted({cell["date"] for cell in record["cells"] if cell["date"]})
    when = " and ".join(days) if days else record["date"]
    at_once = f" {record['batch']} samples at once," if record["batch"] > 1 else ""
    pages = " memory in huge pages," if about.get("memory_pages") == ASKED_FOR else ""
    said = (
        f"Measured {when} on {about['cpu']} ({', '.join(about['instruction_set'])}), {count} "
        f"thread{'s' * (count > 1)},{pages}{at_once} {record['calibration']} calibration samples "
        f"([measured/{file}](measured/{file}))."
    )
    return said if any(cell["timed"] for cell in record["cells"]) else f"{said} Nothing was timed in that run."


def _busy(record: Record, cell: Mapping[str, Any]) -> bool:
    """Whether other programs ran while the artifact was built, so that its seconds are too many."""
    built = cell["built"]
    return built is not None and (built["load"] is None or built["load"] > record["machine"]["cores"] + 1)


def _costs(cell: Mapping[str, Any], busy: bool) -> list[str]:
    built, timed = cell["built"], cell["timed"]
    peak = timed["peak_bytes"] if timed else None
    memory = _ABSENT if peak is None else f"{peak / 1e6:.0f} MB"
    return [f"{built['size_bytes'] / 1e6:.1f} MB", f"{built['seconds']:.1f} s{' †' if busy else ''}", memory]


def comma_separated(record: Record) -> str:
    """Every cell, a line each."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    for cell in record["cells"]:
        built, judged, timed = (cell[each] or {} for each in ("built", "judged", "timed"))
        found = {**judged, **timed, **built, **{name: cell[name] for name in ("model", "row", "failed")}}
        found |= {"precision": _BY_NAME[cell["row"]].precision}
        found |= {"build_peak_bytes": built.get("peak_bytes"), "run_peak_bytes": timed.get("peak_bytes")}
        writer.writerow({name: found.get(name) for name in _COLUMNS})
    return text.getvalue()


def points(record: Record) -> dict[str, list[dict[str, Any]]]:
    """Model → what the figure shows of it: right answers in percent, or SQNR where there are no labels."""
    found: dict[str, list[dict[str, Any]]] = {}
    for cell in record["cells"]:
        if cell["timed"] is None or cell["judged"] is None:
            continue
        judged, row = cell["judged"], _BY_NAME[cell["row"]]
        labelled = judged["right"] is not None
        value = 100 * judged["right"] / judged["samples"] if labelled else judged["sqnr_db"]
        if value is None:
            continue
        label = "right answers, %" if labelled else "SQNR against the plain export, dB"
        point = {"name": row.name, "ms": cell["timed"]["p50_ms"], "value": value, "label": label}
        found.setdefault(cell["model"], []).append({**point, "ours": row.ours})
    return found
