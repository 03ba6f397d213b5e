"""bias correction: what rounding adds to a layer's result on average is taken off its bias.

Rounding weights and values moves the mean of each output channel, the same way on every input; a bias takes that back
at no cost. The mean is measured on samples with everything before the layer in float::

    b' = b + E[f(x, w)] - E[f(round(x), round(w))]

Source: Nagel et al. 2019, arXiv 1906.04721, section 4.2.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.fx import Node

from vlexport.calibration.keys import value_keys
from vlexport.ir.program import Program
from vlexport.passes.projections.projection import Projection, projection_of
from vlexport.passes.quantization.decisions import Decisions
from vlexport.passes.quantization.layer_sqnr import Watch
from vlexport.passes.quantization.rescale import with_tensors


def mean_errors(program: Program, decisions: Decisions, samples: Iterable[tuple[Tensor, ...]]) -> dict[str, Tensor]:
    """What each layer's result lacks on average once its operands are rounded.

    Args:
        program: In float; the one that was decided about.
        decisions: What is rounded, and how.
        samples: One tensor per input each, with batch dim; each is run once.

    Returns:
        Key of a layer with a stored weight → float64, one value an output channel.
    """
    nodes = {key: node for node, key in value_keys(program).items()}
    layers = {nodes[each.call]: each for each in decisions.layers if each.weight}
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def look(node: Node, value: Tensor, with_weight: Tensor, with_all: Tensor) -> None:
        found = projection_of(program, node)
        if node not in layers or not isinstance(found, Projection):
            return
        axis = found.channel_axis
        lacking = (value - with_all).double().movedim(axis, -1).reshape(-1, value.shape[axis])
        key = layers[node].call
        sums[key] = sums.get(key, torch.zeros(lacking.shape[1], dtype=torch.float64)) + lacking.sum(0)
        counts[key] = counts.get(key, 0) + lacking.shape[0]

    watch = Watch(program, decisions)
    for sample in samples:
        watch.run(sample, look)
    return {key: total / counts[key] for key, total in sums.items()}


def corrected(program: Program, node: Node, lacking: Tensor) -> None:
    """Put what a layer lacks on its bias; one without a bias gets one."""
    found = projection_of(program, node)
    assert isinstance(found, Projection)
    if found.bias is None:
        return
    old = found.operand(found.bias)
    bias = program.tensor_of(old)
    name = str(old.target) if isinstance(old, Node) else f"{found.operand(found.weight).target}_bias"
    made = lacking if bias is None else bias.double() + lacking
    with_tensors(program, node, {found.bias: made}, names={found.bias: f"{name}_corrected"})
