"""Capture of models that write in place: the graph is functional, right, and its operators stay whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

from tests.frontends.test_capture import TOLERANCE, image, operators
from vlexport.frontends.capture import capture
from vlexport.ir import dialect
from vlexport.passes.pipeline import verify


def inplace_fresh(x: Tensor) -> Tensor:
    y = torch.sin(x)
    y.relu_()
    y.add_(1).mul_(2)
    y += x
    return y


def inplace_then_read_old_name(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x * 2
    z = y + 1
    y.neg_()
    return y + z, y


def inplace_on_view(x: Tensor) -> Tensor:
    y = x * 2
    y[:, 0] += 1
    y[:, :, 1:].mul_(3)
    return y


def inplace_under_view(x: Tensor) -> Tensor:
    y = x * 2
    rows = y.view(y.shape[0], -1)
    y.add_(1)
    return rows * 3


def inplace_after_view_of_inplace(x: Tensor) -> Tensor:
    y = (x * 2).relu_()
    rows = y.reshape(y.shape[0], -1)
    y.add_(1)
    return rows + y.flatten(1)


def inplace_with_promotion(x: Tensor) -> Tensor:
    ids = x.to(torch.int32) + 1
    ids.add_(torch.arange(6))
    return ids


def masked_assignment(x: Tensor) -> Tensor:
    y = x + 0
    y[y < 0] = 0.5
    return y


@pytest.mark.parametrize(
    "function",
    [
        inplace_fresh,
        inplace_then_read_old_name,
        inplace_on_view,
        inplace_under_view,
        inplace_after_view_of_inplace,
        inplace_with_promotion,
        masked_assignment,
    ],
)
def test_graph_is_functional_and_right_when_forward_writes_in_place(function: Callable[[Tensor], Any]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Any:
            return function(self.norm(x))

    torch.manual_seed(0)
    model = Model().eval()
    program = capture(model, image(2)).program
    verify(program, made_by="capture")
    assert not any(dialect.mutates(n.target) for n in program.calls())
    assert "aten.batch_norm.default" in operators(program), "whole, whichever way the graph became functional"
    seen: dict[str, torch.dtype | None] = {}

    def watch(node: Node, value: Any) -> None:
        seen[node.name] = getattr(value, "dtype", None)

    for batch in (1, 3):
        expected = torch.utils._pytree.tree_leaves(model(image(batch)))
        found = program.run(image(batch), observe=watch)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b.detach(), **TOLERANCE)
        for node in program.calls():
            assert seen[node.name] == getattr(node.meta["val"], "dtype", None), "the recorded dtype is the real one"


def test_composite_operators_stay_whole_when_a_view_is_written() -> None:
    class Written(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            y[:, 0] = 0
            attended = F.scaled_dot_product_attention(y, y, y)
            return F.layer_norm(F.gelu(attended).roll(1, 2), (6,)).softmax(-1)

    found = operators(capture(Written().eval(), image(2)).program)
    for name in ("scaled_dot_product_attention", "gelu", "roll", "layer_norm"):
        assert f"aten.{name}.default" in found
    assert "aten.softmax.int" in found
