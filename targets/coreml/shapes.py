"""Sizes of dynamic dims in a Core ML package: fixed, a list of sizes, or a range. No torch.

Written as ``batch=1`` (fixed), ``height=224:320:448`` (these sizes; the first is the default) or ``width=160-640`` (a
range), separated by commas. Core ML plans memory for every listed size beforehand, and for a range at run time.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from vlexport.core.artifact import DimRange
from vlexport.core.errors import UsageError, nearest

MOST_SHAPES = 128
"""Core ML takes so many enumerated shapes at most."""
_SETTING = "--set coreml.shapes"
_ITEM = re.compile(r"(?P<name>[^=]+)=(?:(?P<low>\d+)-(?P<high>\d+)|(?P<sizes>\d+(?::\d+)*))")


@dataclass(frozen=True)
class Sizes:
    """Sizes of one dim.

    Attributes:
        listed: Sizes in order of preference, the default first; one alone is fixed. Empty for a range.
        low: Smallest size of a range.
        high: Largest size of a range.
        default: The size that the package is written for.
    """

    listed: tuple[int, ...] = ()
    low: int = 0
    high: int = 0
    default: int = 1

    @property
    def fixed(self) -> bool:
        """Whether there is one size alone."""
        return len(self.listed) == 1

    def text(self) -> str:
        """As it is written in the option."""
        return ":".join(map(str, self.listed)) if self.listed else f"{self.low}-{self.high}"


def parse_shapes(text: str) -> dict[str, Sizes]:
    """Read the option.

    Args:
        text: For example ``batch=1,height=224:320``; empty for none.

    Raises:
        ValueError: Saying what is not understood and how it is written.
    """
    found: dict[str, Sizes] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        match = _ITEM.fullmatch(item)
        if match is None:
            raise ValueError(f"'{item}' is not understood: write batch=1, height=224:320:448 or width=160-640")
        name = match["name"].strip()
        if name in found:
            raise ValueError(f"'{name}' is given twice")
        if match["sizes"]:
            listed = tuple(dict.fromkeys(map(int, match["sizes"].split(":"))))
            sizes = Sizes(listed=listed, default=listed[0])
        else:
            low, high = int(match["low"]), int(match["high"])
            sizes = Sizes(low=low, high=high, default=low) if low < high else Sizes(listed=(low,), default=low)
            if high < low:
                raise ValueError(f"'{item}' has no size: {low} is above {high}")
        if min(sizes.listed or (sizes.low,)) < 1 or len(sizes.listed) > MOST_SHAPES:
            raise ValueError(f"'{item}': sizes are 1 or more, and at most {MOST_SHAPES} of them")
        found[name] = sizes
    return found


def sizes_of_dims(
    dims: Mapping[str, DimRange], asked: Mapping[str, Sizes], known: Mapping[str, int]
) -> dict[str, Sizes]:
    """What every dynamic dim of a program becomes.

    Args:
        dims: Dims of the program.
        asked: What the option says; wins.
        known: Sizes that the preprocessing of an image fixes.

    Raises:
        UsageError: VLX0703 for a dim that does not exist, a size outside its range, or a dim without a largest size.
    """
    for name in asked:
        if name not in dims:
            raise UsageError(
                "VLX0703", f"the program has no dynamic dim '{name}'{nearest(name, dims)}", where=_SETTING,
                hint=f"dynamic dims: {', '.join(dims) or 'none'}",
            )  # fmt: skip
    found = {}
    for name, bound in dims.items():
        sizes = asked.get(name)
        if sizes is None and name in known:
            sizes = Sizes(listed=(known[name],), default=known[name])
        if sizes is None:
            if bound.max is None:
                raise UsageError(
                    "VLX0703", f"dim '{name}' has no largest size, and Core ML wants one", where=_SETTING,
                    hint=f"{_SETTING}={name}={bound.opt}, or {name}=1:2:4, or {name}={bound.min}-8",
                )  # fmt: skip
            fixed = (bound.min,) if bound.min == bound.max else ()
            sizes = Sizes(listed=fixed, low=bound.min, high=bound.max, default=bound.opt)
        low, high = (min(sizes.listed), max(sizes.listed)) if sizes.listed else (sizes.low, sizes.high)
        if low < bound.min or (bound.max is not None and high > bound.max):
            upper = "up" if bound.max is None else f"to {bound.max}"
            raise UsageError(
                "VLX0703", f"dim '{name}' takes sizes from {bound.min} {upper}, not {sizes.text()}", where=_SETTING
            )
        found[name] = sizes
    return found


def enumerated_shapes(shape: tuple[int | str, ...], sizes: Mapping[str, Sizes]) -> list[tuple[int, ...]]:
    """All shapes of an input whose dynamic dims are fixed or listed; lists go side by side, so they are equally long.

    Raises:
        UsageError: VLX0703 where they are not, or a range stands beside a list.
    """
    used = {dim: sizes[dim] for dim in shape if isinstance(dim, str)}
    lists = {dim: each for dim, each in used.items() if not each.fixed}
    shown = ", ".join(f"{dim}={each.text()}" for dim, each in lists.items())
    if any(not each.listed for each in lists.values()):
        raise UsageError("VLX0703", f"one input has a range beside a list of sizes ({shown})", where=_SETTING,
                         hint="Core ML takes one or the other for an input")  # fmt: skip
    counts = {len(each.listed) for each in lists.values()}
    if len(counts) > 1:
        raise UsageError("VLX0703", f"lists of one input are not equally long ({shown})", where=_SETTING,
                         hint="the first sizes of all lists make the first shape, and so on")  # fmt: skip
    return [
        tuple(dim if isinstance(dim, int) else used[dim].listed[0 if used[dim].fixed else i] for dim in shape)
        for i in range(max(counts, default=1))
    ]
