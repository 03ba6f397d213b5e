"""The merged form, written by hand: what users call before they export, and what the compiler is held against."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from samples.zoo.fmvit.branches import Branches
from samples.zoo.fmvit.model import ConvolutionalFusion, FMViT, MultiFrequency, PooledAttention


def merged(model: FMViT) -> FMViT:
    """A copy for inference: one convolution for every sum of branches, and no batch norm.

    Args:
        model: In eval mode: its statistics are final.

    Raises:
        ValueError: The model is in train mode.
    """
    if model.training:
        raise ValueError("merge a model in eval mode: its batch norms still change")
    net = copy.deepcopy(model).double()
    _merge_branches(net)
    for block in net.modules():
        if isinstance(block, PooledAttention) and isinstance(block.norm, nn.BatchNorm2d):
            _move_behind(block.norm, (block.key, block.value))
            block.norm = nn.Identity()
        if isinstance(block, ConvolutionalFusion):
            _move_behind(block.norm, (block.mlp.expand,))
            block.norm = nn.Identity()
    for block in net.modules():
        if isinstance(block, MultiFrequency):  # an average of scaled values is the scaled average
            _move_behind(block.norm1, (block.attention.query, block.attention.key, block.attention.value))
            _move_behind(block.norm2, (block.mlp.expand,))
            block.norm1, block.norm2 = nn.Identity(), nn.Identity()
    _move_behind(net.norm, (net.head,))
    net.norm = nn.Identity()
    return net.to(next(model.parameters()).dtype)


def convolution(branches: Branches) -> nn.Conv2d:
    """The convolution that a sum of branches is."""
    convs = [each[0] for each in branches.convolutions]
    kernel = max(each.kernel_size[0] for each in convs)
    groups = math.gcd(*(each.groups for each in convs))
    first = convs[0]
    one = nn.Conv2d(
        first.in_channels, first.out_channels, kernel, stride=branches.stride, padding=kernel // 2, groups=groups
    ).to(first.weight)
    weight, bias = torch.zeros_like(one.weight), torch.zeros_like(one.bias)
    for conv, norm in branches.convolutions:
        scale, shift = _affine(norm)
        weight += _widened(conv.weight, conv.groups, groups, kernel) * scale.reshape(-1, 1, 1, 1)
        bias += shift
    if branches.identity is not None:
        scale, shift = _affine(branches.identity)
        depthwise = scale.reshape(-1, 1, 1, 1)
        weight += _widened(depthwise, first.in_channels, groups, kernel)
        bias += shift
    with torch.no_grad():
        one.weight.copy_(weight)
        one.bias.copy_(bias)
    return one


def _merge_branches(parent: nn.Module) -> None:
    for name, child in list(parent.named_children()):
        if isinstance(child, Branches):
            setattr(parent, name, convolution(child))
        else:
            _merge_branches(child)


def _affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Scale and shift of each channel."""
    scale = norm.weight.detach() * torch.rsqrt(norm.running_var + norm.eps)
    return scale, norm.bias.detach() - norm.running_mean * scale


def _widened(weight: Tensor, groups: int, wanted: int, kernel: int) -> Tensor:
    """A weight ``(outputs, inputs / groups, k, k)`` as one of fewer groups and a larger kernel."""
    outputs, fan, size, _ = weight.shape
    wide = weight.new_zeros(outputs, fan * groups // wanted, kernel, kernel)
    edge = (kernel - size) // 2
    for group in range(groups):
        rows = slice(group * outputs // groups, (group + 1) * outputs // groups)
        start = (group % (groups // wanted)) * fan
        wide[rows, start : start + fan, edge : edge + size, edge : edge + size] = weight.detach()[rows]
    return wide


def _move_behind(norm: nn.BatchNorm2d, readers: Iterable[nn.Module]) -> None:
    """Put a batch norm into the layers that read it: 1x1 convolutions or linears, which see no padding."""
    scale, shift = _affine(norm)
    for reader in readers:
        with torch.no_grad():
            matrix = reader.weight.reshape(reader.weight.shape[0], -1)
            reader.bias += matrix @ shift
            reader.weight *= scale.reshape(1, -1, *[1] * (reader.weight.ndim - 2))
