"""A convolution that is trained as a sum of branches and is one convolution afterwards.

Every branch is linear and ends in a batch norm of its own, so in inference the sum is one convolution with the largest
kernel and as many groups as all branches share: a branch with more groups is a dense one whose other weights are zero.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class ConvNorm(nn.Sequential):
    """A convolution without bias and its batch norm. An odd kernel keeps the size of the picture at stride 1."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, groups: int, stride: int) -> None:
        conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False)
        super().__init__(conv, nn.BatchNorm2d(outputs))


class Branches(nn.Module):
    """``(N, inputs, H, W)`` to ``(N, outputs, H / stride, W / stride)``: the sum of all branches.

    Args:
        inputs: Channels.
        outputs: Channels.
        kinds: Kernel and groups of each convolution.
        stride: Of all of them.
        identity: Add the input itself, through a batch norm.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kinds: Sequence[tuple[int, int]],
        *,
        stride: int = 1,
        identity: bool = False,
    ) -> None:
        super().__init__()
        if identity and (inputs != outputs or stride != 1):
            raise ValueError("the input can be added where its shape is that of the output")
        self.stride = stride
        self.convolutions = nn.ModuleList(
            ConvNorm(inputs, outputs, kernel, groups=groups, stride=stride) for kernel, groups in kinds
        )
        self.identity = nn.BatchNorm2d(inputs) if identity else None

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor | None = self.identity(x) if self.identity is not None else None
        for branch in self.convolutions:
            total = branch(x) if total is None else total + branch(x)
        assert total is not None
        return total


def pointwise(inputs: int, outputs: int, groups: Sequence[int] = (1, 4)) -> Branches:
    """Mixes channels: one 1x1 convolution for each number of groups."""
    return Branches(inputs, outputs, [(1, each) for each in groups])


def spatial(width: int, kernel: int, group_width: int) -> Branches:
    """Mixes neighbours in groups of channels: grouped, channel by channel, 1x1, and the input itself."""
    groups = width // group_width
    return Branches(width, width, [(kernel, groups), (kernel, width), (1, groups)], identity=True)


def downsampling(inputs: int, outputs: int) -> Branches:
    """Halves height and width: 3x3 and 1x1, both with stride 2."""
    return Branches(inputs, outputs, [(3, 1), (1, 1)], stride=2)
