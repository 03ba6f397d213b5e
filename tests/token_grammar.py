"""Random Programs that prune tokens: a mask, operators on what it keeps, maybe a second mask, and a pooled result.

A Program grows from one captured seed at batch 1, so no example costs a capture.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import Node

from vlexport.core.artifact import Signature
from vlexport.frontends.capture import capture
from vlexport.ir.program import Program

aten = torch.ops.aten
TOKENS, WIDTH = 6, 4


class _Seed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = x[:, self.score(x)[0, :, 0] > 0]
        return kept.mean(1)


@functools.cache
def _seed() -> Program:
    torch.manual_seed(3)
    return capture(_Seed().eval(), torch.randn(1, TOKENS, WIDTH), dynamic=False).program


class PruningGrower:
    """A Program under construction; ``x`` is the value that the next operator reads: (1, tokens, 4)."""

    def __init__(self, draw: Callable[[st.SearchStrategy[Any]], Any]) -> None:
        self.program = _seed().copy()
        self.draw = draw
        self.generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
        self.x: Node = self.program.calls("aten.index.Tensor")[0]
        self.class_token = False
        self.count = 0

    def call(self, target: Any, *args: Any) -> Node:
        """Append a call."""
        return self.program.add_call(target, args, before=self.program.output, value_of=self.program.calls()[0])

    def tensor(self, *shape: int) -> Node:
        """Append a stored tensor."""
        self.count += 1
        value = torch.randn(shape, generator=self.generator)
        return self.program.add_tensor(f"t{self.count}", value, before=self.program.output)

    def length(self) -> Node:
        """How many tokens there are."""
        return self.call(aten.sym_size.int, self.x, 1)

    def linear(self, x: Node, width: int = WIDTH) -> Node:
        """On the last axis."""
        return self.call(aten.linear.default, x, self.tensor(width, WIDTH), self.tensor(width))

    def step(self, kind: str) -> None:
        """Let one operator read ``x`` and become it."""
        self.x = getattr(self, f"_{kind}")(self.x)

    def _mlp(self, x: Node) -> Node:
        return self.call(aten.add.Tensor, x, self.linear(self.call(aten.gelu.default, x)))

    def _norm(self, x: Node) -> Node:
        return self.call(aten.layer_norm.default, x, [WIDTH], self.tensor(WIDTH), self.tensor(WIDTH))

    def _attention(self, x: Node) -> Node:
        n = self.length()
        packed = self.call(aten.reshape.default, self.linear(x, 3 * WIDTH), [1, n, 3, 2, WIDTH // 2])
        parts = self.call(aten.unbind.int, self.call(aten.permute.default, packed, [2, 0, 3, 1, 4]))
        q, k, v = (self.call(operator.getitem, parts, i) for i in range(3))
        mixed = self.call(aten.scaled_dot_product_attention.default, q, k, v)
        back = self.call(aten.reshape.default, self.call(aten.permute.default, mixed, [0, 2, 1, 3]), [1, n, WIDTH])
        return self.call(aten.add.Tensor, x, back)

    def _by_hand(self, x: Node) -> Node:
        keys = self.call(aten.permute.default, self.linear(x), [0, 2, 1])
        scores = self.call(aten.mul.Tensor, self.call(aten.matmul.default, self.linear(x), keys), 0.5)
        return self.call(aten.matmul.default, self.call(aten.softmax.int, scores, -1), x)

    def _one_head_without_batch(self, x: Node) -> Node:
        flat = self.call(aten.select.int, x, 0, 0)
        scores = self.call(aten.matmul.default, self.linear(flat), self.call(aten.permute.default, flat, [1, 0]))
        mixed = self.call(aten.matmul.default, self.call(aten.softmax.int, scores, 1), flat)
        return self.call(aten.unsqueeze.default, mixed, 0)

    def _gram(self, x: Node) -> Node:
        """A product over tokens without a softmax, channels × channels."""
        turned = self.call(aten.permute.default, x, [0, 2, 1])
        scale = self.call(aten.tanh.default, self.call(aten.matmul.default, turned, x))
        return self.call(aten.matmul.default, x, scale)

    def _centred(self, x: Node) -> Node:
        return self.call(aten.sub.Tensor, x, self.call(aten.mean.dim, x, [1], True))

    def _scaled_by_count(self, x: Node) -> Node:
        total = self.call(aten.sum.dim_IntList, x, [1], True)
        return self.call(aten.add.Tensor, x, self.call(aten.div.Tensor, total, self.length()))

    def _largest(self, x: Node) -> Node:
        return self.call(aten.add.Tensor, x, self.call(aten.amax.default, x, [1], True))

    def _weighted(self, x: Node) -> Node:
        return self.call(aten.mul.Tensor, x, self.call(aten.softmax.int, x, 1))

    def _channels_first(self, x: Node) -> Node:
        turned = self.call(aten.permute.default, x, [0, 2, 1])
        return self.call(aten.permute.default, self.call(aten.mul.Tensor, turned, self.tensor(WIDTH, 1)), [0, 2, 1])

    def _class(self, x: Node) -> Node:
        self.class_token = True
        return self.call(aten.cat.default, [self.tensor(1, 1, WIDTH), x], 1)

    def _appended(self, x: Node) -> Node:
        return self.call(aten.cat.default, [x, self.call(aten.mean.dim, x, [1], True)], 1)

    def _halves(self, x: Node) -> Node:
        parts = self.call(aten.split.Tensor, x, WIDTH // 2, 2)
        a, b = (self.call(operator.getitem, parts, i) for i in range(2))
        return self.call(aten.cat.default, [b, self.call(aten.relu.default, a)], 2)

    def _pruned(self, x: Node) -> Node:
        self.class_token = False
        score = self.call(aten.select.int, self.call(aten.select.int, x, 2, 0), 0, 0)
        mask = self.call(aten.lt.Scalar, score, 0.7)
        return self.call(aten.index.Tensor, x, [None, mask])

    def finish(self, kind: str) -> Program:
        """Pool over the tokens and return it."""
        if kind == "first" and self.class_token:
            pooled = self.call(aten.select.int, self.x, 1, 0)
        elif kind == "amax":
            pooled = self.call(aten.amax.default, self.x, [1])
        elif kind == "sum":
            pooled = self.call(aten.sum.dim_IntList, self.x, [1])
        else:
            pooled = self.call(aten.mean.dim, self.x, [1])
        old = self.program.results[0]
        self.program.output.args = ((pooled,),)
        self.program.erase_dead(old)
        specs = self.program.signature
        self.program.signature = Signature(inputs=specs.inputs, outputs=specs.outputs, dims={})
        return self.program


STEPS = tuple(name[1:] for name in vars(PruningGrower) if name.startswith("_") and not name.startswith("__"))
"""Names of the operators."""


@st.composite
def pruning_programs(draw: Callable[[st.SearchStrategy[Any]], Any]) -> Program:
    """One or two operators behind a selection."""
    grower = PruningGrower(draw)
    for kind in draw(st.lists(st.sampled_from(STEPS), min_size=1, max_size=2)):
        grower.step(kind)
    return grower.finish(draw(st.sampled_from(["mean", "sum", "amax", "first"])))
