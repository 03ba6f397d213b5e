"""decide: scales for what is placed, from calibrated ranges; and which values have to be calibrated for that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch.fx import Node

from vlexport.calibration.collect import Want, Wanted
from vlexport.calibration.keys import value_keys
from vlexport.calibration.scales import LARGEST_HALF, affine, float8, half_scale, symmetric
from vlexport.calibration.table import ValueEntry
from vlexport.core.grids import GRIDS, INT8
from vlexport.core.scheme import E4M3, QuantScheme, TensorRule
from vlexport.ir import dialect, provenance
from vlexport.ir.program import Program
from vlexport.passes.quantization.decisions import Decisions, LayerDecision, ValueDecision
from vlexport.passes.quantization.placement import Placement, place


def wanted_values(program: Program, scheme: QuantScheme) -> Wanted:
    """Which values need a range; those of calls that are kept in float too, so that one table serves every choice."""
    placed = place(program, scheme)
    values = {*placed.integers, *(each for layer in placed.layers for each in layer.operands)}
    return lambda node: Want() if node in values else None


def decide(
    program: Program,
    scheme: QuantScheme,
    ranges: Mapping[str, ValueEntry],
    *,
    keep: Sequence[str] = (),
    only: Sequence[str] = (),
) -> tuple[Decisions, Placement]:
    """Decide everything.

    Args:
        program: In float; the one that was calibrated.
        scheme: What the target wants.
        ranges: Key of a value → its range.
        keep: Patterns of module paths, and keys, of what stays in float.
        only: The same of what alone is quantized; empty for all.

    Returns:
        The decisions, and the placement that they rest on, with the reasons for what stays in float.
    """
    keys = value_keys(program)

    def refuse(node: Node) -> str:
        entry = ranges.get(keys.get(node, ""))
        what = dialect.plain_name(node) if node.op == "call_function" else f"input {node.name}"
        if entry is None:
            return f"no range was measured for {what}"
        if entry.low == entry.high:
            return f"{what} is {entry.low:g} on all calibration samples: its range on others is unknown"
        reach = max(-entry.low, entry.high)
        if scheme.scales == "float16" and reach > LARGEST_HALF * INT8.high:
            return f"{what} reaches {reach:.2g}: no scale of float16 spans that"
        return ""

    placed = place(program, scheme, keep=keep, only=only, refuse=refuse)
    rules: dict[Node, TensorRule] = {}
    layers = []
    for layer in placed.layers:
        for node in (*layer.operands, *([layer.output] if layer.output is not None else [])):
            assert layer.rule.activation is not None
            rules.setdefault(node, _of_result(scheme, node) or layer.rule.activation)
        weight = layer.rule.weight
        layers.append(
            LayerDecision(
                call=keys[layer.node], op=dialect.plain_name(layer.node), module=provenance.module_path(layer.node),
                operands=tuple(keys[node] for node in layer.operands),
                weight=weight.type if weight is not None else "",
                block=_block(layer.node, weight), bias=layer.rule.bias,
                output=keys[layer.output] if layer.output is not None else "",
                residual=keys[placed.sums[layer.node]] if layer.node in placed.sums else "",
                dynamic=layer.rule.activation is not None and layer.rule.activation.dynamic,
            )
        )  # fmt: skip
    for node in placed.integers:
        if node not in rules:
            rules[node] = next(rules[each] for each in placed.groups[node] if each in rules)
    order = [node for node in (*program.placeholders, *program.calls()) if node in rules]
    values = [_value(node, rules[node], placed, keys, ranges, scheme.scales) for node in order]
    return Decisions(scheme=scheme.id, scales=scheme.scales, layers=tuple(layers), values=tuple(values)), placed


def scaling(low: float, high: float, rule: TensorRule, scales: str = "float32") -> tuple[float, int]:
    """Scale and zero point of a range by a rule.

    Args:
        low: Lower bound.
        high: Upper bound.
        rule: Of the value.
        scales: Type whose number the scale shall be; of symmetric rules.
    """
    point = 0
    if rule.fixed_scale is not None:
        scale = rule.fixed_scale
    elif rule.type == E4M3:
        scale = float(float8(low, high))
    else:
        made = (symmetric if rule.symmetric else affine)(low, high, GRIDS[rule.type])
        scale, point = float(made.scale), int(made.zero_point)
    return float(half_scale(np.float32(scale)) if scales == "float16" else scale), point


def _block(node: Node, weight: TensorRule | None) -> int:
    """Neighbours that share a scale or a palette; channels that no group divides share one palette."""
    if weight is None or weight.granularity != "group":
        return weight.block if weight is not None else 0
    stored = dict(zip(dialect.operand_names(node), dialect.operands(node), strict=True))["weight"]
    return weight.block if stored.meta["val"].shape[0] % weight.block == 0 else 0


def _of_result(scheme: QuantScheme, node: Node) -> TensorRule | None:
    """The rule for results of an operator whose range is known without looking."""
    rule = scheme.layer(dialect.plain_name(node)) if node.op == "call_function" else None
    found = rule.activation if rule is not None else None
    return found if found is not None and found.fixed_scale is not None else None


def _value(
    node: Node,
    rule: TensorRule,
    placed: Placement,
    keys: Mapping[Node, str],
    ranges: Mapping[str, ValueEntry],
    scales: str,
) -> ValueDecision:
    entries = [ranges[keys[each]] for each in placed.groups.get(node, (node,)) if keys[each] in ranges]
    low, high = min(e.low for e in entries), max(e.high for e in entries)
    scale, point = scaling(low, high, rule, scales)
    return ValueDecision(
        value=keys[node], place=ranges[keys[node]].place, low=low, high=high, type=rule.type,
        scale=scale, zero_point=point, for_all=node in placed.integers,
    )  # fmt: skip
