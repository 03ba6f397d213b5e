"""Where axes go: what a reshape or a permute, or a chain of them, does to the axes of a value.

An :class:`AxisMap` cuts the axes before and after into common *atoms*; a chain of reshapes and permutes is one order of
atoms. From the map follows the shortest spelling: nothing, one reshape, one permute, two operators or three::

    permute [0,2,3,1] → reshape [-1,196,64]      (batch) (64) (14·14)  →  (batch) (14·14) (64)

An axis of size 1 has no atom, so that moving it is never a permute. Sizes may be symbols; ``64·batch`` is cut into
``batch`` and ``64`` where the other side says so. Two reshapes that cut an axis at places of which neither refines the
other (6 · 4 into 4 · 6) have no common atoms, and no map.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch

Size = Any
"""A sympy integer expression of a size."""
Group = tuple[Size, ...]


@dataclass(frozen=True)
class Reshape:
    """A step: the same order of elements under other sizes."""

    sizes: tuple[Size, ...]


@dataclass(frozen=True)
class Permute:
    """A step: axis ``i`` of the result is axis ``dims[i]`` of the operand."""

    dims: tuple[int, ...]


Step = Reshape | Permute


def sizes_of(value: torch.Tensor) -> tuple[Size, ...]:
    """The sizes of a recorded value as expressions."""
    return tuple(s.node.expr if isinstance(s, torch.SymInt) else sympy.Integer(int(s)) for s in value.shape)


@dataclass(frozen=True)
class AxisMap:
    """How the axes of a value are cut, ordered and joined; always with as few atoms as possible.

    Attributes:
        source: For every axis before, the sizes of its atoms, outermost first; an axis of size 1 has none.
        target: For every axis after, its atoms as places in the flattened ``source``.
    """

    source: tuple[Group, ...]
    target: tuple[tuple[int, ...], ...]

    @property
    def atoms(self) -> Group:
        """Sizes of all atoms in the order before."""
        return tuple(atom for group in self.source for atom in group)

    @property
    def before(self) -> tuple[Size, ...]:
        """Sizes before."""
        return tuple(_product(group) for group in self.source)

    @property
    def after(self) -> tuple[Size, ...]:
        """Sizes after."""
        atoms = self.atoms
        return tuple(_product(atoms[i] for i in group) for group in self.target)

    @property
    def is_identity(self) -> bool:
        """Whether the map leaves a value as it is."""
        return self.in_order and self.before == self.after

    @property
    def in_order(self) -> bool:
        """Whether no atom passes another."""
        order = [i for group in self.target for i in group]
        return order == sorted(order)

    def inverse(self) -> AxisMap:
        """The map back."""
        atoms = self.atoms
        order = [i for group in self.target for i in group]
        places = {atom: place for place, atom in enumerate(order)}
        groups, start = [], 0
        for group in self.source:
            groups.append(tuple(places[i] for i in range(start, start + len(group))))
            start += len(group)
        return _joined(tuple(tuple(atoms[i] for i in group) for group in self.target), tuple(groups))

    def then(self, other: AxisMap) -> AxisMap | None:
        """This map and another behind it; None where an axis between them has no common atoms."""
        mine: dict[int, list[Size]] = {}
        theirs: list[int] = []
        pieces: list[list[int]] = []  # atom of `other` → numbers of pieces
        owner: list[tuple[int, Size]] = []  # number of a piece → my atom, size
        atoms = self.atoms
        for own, his in zip(self.target, other.source, strict=True):
            cut = _common([atoms[i] for i in own], list(his))
            if cut is None:
                return None
            base = len(pieces)
            pieces.extend([] for _ in his)
            for place_own, place_his, size in cut:
                mine.setdefault(own[place_own], []).append(size)
                pieces[base + place_his].append(len(owner))
                owner.append((own[place_own], size))
                theirs.append(base + place_his)
        starts, total = {}, 0
        for i in range(len(atoms)):
            starts[i] = total
            total += len(mine[i])
        used = dict.fromkeys(mine, 0)
        number: list[int] = []
        for atom, _ in owner:
            number.append(starts[atom] + used[atom])
            used[atom] += 1
        source, at = [], 0
        for group in self.source:
            source.append(tuple(s for i in range(at, at + len(group)) for s in mine[i]))
            at += len(group)
        target = tuple(tuple(number[p] for atom in group for p in pieces[atom]) for group in other.target)
        return _joined(tuple(source), target)


@functools.lru_cache(maxsize=4096)
def reshaped(before: tuple[Size, ...], after: tuple[Size, ...]) -> AxisMap | None:
    """The map of a reshape; None where its axes have no common atoms."""
    cut = _common(list(before), list(after))
    if cut is None:
        return None
    source: list[list[Size]] = [[] for _ in before]
    target: list[list[int]] = [[] for _ in after]
    for number, (i, j, size) in enumerate(cut):
        source[i].append(size)
        target[j].append(number)
    return _joined(tuple(map(tuple, source)), tuple(map(tuple, target)))


@functools.lru_cache(maxsize=4096)
def permuted(before: tuple[Size, ...], dims: tuple[int, ...]) -> AxisMap:
    """The map of a permute."""
    source = tuple(() if size == 1 else (size,) for size in before)
    numbers, total = [], 0
    for group in source:
        numbers.append(tuple(range(total, total + len(group))))
        total += len(group)
    return _joined(source, tuple(numbers[d] for d in dims))


@functools.lru_cache(maxsize=4096)
def steps(axes: AxisMap) -> tuple[tuple[Step, ...], ...]:
    """The shortest spellings of a map; where there are two of one length, both."""
    if axes.is_identity:
        return ((),)
    if axes.in_order:
        return ((Reshape(axes.after),),)
    behind, ahead = _permute_first(axes), _permute_last(axes)
    both = [found for found in (ahead, behind) if found is not None]
    if both:
        least = min(map(len, both))
        return tuple(dict.fromkeys(found for found in both if len(found) == least))
    return (_three_steps(axes),)


def _permute_first(axes: AxisMap) -> tuple[Step, ...] | None:
    """A permute of the axes as they are, then perhaps a reshape."""
    dims = _whole_axes(axes.source, [i for group in axes.target for i in group])
    if dims is None:
        return None
    units = [i for i, group in enumerate(axes.source) if not group]
    exact = _with_units(dims, axes.target, units)
    if exact is not None and tuple(axes.before[d] for d in exact) == axes.after:
        return (Permute(tuple(exact)),)
    return (Permute((*dims, *units)), Reshape(axes.after))


def _permute_last(axes: AxisMap) -> tuple[Step, ...] | None:
    """A reshape, then a permute into the axes as they shall be."""
    found = _permute_first(axes.inverse())
    if found is None:
        return None
    first = found[0]
    assert isinstance(first, Permute)
    back = tuple(sorted(range(len(first.dims)), key=first.dims.__getitem__))
    if len(found) == 1:
        return (Permute(back),)
    return (Reshape(tuple(axes.after[d] for d in first.dims)), Permute(back))


def _three_steps(axes: AxisMap) -> tuple[Step, ...]:
    """A reshape into atoms, joined where they stay together, a permute of those, and a reshape."""
    order = [i for group in axes.target for i in group]
    runs: list[list[int]] = []
    for atom in order:
        if runs and runs[-1][-1] + 1 == atom:
            runs[-1].append(atom)
        else:
            runs.append([atom])
    by_source = sorted(runs)
    atoms = axes.atoms
    middle = tuple(_product(atoms[i] for i in run) for run in by_source)
    return (Reshape(middle), Permute(tuple(by_source.index(run) for run in runs)), Reshape(axes.after))


def _whole_axes(source: Sequence[Group], order: Sequence[int]) -> list[int] | None:
    """The axes in ``order`` of their atoms, if no axis is torn."""
    starts, total = {}, 0
    for axis, group in enumerate(source):
        if group:
            starts[total] = axis
        total += len(group)
    dims, at = [], 0
    while at < len(order):
        if order[at] not in starts:
            return None
        axis = starts[order[at]]
        length = len(source[axis])
        if list(order[at : at + length]) != list(range(order[at], order[at] + length)):
            return None
        dims.append(axis)
        at += length
    return dims


def _with_units(dims: list[int], target: Sequence[Sequence[int]], units: list[int]) -> list[int] | None:
    """``dims`` with the axes of size 1 where the target has some; None where their numbers differ."""
    if len(target) != len(dims) + len(units) or sum(not group for group in target) != len(units):
        return None
    whole, single = iter(dims), iter(units)
    return [next(whole) if group else next(single) for group in target]


def _common(left: list[Size], right: list[Size]) -> list[tuple[int, int, Size]] | None:
    """Common atoms of two factorisations of one number: place on the left, place on the right, size.

    None where they differ in their product, or neither of two cuts refines the other.
    """
    found: list[tuple[int, int, Size]] = []
    i = j = 0
    one = sympy.Integer(1)
    a, b = one, one
    while True:
        while a == one and i < len(left):
            a, i = left[i], i + 1
        while b == one and j < len(right):
            b, j = right[j], j + 1
        if a == one and b == one:
            return found
        if a == one or b == one:
            return None
        if a == b:
            found.append((i - 1, j - 1, a))
            a = b = one
            continue
        down, up = a / b, b / a
        if down.is_integer and down.is_positive:
            found.append((i - 1, j - 1, b))
            a, b = down, one
        elif up.is_integer and up.is_positive:
            found.append((i - 1, j - 1, a))
            a, b = one, up
        else:
            return None


def _joined(source: tuple[Group, ...], target: tuple[tuple[int, ...], ...]) -> AxisMap:
    """The map with neighbouring atoms joined where no axis, before or after, parts them."""
    follows = {a: b for group in target for a, b in itertools.pairwise(group)}
    number: dict[int, int] = {}
    groups: list[Group] = []
    at = total = 0
    for group in source:
        sizes: list[Size] = []
        for place, size in enumerate(group):
            if place and follows.get(at - 1) == at:
                sizes[-1] = sizes[-1] * size
            else:
                sizes.append(size)
                number[at] = total
                total += 1
            at += 1
        groups.append(tuple(sizes))
    kept = tuple(tuple(number[i] for i in group if i in number) for group in target)
    return AxisMap(tuple(groups), kept)


def _product(sizes: Any) -> Size:
    total = sympy.Integer(1)
    for size in sizes:
        total = total * size
    return total
