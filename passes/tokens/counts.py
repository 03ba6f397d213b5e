"""How many tokens each selection keeps, counted over calibration samples, and the K that follows.

Samples stream through: of each only one whole number a selection is kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from vlexport.core.errors import DataError
from vlexport.ir import provenance
from vlexport.ir.program import Program

LEAST_PLACES = 2
"""A runtime's kernel for one token may differ from that for several, so K is never 1."""


@dataclass(frozen=True)
class Counts:
    """What was counted.

    Attributes:
        by_mask: Call that makes a mask → tokens that it kept, sample by sample; 0 where a sample lost all.
        samples: How many samples were run.
        emptied: How many of them the Program refused, because a selection kept nothing.
    """

    by_mask: Mapping[Node, tuple[int, ...]]
    samples: int
    emptied: int

    def places(self, percentile: float) -> dict[Node, int]:
        """K of every selection: so many tokens that ``percentile`` % of the samples need no more."""
        return {mask: max(LEAST_PLACES, at_percentile(found, percentile)) for mask, found in self.by_mask.items()}


def at_percentile(values: Sequence[int], percentile: float) -> int:
    """The smallest of ``values`` that at least so many per cent of them do not exceed."""
    ordered = sorted(values)
    return ordered[max(math.ceil(len(ordered) * percentile / 100.0 - 1e-9), 1) - 1]


def count(
    program: Program, masks: Sequence[Node], samples: Iterable[tuple[Tensor, ...]], *, empty: bool = False
) -> Counts:
    """Run the Program on every sample and count what its masks keep.

    Args:
        program: Of batch 1; a sample of several rows is run row by row.
        masks: Calls or inputs that make a mask.
        samples: One tensor per input each.
        empty: The Program computes a sample of which no token is left: masks leave tokens in their places.

    Raises:
        DataError: VLX0216 without samples, or where every sample lost all its tokens; VLX0217 naming a sample that
            holds NaN, makes one that a mask is made from, or does not run.
    """
    found: dict[Node, list[int]] = {mask: [] for mask in masks}
    total = emptied = 0
    for name, values in rows_of(samples):
        total += 1
        kept = _counted(program, masks, name, values)
        emptied += 0 in kept.values()
        for mask in masks:
            found[mask].append(kept.get(mask, 0))
    if not total:
        raise DataError(
            "VLX0216", "a selection is frozen at the number of tokens that real samples keep, and there are none",
            where="--calib", hint="add --calib DATA: some hundred unlabelled samples like those of the field",
        )  # fmt: skip
    if emptied == total and not empty:
        raise DataError(
            "VLX0216", f"every one of the {total} calibration samples loses all its tokens",
            where=provenance.describe(masks[0]), hint="check the preprocessing of --calib DATA",
        )  # fmt: skip
    return Counts({mask: tuple(each) for mask, each in found.items()}, total, emptied)


def rows_of(samples: Iterable[tuple[Tensor, ...]]) -> Iterator[tuple[str, tuple[Tensor, ...]]]:
    """Every row of every sample on its own, with its name in messages."""
    for position, values in enumerate(samples, 1):
        rows = max((int(v.shape[0]) for v in values if v.ndim), default=1)
        for row in range(rows):
            name = f"calibration sample {position}" + (f", row {row + 1}" if rows > 1 else "")
            yield name, tuple(v[row : row + 1] if v.ndim and int(v.shape[0]) == rows else v for v in values)


def _counted(program: Program, masks: Sequence[Node], name: str, values: tuple[Tensor, ...]) -> dict[Node, int]:
    """What each mask keeps of one sample, as far as the Program ran."""
    wanted = set(masks)
    kept: dict[Node, int] = {}
    for value in values:
        if value.is_floating_point() and bool(torch.isnan(value).any()):
            raise _unusable(f"{name} holds NaN", name)
    for node, value in zip(program.placeholders, values, strict=True):
        if node in wanted:
            kept[node] = int(torch.count_nonzero(value))
    sources = {operand for mask in masks for operand in mask.all_input_nodes}
    broken: list[Node] = []

    def look(node: Node, value: object) -> None:
        if not isinstance(value, Tensor):
            return
        if node in wanted:
            kept[node] = int(torch.count_nonzero(value))
        if node in sources and value.is_floating_point() and bool(torch.isnan(value).any()):
            broken.append(node)

    try:
        program.run(*values, observe=look)
    except (RuntimeError, IndexError, ValueError) as error:
        if not broken and 0 not in kept.values():
            raise _unusable(f"{name} does not run: {str(error).splitlines()[0]}", name) from error
    if broken:
        raise _unusable(f"{name} gives NaN where tokens are chosen: {provenance.describe(broken[0])}", name)
    return kept


def _unusable(what: str, where: str) -> DataError:
    return DataError("VLX0217", what, where=where, hint="check that sample and its preprocessing, or leave it out")
