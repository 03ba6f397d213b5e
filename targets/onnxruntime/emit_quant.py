"""emit_quant: quantization spelled as ONNX Runtime's integer kernels want it.

QGemm is made of a Gemm whose operands are dequantized, the weight with written zero points and the bias from int32 at
the product of both scales; a linear without bias gets one of zeros. A linear over more than two dims is one over rows,
with reshapes around it. QLinearConv is made where what follows the convolution is quantized too. Zero points are
shaped like their scales. Measured; tests/targets/test_emit_quant.py counts the kernels.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from vlexport.core.bundle_schema import Change
from vlexport.core.grids import INT32, quantize
from vlexport.ir import dialect, provenance
from vlexport.ir.cost import parameters_stored
from vlexport.ir.program import Program
from vlexport.ir.quant_ops import CHOOSE_QPARAMS, DEQUANTIZE, QUANTIZE
from vlexport.passes.quantization.decisions import Decisions, LayerDecision, ValueDecision
from vlexport.passes.quantization.spell import feed, rounded, said, spell, stored
from vlexport.passes.quantization.weights import as_steps
from vlexport.targets.onnxruntime.small_weights import store_small

aten = torch.ops.aten


def emit_quant(program: Program, decisions: Decisions, nodes: Mapping[str, Node], layer: LayerDecision) -> Change:
    """Spell one quantized call.

    Args:
        program: Changed in place.
        decisions: All of them.
        nodes: Key → node, of the Program before any was spelled.
        layer: The call.
    """
    values = decisions.by_value()
    node = nodes[layer.call]
    if layer.dynamic:
        _round_by_range(program, node)
        return spell(program, decisions, node, layer)
    if not layer.operands:
        return store_small(program, node, layer)
    calls, stored_before = len(program.calls()), parameters_stored(program)
    if layer.op == "linear" and node.meta["val"].ndim != 2:
        node = _as_rows(program, node, values[layer.operands[0]])
    else:
        for position, key in enumerate(layer.operands):
            operand = dialect.operands(node)[position]
            if operand.target is not DEQUANTIZE:
                feed(program, operand, values[key], node)
    if layer.weight:
        _store(program, node, layer, values[layer.operands[0]])
    if layer.output:
        _round_again(program, decisions, nodes, layer.output)
    return Change(
        what=said(layer, values), where=(provenance.module_path(node),), saved_nodes=calls - len(program.calls()),
        saved_parameters=stored_before - parameters_stored(program),
    )  # fmt: skip


def _round_by_range(program: Program, node: Node) -> None:
    """Round what a linear reads by its range of this run; once for all linears that read it."""
    value = dialect.operands(node)[0]
    ranged = next((user for user in value.users if user.target is CHOOSE_QPARAMS), None)
    if ranged is None:
        before = value.next
        while before.op == "placeholder":
            before = before.next
        ranged = program.add_call(CHOOSE_QPARAMS, (value,), before=before, value_of=node)
        scale, point = (program.add_call(operator.getitem, (ranged, i), before=before, value_of=node) for i in (0, 1))
        steps = program.add_call(QUANTIZE, (value, scale, point), before=before, value_of=node)
        made = program.add_call(DEQUANTIZE, (steps, scale, point), before=before, value_of=node)
    else:
        made = next(user for steps in value.users if steps.target is QUANTIZE for user in steps.users)
    node.replace_input_with(value, made)


def _as_rows(program: Program, node: Node, decision: ValueDecision) -> Node:
    """A linear over rows in place of ``node``: its input is reshaped as integers, its result back."""
    value = dialect.operands(node)[0]
    fed_by = value if value.target is DEQUANTIZE else rounded(program, value, decision)
    steps, scale, point = fed_by.args[:3]
    assert isinstance(steps, Node)
    width = [-1, value.meta["val"].shape[-1]]
    rows = program.add_call(aten.reshape.default, (steps, width), before=node, value_of=node)
    fed = program.add_call(DEQUANTIZE, (rows, scale, point), before=node, value_of=node)
    made = program.add_call(aten.linear.default, (fed, *dialect.operands(node)[1:]), before=node, value_of=node)
    back = program.add_call(aten.reshape.default, (made, _sizes(program, node)), before=node, value_of=node)
    program.replace(node, back)
    program.erase_dead(fed_by)
    return made


def _sizes(program: Program, node: Node) -> list[Any]:
    """The shape of a value as reshape takes it: the first size that is not known is -1, others are asked for."""
    found: list[Any] = []
    for dim, size in enumerate(node.meta["val"].shape):
        if not isinstance(size, torch.SymInt):
            found.append(int(size))
        elif -1 not in found:
            found.append(-1)
        else:
            found.append(program.add_call(aten.sym_size.int, (node.args[0], dim), before=node, value_of=node))
    return found


def _round_again(program: Program, decisions: Decisions, nodes: Mapping[str, Node], key: str) -> None:
    """Round a result for all its readers, and what is moved about of it at the same scale."""
    values = decisions.by_value()
    feed(program, nodes[key], values[key], nodes[key])
    for each in decisions.values:
        same = (each.scale, each.zero_point) == (values[key].scale, values[key].zero_point)
        if each.for_all and same and all(_is_rounded(s) for s in nodes[each.value].all_input_nodes):
            feed(program, nodes[each.value], each, nodes[each.value])


def _is_rounded(node: Node) -> bool:
    return node.target is DEQUANTIZE


def _store(program: Program, node: Node, layer: LayerDecision, value: ValueDecision) -> None:
    """Weight and bias as integers."""
    given = dict(zip(dialect.operand_names(node), dialect.operands(node), strict=True))
    weight, bias = given["weight"], given.get("bias")
    floats = program.tensor_of(weight)
    assert floats is not None
    integers, scale, zero = as_steps(floats, layer.weight)
    name = str(weight.target)
    fresh = {"weight": stored(program, node, name, integers, scale, zero)}
    if layer.bias == "int32":
        scales = (scale.numpy() * np.float32(value.scale)).astype(np.float32)
        was = program.tensor_of(bias)
        floating = was.detach().double().numpy() if was is not None else np.zeros(floats.shape[0])
        points = np.zeros(scales.shape, np.int32)
        steps = quantize(floating, scales, points, INT32, axis=0)
        called = str(bias.target) if isinstance(bias, Node) else f"{name}_bias"
        fresh["bias"] = stored(program, node, called, steps, scales, points)
    operands = [fresh.get(key, each) for key, each in given.items()]
    assert isinstance(node.target, torch._ops.OpOverload)
    node.args, node.kwargs = dialect.arguments(node.target, operands)
    for old in (weight, bias):
        if isinstance(old, Node):
            program.erase_dead(old)
