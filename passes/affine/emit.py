"""A merge written as a call: one convolution, transposed convolution or linear with its new weights."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from vlexport.ir import provenance
from vlexport.ir.program import Program
from vlexport.passes.affine.analysis import is_same
from vlexport.passes.affine.choice import Merge
from vlexport.passes.affine.kernel import in_groups, in_taps, kernel_of
from vlexport.passes.layout.views import emit
from vlexport.passes.match import place_of

aten = torch.ops.aten
_CONVOLUTIONS = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}
_SAME = {1: aten.conv1d.padding, 2: aten.conv2d.padding, 3: aten.conv3d.padding}
_TRANSPOSED = {
    1: aten.conv_transpose1d.default, 2: aten.conv_transpose2d.input, 3: aten.conv_transpose3d.input,
}  # fmt: skip


Arranged = dict[tuple[Node, Any], Node]
"""Root and view → the node that holds it, of merges that are written together."""


def write(program: Program, merge: Merge, arranged: Arranged) -> tuple[Node, int]:
    """Store the weights of a merge and add its call before the value that it computes.

    Returns:
        The call, and how many calls were added in all.
    """
    spec, value = merge.form.expression.spec, merge.value
    groups, rank = spec.groups, len(spec.taps)
    kernel = in_groups(in_taps(kernel_of(merge.form.expression), spec.taps, merge.taps), spec.inputs, groups)
    weight = kernel.weight
    is_linear = merge.form.axis != 1 or rank == 0
    if is_linear:
        weight = weight.reshape(spec.outputs, spec.inputs)
    elif spec.scatter is not None:
        blocks = weight.reshape(groups, spec.outputs // groups, *weight.shape[1:]).transpose(1, 2)
        weight = blocks.reshape(spec.inputs, spec.outputs // groups, *weight.shape[2:])
    dtype = value.meta["val"].dtype
    stem = _stem(program, merge)
    stored = program.add_tensor(f"{stem}_folded.weight", weight.to(dtype).contiguous(), before=value)
    bias = program.add_tensor(f"{stem}_folded.bias", kernel.bias.to(dtype), before=value) if spec.biased else None
    target, rest = _call(merge, is_linear)
    root: Node = place_of(merge.form.root, merge.consumed).value
    others = [each for each in merge.consumed if each is not value]
    first = next((each for each in others if program.tensor_of(each.all_input_nodes[-1]) is not None), None)
    order = [first, *(each for each in others if each is not first)] if first is not None else others
    start, added = (root, merge.form.view), 1
    if start not in arranged:
        arranged[start] = emit(program, merge.views, root, before=value, value_of=value, merges=order)
        added += len(merge.views)
    operands = (arranged[start], stored, bias, *rest)
    return program.add_call(target, operands, before=value, value_of=value, merges=order), added


def _stem(program: Program, merge: Merge) -> str:
    """The name of the first weight that goes."""
    for node in merge.consumed:
        for operand in node.all_input_nodes:
            tensor = program.tensor_of(operand)
            if tensor is not None and tensor.ndim > 1:
                return str(operand.target).removesuffix(".weight")
    return provenance.module_path(merge.value) or "merged"


def _call(merge: Merge, is_linear: bool) -> tuple[Any, tuple[Any, ...]]:
    spec = merge.form.expression.spec
    rank = len(spec.taps)
    if is_linear:
        return aten.linear.default, ()
    if spec.scatter is not None:
        stride, padding, output_padding, dilation = map(list, spec.scatter)
        return _TRANSPOSED[rank], (stride, padding, output_padding, spec.groups, dilation)
    dilation = [taps.step for taps in merge.taps]
    if is_same(spec) and any(taps.span % 2 for taps in merge.taps):
        return _SAME[rank], (list(spec.stride), "same", dilation, spec.groups)
    return _CONVOLUTIONS[rank], (list(spec.stride), list(merge.padding), dilation, spec.groups)
