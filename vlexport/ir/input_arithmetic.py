"""Arithmetic per channel at a Program's inputs: what preprocessing does to values becomes the graph's first operators.

Before → after::

    program(image)                        program(image)
      %0 = conv2d(image, W)        →        %0 = mul(image, @image_factor: f32[1,C,1,1])
                                            %1 = add(%0, @image_offset: f32[1,C,1,1])
                                            %2 = conv2d(%1, W)

The input then means another value than before; who asks for this rewrites what is recorded of it in the same step.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from vlexport.core.artifact import Array
from vlexport.ir.program import Program

aten = torch.ops.aten
_FACTOR, _OFFSET = "factor", "offset"


def with_arithmetic(program: Program, arithmetic: Mapping[str, tuple[Array, Array]]) -> Program:
    """A copy that computes ``factor · x + offset`` first; a factor of 1 and an offset of 0 are left out.

    Args:
        program: Left as it is; tensors are shared.
        arithmetic: Input of shape N×C×… → factor and offset, float64 of shape (C,), rounded once to the input's dtype.
    """
    changed = program.copy()
    for node in changed.placeholders:
        numbers = arithmetic.get(str(node.target))
        readers = list(node.users)
        if numbers is None or not readers:
            continue
        first = next(n for n in changed.graph.nodes if n in node.users)
        value, recorded = node, node.meta["val"]
        steps = zip((aten.mul.Tensor, aten.add.Tensor), numbers, (1.0, 0.0), (_FACTOR, _OFFSET), strict=True)
        for operator, each, neutral, noun in steps:
            if (each == neutral).all():
                continue
            constant = torch.from_numpy(np.array(each, np.float64)).to(recorded.dtype)
            constant = constant.reshape(1, -1, *[1] * (recorded.ndim - 2))
            stored = changed.add_tensor(f"{node.target}_{noun}", constant, before=first, kind="constant")
            source = first if first.op == "call_function" else next(iter(changed.calls()))
            value = changed.add_call(operator, (value, stored), before=first, value_of=source)
        for reader in readers:
            reader.replace_input_with(node, value)
    return changed


def left_over(program: Program, names: Mapping[str, object]) -> bool:
    """Whether operators that :func:`with_arithmetic` put in front of some inputs are still read there."""
    stored = {f"{name}_{noun}" for name in names for noun in (_FACTOR, _OFFSET)} | {"input_shift"}
    return not stored.isdisjoint(program.used_tensors())
