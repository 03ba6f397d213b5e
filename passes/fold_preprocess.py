"""fold-preprocess: the arithmetic of preprocessing at an input goes into the first convolution.

Before → after::

    %1 = sub(image, mean[C,1,1])
    %2 = div(%1, std[C,1,1])            →    %1 = conv2d(image, W / std, b − Σ W · mean / std)
    %3 = conv2d(%2, W, b)

    and where the convolution pads with zeros:

    %1 = sub(image, mean)                    %1 = add(image, −mean)
    %2 = div(%1, std)                   →    %2 = conv2d(%1, W / std, b, padding=p)
    %3 = conv2d(%2, W, b, padding=p)

Equation: ``W (f · x + o) + b = (W · f) x + (b + Σ W · o)``, the sum over input channels and the kernel, computed in
float64 and cast once. With zeros at the border ``f · x + o = 0`` there, which is ``x = −o / f``, not ``x = 0``: a shift
stays in front of a convolution that pads, and only the factor is folded, since ``f · (x + o / f)`` is zero where
``x + o / f`` is.

With ``--fold-preprocess`` a build also takes mean and std out of the preprocessing that the bundle records: they become
operators at the input, which this pass has to fold completely, or the build says why it cannot. Apps then hand over
pixels times ``scale``, and nothing else.

Does not apply when: the arithmetic is not at an input of the graph (a cast, a permute, a crop may stand between); its
numbers are not one for each channel; it changes shape or dtype; something else than convolutions reads it; a
convolution's weight is computed, read by another call or stored in half precision; a shift stands alone in front of a
convolution that pads; a folded weight would leave the range of half precision.

Numerical effect: exact up to rounding of the weights.
Source: Jacob et al. 2018, arXiv 1712.05877, section 3.2, for folding what is affine per channel; the border is our own
derivation, as above.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from vlexport.ir import dialect, provenance
from vlexport.ir.cost import parameters_stored
from vlexport.ir.program import Program
from vlexport.passes.base import Change, Effect, Match, NearMiss, Pass, Stage
from vlexport.passes.projections.input_affine import STEPS, InputAffine, input_affine
from vlexport.passes.projections.projection import (
    Projection,
    along,
    behind_affine,
    emit,
    pads,
    projection_of,
    why_kept,
    why_too_wide,
)

aten = torch.ops.aten
_PATTERN = "preprocessing → convolution"
_PADS = "the convolution pads with zeros, where the shift is not zero"


@dataclass(frozen=True)
class _Found:
    """Steps, and the convolutions that read them; ``shifts`` where the shift stays in front."""

    affine: InputAffine
    convolutions: tuple[Projection, ...]
    shifts: bool


class FoldPreprocess(Pass[Program]):
    """The arithmetic of preprocessing at an input goes into the first convolution."""

    name: ClassVar[str] = "fold-preprocess"
    stage: ClassVar[Stage] = "reparameterize"
    effect: ClassVar[Effect] = "exact"

    def find(self, ir: Program) -> Iterator[Match | NearMiss]:
        for node in ir.calls(*STEPS):
            found = _found(ir, node)
            if isinstance(found, str):
                yield NearMiss(_PATTERN, node, found)
            elif found is not None:
                yield Match(node, (*found.affine.steps, *(each.node for each in found.convolutions)))

    def apply(self, ir: Program, match: Match) -> Change:
        found = _found(ir, match.node)
        assert isinstance(found, _Found)
        calls, parameters = len(ir.calls()), parameters_stored(ir)
        affine, last = found.affine, match.node
        nodes = (*affine.steps, *(each.node for each in found.convolutions))
        where = tuple(dict.fromkeys(provenance.module_path(node) for node in nodes))
        kind = dialect.plain_name(found.convolutions[0].node)
        shift = _shift(ir, found, last) if found.shifts else None
        for each in found.convolutions:
            weight, bias = _folded(ir, each, affine, shifts=found.shifts)
            ir.replace(each.node, emit(ir, each, weight, bias, value_of=each.node, merges=affine.steps))
        readers = list(last.users)
        source: Node = affine.root
        if shift is not None:
            stored = ir.add_tensor("input_shift", shift, before=last, kind="constant")
            args = (affine.root, stored)
            source = ir.add_call(aten.add.Tensor, args, before=last, value_of=readers[0], merges=affine.steps)
        ir.replace(last, source)
        return Change(
            what=f"{'factor' if found.shifts else 'arithmetic'} at an input folded into {kind}", where=where,
            saved_nodes=calls - len(ir.calls()), saved_parameters=parameters - parameters_stored(ir),
        )  # fmt: skip


def _found(ir: Program, last: Node) -> _Found | str | None:
    """What can be folded, or why nothing; None where ``last`` is no preprocessing, or not the end of it."""
    readers = [user for user in last.users if dialect.op_name(user) in dialect.CONVOLUTIONS]
    if not readers:
        return None
    rank, weight_rank = int(last.meta["val"].ndim), int(dialect.operands(readers[0])[1].meta["val"].ndim)
    affine = input_affine(ir, last, rank - weight_rank + 1)
    if affine is None:
        return None
    convolutions: list[Projection] = []
    for user in last.users:
        found = projection_of(ir, user)
        if isinstance(found, str) or not found.is_convolution or found.operand(found.x) is not last:
            return (isinstance(found, str) and found) or f"{dialect.plain_name(user)} reads it, which is no convolution"
        reason = why_kept(ir, found)
        if reason:
            return reason
        convolutions.append(found)
    shifts = bool(affine.offset.any()) and any(pads(ir, each) for each in convolutions)
    alone = len(affine.steps) == 1 or bool((affine.factor == 1).all())
    if shifts and (alone or not bool(affine.factor.all())):
        return _PADS  # of several steps, the factor can go
    for each in convolutions:
        weight, bias = _folded(ir, each, affine, shifts=shifts)
        old = ir.tensor_of(each.operand(each.bias))
        reason = why_too_wide(each.tensor(ir), weight)
        if not reason and bias is not None:
            reason = why_too_wide(old if old is not None else torch.zeros(1), bias)
        if reason:
            return reason
    return _Found(affine, tuple(convolutions), shifts)


def _folded(ir: Program, convolution: Projection, affine: InputAffine, *, shifts: bool) -> tuple[Tensor, Tensor | None]:
    """Weight and bias, float64; the bias is None where it stays."""
    offset = affine.offset if bool(affine.offset.any()) and not shifts else None
    return behind_affine(ir, convolution, affine.factor, offset)


def _shift(ir: Program, found: _Found, last: Node) -> Tensor:
    """What is added in front of convolutions that pad: ``o / f``."""
    rank = found.convolutions[0].tensor(ir).ndim
    return along(found.affine.offset / found.affine.factor, 0, rank - 1).to(last.meta["val"].dtype)
