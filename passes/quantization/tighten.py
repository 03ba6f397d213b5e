"""tighten: a narrower range where what is cut off matters less than the finer steps for all the rest.

The judge is what reads the value: shares of the calibrated range are tried, and the one is taken whose quantized
readers err least on samples. So an outlier that matters keeps the range wide, and one that does not is cut off. Only
values that have one scale for themselves are looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from torch import Tensor
from torch.fx import Node

from vlexport.calibration.keys import value_keys
from vlexport.core.scheme import QuantScheme
from vlexport.ir.program import Program
from vlexport.passes.projections.projection import Projection, projection_of
from vlexport.passes.quantization.decide import scaling
from vlexport.passes.quantization.decisions import Decisions, ValueDecision
from vlexport.passes.quantization.layer_sqnr import rounded
from vlexport.passes.quantization.weights import rounded_weight

SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
"""Of the calibrated range."""
LEFT = 0.95
"""The error that may be left at most, as a share of what it was; else the range stays."""


def tightened(
    program: Program, decisions: Decisions, scheme: QuantScheme, samples: Iterable[tuple[Tensor, ...]]
) -> Decisions:
    """Decisions with the ranges of single values narrowed.

    Args:
        program: In float; the one that was decided about.
        decisions: What is rounded, and how.
        scheme: What they follow.
        samples: One tensor per input each, with batch dim; each is run once. Without any, nothing changes.
    """
    nodes = {key: node for node, key in value_keys(program).items()}
    added = {layer.residual for layer in decisions.layers}  # what a sum reads says nothing to the error of a product
    tried = {
        each.value: _narrower(each, decisions, scheme)
        for each in decisions.values
        if not each.for_all and each.value not in added
    }
    readers: dict[Node, tuple[str, Projection, Tensor]] = {}
    for layer in decisions.layers:
        found = projection_of(program, nodes[layer.call])
        if isinstance(found, Projection) and found.out_axis == 0 and layer.weight and layer.operands[0] in tried:
            weight = rounded_weight(found.tensor(program), layer.weight, scales=decisions.scales)
            readers[nodes[layer.call]] = (layer.operands[0], found, weight)
    errors = {key: np.zeros(len(each)) for key, each in tried.items()}
    for sample in samples:
        _try(program, sample, readers, tried, errors)
    best = {key: int(np.argmin(found)) for key, found in errors.items()}
    chosen = {key: tried[key][i] for key, i in best.items() if errors[key][i] < LEFT * errors[key][0]}
    return decisions.model_copy(update={"values": tuple(chosen.get(each.value, each) for each in decisions.values)})


def _narrower(value: ValueDecision, decisions: Decisions, scheme: QuantScheme) -> list[ValueDecision]:
    reader = next(each for each in decisions.layers if value.value in each.operands)
    rule = scheme.layer(reader.op)
    assert rule is not None
    assert rule.activation is not None
    found = [value]
    for share in SHARES[1:]:
        low, high = value.low * share, value.high * share
        scale, point = scaling(low, high, rule.activation, decisions.scales)
        update = {"low": low, "high": high, "scale": scale, "zero_point": point}
        found.append(value.model_copy(update=update))
    return found


def _try(
    program: Program,
    sample: tuple[Tensor, ...],
    readers: Mapping[Node, tuple[str, Projection, Tensor]],
    tried: Mapping[str, list[ValueDecision]],
    errors: Mapping[str, Any],
) -> None:
    wanted = {found.operand(found.x) for _, found, _ in readers.values()}
    kept: dict[Node, Tensor] = {n: v for n, v in zip(program.placeholders, sample, strict=True) if n in wanted}

    def look(node: Node, value: Any) -> None:
        if node in wanted:
            kept[node] = value
        if node not in readers:
            return
        key, found, weight = readers[node]
        size = float(value.double().square().sum()) or 1.0
        for i, each in enumerate(tried[key]):
            made = found.again(program, rounded(kept[found.operand(found.x)], each), weight)
            errors[key][i] += float((made - value).double().square().sum()) / size

    program.run(*sample, observe=look)
