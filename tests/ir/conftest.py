"""timm models captured once for all tests of ``ir``: random weights, real structure."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import pytest
import timm
import torch

from tests.harness import captured, one_thread, randomize
from vlexport.ir.program import Program

ZOO = (
    "resnet18",
    "mobilenetv3_small_100",
    "convnext_atto",
    "deit_tiny_patch16_224",
    "swin_tiny_patch4_window7_224",
)


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@functools.cache
def _captured(name: str) -> Program:
    torch.manual_seed(0)
    model = randomize(timm.create_model(name, pretrained=False))
    return captured(model, torch.randn(1, 3, 224, 224))


@pytest.fixture
def zoo() -> Callable[[str], Program]:
    """Name → a Program of one's own; captured once."""
    return lambda name: _captured(name).copy()
