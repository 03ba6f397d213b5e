"""Twelve broken passes as a plugin's: sound at every place but in ``bodies.1``; and the net that they break."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from tests.passes.broken import Mix, Rewrite, Rewriting, again, with_tensor
from tests.passes.test_gate import (
    drop_bias,
    make_nan,
    one_wrong_weight,
    only_at_batch_one,
    scale_weight,
    slice_one_further,
    swap_operands,
    transpose_weight,
    wrong_axis,
)
from vlexport.core.artifact import Frozen
from vlexport.ir import provenance
from vlexport.ir.program import Program

PLACE = "bodies.1"
BODIES = 3


class Body(nn.Module):
    """Convolution, relu, sub, a slice, softmax and a square linear; its output is as large as its input."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.act, self.mix, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), Mix(), nn.Linear(3, 3)
        self.offset = nn.Parameter(torch.linspace(0.5, 1.5, 8))

    def forward(self, x: Tensor) -> Tensor:
        shifted = self.act(self.stem(x)) - self.offset
        tokens = self.mix(shifted.flatten(2)[:, :, 1:33].transpose(1, 2))
        return x + self.head(tokens).mean(1)[:, :, None, None]


class Bodies(nn.Module):
    """Three of them, and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.bodies = nn.ModuleList(Body() for _ in range(BODIES))

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        for body in self.bodies:
            image = body(image)
        pooled = image.mean((2, 3))
        return {"logits": pooled, "doubled": pooled * 2.0}


def wrong_size(ir: Program, node: Node) -> Node:
    new = again(ir, node, *node.args)
    new.args = (new.args[0], ir.add_tensor("wrong", torch.ones(3, 5), before=new), new.args[2])
    return new


def edited_in_place(ir: Program, node: Node) -> Node:
    tensor = ir.tensor_of(node.args[1])
    assert tensor is not None
    tensor.mul_(1.01)
    return again(ir, node, *node.args)


def swapped_outputs(ir: Program, node: Node) -> Node:
    first, second = ir.results
    ir.output.args = ((second, first),)
    return again(ir, node, *node.args)


def cut_further(ir: Program, node: Node) -> Node:
    return slice_one_further(ir, node) if node.args[3] == 33 else again(ir, node, *node.args)


CONV, LINEAR, RELU = "aten.conv2d.default", "aten.linear.default", "aten.relu.default"
FAULTS: dict[str, tuple[str, Rewrite]] = {
    "scale-weight": (CONV, scale_weight),
    "spoil-weight": (CONV, one_wrong_weight),
    "drop-bias": (CONV, drop_bias),
    "swap-operands": ("aten.sub.Tensor", swap_operands),
    "take-wrong-axis": ("aten.softmax.int", wrong_axis),
    "make-nan": (RELU, make_nan),
    "cut-further": ("aten.slice.Tensor", cut_further),
    "transpose-weight": (LINEAR, transpose_weight),
    "break-batch-one": (RELU, only_at_batch_one),
    "mistake-size": (LINEAR, wrong_size),
    "edit-weight": (LINEAR, edited_in_place),
    "swap-outputs": (LINEAR, swapped_outputs),
}
"""Id → the operator that every match is about, and what is done to the one in :data:`PLACE`."""
RAISES = "raise-midway"
DRIFTS = "scale-a-little"


def planted(name: str) -> type[Rewriting]:
    """A pass as a plugin offers it: made from options alone."""
    operator, fault = FAULTS.get(name, (LINEAR, lambda ir, n: 1 / 0))
    if name == DRIFTS:
        operator, fault = LINEAR, lambda ir, n: with_tensor(ir, n, 1, lambda t: t * 1.0000005)

    def rewrite(ir: Program, node: Node) -> Node:
        guilty = provenance.module_path(node).startswith(PLACE)
        return fault(ir, node) if guilty else again(ir, node, *node.args)

    class Planted(Rewriting):
        """Breaks the model at one place."""

        API_VERSION = 1

        def __init__(self, options: Frozen | None = None) -> None:
            super().__init__(operator, rewrite, name=name)
            self.options = options if options is not None else self.Options()

    Planted.name = name
    return Planted


def offer(folder: Any) -> None:
    """Write the metadata of an installed package ``planted`` that offers them all."""
    names = [*FAULTS, RAISES, DRIFTS]
    lines = ["from tests.stages.planted import planted", "API_VERSION = 1"]
    lines += [f"{name.replace('-', '_')} = planted({name!r})" for name in names]
    (folder / "planted_plugin.py").write_text("\n".join(lines) + "\n", encoding="utf-8")
    about = folder / "planted-2.1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: planted\nVersion: 2.1\n", encoding="utf-8")
    entries = [f"{name} = planted_plugin:{name.replace('-', '_')}" for name in names]
    (about / "entry_points.txt").write_text("[vlexport.passes]\n" + "\n".join(entries) + "\n", encoding="utf-8")
