"""per_layer_sqnr: how much of each quantized layer's result survives rounding, and where the noise comes from.

Two figures a layer. Its *own* ratio is what rounding its operands costs while everything before it is in float: the
order in which layers are worth returning to float. The ratio that *arrived* is what its result still is worth in the
quantized Program, with the noise of all layers before it: the way from good to bad shows where it went wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from vlexport.calibration.keys import value_keys
from vlexport.calibration.ranges import ValueRange
from vlexport.core.artifact import Frozen
from vlexport.ir import dialect, provenance
from vlexport.ir.program import Program
from vlexport.ir.quant_ops import CHOOSE_QPARAMS, DEQUANTIZE, QUANTIZE
from vlexport.passes.quantization.decisions import Decisions, LayerDecision, ValueDecision
from vlexport.passes.quantization.weights import rounded_weight


class LayerSqnr(Frozen):
    """What rounding costs one layer, in decibels of signal to noise over all samples; ``inf`` without noise.

    Attributes:
        call: Key of the layer.
        op: Plain name of its operator.
        module: Module path.
        own_db: With its operands rounded and everything before it in float.
        weight_db: With its stored operand alone rounded.
        arrived_db: In the quantized Program; None where none was given, or its values cannot be told apart there.
    """

    call: str
    op: str
    module: str
    own_db: float
    weight_db: float
    arrived_db: float | None = None


Look = Callable[[Node, Tensor, Tensor, Tensor], None]
"""Told of a layer: its float result, that with its weight rounded, and that with all its operands rounded."""


@dataclass
class _Tally:
    decision: LayerDecision
    own: ValueRange = field(default_factory=ValueRange)
    of_weight: ValueRange = field(default_factory=ValueRange)
    arrived: ValueRange | None = None


def per_layer_sqnr(
    program: Program,
    decisions: Decisions,
    samples: Iterable[tuple[Tensor, ...]],
    *,
    quantized: Program | None = None,
) -> tuple[LayerSqnr, ...]:
    """Measure every quantized layer.

    Args:
        program: In float; the one that was decided about.
        decisions: What is rounded, and how.
        samples: One tensor per input each, with batch dim; each is run once, or twice with ``quantized``.
        quantized: The Program after the decisions were spelled, for what arrives at each layer.

    Returns:
        One entry a layer, in the Program's order. One whose result is 0 on all samples has ``-inf`` or ``inf``.
    """
    nodes = {key: node for node, key in value_keys(program).items()}
    layers = {nodes[each.call]: _Tally(each) for each in decisions.layers}
    ends = _ends(program, quantized) if quantized is not None else {}
    for sample in samples:
        found = _found_in(quantized, sample, ends) if quantized is not None else {}

        def look(
            node: Node, value: Tensor, with_weight: Tensor, with_all: Tensor, found: Mapping[Node, Tensor] = found
        ) -> None:
            layer = layers[node]
            layer.of_weight.update(value.numpy(), with_weight.numpy())
            layer.own.update(value.numpy(), with_all.numpy())
            arrived = found.get(node)
            if arrived is not None and arrived.shape == value.shape:
                layer.arrived = layer.arrived or ValueRange()
                layer.arrived.update(value.numpy(), arrived.numpy())

        watch_layers(program, decisions, sample, look)
    return tuple(
        LayerSqnr(
            call=each.decision.call, op=each.decision.op, module=each.decision.module, own_db=each.own.kept_db,
            weight_db=each.of_weight.kept_db, arrived_db=each.arrived.kept_db if each.arrived is not None else None,
        )
        for each in layers.values()
    )  # fmt: skip


def watch_layers(program: Program, decisions: Decisions, sample: tuple[Tensor, ...], look: Look) -> None:
    """Run a float Program once, and compute every layer again with rounded operands on the way.

    Args:
        program: In float; the one that was decided about.
        decisions: What is rounded, and how.
        sample: One tensor per input, with batch dim.
        look: Told of every layer.
    """
    nodes = {key: node for node, key in value_keys(program).items()}
    layers = {nodes[each.call]: each for each in decisions.layers}
    wanted = {operand for node in layers for operand in node.all_input_nodes}
    values = decisions.by_value()
    kept: dict[Node, Any] = {n: v for n, v in zip(program.placeholders, sample, strict=True) if n in wanted}

    def seen(node: Node, value: Any) -> None:
        if node in wanted:
            kept[node] = value
        if node in layers:
            look(node, value, *_again(program, node, layers[node], values, kept.__getitem__, decisions.scales))

    program.run(*sample, observe=seen)


def rounded(value: Tensor, decision: ValueDecision) -> Tensor:
    """A value after rounding by a decision."""
    scale = torch.tensor(decision.scale, dtype=torch.float32)
    point = torch.tensor(decision.zero_point, dtype=getattr(torch, decision.grid.dtype))
    found: Tensor = DEQUANTIZE(QUANTIZE(value, scale, point), scale, point)
    return found


def _rounded_by_range(value: Tensor) -> Tensor:
    """A value after rounding by its range of this run."""
    scale, point = CHOOSE_QPARAMS(value)
    found: Tensor = DEQUANTIZE(QUANTIZE(value, scale, point), scale, point)
    return found


def _weight(program: Program, node: Node, decision: LayerDecision, scales: str) -> Tensor | None:
    if not decision.weight:
        return None
    given = dict(zip(dialect.operand_names(node), dialect.operands(node), strict=True))
    stored = program.tensor_of(given["weight"])
    assert stored is not None
    return rounded_weight(stored, decision.weight, block=decision.block, scales=scales)


def _again(
    program: Program,
    node: Node,
    decision: LayerDecision,
    values: Mapping[str, ValueDecision],
    kept: Callable[[Node], Any],
    scales: str,
) -> tuple[Tensor, Tensor]:
    """The layer with its weight rounded, and with its computed operands rounded too."""
    given = list(dialect.operands(node))
    plain = [_value(program, each, kept) for each in given]
    weight = _weight(program, node, decision, scales)
    if weight is not None:
        plain[dialect.operand_names(node).index("weight")] = weight
    every = list(plain)
    positions = [i for i, each in enumerate(given) if isinstance(each, Node) and program.tensor_of(each) is None]
    for place, key in zip(positions, decision.operands, strict=False):
        every[place] = rounded(plain[place], values[key])
    if decision.dynamic:
        every[positions[0]] = _rounded_by_range(plain[positions[0]])
    assert isinstance(node.target, torch._ops.OpOverload)
    made = []
    for operands in (plain, every):
        args, kwargs = dialect.arguments(node.target, operands)
        made.append(node.target(*args, **kwargs))
    return made[0], made[1]


def _value(program: Program, operand: Any, kept: Callable[[Node], Any]) -> Any:
    if not isinstance(operand, Node):
        return operand
    stored = program.tensor_of(operand)
    return kept(operand) if stored is None else stored


def _ends(program: Program, quantized: Program) -> dict[Node, Node]:
    """Call in the quantized Program → the float call whose value it is: the last of each that stand for one value."""
    ours, theirs = ({provenance.origins(node)[-1]: node for node in each.calls()} for each in (quantized, program))
    return {ours[ordinal]: node for ordinal, node in theirs.items() if ordinal in ours}


def _found_in(quantized: Program, sample: tuple[Tensor, ...], ends: Mapping[Node, Node]) -> dict[Node, Tensor]:
    found: dict[Node, Tensor] = {}

    def look(node: Node, value: Any) -> None:
        if node in ends and isinstance(value, Tensor) and value.is_floating_point():
            found[ends[node]] = value

    quantized.run(*sample, observe=look)
    return found


def weakest(layers: Iterable[LayerSqnr]) -> list[LayerSqnr]:
    """The layers that lose most of their own first; what is no number (a result of nothing but 0) comes last."""
    return sorted(layers, key=lambda each: math.inf if math.isnan(each.own_db) else each.own_db)
