"""raise-norms: every spelling becomes one operator, and what is another function stays and says why."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.fx import Node

from tests.spelled import EXACT, Writer, aten, examples, left, raised
from vlexport.passes.raise_norms import RaiseNorms

ROWS, IMAGE, SPLIT = (3, 5), (6, 4, 3), (2, 9)
EPS = 1e-3


# -- a grammar of spellings ------------------------------------------------------------------------------------------


@dataclass
class Spelled:
    """A norm that is written over some axes of ``x``.

    Attributes:
        w: The writer.
        x: What is normalised.
        dims: Axes, with the batch.
    """

    w: Writer
    x: Node
    dims: tuple[int, ...]

    @property
    def rank(self) -> int:
        return int(self.x.meta["val"].ndim)

    @property
    def count(self) -> int:
        shape = self.x.meta["val"].shape
        return int(torch.Size([int(shape[d]) for d in self.dims]).numel())

    def axes(self) -> list[int]:
        """The same axes, counted from either end."""
        shift = self.w.pick(0, self.rank)
        return [d - shift for d in self.dims]

    def kept(self, value: Node, keepdim: bool) -> Node:
        """The axes of size 1 that a moment without keepdim has lost."""
        for d in () if keepdim else self.dims:
            value = self.w.call(aten.unsqueeze.default, value, d)
        return value

    def mean(self, value: Node, *, bare: bool = False) -> tuple[Node, bool]:
        """The mean, and whether it has kept its axes."""
        w, keep = self.w, True if bare else self.w.pick(True, False)
        if w.pick(False, False, True):
            return w.times(w.call(aten.sum.dim_IntList, value, self.axes(), keep), 1 / self.count), keep
        return w.call(aten.mean.dim, value, self.axes(), keep), keep

    def centred(self, dims: tuple[int, ...] | None = None) -> Node:
        """``x`` less its mean."""
        w, own = self.w, Spelled(self.w, self.x, dims or self.dims)
        keep = w.pick(True, False)
        mean = own.kept(w.call(aten.mean.dim, self.x, own.axes(), keep), keep)
        if w.pick(False, False, True):
            return w.call(aten.add.Tensor, self.x, w.call(aten.neg.default, mean))
        return w.call(aten.sub.Tensor, self.x, mean)

    def spread(self, value: Node, *, of: Node | None = None, eps: float = EPS) -> tuple[Node, bool]:
        """The mean square of ``value``, or the variance of ``of``, and eps."""
        w = self.w
        spelling = w.pick("squares", "var", "var_mean", "difference") if of is not None else "squares"
        if spelling == "var":
            keep = w.pick(True, False)
            made = w.call(aten.var.correction, of, self.axes(), correction=0, keepdim=keep)
        elif spelling == "var_mean":
            keep = w.pick(True, False)
            both = w.call(aten.var_mean.correction, of, self.axes(), correction=0, keepdim=keep)
            made = w.call(operator.getitem, both, 0)
        elif spelling == "difference":
            keep = True
            assert of is not None
            squares = w.call(aten.mean.dim, w.square(of), self.axes(), True)
            made = w.call(aten.sub.Tensor, squares, w.square(w.call(aten.mean.dim, of, self.axes(), True)))
        else:
            made, keep = self.mean(w.square(value))
        return (w.plus(made, eps) if eps else made), keep

    def divided(self, value: Node, spread: Node, keep: bool, scale: Node | None = None) -> Node:
        """``value`` divided by the root, times ``scale`` on the way."""
        w = self.w
        spelling = w.pick("rsqrt", "sqrt", "reciprocal", "pow -0.5", "pow 0.5", "one over")
        if spelling in ("sqrt", "pow 0.5"):
            root = w.call(aten.sqrt.default, spread)
            if spelling == "pow 0.5":
                root = w.call(aten.pow.Tensor_Scalar, spread, 0.5)
            if scale is not None:
                value = w.product(value, scale)
            return w.call(aten.div.Tensor, value, self.kept(root, keep))
        if spelling == "rsqrt":
            root = w.call(aten.rsqrt.default, spread)
        elif spelling == "pow -0.5":
            root = w.call(aten.pow.Tensor_Scalar, spread, -0.5)
        elif spelling == "reciprocal":
            root = w.call(aten.reciprocal.default, w.call(aten.sqrt.default, spread))
        else:
            root = w.call(aten.pow.Tensor_Scalar, w.call(aten.sqrt.default, spread), -1)
        root = self.kept(root, keep)
        if scale is None:
            return w.product(value, root)
        return (
            w.product(value, w.product(root, scale))
            if w.pick(True, False)
            else w.product(w.product(value, scale), root)
        )

    def scaled(self, value: Node, shape: tuple[int, ...], *, shift: bool = True) -> Node:
        """With a scale and a shift, or one of both, or none."""
        w = self.w
        if w.pick(True, False):
            value = w.product(value, w.tensor(*w.pick(shape, (1, *shape))))
        if shift and w.pick(True, False):
            value = (
                w.sum(value, w.tensor(*shape))
                if w.pick(True, False)
                else w.call(aten.sub.Tensor, value, w.tensor(*shape))
            )
        return value


def layer_norm(w: Writer, dims: tuple[int, ...], shape: tuple[int, ...], x: Node | None = None) -> Node:
    s = Spelled(w, x or w.x, dims)
    centred = s.centred()
    spread, keep = s.spread(centred, of=s.x)
    scale = w.tensor(*shape) if w.pick(False, False, True) else None
    return s.scaled(s.divided(centred, spread, keep, scale), shape)


def rms_norm(w: Writer, dims: tuple[int, ...] = (2,), shape: tuple[int, ...] = (5,)) -> Node:
    s = Spelled(w, w.x, dims)
    spread, keep = s.spread(w.x)
    scale = w.tensor(*shape) if w.pick(False, False, True) else None
    return s.scaled(s.divided(w.x, spread, keep, scale), shape, shift=False)


def group_norm(w: Writer) -> Node:
    tail = w.pick((-1,), (3, 4, 3))
    split = w.call(aten.reshape.default, w.x, [w.call(aten.sym_size.int, w.x, 0), 2, *tail])
    s = Spelled(w, split, tuple(range(2, 2 + len(tail))))
    centred = s.centred()
    spread, keep = s.spread(centred, of=split)
    made = s.divided(centred, spread, keep)
    back = w.call(aten.reshape.default, made, [-1, *IMAGE])
    return s.scaled(back, (6, 1, 1))


def whole_group(w: Writer) -> Node:
    """All of a sample, scaled by channel."""
    s = Spelled(w, w.x, (1, 2, 3))
    centred = s.centred()
    spread, keep = s.spread(centred, of=w.x)
    return s.scaled(w.product(s.divided(centred, spread, keep), w.tensor(6, 1, 1)), (6, 1, 1))


def l2_normalize(w: Writer, *, limit: bool) -> Node:
    s = Spelled(w, w.x, (w.pick(1, 2),))
    keep = w.pick(True, False)
    if w.pick(True, False):
        order = w.pick(2, 2.0)
        norm = w.call(aten.linalg_vector_norm.default, w.x, order, s.axes(), keep)
    else:
        squares = w.call(aten.sum.dim_IntList, w.square(w.x), s.axes(), keep)
        if limit and w.pick(True, False):
            return s.divided(w.x, w.call(aten.clamp_min.default, squares, 0.25), keep)
        if not limit:
            return s.divided(w.x, squares, keep)
        norm = w.call(aten.sqrt.default, squares)
    if limit:
        norm = w.call(w.pick(aten.clamp_min.default, aten.clamp.default), norm, 0.5)
    norm = s.kept(norm, keep)
    if w.pick(True, False):
        norm = w.call(aten.expand.default, norm, [-1, *ROWS])
    return w.call(aten.div.Tensor, w.x, norm)


def completed(w: Writer) -> Node:
    """An operator without scale and shift, which come behind it."""
    made = w.call(aten.layer_norm.default, w.x, [5], None, None, EPS)
    return w.sum(w.product(made, w.tensor(5)), w.tensor(*w.pick((5,), (1, 1, 5))))


CHANNELS_FIRST = ["permute", "layer_norm", "permute"]
GRAMMAR: dict[str, tuple[tuple[int, ...], Callable[[Writer], Node], list[str]]] = {
    "layer norm": (ROWS, lambda w: layer_norm(w, (2,), (5,)), ["layer_norm"]),
    "layer norm, two axes": (ROWS, lambda w: layer_norm(w, (1, 2), (3, 5)), ["layer_norm"]),
    "layer norm, channels first": (IMAGE, lambda w: layer_norm(w, (1,), (6, 1, 1)), CHANNELS_FIRST),
    "rms norm": (ROWS, rms_norm, ["rms_norm"]),
    "group norm": (IMAGE, group_norm, ["group_norm"]),
    "group norm, one group": (IMAGE, whole_group, ["group_norm"]),
    "l2": (ROWS, lambda w: l2_normalize(w, limit=False), ["linalg_vector_norm", "div.Tensor"]),
    "l2, limit": (ROWS, lambda w: l2_normalize(w, limit=True), ["linalg_vector_norm", "clamp_min", "div.Tensor"]),
    "completed": (ROWS, completed, ["layer_norm"]),
}


@pytest.mark.parametrize("kind", GRAMMAR)
@examples(40)
@given(data=st.data())
def test_every_spelling_becomes_one_operator_when_it_is_equal(kind: str, data: st.DataObject) -> None:
    shape, write, wanted = GRAMMAR[kind]
    w = Writer(shape, data.draw)
    operators, error = raised(RaiseNorms(), w.finished(write(w)))
    assert operators == wanted
    assert error <= EXACT


def unbiased(w: Writer) -> Node:
    s = Spelled(w, w.x, (2,))
    made = w.call(w.pick(aten.var.correction, aten.var.dim), w.x, [2], keepdim=True)
    return s.divided(s.centred(), w.plus(made, EPS), True)


def outside(w: Writer) -> Node:
    s = Spelled(w, w.x, (2,))
    centred = s.centred()
    spread, keep = s.spread(centred, of=w.x, eps=0.0)
    root = w.plus(s.kept(w.call(aten.sqrt.default, spread), keep), EPS)
    return w.call(aten.div.Tensor, centred, root)


def deviation(w: Writer) -> Node:
    s = Spelled(w, w.x, (2,))
    root = w.call(aten.std.correction, w.x, [2], correction=0, keepdim=True)
    return w.call(aten.div.Tensor, s.centred(), w.plus(root, EPS))


def without_eps(w: Writer) -> Node:
    s = Spelled(w, w.x, (2,))
    value = w.pick(s.x, s.centred())
    spread, keep = s.spread(value, eps=0.0)
    return s.divided(value, spread, keep)


def other_axes(w: Writer) -> Node:
    s = Spelled(w, w.x, (2,))
    spread = w.plus(w.call(aten.var.correction, w.x, [2], correction=0, keepdim=True), EPS)
    return s.divided(s.centred((1,)), spread, True)


def one_sided(w: Writer) -> Node:
    s = Spelled(w, w.x, (2,))
    centred = s.centred()
    if w.pick(True, False):
        spread, keep = s.spread(centred)
        return s.divided(w.x, spread, keep)
    spread, keep = s.spread(w.x)
    return s.divided(centred, spread, keep)


def halved(w: Writer) -> Node:
    s = Spelled(w, w.x, (2,))
    made, keep = s.mean(w.square(w.x))
    return s.divided(w.x, w.plus(w.times(made, 0.5), EPS), keep)


def limited(w: Writer) -> Node:
    s = Spelled(w, w.x, (2,))
    made, keep = s.mean(w.square(w.x))
    return s.divided(w.x, w.call(aten.clamp_min.default, made, EPS), keep)


def l2_under_root(w: Writer) -> Node:
    s = Spelled(w, w.x, (2,))
    return s.divided(w.x, w.plus(w.call(aten.sum.dim_IntList, w.square(w.x), [2], True), EPS), True)


def l2_added(w: Writer) -> Node:
    norm = w.call(aten.linalg_vector_norm.default, w.x, 2, [2], True)
    return w.call(aten.div.Tensor, w.x, w.plus(norm, EPS))


MUTATIONS: dict[str, tuple[tuple[int, ...], Callable[[Writer], Node], str]] = {
    "unbiased": (ROWS, unbiased, "its variance is unbiased: it divides by n − 1"),
    "eps outside": (ROWS, outside, r"its eps, 0\.001, is added to the root, outside of it"),
    "std": (ROWS, deviation, r"its eps, 0\.001, is added to the root, outside of it"),
    "no eps": (ROWS, without_eps, "nothing is added to the variance"),
    "other axes": (ROWS, other_axes, "its mean is over axes 1, its spread over 2"),
    "one-sided": (ROWS, one_sided, "the mean is subtracted on one side of the division only"),
    "instance norm": (IMAGE, lambda w: layer_norm(w, (2, 3), (6, 1, 1)), "as an instance norm does"),
    "axes 1 and 3": (IMAGE, lambda w: layer_norm(w, (1, 3), (3,)), r"its axes \(1, 3 of 4\) are neither|another shape"),
    "half the mean": (ROWS, halved, r"its mean square is multiplied by 0\.5|0\.001 is added under"),
    "limit": (ROWS, limited, "its root is held above a limit"),
    "l2, eps under the root": (ROWS, l2_under_root, r"0\.001 is added under the root"),
    "l2, eps added": (ROWS, l2_added, r"0\.001 is added to the norm"),
}


@pytest.mark.parametrize("kind", MUTATIONS)
@examples(20)
@given(data=st.data())
def test_nothing_is_raised_when_it_is_another_function(kind: str, data: st.DataObject) -> None:
    shape, write, reason = MUTATIONS[kind]
    w = Writer(shape, data.draw)
    reasons = left(RaiseNorms(), w.finished(write(w)))
    assert len(reasons) == 1
    assert re.search(reason, reasons[0]), reasons


@examples(60)
@given(data=st.data(), kind=st.sampled_from(["layer norm", "rms norm", "l2", "l2, limit"]))
def test_nothing_is_raised_when_a_value_inside_has_another_reader(data: st.DataObject, kind: str) -> None:
    shape, write, _ = GRAMMAR[kind]
    w = Writer(shape, data.draw)
    result = write(w)
    moments = w.program.calls("aten.mean.dim", "aten.sum.dim_IntList", "aten.linalg_vector_norm.default")
    kept = [n for n in moments if n.meta["val"].ndim == 3]
    if not kept:
        return
    reasons = left(RaiseNorms(), w.finished(w.sum(result, kept[0])))
    assert len(reasons) == 1
    assert reasons[0].endswith("output is used by 1 other(s)")


@examples(40)
@given(data=st.data())
def test_nothing_is_raised_when_moments_stand_along_another_axis(data: st.DataObject) -> None:
    """A square picture whose statistics are turned by 90 degrees."""
    w = Writer((5, 5), data.draw)
    s = Spelled(w, w.x, (2,))
    spread, _ = s.mean(w.square(w.x), bare=True)
    turned = w.call(aten.permute.default, w.call(aten.rsqrt.default, w.plus(spread, EPS)), [0, 2, 1])
    assert left(RaiseNorms(), w.finished(w.product(w.x, turned))) == []
    w = Writer((5, 5), data.draw)
    spread = w.plus(w.call(aten.mean.dim, w.square(w.x), [2], False), EPS)
    flat = w.call(aten.unsqueeze.default, w.call(aten.rsqrt.default, spread), 1)
    reason = "its mean does not stand along the axes that it was taken over"
    assert left(RaiseNorms(), w.finished(w.product(w.x, flat))) == [reason]


def test_scale_of_two_tensors_is_one_when_both_stand_behind() -> None:
    w = Writer(ROWS)
    program = w.finished(w.product(w.product(layer_norm(w, (2,), (5,)), w.tensor(5)), w.tensor(5)))
    operators, error = raised(RaiseNorms(), program)
    assert operators[0] == "layer_norm"
    assert error <= EXACT
