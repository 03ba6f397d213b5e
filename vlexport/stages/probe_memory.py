"""Whether the numeric gate's probes fit in memory, estimated before anything is drawn or run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import chain

import torch

from vlexport.core.artifact import DimRange
from vlexport.core.errors import InputError
from vlexport.core.memory import available_memory_bytes
from vlexport.frontends.sources import Sources
from vlexport.ir.program import Program
from vlexport.report.figures import size_phrase

KEPT = 2
"""Times that inputs and the largest value are there at once, at least: operand and result, kept and new."""


def require_memory(sources: Sources, dims: Mapping[str, DimRange]) -> None:
    """Refuse sizes at which one probe does not fit in what memory is free.

    Args:
        sources: The model, as saved.
        dims: Dims that take fewer sizes.

    Raises:
        InputError: VLX0410.
    """
    free = available_memory_bytes()
    if free is None:
        return
    for name, source in sources.components.items():
        own = {**source.program.signature.dims, **sources.wiring.dims.own(name, dims)}
        smallest = {dim: each.min for dim, each in own.items()}
        wanted = probe_bytes(source.program, smallest)
        if wanted > free:
            said = ", ".join(f"{dim}={size}" for dim, size in smallest.items())
            raise InputError(
                "VLX0410",
                f"one run at {said or 'the fixed sizes'} takes {size_phrase(wanted)}, {size_phrase(free)} are free",
                where="--dynamic" if dims else "numeric gate",
                hint="give a smaller least size, as --dynamic NAME=MIN:OPT:MAX, or build on a larger machine",
            )


def probe_bytes(program: Program, dims: Mapping[str, int]) -> int:
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
