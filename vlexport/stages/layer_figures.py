"""layer_figures: what rounding costs each layer, and how the values it reads are spread, measured on a few samples.

They are written beside the decisions in ``quantization.json``, rounded so that a build repeats them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from vlexport.calibration.keys import value_keys
from vlexport.calibration.table import TYPICAL
from vlexport.core.grids import GRIDS
from vlexport.ir.program import Program
from vlexport.passes.quantization.decisions import Decisions
from vlexport.passes.quantization.layer_sqnr import per_layer_sqnr

BINS = 32
"""Of a histogram, between the least and the largest value seen."""


def layer_figures(
    program: Program, quantized: Program, decisions: Decisions, samples: Sequence[tuple[Tensor, ...]]
) -> dict[str, Any]:
    """JSON values: ``layers``, ratios in dB by the call's key, and ``seen``, one histogram a rounded value.

    Args:
        program: In float; the one that was decided about.
        quantized: What the decisions made of it.
        decisions: What is rounded; nothing is measured of float8, and of weights in blocks.
        samples: One tensor per input each, with batch dim; none measure nothing.
    """
    types = {each.type for each in decisions.values} | {each.weight for each in decisions.layers if each.weight}
    if not samples or types - GRIDS.keys() or any(each.block for each in decisions.layers):
        return {}
    found = per_layer_sqnr(program, decisions, samples, quantized=quantized)
    layers = {
        each.call: _rounded({"own_db": each.own_db, "weight_db": each.weight_db, "sqnr_db": each.arrived_db})
        for each in found
    }
    return {"layers": layers, "seen": _seen(program, decisions, samples)}


def _rounded(figures: Mapping[str, float | None]) -> dict[str, float]:
    """To a tenth of a dB; what is infinite, without noise or without signal, is left out."""
    return {name: round(value, 1) for name, value in figures.items() if value is not None and math.isfinite(value)}


def _seen(program: Program, decisions: Decisions, samples: Sequence[tuple[Tensor, ...]]) -> list[dict[str, Any]]:
    keys = value_keys(program)
    wanted = {each.value for each in decisions.values}
    nodes = {node: keys[node] for node in (*program.placeholders, *program.calls()) if keys[node] in wanted}
    values: dict[str, list[Tensor]] = {key: [] for key in nodes.values()}
    for sample in samples:

        def look(node: Node, value: Any) -> None:
            if node in nodes:
                values[nodes[node]].append(value.float().flatten())

        for node, value in zip(program.placeholders, sample, strict=True):
            look(node, value)
        program.run(*sample, observe=look)
    return [_histogram(key, torch.cat(parts).numpy()) for key, parts in values.items() if parts]


def _histogram(key: str, values: Any) -> dict[str, Any]:
    low, high = float(values.min()), float(values.max())
    counts = np.histogram(values, bins=BINS, range=(low, high) if low < high else (low, low + 1.0))[0]
    return {
        "value": key,
        "low": _digits(low),
        "high": _digits(high),
        "typical": _digits(float(np.quantile(np.abs(values), TYPICAL))),
        "counts": counts.tolist(),
    }


def _digits(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.3e}")
