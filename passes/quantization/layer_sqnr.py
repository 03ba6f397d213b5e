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
from vlexport.passes.quantization.weights import packed


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
    watch = Watch(program, decisions)
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

        watch.run(sample, look)
    return tuple(
        LayerSqnr(
            call=each.decision.call, op=each.decision.op, module=each.decision.module, own_db=each.own.kept_db,
            weight_db=each.of_weight.kept_db, arrived_db=each.arrived.kept_db if each.arrived is not None else None,
        )
        for each in layers.values()
    )  # fmt: skip


class Watch:
    """A float Program, run to compute its quantized layers again with rounded operands on the way.

    Args:
        program: In float; the one that was decided about.
        decisions: What is rounded, and how. Stored operands are rounded once, whatever the number of runs.
    """

    def __init__(self, program: Program, decisions: Decisions) -> None:
        nodes = {key: node for node, key in value_keys(program).items()}
        self._program = program
        self._layers = {nodes[each.call]: each for each in decisions.layers}
        self._wanted = {operand for node in self._layers for operand in node.all_input_nodes}
        self._values = decisions.by_value()
        self._weights = {
            node: packed(_stored(program, node), each.weight, block=each.block, scales=decisions.scales)
            for node, each in self._layers.items()
            if each.weight
        }

    def run(self, sample: tuple[Tensor, ...], look: Look) -> None:
        """Run once.

        Args:
            sample: One tensor per input, with batch dim.
            look: Told of every layer.
        """
        given = zip(self._program.placeholders, sample, strict=True)
        kept: dict[Node, Any] = {node: value for node, value in given if node in self._wanted}

        def seen(node: Node, value: Any) -> None:
            if node in self._wanted:
                kept[node] = value
            if node in self._layers:
                look(node, value, *self._again(node, kept.__getitem__))

        self._program.run(*sample, observe=seen)

    def _again(self, node: Node, kept: Callable[[Node], Any]) -> tuple[Tensor, Tensor]:
        """The layer with its weight rounded, and with its computed operands rounded too."""
        program, decision = self._program, self._layers[node]
        given = list(dialect.operands(node))
        plain = [_value(program, each, kept) for each in given]
        if node in self._weights:
            plain[dialect.operand_names(node).index("weight")] = self._weights[node]()
        every = list(plain)
        positions = [i for i, each in enumerate(given) if isinstance(each, Node) and program.tensor_of(each) is None]
        for place, key in zip(positions, decision.operands, strict=False):
            every[place] = rounded(plain[place], self._values[key])
        if decision.dynamic:
            every[positions[0]] = _rounded_by_range(plain[positions[0]])
        assert isinstance(node.target, torch._ops.OpOverload)
        made = []
        for operands in (plain, every):
            args, kwargs = dialect.arguments(node.target, operands)
            made.append(node.target(*args, **kwargs))
        return made[0], made[1]


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


def _stored(program: Program, node: Node) -> Tensor:
    given = dict(zip(dialect.operand_names(node), dialect.operands(node), strict=True))
    stored = program.tensor_of(given["weight"])
    assert stored is not None
    return stored


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
