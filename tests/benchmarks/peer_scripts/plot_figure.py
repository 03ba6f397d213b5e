"""Draws the comparison's figure with matplotlib: latency against accuracy or fidelity, a panel a model, as SVG."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def draw(points: dict[str, list[dict[str, Any]]], output: Path) -> None:
    """``points`` maps a model to ``{name, ms, value, label, ours}``."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "vlexport"
    matplotlib.rcParams["svg.fonttype"] = "none"
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(points), figsize=(6.5 * len(points), 5), squeeze=False)
    for panel, (model, found) in zip(panels[0], points.items(), strict=True):
        for each in found:
            panel.plot(each["ms"], each["value"], "D" if each["ours"] else "o", color="C3" if each["ours"] else "C0")
            panel.annotate(each["name"], (each["ms"], each["value"]), (4, 3), textcoords="offset points", fontsize=7)
        panel.set_title(model)
        panel.set_xscale("log")
        panel.set_xlabel("median of one sample, ms")
        panel.set_ylabel(found[0]["label"] if found else "")
        panel.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(output, metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    draw(json.load(sys.stdin), Path(sys.argv[1]))
