"""fold-casts: a cast beside ``quantize`` or ``dequantize`` goes; the scale is stored in the type of the floats instead.

Before → after::

    %1 = _to_copy(%0: f16, dtype=f32)          %2 = quantize(%0, @scale_fp16, @zero)
    %2 = quantize(%1, @scale: f32, @zero)      %3 = dequantize(%2, @scale_fp16, @zero): f16
    %3 = dequantize(%2, @scale, @zero)     →   %5 = linear(%3, …): f16
    %4 = _to_copy(%3, dtype=f16)
    %5 = linear(%4, …): f16

The same holds of ``look_up``, whatever its tables hold: what is rounded is looked up. What computes in half reads
rounded values in half, and no cast stands between a runtime's ``dequantize`` and the call that it belongs to.

Equation: with a scale s that half holds, ``half(float(q · s)) = q · s`` rounded once: a product of 8 and 11 bits fits
into float32.

Does not apply when: the scale is no number of the half type, or is computed; a bias in int32 is dequantized.
Numerical effect: none, bit for bit.
Source: ONNX operator specification, QuantizeLinear and DequantizeLinear 19: the floats are of the scale's type.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch.fx import Node

from vlexport.ir import dialect, provenance
from vlexport.ir.cost import parameters_stored
from vlexport.ir.program import Program
from vlexport.ir.quant_ops import BIAS, DEQUANTIZE, LOOK_UP, QUANTIZE
from vlexport.ir.rounded import HALF_DTYPES
from vlexport.passes.base import Change, Effect, Match, NearMiss, Pass, Stage

_INTO, _OUT_OF = "cast → quantize", "dequantize → cast"
_LOOKED_UP = "look_up → cast"


class FoldCasts(Pass[Program]):
    """A cast beside quantize or dequantize goes; the scale is stored in the type of the floats instead."""

    name: ClassVar[str] = "fold-casts"
    stage: ClassVar[Stage] = "precision"
    effect: ClassVar[Effect] = "exact"

    def find(self, ir: Program) -> Iterator[Match | NearMiss]:
        """Casts from half that are quantized, and casts to half of what was dequantized."""
        for node in ir.calls():
            source: Any = node.args[0] if node.args else None
            if node.target is QUANTIZE and dialect.is_cast(source):
                before: Any = source.args[0]
                half, pattern, nodes = before.meta["val"].dtype, _INTO, (node, source)
            elif dialect.is_cast(node) and isinstance(source, Node) and source.target in (DEQUANTIZE, LOOK_UP):
                pattern = _OUT_OF if source.target is DEQUANTIZE else _LOOKED_UP
                half, nodes = node.meta["val"].dtype, (node, source)
            else:
                continue
            call = nodes[0] if pattern == _INTO else nodes[1]
            cast = nodes[1] if pattern == _INTO else nodes[0]
            if half not in HALF_DTYPES and not _is_idle(cast):
                continue
            reason = _why_not(ir, call, half)
            yield NearMiss(pattern, node, reason) if reason else Match(node, nodes, (pattern, half))

    def apply(self, ir: Program, match: Match) -> Change:
        """Write the call with a scale in half."""
        pattern, half = match.data
        node, source = match.nodes
        calls, stored = len(ir.calls()), parameters_stored(ir)
        where = (provenance.module_path(node),)
        call: Any = node if pattern == _INTO else source
        value = source.args[0]
        scale: Any = call.args[1]
        rest = call.args[2:]
        halved = _in_half(ir, scale, half, before=call)
        made = ir.add_call(call.target, (value, halved, *rest), before=node, value_of=call)
        ir.replace(node, made)
        return Change(
            what=f"{pattern} without the cast", where=where, saved_nodes=calls - len(ir.calls()),
            saved_parameters=stored - parameters_stored(ir),
        )  # fmt: skip


def _is_idle(cast: Node) -> bool:
    """Whether a cast keeps the type, as all do in a float64 copy."""
    source: Any = cast.args[0]
    return bool(source.meta["val"].dtype is cast.meta["val"].dtype)


def _why_not(ir: Program, call: Node, half: torch.dtype) -> str:
    scale = ir.tensor_of(call.args[1])
    point: Any = call.args[2] if len(call.args) > 2 else None
    if scale is None:
        return f"its {'table' if call.target is LOOK_UP else 'scale'} is computed, not stored"
    if call.target is LOOK_UP:
        return ""
    if point is not None and point.meta["val"].dtype is BIAS:
        return "a bias is rounded at the product of two scales"
    if not torch.equal(scale.to(half).to(scale.dtype), scale):
        return f"its scale is no number of {str(half).removeprefix('torch.')}"
    return ""


def _in_half(ir: Program, scale: Node, half: torch.dtype, *, before: Node) -> Node:
    """The node that reads the scale in half; one for all calls behind the first."""
    tensor = ir.tensor_of(scale)
    assert tensor is not None
    if tensor.dtype is half:
        return scale
    name = f"{scale.target}_half"
    kept = ir.tensors.get(name)
    if kept is not None and kept.dtype is half:
        readers: list[Node] = [n for n in ir.graph.nodes if n.op == "get_attr" and n.target == name and n < before]
        if readers:
            return readers[0]
    return ir.add_tensor(name, tensor.to(half), before=before)
