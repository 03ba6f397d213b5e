"""A linear that computes with integers, taken apart: what is not all of it is refused."""

from __future__ import annotations

import numpy as np
import onnx_ir
import pytest

from tests.targets.onnx_passes import model_of
from vlexport.targets.onnxruntime.integer_linear import NoLinear, integer_linear

LINEAR = """
<ir_version: 10, opset_import: ["" : 20]>
main (float[batch,2] x) => (float[batch,2] y)
<int8[2,2] w = {{1,2,3,4}}, float[2] s = {{0.5,0.5}}, int8[2] z = {{0,0}}, float[2] c = {{10,20}},
 float[2] d = {{100,200}}>
{{
  q, scale, zero = DynamicQuantizeLinear(x)
  i = QuantizeLinear(x, scale, zero)
  r = DequantizeLinear(i, scale, zero)
  wf = DequantizeLinear<axis=1>(w, s, z)
  {product}
  y = Add(g, d)
}}
"""


def made(product: str) -> onnx_ir.Value:
    model = model_of(LINEAR.format(product=product))
    zero = model.nodes("DynamicQuantizeLinear")[0].outputs[2]
    zero.type = onnx_ir.TensorType(onnx_ir.DataType.UINT8)
    return model.nodes("Add")[0].outputs[0]


def test_row_behind_a_product_is_its_bias() -> None:
    found = integer_linear(made("g = MatMul(r, wf)"))
    assert found.bias is not None
    np.testing.assert_array_equal(found.bias, [100, 200])
    np.testing.assert_array_equal(found.weight, [[1, 2], [3, 4]])


def test_two_rows_that_are_added_are_refused() -> None:
    with pytest.raises(NoLinear, match="two rows"):
        integer_linear(made("g = Gemm(r, wf, c)"))
