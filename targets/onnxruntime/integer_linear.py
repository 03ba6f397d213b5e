"""integer_linear: a linear between dequantized operands, as the kernels of ONNX Runtime take it apart.

::

    %x = DequantizeLinear(%q, scale, zero)             reshapes of %q included
    %w = DequantizeLinear(@weight, scales, zeros)      as it is, or transposed
    %y = Gemm(%x, %w, bias)  or  MatMul(%x, %w) + bias
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir

from vlexport.passes.base import Effect, Pass, Stage
from vlexport.passes.statistic import Statistic
from vlexport.targets.onnx.layout import origin
from vlexport.targets.onnx.model import OnnxModel

Array = npt.NDArray[np.generic]
_INTEGERS = ("uint8", "int8")
_LEAST = 3.0
"""Decibels of an output, where noise has half the power of what it should be."""


class NoLinear(Exception):  # noqa: N818  its text is the reason
    """A value that no integer linear makes."""


@dataclass(frozen=True)
class IntegerLinear:
    """One linear.

    Attributes:
        integers: What it reads, before reshapes.
        scale: Of them.
        zero: Of them.
        floats: What was rounded, where that happens at run time by its own range; None where scale and zero are stored.
        weight: (depth, columns) int8.
        weight_scale: (columns,) float32.
        weight_zero: (columns,), of the weight's dtype.
        bias: (columns,) float32; None where there is none.
    """

    integers: onnx_ir.Value
    scale: onnx_ir.Value
    zero: onnx_ir.Value
    floats: onnx_ir.Value | None
    weight: Array
    weight_scale: Array
    weight_zero: Array
    bias: Array | None


class IntegerFusion(Pass[OnnxModel]):
    """A fusion of nodes that compute with integers.

    A rounding of float that tips an integer over is a whole step further on: noise like quantization's. On a deep
    model it costs about as much as quantization itself (33 dB beside 31 dB on deit_small; 7.5 dB on two logits of a
    trained ViT that chooses tokens), so that outputs prove little: they are held to :data:`_LEAST`. What proves is each
    place alone, given what stood before it: one integer in a hundred tipped over leaves 46 dB, a wrong row or bias none
    of it.
    """

    stage: ClassVar[Stage] = "legalize"
    effect: ClassVar[Effect] = "approximate"

    @property
    def statistic(self) -> Statistic:
        """Signal to noise ratio, of outputs and of each place."""
        option = f"onnxruntime.{self.name.replace('-', '_')}"
        hint = f"switch the fusion off with --set {option}=false, and report this"
        return Statistic("sqnr_db", _LEAST, place=40.0, hint=hint)


def integer_linear(value: onnx_ir.Value) -> IntegerLinear:
    """Take apart what makes a value.

    Raises:
        NoLinear: With the reason.
    """
    node, bias = value.producer(), None
    if node is not None and node.op_type == "Add":
        stored = [each for each in node.inputs if _constant(each) is not None]
        computed = [each.producer() for each in node.inputs if each is not None and each not in stored]
        if len(stored) != 1 or len(computed) != 1:
            raise NoLinear("no linear makes it")
        bias, node = _constant(stored[0]), computed[0]
        if node is not None and (len(list(node.outputs[0].uses())) != 1 or node.outputs[0].is_graph_output()):
            raise NoLinear("the product is also read without its bias")
    if node is None or node.op_type not in ("MatMul", "Gemm"):
        raise NoLinear("no linear makes it")
    if _of(node, "transA", 0) or _of(node, "alpha", 1.0) != 1 or _of(node, "beta", 1.0) != 1:
        raise NoLinear("its product is transposed or scaled")
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        if bias is not None:
            raise NoLinear("two rows are added to its product")
        bias = _constant(node.inputs[2])
        if bias is None:
            raise NoLinear("its bias is computed, not stored")
    if bias is not None and bias.ndim != 1:
        raise NoLinear("its bias is no row")
    weight, scales, zeros = _weight(node.inputs[1], turned=bool(_of(node, "transB", 0)))
    rounded = node.inputs[0].producer() if node.inputs[0] is not None else None
    if rounded is None or rounded.op_type != "DequantizeLinear":
        raise NoLinear("what it reads is not rounded to integers")
    read, scale, zero = (*rounded.inputs, None)[:3]
    assert read is not None
    assert scale is not None
    if zero is None or zero.dtype is not onnx_ir.DataType.UINT8:
        raise NoLinear("what it reads is not in uint8")
    made = origin(read)
    if made.factor != 1.0 or any(each.op_type not in ("Reshape", "Identity") for each in made.between):
        raise NoLinear("the integers are moved about in between")
    maker, floats, integers = made.root.producer(), None, made.root
    ranged = scale.producer()
    if ranged is not None:
        if ranged.op_type != "DynamicQuantizeLinear" or maker is None or maker.op_type != "QuantizeLinear":
            raise NoLinear("its scale is computed in a way that no kernel knows")
        if maker.inputs[0] is not ranged.inputs[0] or maker.inputs[1] is not scale:
            raise NoLinear("it is rounded by the range of another value")
        floats, integers = ranged.inputs[0], ranged.outputs[0]
    return IntegerLinear(integers, scale, zero, floats, weight, scales, zeros, bias)


def _weight(value: onnx_ir.Value | None, *, turned: bool) -> tuple[Array, Array, Array]:
    node = value.producer() if value is not None else None
    while node is not None and node.op_type == "Transpose":
        turned = not turned
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    if node is None or node.op_type != "DequantizeLinear" or len(node.inputs) < 3:
        raise NoLinear("its weight is not in integers")
    weight, scale, zero = map(_stored, node.inputs)
    if weight is None or scale is None or zero is None or weight.ndim != 2 or weight.dtype.name not in _INTEGERS:
        raise NoLinear("its weight is not in integers")
    columns = 0 if turned else 1
    if scale.ndim and _of(node, "axis", 1) % 2 != columns:
        raise NoLinear("its weight has no scale a column")
    count = weight.shape[columns]
    turned_back = weight.T if turned else weight
    return turned_back, np.broadcast_to(scale, (count,)), np.broadcast_to(zero, (count,))


def _constant(value: onnx_ir.Value | None) -> Array | None:
    """A stored float tensor, or one that is dequantized from a stored one."""
    found = _stored(value)
    if found is not None or value is None:
        return found
    node = value.producer()
    if node is None or node.op_type != "DequantizeLinear" or len(node.inputs) < 3:
        return None
    integers, scale, zero = map(_stored, node.inputs)
    if integers is None or scale is None or zero is None or integers.ndim != 1:
        return None
    found = (integers.astype(np.int64) - zero.astype(np.int64)).astype(np.float32) * scale.astype(np.float32)
    return np.asarray(found)


def _stored(value: onnx_ir.Value | None) -> Array | None:
    if value is None or value.const_value is None:
        return None
    return np.asarray(value.const_value.numpy())


def _of(node: onnx_ir.Node, name: str, otherwise: float) -> float:
    found = node.attributes.get(name)
    return otherwise if found is None else found.value
