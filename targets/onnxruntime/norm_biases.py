"""norm_biases: every LayerNormalization has a bias, of zeros where it had none.

A norm loses its bias where the pipeline folds it into the linear behind it, and ONNX's operator may do without one. The
optimizer of ONNX Runtime 1.18 (``AttentionFusion``) reads it all the same and ends the process: built models with such
norms were seen to die on opening with 1.18.1 and to open with a bias; 1.19 and later open both. Adding zeros costs
nothing that could be measured.
"""

from __future__ import annotations

import numpy as np
import onnx_ir

from vlexport.targets.onnx.model import OnnxModel
from vlexport.targets.onnx.rewriting import stored

_OPERANDS = 3
"""Value, scale, bias."""


def give_biases(model: OnnxModel) -> None:
    """Give every LayerNormalization without a bias one of zeros, which norms of one shape and dtype share.

    Args:
        model: Changed in place. A norm whose scale has no known shape is left as it is.
    """
    zeros: dict[tuple[tuple[int, ...], onnx_ir.DataType], onnx_ir.Value] = {}
    for norm in model.nodes("LayerNormalization"):
        scale = norm.inputs[1]
        if scale is None or scale.dtype is None or (len(norm.inputs) == _OPERANDS and norm.inputs[-1] is not None):
            continue
        shape = tuple(dim for dim in scale.shape or () if isinstance(dim, int))
        if not shape or len(shape) != len(scale.shape or ()):
            continue
        key = (shape, scale.dtype)
        if key not in zeros:
            name = f"zeros_{'_'.join(map(str, shape))}"
            zeros[key] = stored(model, name, np.zeros(shape, scale.dtype.numpy()))
        norm.resize_inputs(_OPERANDS)
        norm.replace_input_with(_OPERANDS - 1, zeros[key])
