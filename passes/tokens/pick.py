"""random: a seeded choice of patch tokens stays, the same for every sample. The control that a method must beat."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.fx import Node

from vlexport.passes.tokens.blocks import Block
from vlexport.passes.tokens.emit import Emit, aten
from vlexport.passes.tokens.sweep import Reduced, Reduction, State


@dataclass(frozen=True)
class Pick(Reduction):
    """At one block.

    Attributes:
        block: Where.
        keep: How many patch tokens stay.
        seed: Of the choice.
    """

    block: Block
    keep: int
    seed: int

    def apply(self, state: State) -> Reduced:
        """The chosen ones, in their order."""
        emit, front = state.emit, state.protected
        patches = state.tokens - front
        order = torch.randperm(patches, generator=torch.Generator().manual_seed(self.seed))
        chosen = order[: self.keep].sort().values
        index = emit.stored(f"tokens_kept_{self.block.number}", torch.cat([torch.arange(front), chosen + front]))
        stream = emit(aten.index_select.default, state.stream, 1, index)
        return Picked(
            stream, f"random: {self.keep} of {patches} patch tokens stay", nearest=_nearest(chosen, patches, front)
        )


def _nearest(chosen: torch.Tensor, patches: int, front: int) -> torch.Tensor:
    """For every token which of those that stay is nearest in their order; the first ``front`` all stay."""
    nearest = (torch.arange(patches)[:, None] - chosen[None]).abs().argmin(1)
    return torch.cat([torch.arange(front), nearest + front])


@dataclass(frozen=True)
class Picked(Reduced):
    """The same tokens of every sample stayed.

    Attributes:
        nearest: For every former token which of those is nearest.
    """

    nearest: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    def back(self, emit: Emit, tokens: Node) -> Node:
        """Every former token is the nearest one that stayed."""
        index = emit.program.add_tensor("tokens_nearest", self.nearest, before=emit.before, kind="constant")
        return emit(aten.index_select.default, tokens, 1, index)
