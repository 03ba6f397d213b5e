"""Which outputs of a map read which inputs: grouped bands, and the number of groups that a convolution needs for them.

A depthwise convolution is one band of as many groups as channels, a dense one is one band of one group, and two
branches over halves of a value are two bands. A sum of maps has the bands of both: it is a convolution of the finest
groups in which all of them fit (``groups 4`` and ``groups 6`` fit in ``groups 2``).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Band:
    """``groups`` equal blocks along a diagonal.

    Attributes:
        first_out: First output channel.
        outs: Output channels, a multiple of ``groups``.
        first_in: First input channel.
        ins: Input channels, a multiple of ``groups``.
        groups: Blocks.
    """

    first_out: int
    outs: int
    first_in: int
    ins: int
    groups: int


Bands = tuple[Band, ...]


def whole(outs: int, ins: int, groups: int) -> Bands:
    """The band of a convolution."""
    return (Band(0, outs, 0, ins, groups),)


@functools.lru_cache(maxsize=4096)
def groups_of(bands: Bands, outs: int, ins: int) -> int:
    """The most groups of a convolution from ``ins`` to ``outs`` channels that holds every band."""
    if all(band.outs == outs and band.ins == ins for band in bands):
        return math.gcd(*(band.groups for band in bands))
    common = math.gcd(outs, ins)
    divisors = (g for g in range(common, 0, -1) if common % g == 0)
    return next(g for g in divisors if all(_fits(band, outs // g, ins // g) for band in bands))


def _fits(band: Band, per_out: int, per_in: int) -> bool:
    outs, ins = band.outs // band.groups, band.ins // band.groups
    if outs > per_out or ins > per_in:
        return False
    for block in range(band.groups):
        first_out, first_in = band.first_out + block * outs, band.first_in + block * ins
        places = {first_out // per_out, (first_out + outs - 1) // per_out}
        places |= {first_in // per_in, (first_in + ins - 1) // per_in}
        if len(places) > 1:
            return False
    return True


def together(bands: Iterable[Band]) -> Bands:
    """The bands of a sum, equal places once."""
    found: dict[tuple[int, int, int, int], int] = {}
    for band in bands:
        place = (band.first_out, band.outs, band.first_in, band.ins)
        found[place] = math.gcd(found.get(place, 0), band.groups)
    return tuple(Band(*place, groups) for place, groups in found.items())


def picked(bands: Bands, first: int, count: int) -> Bands:
    """The bands of ``count`` outputs from ``first`` on."""
    cut = (piece for band in bands for piece in _of_outputs(band, first, first + count))
    return tuple(replace(piece, first_out=piece.first_out - first) for piece in cut)


def moved(bands: Bands, by: int) -> Bands:
    """The bands of a value that stands behind ``by`` other channels in a join."""
    return tuple(replace(band, first_out=band.first_out + by) for band in bands)


def behind(outer: Bands, inner: Bands) -> Bands:
    """The bands of one map behind another."""
    found = []
    for late in outer:
        for early in inner:
            for piece in _of_outputs(early, late.first_in, late.first_in + late.ins):
                for reader in _of_inputs(late, piece.first_out, piece.first_out + piece.outs):
                    fits = reader.first_in == piece.first_out and reader.ins == piece.outs
                    groups = math.gcd(reader.groups, piece.groups) if fits else 1
                    found.append(Band(reader.first_out, reader.outs, piece.first_in, piece.ins, groups))
    return together(found)


def _turned(band: Band) -> Band:
    return Band(band.first_in, band.ins, band.first_out, band.outs, band.groups)


def _of_inputs(band: Band, start: int, stop: int) -> list[Band]:
    return [_turned(piece) for piece in _of_outputs(_turned(band), start, stop)]


def _of_outputs(band: Band, start: int, stop: int) -> list[Band]:
    """The part of a band between two output channels: a cut block, whole blocks, a cut block."""
    start, stop = max(start, band.first_out), min(stop, band.first_out + band.outs)
    if start >= stop:
        return []
    outs, ins = band.outs // band.groups, band.ins // band.groups
    found: list[Band] = []
    while start < stop:
        block, inside = divmod(start - band.first_out, outs)
        blocks = (stop - start) // outs if inside == 0 else 0
        count = blocks * outs or min(stop - start, outs - inside)
        found.append(Band(start, count, band.first_in + block * ins, max(blocks, 1) * ins, max(blocks, 1)))
        start += count
    return found
