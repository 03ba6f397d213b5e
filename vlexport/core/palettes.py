"""Palette: a few values that stand for all those of a stored tensor, found by k-means. Numpy, no torch.

Entries of a tensor become numbers of places in a table of 16, 64 or 256 values. The table is the one of least squared
error that Lloyd's iteration finds on sorted values, where a cluster is a stretch and its mean a difference of two
running sums. It starts from stretches that were split one by one, each time where that takes most of the error away, so
that outliers have entries of their own.

Source: Lloyd, Least squares quantization in PCM, 1982; coremltools guide, Palettization Overview, for palettes that
groups of output channels share.
"""

from __future__ import annotations

import heapq

import numpy as np
import numpy.typing as npt

from vlexport.core.artifact import Array

PALETTES = {"palette4": 4, "palette6": 6, "palette8": 8}
"""Name → bits of an entry."""
ROUNDS = 100
"""Of Lloyd's iteration, at most."""

Floats = npt.NDArray[np.float64]


def palettize(values: Array, kind: str, *, group: int = 0, scales: str = "float32") -> tuple[Array, Array]:
    """A tensor as places in tables.

    Args:
        values: Finite floating array of at least one dim.
        kind: Name of a palette.
        group: So many neighbours on dim 0 share a table; 0 for all.
        scales: Type whose numbers the tables shall hold: ``float32`` or ``float16``; larger values become its largest.

    Returns:
        uint8 of the shape of ``values``, and float32 ``(tables, 2**bits)``, each sorted.
    """
    parts = values.astype(np.float64).reshape(values.shape[0] // (group or values.shape[0]), -1)
    tables, places = [], []
    for part in parts:
        table = _table(part, 1 << PALETTES[kind])
        reach = float(np.finfo(scales).max)
        tables.append(np.sort(np.clip(table, -reach, reach).astype(scales).astype(np.float64)))
        places.append(np.searchsorted(_midpoints(tables[-1]), part).astype(np.uint8))
    return np.stack(places).reshape(values.shape), np.stack(tables).astype(np.float32)


def looked_up(places: Array, tables: Array) -> Array:
    """The tensor that places and tables stand for; arrays as of :func:`palettize`."""
    parts = places.reshape(tables.shape[0], -1).astype(np.int64)
    found: Array = np.take_along_axis(tables, parts, axis=1).reshape(places.shape)
    return found


def _table(values: Floats, count: int) -> Floats:
    ordered = np.sort(values)
    distinct = np.unique(ordered)
    if distinct.size <= count:
        return np.pad(distinct, (0, count - distinct.size), mode="edge")
    sums = np.append(0.0, np.cumsum(ordered))
    ends = _split(sums, count)
    table = np.pad(np.diff(sums[ends]) / np.diff(ends), (0, count + 1 - len(ends)), mode="edge")
    for _ in range(ROUNDS):
        ends = np.concatenate(([0], np.searchsorted(ordered, _midpoints(table)), [ordered.size]))
        sizes = np.diff(ends)
        found = np.where(sizes > 0, np.diff(sums[ends]) / np.maximum(sizes, 1), table)
        if np.array_equal(found, table):
            break
        table = found
    return table


def _split(sums: Floats, count: int) -> npt.NDArray[np.int64]:
    """Ends of stretches of sorted values: again and again, the split that takes away most of the error is made."""

    def best(start: int, stop: int) -> tuple[float, int, int, int]:
        """What the best split of a stretch gains, negative for the heap, and where it is."""
        at = np.arange(start + 1, stop)
        if not at.size:
            return np.inf, start, stop, start
        left, right = (sums[at] - sums[start]) ** 2 / (at - start), (sums[stop] - sums[at]) ** 2 / (stop - at)
        gain = left + right - (sums[stop] - sums[start]) ** 2 / (stop - start)
        chosen = int(np.argmax(gain))
        return -float(gain[chosen]), start, stop, int(at[chosen])

    size = len(sums) - 1
    stretches = [best(0, size)]
    while len(stretches) < count and stretches[0][0] < np.inf:
        _, start, stop, middle = heapq.heappop(stretches)
        heapq.heappush(stretches, best(start, middle))
        heapq.heappush(stretches, best(middle, stop))
    return np.array([*sorted(start for _, start, _, _ in stretches), size], np.int64)


def _midpoints(table: Floats) -> Floats:
    found: Floats = (table[1:] + table[:-1]) / 2.0
    return found
