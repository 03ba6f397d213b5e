"""Tables of docs about tokens, from what ``tests/benchmarks/token_*.py`` and ``freeze.py`` recorded.

Intervals are computed here from the recorded counts, and what they do not show is said in words.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlexport.core.verdict import Measured, measured_drop

MEASURED = Path(__file__).resolve().parents[1] / "docs" / "measured"
DENSE = "dense"
BATCHES = (1, 8)


def recorded(name: str) -> dict[str, Any]:
    """A record, or one without rows where nothing was recorded yet."""
    file = MEASURED / f"{name}.json"
    if not file.is_file():
        return {"rows": []}
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def drop(row: dict[str, Any]) -> Measured:
    """The paired drop under heads that were fitted without reduction, in points."""
    return measured_drop(row["lost"], row["gained"], row["photos"])


def fresh(row: dict[str, Any]) -> Measured:
    """The paired drop on photos that nobody looked at when settings were chosen, in points."""
    return measured_drop(row["fresh_lost"], row["fresh_gained"], row["fresh"])


def refitted(row: dict[str, Any]) -> Measured:
    """The paired drop under heads that were fitted again."""
    return measured_drop(row["refit_lost"], row["refit_gained"], row["photos"])


def gain(row: dict[str, Any]) -> Measured:
    """What the method is right on more often than the control at random, in points."""
    return measured_drop(row["only_ours"], row["control_only"], row["photos"])


def accuracy(record: dict[str, Any], latency: dict[str, Any]) -> str:
    """One line a variant, and which of them chance would have done as well."""
    rows = record["rows"]
    ratios: dict[str, dict[int, dict[str, Any]]] = {}
    for row in latency["rows"]:
        if row["model"] == "solar_cells":
            ratios.setdefault(row["tokens"], {})[row["batch"]] = row
    lines = []
    for row in rows:
        right = f"{100 * row['right'] / row['photos']:.1f} %"
        cells = [
            f"`{row['tokens']}`" if row["tokens"] else "none",
            f"{row['macs'] / 1e9:.2f}",
            str(row["photos"]),
            right,
        ]
        if row["name"] == DENSE:
            cells += ["-"] * 6
        else:
            over = _shown(gain(row), sign="+") if row["control"] else "-"
            cells += [_shown(each(row)) for each in (drop, fresh, refitted)]
            of_batch = ratios.get(row["tokens"], {})
            cells += [over, *(_ratio(of_batch.get(batch)) for batch in BATCHES)]
        lines.append(cells)
    heads = (
        "`--tokens`", "GMACs", "photos", "right", "drop, points (95 %)", "on photos not looked at",
        "heads fitted again", "over random", "latency at batch 1", "at batch 8",
    )  # fmt: skip
    return "\n".join([_table(_source(record), heads, lines), "", *_words(rows), "", "```csv", *_csv(rows), "```"])


def rounded(record: dict[str, Any]) -> str:
    """One line a variant in int8 with fewer tokens, beside the model in fp32 with all of them."""
    lines = []
    for row in record["rows"]:
        dense = row["name"] == DENSE
        cells = [
            f"`{row['tokens']}`" if row["tokens"] else "none", row["rounded"] or "fp32", f"{row['macs'] / 1e9:.2f}",
            str(row["photos"]), f"{100 * row['right'] / row['photos']:.1f} %",
            *(["-"] * 2 if dense else [_shown(each(row)) for each in (drop, fresh)]),
        ]  # fmt: skip
        lines.append(cells)
    heads = (
        "`--tokens`", "activations", "GMACs", "photos", "right", "drop, points (95 %)", "on photos not looked at",
    )  # fmt: skip
    return _table(_source(record), heads, lines)


def _words(rows: list[dict[str, Any]]) -> list[str]:
    better, not_shown, worse = [], [], []
    for row in rows:
        if row["control"]:
            low, high = gain(row).interval or (0.0, 0.0)
            (better if low > 0 else worse if high < 0 else not_shown).append(f"`{row['tokens']}`")
    said = []
    if better:
        said.append(f"Better than chance at its rate: {', '.join(better)}.")
    if not_shown:
        said.append(
            f"**Not shown to be better than chance** (the interval over `random` holds zero): {', '.join(not_shown)}."
        )
    if worse:
        said.append(f"**Worse than chance** at its rate: {', '.join(worse)}.")
    return [" ".join(said)]


def _csv(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["name,gmacs,accuracy,drop,drop_low,drop_high,refit_drop,over_random,over_random_low,over_random_high"]
    for row in rows:
        first, again, over = drop(row), refitted(row), gain(row)
        figures = [
            row["macs"] / 1e9,
            100 * row["right"] / row["photos"],
            first.value,
            first.low,
            first.high,
            again.value,
        ]
        figures += [over.value, over.low, over.high] if row["control"] else []
        cells = [f"{figure:.3f}" for figure in figures if figure is not None]
        lines.append(",".join([row["name"], *cells, *[""] * (9 - len(cells))]))
    return lines


def latency(record: dict[str, Any]) -> str:
    """One line a model and variant."""
    lines = []
    for row in record["rows"]:
        macs = f"{row['dense_macs'] / 1e9:.2f} → {row['macs'] / 1e9:.2f}"
        fewer = f"{100 * (1 - row['macs'] / row['dense_macs']):.1f} %"
        times = f"{row['dense_p50_ms']:.1f} → {row['p50_ms']:.1f}"
        cells = [row["model"], f"`{row['tokens']}`", str(row["batch"]), macs, fewer, times, _ratio(row)]
        lines.append([*cells, str(row["rounds"])])
    heads = (
        "model", "`--tokens`", "batch", "GMACs of an image", "fewer", "ms of a batch",
        "ratio over the same build without (95 %)", "rounds",
    )  # fmt: skip
    return _table(_source(record), heads, lines)


def heatmaps(record: dict[str, Any]) -> str:
    """One line a variant."""
    lines = []
    for row in record["rows"]:
        macs = f"{row['dense_macs'] / 1e9:.2f} → {row['macs'] / 1e9:.2f}"
        figures = [f"{row[name]:.3f}" for name in ("mean", "median", "lowest_5_percent", "lowest")]
        lines.append([f"`{row['tokens']}`", macs, str(row["photos"]), *figures])
    heads = ("`--tokens`", "GMACs", "photos", "mean correlation", "median", "5 % lie below", "lowest")
    return _table(_source(record), heads, lines)


def frozen(record: dict[str, Any]) -> str:
    """One line a percentile behind that of the dynamic model."""
    where = f"{record['machine']['cpu']} ({record['machine']['cores']} cores)"
    lines = []
    for row in record["figures"]:
        right = f"{100 * row['accuracy']:.1f} % ({100 * row['low']:.1f} % to {100 * row['high']:.1f} %)"
        if "kept" not in row:
            lines.append([row["model"], "of each digit", "of each digit", right, *[""] * 4])
            continue
        kept, found = ", then ".join(map(str, row["kept"])), row.get("latency")
        drop = f"{row['drop']:+.1f} ({row['drop_low']:+.1f} to {row['drop_high']:+.1f})"
        equal = f"{row['calibration_equal']} of {row['calibration']}"
        cells = [row["model"], kept, f"{row['macs'] / 1e6:.2f}", right, drop, equal]
        if found is None:
            cells += ["not measured", "not measured"]
        else:
            ratio = {"ratio": found["ratio"], "low": found["ratio_low"], "high": found["ratio_high"]}
            cells += [f"{found['baseline_p50_ms']:.2f} → {found['p50_ms']:.2f} ms", _ratio(ratio)]
        lines.append(cells)
    heads = (
        "model", "K", "MMACs", "accuracy", "drop in points", "calibration digits of equal class", "latency",
        "ratio over the plain export of the dynamic model",
    )  # fmt: skip
    return _table(f"{record['date']}, {where}, by `{record['command']}`.", heads, lines)


def macs(record: dict[str, Any]) -> str:
    """One line a model and method."""
    lines = []
    for row in record["rows"]:
        shown = [f"{row[name] / 1e9:.2f} G" for name in ("dense", "macs", "narrowed")]
        fewer = f"{100 * (1 - row['narrowed'] / row['dense']):.1f} %"
        lines.append([row["model"], f"`{row['tokens']}`", *shown, fewer, f"{row['seconds']:.1f}"])
    heads = ("model", "option", "before", "behind the pass", "behind `narrow-to-demand`", "fewer", "pass, CPU seconds")
    return _table(_source(record), heads, lines)


def _table(source: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"|{'|'.join(f' {cell} ' if cell else ' ' for cell in cells)}|" for cells in (heads, *rows)]
    return "\n".join([source, "", lines[0], "|---" * len(heads) + "|", *lines[1:]])


def _shown(found: Measured, sign: str = "") -> str:
    return f"{found.value:{sign}.2f} ({found.low:{sign}.2f} to {found.high:{sign}.2f})"


def _ratio(row: dict[str, Any] | None) -> str:
    if row is None or row["ratio"] is None:
        return "not measured"
    return f"{row['ratio']:.2f}× ({row['low']:.2f} to {row['high']:.2f})"


def _source(record: dict[str, Any]) -> str:
    machine = record["machine"]
    where = f"{machine['cpu']} ({machine['cores']} cores)"
    return f"{record['date']}, {where}, by `{record['command']}`, with {record['versions']}."


TABLES = {
    "tokens": lambda: accuracy(recorded("tokens"), recorded("tokens_latency")),
    "tokens_int8": lambda: rounded(recorded("tokens_int8")),
    "token_heatmaps": lambda: heatmaps(recorded("token_heatmaps")),
    "tokens_latency": lambda: latency(recorded("tokens_latency")),
    "token_macs": lambda: macs(recorded("token_macs")),
    "freeze": lambda: frozen(recorded("freeze")),
}
"""Record → its table."""
