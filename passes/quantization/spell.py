"""spell: quantization written into a Program as ``quantize`` and ``dequantize``, the part that targets share.

What a target's kernels want beside it (an int32 bias, rows, a rounded result) stands in its own ``emit_quant``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from vlexport.core.bundle_schema import Change
from vlexport.core.grids import INT4
from vlexport.core.palettes import PALETTES
from vlexport.ir import dialect, provenance
from vlexport.ir.cost import parameters_stored
from vlexport.ir.program import Program
from vlexport.ir.quant_ops import DEQUANTIZE, LOOK_UP, QUANTIZE
from vlexport.passes.quantization.decisions import Decisions, LayerDecision, ValueDecision
from vlexport.passes.quantization.weights import as_steps, by_palettes, dtype_of


def spell(program: Program, decisions: Decisions, node: Node, layer: LayerDecision) -> Change:
    """Write one call with rounded operands: each computed one behind ``quantize``, the weight stored; a bias stays.

    Args:
        program: Changed in place.
        decisions: All of them.
        node: The call.
        layer: Its decision.
    """
    calls, stored_before = len(program.calls()), parameters_stored(program)
    values = decisions.by_value()
    for position, key in enumerate(layer.operands):
        operand = dialect.operands(node)[position]
        if operand.target is not DEQUANTIZE:
            feed(program, operand, values[key], node)
    if layer.weight:
        store_weight(program, node, layer, scales=decisions.scales)
    if layer.residual:
        (reader,) = node.users
        (added,) = (each for each in reader.all_input_nodes if each is not node)
        if added.target is not DEQUANTIZE:
            feed(program, added, values[layer.residual], reader)
    return Change(
        what=said(layer, values), where=(provenance.module_path(node),), saved_nodes=calls - len(program.calls()),
        saved_parameters=stored_before - parameters_stored(program),
    )  # fmt: skip


def said(layer: LayerDecision, values: dict[str, ValueDecision]) -> str:
    """``linear in int8 x int8``, or ``linear with int4 weights`` where nothing else is rounded."""
    if not layer.operands:
        dynamic = f" in uint8, by the range of each run, x {layer.weight}"
        return layer.op + (dynamic if layer.dynamic else f" with {layer.weight} weights")
    return f"{layer.op} in {values[layer.operands[0]].type} x {layer.weight or values[layer.operands[-1]].type}"


def feed(program: Program, value: Node, decision: ValueDecision, reader: Node) -> None:
    """Let one reader, or all, read the rounded value."""
    made = rounded(program, value, decision)
    readers = list(value.users) if decision.for_all else [reader]
    for each in readers:
        if each.target is not QUANTIZE:
            each.replace_input_with(value, made)


def rounded(program: Program, value: Node, decision: ValueDecision) -> Node:
    """The value after rounding, made once."""
    for user in value.users:
        if user.target is QUANTIZE:
            made = next((each for each in user.users if each.target is DEQUANTIZE), None)
            return made or program.add_call(DEQUANTIZE, (user, *user.args[1:]), before=user.next, value_of=user)
    before = value.next
    while before.op == "placeholder":
        before = before.next
    owner = value if value.op == "call_function" else next(iter(value.users))
    name = f"{provenance.module_path(owner) or 'main'}.{value.name}"
    scale = program.add_tensor(f"{name}_scale", torch.tensor(decision.scale, dtype=torch.float32), before=before)
    kind = dtype_of(decision.type)
    point = program.add_tensor(f"{name}_zero", torch.tensor(decision.zero_point).to(kind), before=before)
    steps = program.add_call(QUANTIZE, (value, scale, point), before=before, value_of=owner)
    return program.add_call(DEQUANTIZE, (steps, scale, point), before=before, value_of=owner)


def store_weight(program: Program, node: Node, layer: LayerDecision, *, scales: str = "float32") -> None:
    """The weight of a call as integers or float8, a scale for each entry of dim 0 or for blocks along dim 1; or by its
    palettes.
    """
    names = dialect.operand_names(node)
    operands = list(dialect.operands(node))
    weight = operands[names.index("weight")]
    floats = program.tensor_of(weight)
    assert floats is not None
    name = str(weight.target)
    if layer.weight in PALETTES:
        places, tables = by_palettes(floats, layer.weight, group=layer.block, scales=scales)
        made = _read(program, node, LOOK_UP, {f"{name}_places": places, f"{name}_tables": tables})
    else:
        steps, scale, point = as_steps(floats, layer.weight, block=layer.block, scales=scales)
        how = (1, layer.block, 4 if layer.weight == INT4.name else 8) if layer.block else (0,)
        made = stored(program, node, name, steps, scale, point, how)
    operands[names.index("weight")] = made
    assert isinstance(node.target, torch._ops.OpOverload)
    node.args, node.kwargs = dialect.arguments(node.target, operands)
    program.erase_dead(weight)


def stored(
    program: Program, node: Node, name: str, steps: Any, scale: Any, point: Any, how: tuple[int, ...] = (0,)
) -> Node:
    """A stored tensor, dequantized before ``node`` along the axis, and in the blocks and bits, of ``how``.

    What was stored for an earlier call is read again.
    """
    tensors = {f"{name}_{suffix}": _tensor(v) for suffix, v in (("int", steps), ("scale", scale), ("zero", point))}
    return _read(program, node, DEQUANTIZE, tensors, how)


def _read(program: Program, node: Node, target: Any, tensors: dict[str, Tensor], how: tuple[int, ...] = ()) -> Node:
    for made in program.calls():
        if made.target is not target:
            continue
        same = [(n.target, program.tensor_of(n)) for n in made.all_input_nodes]
        if made < node and made.args[len(tensors) :] == how and all(
            found == wanted and kept is not None and kept.dtype == each.dtype and torch.equal(kept, each)
            for (found, kept), (wanted, each) in zip(same, tensors.items(), strict=True)
        ):  # fmt: skip
            return made
    given = [program.add_tensor(key, each, before=node) for key, each in tensors.items()]
    return program.add_call(target, (*given, *how), before=node, value_of=node)


def _tensor(values: Any) -> Tensor:
    return values if isinstance(values, Tensor) else torch.from_numpy(np.ascontiguousarray(values))
