"""operator_times: where a model's time goes, as ONNX Runtime's profiler tells it. No torch."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_KERNEL = "_kernel_time"


def operator_times(trace: Path, *, runs: int) -> dict[str, tuple[int, float]]:
    """Operator → how often it runs and milliseconds, both a run of the model.

    Args:
        trace: What ``end_profiling`` wrote.
        runs: Runs of the model in it.
    """
    return summed(json.loads(trace.read_text(encoding="utf-8")), runs=runs)


def summed(events: Iterable[dict[str, Any]], *, runs: int) -> dict[str, tuple[int, float]]:
    """The same of events as the trace lists them; a kernel's own time is in microseconds."""
    counts: dict[str, int] = defaultdict(int)
    spent: dict[str, float] = defaultdict(float)
    for event in events:
        if event.get("cat") == "Node" and str(event.get("name", "")).endswith(_KERNEL):
            operator = str(event["args"]["op_name"])
            counts[operator] += 1
            spent[operator] += float(event["dur"])
    found = {name: (round(counts[name] / runs), spent[name] / runs / 1e3) for name in counts}
    return dict(sorted(found.items(), key=lambda each: -each[1][1]))
