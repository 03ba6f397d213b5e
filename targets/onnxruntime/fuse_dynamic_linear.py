"""fuse-dynamic-linear: a linear whose input is rounded at run time becomes one operator of ONNX Runtime.

Before → after::

    %q, %scale, %zero = DynamicQuantizeLinear(x)
    %0 = QuantizeLinear(x, %scale, %zero)
    %1 = DequantizeLinear(%0, %scale, %zero)
    %2 = DequantizeLinear(@w: i8[8,4], @scales, @zeros)   →   %0 = com.microsoft.DynamicQuantizeMatMul(x, @w', …)
    %3 = MatMul(%1, transposed %2)                            return %0
    %4 = Add(%3, @bias)
    return %4

Equation: the same, added up in 32-bit integers. Left as they are, ONNX Runtime makes MatMulNBits of the nodes, which is
slower than float (measured). Where several linears read one rounded value, it is rounded once, and they become
MatMulIntegerToFloat.

Does not apply when: the weight is not in integers, or the range is that of another value.
Numerical effect: rounding, as fuse-qattention's.
Source: ONNX Runtime, contributed operators, com.microsoft.DynamicQuantizeMatMul and MatMulIntegerToFloat.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import onnx_ir

from vlexport.passes.base import Change, Match, NearMiss
from vlexport.targets.onnx.model import OnnxModel, module_path
from vlexport.targets.onnx.rewriting import CONTRIB, put, stored
from vlexport.targets.onnxruntime.integer_linear import IntegerFusion, IntegerLinear, NoLinear, integer_linear

_PATTERN = "rounded at run time → linear"


class FuseDynamicLinear(IntegerFusion):
    """A linear whose input is rounded at run time becomes one operator of ONNX Runtime."""

    name: ClassVar[str] = "fuse-dynamic-linear"

    def find(self, ir: OnnxModel) -> Iterator[Match[onnx_ir.Node] | NearMiss[onnx_ir.Node]]:
        """Every product behind a value that is rounded at run time."""
        for node in ir.nodes("MatMul", "Gemm"):
            if not _is_ranged(node):
                continue
            made = node.outputs[0]
            users = list(made.uses())
            if node.op_type == "MatMul" and len(users) == 1 and users[0][0].op_type == "Add":
                made = users[0][0].outputs[0]
            try:
                try:
                    linear = integer_linear(made)
                except NoLinear:  # what is added is no bias
                    made = node.outputs[0]
                    linear = integer_linear(made)
            except NoLinear as miss:
                yield NearMiss(_PATTERN, node, str(miss))
                continue
            yield Match(node, (node,), (made, linear))

    def apply(self, ir: OnnxModel, match: Match[onnx_ir.Node]) -> Change:
        """One node in the place of all."""
        made: onnx_ir.Value = match.data[0]
        linear: IntegerLinear = match.data[1]
        before, where = len(ir.nodes()), module_path(match.node)
        name = f"{where or 'main'}.weight"
        weight = stored(ir, f"{name}_int", linear.weight)
        scale = stored(ir, f"{name}_scale", linear.weight_scale)
        zero = stored(ir, f"{name}_zero", linear.weight_zero) if linear.weight_zero.any() else None
        bias = stored(ir, f"{where or 'main'}.bias", linear.bias) if linear.bias is not None else None
        if _readers(linear) > 1:
            operands = [linear.integers, weight, linear.scale, scale, linear.zero, zero, bias]
            put(ir, made, "MatMulIntegerToFloat", operands, domain=CONTRIB, origin=match.node)
        else:
            operands = [linear.floats, weight, scale, zero, bias]
            put(ir, made, "DynamicQuantizeMatMul", operands, domain=CONTRIB, origin=match.node)
        return Change(
            what="linear with its rounding as one operator", where=(where,), saved_nodes=before - len(ir.nodes())
        )  # fmt: skip


def _is_ranged(node: onnx_ir.Node) -> bool:
    rounded = node.inputs[0].producer() if node.inputs[0] is not None else None
    if rounded is None or rounded.op_type != "DequantizeLinear" or rounded.inputs[1] is None:
        return False
    maker = rounded.inputs[1].producer()
    return maker is not None and maker.op_type == "DynamicQuantizeLinear"


def _readers(linear: IntegerLinear) -> int:
    """How many nodes read the rounded value, and have it by its integers already."""
    ranged = linear.integers.producer()
    assert ranged is not None
    floats = ranged.outputs[1]
    dequantized = [user for user, _ in floats.uses() if user.op_type == "DequantizeLinear"]
    return len(list(linear.integers.uses())) + sum(len(list(each.outputs[0].uses())) for each in dequantized)
