"""Our quantization operators in ONNX: QuantizeLinear, DequantizeLinear, DynamicQuantizeLinear.

Zero points are written out, also where they are 0: without them ONNX Runtime leaves a linear in float (measured).
int4 leaves the exporter as int8 with a Cast behind it, and becomes an INT4 initializer afterwards: opset 21.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir
from onnxscript import opset18, opset20, opset21

from vlexport.core.errors import CapabilityError
from vlexport.ir import dialect, provenance, quant_ops
from vlexport.ir.program import Program

FLOAT8_OPSET = 19
"""float8 began with it, and an attribute of QuantizeLinear for it."""
BLOCKED_OPSET = 21
"""int4 and blocks began with it."""
_INT4 = int(onnx_ir.DataType.INT4)


def translations(opset: int) -> dict[Any, Callable[..., Any]]:
    """Operator → what writes it, for the exporter."""
    return {
        quant_ops.QUANTIZE: _quantize if opset >= FLOAT8_OPSET else _quantize_before,
        quant_ops.DEQUANTIZE: _dequantize_blocked if opset >= BLOCKED_OPSET else _dequantize,
        quant_ops.CHOOSE_QPARAMS: _choose_qparams,
    }


def unexpressible(program: Program, *, opset: int) -> list[CapabilityError]:
    """VLX0503 for every quantizing call that the opset has no spelling for."""
    found = [
        CapabilityError(
            "VLX0503", "ONNX has no tables that weights are looked up in (vlexport.look_up)",
            where=provenance.describe(node), hint="build from the model before it was quantized",
        )
        for node in program.calls("vlexport.look_up.default")
    ]  # fmt: skip
    for node in program.calls("vlexport.quantize.default", "vlexport.dequantize.default"):
        operands = dict(zip(dialect.operand_names(node), dialect.operands(node), strict=True))
        why = _why_not(operands, opset)
        if why:
            error = CapabilityError(
                "VLX0503", f"ONNX opset {opset} cannot express {dialect.op_name(node)}: {why}",
                where=provenance.describe(node), hint=f"ask for opset {BLOCKED_OPSET}, or for int8 a tensor or channel",
            )  # fmt: skip
            found.append(error)
    return found


def store_int4(model: onnx_ir.Model) -> int:
    """Make an INT4 initializer of every int8 one that is cast to int4; returns how many."""
    made = 0
    for node in list(model.graph):
        if node.op_type != "Cast" or node.attributes["to"].as_int() != _INT4:
            continue
        stored, four = node.inputs[0], node.outputs[0]
        assert stored is not None
        assert stored.const_value is not None
        values = stored.const_value.numpy()
        name = f"{stored.name}_int4"
        kept = onnx_ir.Value(name=name, const_value=onnx_ir.tensor(values, dtype=onnx_ir.DataType.INT4, name=name))
        kept.shape, kept.dtype = onnx_ir.Shape(values.shape), onnx_ir.DataType.INT4
        model.graph.register_initializer(kept)
        four.replace_all_uses_with(kept)
        model.graph.remove(node, safe=True)
        if not stored.uses():
            del model.graph.initializers[str(stored.name)]
        made += 1
    return made


def _why_not(operands: dict[str, Any], opset: int) -> str:
    dtype = operands["zero_point"].meta["val"].dtype
    if opset < FLOAT8_OPSET and dtype is quant_ops.E4M3:
        return "float8 began with opset 19"
    if opset < BLOCKED_OPSET and (operands.get("block", 0) or operands.get("bits", 8) == 4):
        return "blocks and int4 began with opset 21"
    if "bits" not in operands and dtype is quant_ops.BIAS:
        return "QuantizeLinear makes no int32; a bias is stored"
    return ""


def _axis(axis: int | None) -> int:
    """ONNX's own default where there is one scale, which does not look at it."""
    return 1 if axis is None else axis


def _quantize(input: Any, scale: Any, zero_point: Any, axis: int | None = None) -> Any:  # noqa: A002
    return opset20.QuantizeLinear(input, scale, zero_point, axis=_axis(axis))


def _quantize_before(input: Any, scale: Any, zero_point: Any, axis: int | None = None) -> Any:  # noqa: A002
    """Without the attribute for float8."""
    return opset18.QuantizeLinear(input, scale, zero_point, axis=_axis(axis))


def _dequantize(input: Any, scale: Any, zero_point: Any, axis: int | None = None, block: int = 0, bits: int = 8) -> Any:  # noqa: A002
    return opset20.DequantizeLinear(input, scale, zero_point, axis=_axis(axis))


def _dequantize_blocked(
    input: Any, scale: Any, zero_point: Any, axis: int | None = None, block: int = 0, bits: int = 8,  # noqa: A002
) -> Any:  # fmt: skip
    if bits == 4:
        input, zero_point = opset21.Cast(input, to=_INT4), opset21.Cast(zero_point, to=_INT4)  # noqa: A001
    return opset21.DequantizeLinear(input, scale, zero_point, axis=_axis(axis), block_size=block)


def _choose_qparams(input: Any) -> Any:  # noqa: A002
    _, scale, zero_point = opset20.DynamicQuantizeLinear(input)
    return scale, zero_point
