"""Axis maps: composition, inverse and the shortest spelling, against torch itself."""

from __future__ import annotations

import random

import pytest
import sympy
import torch
from torch import Tensor

from vlexport.passes.layout.axis_maps import AxisMap, Permute, Reshape, Step, permuted, reshaped, sizes_of, steps

BATCH = sympy.Symbol("batch", integer=True, positive=True)


def run(x: Tensor, spelling: tuple[Step, ...]) -> Tensor:
    for step in spelling:
        x = x.reshape([int(s) for s in step.sizes]) if isinstance(step, Reshape) else x.permute(step.dims)
    return x


def numbers(*sizes: object) -> tuple[object, ...]:
    return tuple(sympy.sympify(s) for s in sizes)


def random_reshape(draw: random.Random, x: Tensor) -> Tensor:
    factors = [p for p, power in sympy.factorint(x.numel()).items() for _ in range(power)]
    draw.shuffle(factors)
    sizes = [1]
    for factor in factors:
        if draw.random() < 0.5:
            sizes.append(factor)
        else:
            sizes[-1] *= factor
    return x.reshape(sizes)


def test_shortest_spelling_does_what_the_chain_does_when_it_is_random() -> None:
    draw = random.Random(0)
    seen = {0: 0, 1: 0, 2: 0, 3: 0}
    for _ in range(1500):
        x = torch.arange(2 * 3 * 4 * 6).reshape(draw.choice([(2, 3, 4, 6), (6, 24), (144,), (1, 12, 12), (2, 1, 72)]))
        y, axes = x, reshaped(sizes_of(x), sizes_of(x))
        length = draw.randint(1, 4)
        for _ in range(length):
            if draw.random() < 0.5:
                dims = draw.sample(range(y.ndim), y.ndim)
                y, step = y.permute(dims), permuted(sizes_of(y), tuple(dims))
            else:
                z = random_reshape(draw, y)
                y, step = z, reshaped(sizes_of(y), sizes_of(z))
            axes = axes.then(step) if axes is not None and step is not None else None
        if axes is None:
            continue
        assert axes.inverse().inverse() == axes
        back = axes.then(axes.inverse())
        assert back is not None
        assert back.is_identity
        for spelling in steps(axes):
            assert torch.equal(run(x, spelling), y)
            assert len(spelling) <= length
        seen[len(steps(axes)[0])] += 1
    assert min(seen.values()) > 10, seen


@pytest.mark.parametrize(
    ("before", "after", "atoms"),
    [
        ((64 * BATCH, 49, 96), (BATCH, 8, 8, 7, 7, 96), ((BATCH, 8, 8), (7, 7), (96,))),
        ((BATCH, 1, 12), (12 * BATCH,), ((12 * BATCH,),)),
        ((BATCH, BATCH + 1), (BATCH * (BATCH + 1),), None),
    ],
)
def test_symbolic_sizes_are_cut_into_common_atoms_when_they_divide(
    before: tuple[object, ...], after: tuple[object, ...], atoms: tuple[tuple[object, ...], ...] | None
) -> None:
    axes = reshaped(numbers(*before), numbers(*after))
    assert axes is not None
    assert axes.after == numbers(*after)
    back = axes.then(axes.inverse())
    assert back is not None
    assert back.is_identity
    if before == (64 * BATCH, 49, 96):
        assert axes.source == atoms


@pytest.mark.parametrize(
    ("before", "after"),
    [((6, 4), (4, 6)), ((BATCH, 6), (6, BATCH)), ((BATCH, 4), (2 * BATCH + 1, 2)), ((3, 0), (2, 0))],
)
def test_no_map_is_found_when_neither_cut_refines_the_other(
    before: tuple[object, ...], after: tuple[object, ...]
) -> None:
    assert reshaped(numbers(*before), numbers(*after)) is None


def test_permute_of_an_axis_of_size_one_is_a_reshape_when_spelled() -> None:
    axes = permuted(numbers(BATCH, 1, 7), (0, 2, 1))
    assert steps(axes) == ((Reshape(numbers(BATCH, 7, 1)),),)


def test_both_spellings_are_given_when_permute_and_reshape_can_change_places() -> None:
    flat = reshaped(numbers(BATCH, 64, 14, 14), numbers(BATCH, 64, 196))
    assert flat is not None
    tokens = flat.then(permuted(numbers(BATCH, 64, 196), (0, 2, 1)))
    assert isinstance(tokens, AxisMap)
    assert steps(tokens) == (
        (Reshape(numbers(BATCH, 64, 196)), Permute((0, 2, 1))),
        (Permute((0, 2, 3, 1)), Reshape(numbers(BATCH, 196, 64))),
    )
