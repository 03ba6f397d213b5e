"""What every value is of the values before it: for each, the few affine forms that may be worth writing.

A :class:`Form` says that a value is an expression of one root, what that costs as one operator, and the least that it
is known to cost otherwise. A form that costs more than its parts is kept for a while, for in a sum with a larger kernel
it may cost nothing; the operand that it starts from is then another root, and both are looked at.

Forms are found operands before readers, once each, so that the work grows with the graph.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import sympy
from torch.fx import Node

from vlexport.ir.cost import node_macs
from vlexport.ir.program import Program
from vlexport.passes.affine import expression as ex
from vlexport.passes.affine.expression import Expression, Lengths
from vlexport.passes.affine.reading import Added, Joined, Mapped, Picked, Reading, Refused, Rescaled, Viewed, read
from vlexport.passes.affine.taps import Taps, padded, reaches
from vlexport.passes.layout.axis_maps import AxisMap

MOST = 4
"""Forms of one value that are kept, of far roots and of near ones."""
MOST_AXES = 3
"""Axes of the largest convolution."""


@dataclass(frozen=True)
class Form:
    """A value as an expression of a root.

    Attributes:
        root: What it is an expression of.
        axis: The channels of both.
        expression: The expression.
        macs: What it costs as one operator.
        least: The least that it is known to cost, as one operator or as several.
        view: The expression is one of the root in this arrangement of its axes.
    """

    root: Node
    axis: int
    expression: Expression
    macs: int
    least: int
    view: AxisMap | None = None

    @property
    def start(self) -> tuple[Node, AxisMap | None]:
        """What the expression is one of."""
        return self.root, self.view

    @property
    def pays(self) -> bool:
        """Whether nothing cheaper than one operator is known."""
        return self.macs == self.least


@dataclass(frozen=True)
class Miss:
    """Why an operator is no part of a larger map: what was looked for, and the reason."""

    pattern: str
    reason: str


class Analysis:
    """Forms of all values of a Program.

    Attributes:
        forms: Value → forms, that of the farthest root first.
        readings: Call → what it does.
        misses: Call → why it could not be merged with what it reads.
        place: Node → its number in the order of the graph.
        refused: Call that is affine in general → why it is not here.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.forms: dict[Node, tuple[Form, ...]] = {}
        self.readings: dict[Node, Reading] = {}
        self.misses: dict[Node, Miss] = {}
        self.refused: dict[Node, str] = {}
        self.place: dict[Node, int] = {}
        self._sizes: dict[Node, tuple[int, ...]] = {}
        self._macs: dict[Node, int] = {}
        for place, node in enumerate(program.graph.nodes):
            self.place[node] = place
            if node.op == "call_function":
                self._look(node)

    def lengths(self, form: Form) -> Lengths:
        """Sizes of what the expression is one of, but of the first axis and the channels."""
        shape = form.view.after if form.view is not None else form.root.meta["val"].shape
        known = (int, sympy.Integer)
        return tuple(int(s) if isinstance(s, known) else None for i, s in enumerate(shape) if i not in (0, form.axis))

    def sizes(self, node: Node) -> tuple[int, ...]:
        """Sizes of a value with every dim at its ``opt``."""
        if node not in self._sizes:
            self._sizes[node] = self.program.sizes(node.meta["val"].shape, {})
        return self._sizes[node]

    def macs(self, node: Node) -> int:
        """MACs of a call with every dim at its ``opt``."""
        if node not in self._macs:
            self._macs[node] = node_macs(self.program, node, {})
        return self._macs[node]

    def fitted(self, form: Form) -> tuple[tuple[Taps, ...], tuple[int, ...]] | None:
        """Taps and padding with which one convolution computes a form; None where there is no such padding.

        Padding that is larger on the right by one is ``same``, and is given as that of the left.
        """
        spec = form.expression.spec
        if spec.scatter is not None:
            return spec.taps, (0,) * len(spec.taps)
        if is_same(spec):
            return spec.taps, tuple(-taps.start for taps in spec.taps)
        found = []
        lengths = self.lengths(form)
        for taps, length, reach, stride in zip(spec.taps, lengths, spec.reach, spec.stride, strict=True):
            fit = padded(taps, reaches(length, reach, stride))
            if fit is None:
                return None
            found.append(fit)
        return tuple(taps for taps, _ in found), tuple(padding for _, padding in found)

    def _look(self, node: Node) -> None:
        reading = read(self.program, node)
        if isinstance(reading, Refused):
            self.refused[node] = reading.reason
        if reading is None or isinstance(reading, Refused):
            return
        self.readings[node] = reading
        found: dict[int, list[Form]] = {}
        for form in self._read(node, reading):
            if form.expression.depth <= ex.DEEPEST:
                found.setdefault(form.axis, []).append(form)
        self.forms[node] = tuple(form for axis in sorted(found) for form in self._kept(found[axis]))

    def _kept(self, found: list[Form]) -> list[Form]:
        """The farthest roots, up to the first that pays; of nearer ones only the nearest that others read too.

        For those stay whatever is merged, and then a farther root saves nothing. Nor is a nearer root left out where
        the expression is about to become too deep.
        """
        forms = sorted(found, key=lambda form: self.place[form.root])
        forms = [self._relaxed(form, forms) for form in forms]
        paid = next((i for i, form in enumerate(forms) if form.pays), len(forms) - 1)
        until, behind = forms[: paid + 1], forms[paid + 1 :]
        if not any(form.expression.depth > ex.DEEPEST - 4 for form in until):
            behind = [form for form in behind if self._stays(form.root)]
        return [*until[-MOST:], *behind[-MOST:]]

    def _stays(self, root: Node) -> bool:
        """Whether others read a root too, or what it is an arrangement of: no form begins at that."""
        while len(root.users) == 1 and isinstance(reading := self.readings.get(root), Viewed):
            root = reading.operand
        return len(root.users) > 1

    def _relaxed(self, form: Form, others: list[Form]) -> Form:
        """With the least that it costs by way of one of the other roots."""
        ways = [
            other.least + inner.least
            for other in others
            if other.root is not form.root and other.view is None
            for inner in self.forms.get(other.root, ())
            if inner.start == form.start and inner.axis == form.axis
        ]
        return replace(form, least=min([form.least, *ways]))

    def of(self, node: Node, axis: int) -> list[Form]:
        """The forms of a value whose channels are ``axis``, and that of being itself."""
        known = [form for form in self.forms.get(node, ()) if form.axis == axis]
        size = node.meta["val"].shape[axis]
        if isinstance(size, int):
            known.append(Form(node, axis, ex.identity(size, node.meta["val"].ndim - 2), 0, 0))
        return known

    def _axes(self, *nodes: Node) -> list[int]:
        return sorted({form.axis for node in nodes for form in self.forms.get(node, ())})

    def _read(self, node: Node, reading: Reading) -> Iterator[Form]:
        if isinstance(reading, Mapped):
            yield from self._mapped(node, reading)
        elif isinstance(reading, Rescaled):
            x = reading.operand
            axes = [reading.axis] if reading.axis is not None else sorted({1, x.meta["val"].ndim - 1, *self._axes(x)})
            for form in (form for axis in axes for form in self.of(x, axis)):
                made = ex.scaled(form.expression, reading.factor, reading.shift)
                yield self._form(node, form, made, form.least)
        elif isinstance(reading, Added):
            yield from self._added(node, reading)
        elif isinstance(reading, Joined):
            yield from self._joined(node, reading)
        elif isinstance(reading, Viewed):
            yield from self._viewed(node, reading)
        elif isinstance(reading, Picked):
            for form in self.of(reading.operand, reading.axis):
                yield self._form(node, form, ex.pick(form.expression, reading.first, reading.count), form.least)

    def _mapped(self, node: Node, reading: Mapped) -> Iterator[Form]:
        own = self.macs(node)
        for form in self.of(reading.operand, reading.axis):
            lengths = self.lengths(form)
            made = ex.composed(reading.leaf, form.expression, lengths)
            if isinstance(made, str):
                self.misses[node] = Miss("conv → conv", made)
                continue
            if form.root is reading.operand:  # nothing is before it: the leaf itself, not one behind an identity
                made = reading.leaf
            yield self._form(node, form, made, form.least + own)

    def _added(self, node: Node, reading: Added) -> Iterator[Form]:
        for axis in self._axes(reading.first, reading.second):
            seconds = {form.start: form for form in self.of(reading.second, axis)}
            for one in self.of(reading.first, axis):
                two = seconds.get(one.start)
                if two is None:
                    continue
                lengths = self.lengths(one)
                made = ex.summed(one.expression, two.expression, reading.factor, lengths)
                if isinstance(made, str):
                    self.misses[node] = Miss("sum of branches", made)
                else:
                    yield self._form(node, one, made, one.least + two.least)

    def _joined(self, node: Node, reading: Joined) -> Iterator[Form]:
        first, *rest = ({form.start: form for form in self.of(each, reading.axis)} for each in reading.operands)
        for start, form in first.items():
            if not all(start in other for other in rest):
                continue
            parts = [form, *(other[start] for other in rest)]
            made = ex.joined([part.expression for part in parts], self.lengths(form))
            if isinstance(made, str):
                self.misses[node] = Miss("join of branches", made)
            else:
                yield self._form(node, form, made, sum(part.least for part in parts))

    def _viewed(self, node: Node, reading: Viewed) -> Iterator[Form]:
        """A pointwise map behind which the axes are arranged anew is that map behind the same arrangement."""
        rank = node.meta["val"].ndim - 2
        for form in self.forms.get(reading.operand, ()):
            moved = _with_channels(reading.axes, form.axis, form.expression.spec)
            if moved is None or not form.expression.spec.is_pointwise:
                continue
            axes, axis = moved
            view = axes if form.view is None else form.view.then(axes)
            writable = axis == rank + 1 or (axis == 1 and rank <= MOST_AXES)
            if view is None or not writable:
                continue
            at = replace(form, axis=axis, view=None if view.is_identity else view)
            yield self._form(node, at, ex.reranked(form.expression, rank), form.least)

    def _form(self, node: Node, at: Form, made: Expression, least: int) -> Form:
        form = Form(at.root, at.axis, made, 0, least, at.view)
        fit = self.fitted(form)
        if fit is None:
            return replace(form, macs=least + 1)
        spec = made.spec
        kernel = ex.elements(spec, fit[0])
        positions = math.prod(self.sizes(node)) // spec.outputs
        if spec.scatter is not None:
            positions = math.prod(self.sizes(at.root)) // spec.inputs
        macs = kernel * positions
        return replace(form, macs=macs, least=min(least, macs))


def _with_channels(axes: AxisMap, axis: int, spec: ex.Spec) -> tuple[AxisMap, int] | None:
    """The arrangement for as many channels as the root has, and where it puts them; None where it tears them."""
    if len(axes.source[axis]) != 1 or spec.inputs == 1:
        return None
    atom = sum(len(group) for group in axes.source[:axis])
    places = [i for i, group in enumerate(axes.target) if group == (atom,)]
    if not places or places[0] == 0:
        return None
    source = (*axes.source[:axis], (sympy.Integer(spec.inputs),), *axes.source[axis + 1 :])
    return AxisMap(source, axes.target), places[0]


def is_same(spec: ex.Spec) -> bool:
    """Whether the padding ``same`` of a convolution is that of a map: one more on the right where it is odd."""
    if spec.scatter is not None or any(stride != 1 for stride in spec.stride):
        return False
    return all(reach == 0 and -taps.start == taps.span // 2 for reach, taps in zip(spec.reach, spec.taps, strict=True))
