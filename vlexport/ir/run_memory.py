"""What memory a run of a Program takes at least, told from recorded shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import chain

import torch

from vlexport.ir.program import Program

KEPT = 2
"""Times that inputs and the largest value are there at once, at least: operand and result, kept and new."""


def run_bytes(program: Program, dims: Mapping[str, int]) -> int:
    """Bytes that a run takes at least: inputs, and the largest value that a call gives, twice each."""
    inputs = sum(_bytes(program, node.meta["val"], dims) for node in program.placeholders)
    values = chain.from_iterable(
        value if isinstance(value, (tuple, list)) else [value]
        for value in (node.meta["val"] for node in program.calls())
    )
    largest = max((_bytes(program, each, dims) for each in values if isinstance(each, torch.Tensor)), default=0)
    return KEPT * (inputs + largest)


def _bytes(program: Program, value: torch.Tensor, dims: Mapping[str, int]) -> int:
    return math.prod(program.sizes(value.shape, dims)) * value.element_size()
