"""Which dynamic dims of wired components are one: an edge makes one of the two at its ends. No torch.

A class of such dims has the range that all its members take (their intersection), or one size where some end is fixed.
A dim that a component computes (``2*batch``) is known when it runs, and not before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vlexport.core.artifact import DimRange, Signature, TensorSpec

Member = tuple[str, str]
"""A component and the name of one of its dims."""


@dataclass
class _Class:
    """Dims that are one.

    Attributes:
        members: In the order in which edges joined them.
        range: What all of them take.
        computed: ``component: dim`` that it follows, which is known when that component runs.
        label: Public name, once settled.
    """

    members: list[Member]
    range: DimRange
    computed: str = ""
    label: str = ""

    @property
    def fixed(self) -> int | None:
        return self.range.min if self.range.min == self.range.max else None


@dataclass
class WiredDims:
    """The dims of some components; :meth:`join` for every edge, then :meth:`settle` once.

    Attributes:
        components: Name → inputs, outputs and dims.
        ranges: Public name → range of every dim that an input of the whole has.
    """

    components: Mapping[str, Signature]
    ranges: dict[str, DimRange] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Each dim that an input names begins as a class of its own."""
        self._classes: dict[Member, _Class] = {}
        for name, signature in self.components.items():
            for dim in (d for spec in signature.inputs for d in spec.shape if isinstance(d, str)):
                found = signature.dims.get(dim, DimRange())
                self._classes.setdefault((name, dim), _Class([(name, dim)], found))

    def join(self, source: str, produced: TensorSpec, sink: str, consumed: TensorSpec) -> str:
        """Make the dims of an edge's two ends one; returns why they cannot be, or an empty string."""
        if len(produced.shape) != len(consumed.shape):
            shapes = ["×".join(map(str, spec.shape)) or "scalar" for spec in (produced, consumed)]
            return f"shape {shapes[0]} does not fit {shapes[1]}"
        for axis, (a, b) in enumerate(zip(produced.shape, consumed.shape, strict=True)):
            if problem := self._join(self._found(source, a), self._found(sink, b)):
                return f"dim {axis} is {a} in {source}.{produced.name} and {b} in {sink}.{consumed.name}{problem}"
        return ""

    def settle(self, free: Sequence[tuple[str, TensorSpec]], order: Sequence[str]) -> str:
        """Name the dims of the whole's inputs; returns what is wrong with one, or an empty string."""
        seen: list[_Class] = []
        for component, spec in free:
            for dim in (d for d in spec.shape if isinstance(d, str)):
                found = self._classes[component, dim]
                if found.computed:
                    return f"{dim} of input {component}.{spec.name} must be {found.computed}, known when that has run"
                if found.fixed is None and all(found is not other for other in seen):
                    seen.append(found)
        first = [min(each.members, key=lambda member: order.index(member[0])) for each in seen]
        shared = Counter(dim for _, dim in first)
        for each, (component, dim) in zip(seen, first, strict=True):
            each.label = dim if shared[dim] == 1 else f"{component}.{dim}"
            self.ranges[each.label] = each.range
        return ""

    def public(self, component: str, dim: int | str) -> int | str:
        """A dim of a component as the whole calls it: its size where that is fixed."""
        found = self._classes.get((component, str(dim)))
        if isinstance(dim, int) or found is None:
            return dim
        if found.fixed is not None:
            return found.fixed
        return found.label or f"{component}.{dim}"

    def sizes(self, component: str, sizes: Mapping[str, int]) -> dict[str, int]:
        """Sizes of a component's dims for those of the whole; the smallest for one that another component computes."""
        made = {}
        for dim, own in self.components[component].dims.items():
            found = self._classes.get((component, dim))
            known = own.min if found is None else found.range.min
            made[dim] = sizes.get(found.label, known) if found is not None else known
        return made

    def own(self, component: str, ranges: Mapping[str, DimRange]) -> dict[str, DimRange]:
        """Ranges of a component's dims for those of the whole; dims that ``ranges`` does not name are left out."""
        found = {dim: self._classes.get((component, dim)) for dim in self.components[component].dims}
        return {dim: ranges[each.label] for dim, each in found.items() if each is not None and each.label in ranges}

    def _found(self, component: str, dim: int | str) -> _Class:
        """The class of a dim; a fixed or computed one has a class for the moment."""
        if isinstance(dim, int):
            return _Class([], DimRange(min=dim, max=dim, opt=dim))
        return self._classes.get((component, dim)) or _Class([], DimRange(), computed=f"{dim} of {component}")

    def _join(self, a: _Class, b: _Class) -> str:
        if a is b:
            return ""
        if (a.computed and b.fixed is not None) or (b.computed and a.fixed is not None):
            return ", which is known only when it runs"
        low = max(a.range.min, b.range.min)
        high = min((r.max for r in (a.range, b.range) if r.max is not None), default=None)
        if high is not None and low > high:
            if not a.members and not b.members:
                return ", which differ"
            return f": {_shown(a.range)} and {_shown(b.range)} have no size in common"
        opt = max(low, a.range.opt if high is None else min(a.range.opt, high))
        joined = _Class(
            [*a.members, *b.members], DimRange(min=low, max=high, opt=opt), computed=a.computed or b.computed
        )
        for member in joined.members:
            self._classes[member] = joined
        return ""


def _shown(found: DimRange) -> str:
    return str(found.min) if found.min == found.max else f"{found.min} to {found.max or 'any'}"
