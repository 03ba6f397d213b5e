"""The comparison of a build for several targets: one line a target, in columns."""

from __future__ import annotations

from vlexport.core.comparison import Compared, Comparison
from vlexport.report.figures import accuracy_figure, ratio_figure, size_phrase

_HEAD = ("target", "precision", "for", "size", "state", "top-1 %", "drop", "p50 ms", "ratio")
_NONE = "–"


def comparison_lines(comparison: Comparison) -> list[str]:
    """A table for a terminal; a target that refused has its reason instead of figures."""
    made = [_cells(row) for row in comparison.rows if not row.error]
    widths = [max(map(len, column)) for column in zip(_HEAD, *made, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) for cells in (_HEAD, *made)
    ]
    refused = [f"{row.target} refused: {row.error}" for row in comparison.rows if row.error]
    return [*(line.rstrip() for line in lines), *refused]


def _cells(row: Compared) -> tuple[str, ...]:
    top1, drop = accuracy_figure(row.accuracy)
    p50, ratio = ratio_figure(row.latency)
    return (
        row.target,
        row.precision,
        row.device_profile,
        size_phrase(row.size_bytes or 0),
        row.state,
        top1 or _NONE,
        drop or _NONE,
        p50 or "not measured here",
        ratio or _NONE,
    )
