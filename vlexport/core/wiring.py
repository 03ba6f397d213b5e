"""How the components of a bundle are wired: edges that fit, an order to run in, public names. No torch.

::

    image ─▶ encoder ─ features ─▶ head ─▶ scores         inputs: image        outputs: scores

A component's input that no edge feeds is an input of the whole, an output that no edge reads is an output of the whole.
Public names are plain where they are unique and ``component.name`` otherwise; so are the names of dynamic dims, and an
edge makes one dim of the two at its ends. Components stand in alphabetical order wherever edges leave it open.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from vlexport.core.artifact import Array, Signature, TensorSpec
from vlexport.core.errors import InputError, nearest
from vlexport.core.wired_dims import WiredDims

WHOLE = "whole"
"""What all components together are called; none of them may have that name."""
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
Run = Callable[[Mapping[str, Array]], Mapping[str, Array]]


class Port(NamedTuple):
    """An input or output of a component."""

    component: str
    name: str

    def __str__(self) -> str:
        return f"{self.component}.{self.name}"


@dataclass(frozen=True)
class Wiring:
    """Components that fit together.

    Attributes:
        components: Name → its inputs, outputs and dims.
        order: Components as they can be run.
        feeds: Input → the output that feeds it.
        inputs: Public name → input of a component.
        outputs: Public name → output of a component.
        signature: Of the whole.
        dims: Dims of the whole, by those of components.
        groups: Sets of components that edges connect.
    """

    components: Mapping[str, Signature]
    order: tuple[str, ...]
    feeds: Mapping[Port, Port]
    inputs: Mapping[str, Port]
    outputs: Mapping[str, Port]
    signature: Signature
    dims: WiredDims
    groups: tuple[frozenset[str], ...]

    def needed(self, name: str) -> tuple[str, ...]:
        """Public inputs that are needed together with the public input ``name``, itself among them."""
        group = self._group(self.inputs[name].component)
        return tuple(each for each, port in self.inputs.items() if port.component in group)

    def run(self, inputs: Mapping[str, Array], components: Mapping[str, Run]) -> dict[str, Array]:
        """Run the components that ``inputs`` concern, in order.

        Args:
            inputs: Public name → array; whole groups may be left out, and their outputs are then missing too.
            components: Name → what computes it.

        Returns:
            Public name → array.
        """
        concerned = frozenset().union(*(self._group(self.inputs[name].component) for name in inputs))
        taken = {self.inputs[name]: value for name, value in inputs.items()}
        made: dict[Port, Array] = {}
        for name in (each for each in self.order if each in concerned):
            ports = [Port(name, spec.name) for spec in self.components[name].inputs]
            given = {port.name: made[self.feeds[port]] if port in self.feeds else taken[port] for port in ports}
            made |= {Port(name, key): value for key, value in components[name](given).items()}
        return {public: made[port] for public, port in self.outputs.items() if port in made}

    def _group(self, component: str) -> frozenset[str]:
        return next(group for group in self.groups if component in group)


def wire(components: Mapping[str, Signature], edges: Sequence[tuple[str, str]]) -> Wiring:
    """Wire components, or say why they do not fit.

    Args:
        components: Name → its inputs, outputs and dims.
        edges: ``("component.output", "component.input")`` pairs.

    Raises:
        InputError: VLX1102 for a name that is none, an edge to or from nowhere, an input fed twice, ends that do not
            fit, a cycle.
    """
    _require_names(components)
    components = dict(sorted(components.items()))
    dims = WiredDims(components)
    feeds: dict[Port, Port] = {}
    for source_text, sink_text in edges:
        edge = f"{source_text} → {sink_text}"
        source, produced = _end(edge, source_text, components, "output")
        sink, consumed = _end(edge, sink_text, components, "input")
        if sink in feeds:
            raise _unfit(edge, f"{sink} is fed by {feeds[sink]} already", "feed each input once")
        if produced.dtype != consumed.dtype:
            raise _unfit(edge, f"{source} is {produced.dtype}, {sink} is {consumed.dtype}")
        if problem := dims.join(source.component, produced, sink.component, consumed):
            raise _unfit(edge, problem, "save both so that the shapes fit")
        feeds[sink] = source
    order = _order(components, feeds)
    free = [Port(name, s.name) for name in order for s in components[name].inputs if Port(name, s.name) not in feeds]
    read = set(feeds.values())
    unread = [Port(name, s.name) for name in order for s in components[name].outputs if Port(name, s.name) not in read]
    inputs, outputs = ({name: port for port, name in public_names(ports).items()} for ports in (free, unread))
    taken = {Port(name, s.name): s for name, each in components.items() for s in each.inputs}
    given = {Port(name, s.name): s for name, each in components.items() for s in each.outputs}
    if problem := dims.settle([(port.component, taken[port]) for port in free], order):
        raise _unfit("", problem)
    signature = Signature(
        inputs=tuple(_renamed(name, port, taken[port], dims) for name, port in inputs.items()),
        outputs=tuple(_renamed(name, port, given[port], dims) for name, port in outputs.items()),
        dims=dims.ranges,
    )
    return Wiring(components, order, feeds, inputs, outputs, signature, dims, _groups(components, feeds))


def public_names(ports: Iterable[tuple[str, str]]) -> dict[Port, str]:
    """A name for each port: its own where it is the only one, else ``component.name``."""
    every = [Port(*port) for port in ports]
    shared = Counter(port.name for port in every)
    names = {port: port.name if shared[port.name] == 1 else str(port) for port in every}
    if len(set(names.values())) < len(names):  # one's own name is spelt as another's full one
        names = {port: str(port) for port in every}
    return names


def _renamed(name: str, port: Port, spec: TensorSpec, dims: WiredDims) -> TensorSpec:
    return TensorSpec(name=name, dtype=spec.dtype, shape=tuple(dims.public(port.component, d) for d in spec.shape))


def _require_names(components: Mapping[str, Signature]) -> None:
    if not components:
        raise _unfit("", "there is no component")
    folded: dict[str, str] = {}
    for name in components:
        if not _NAME.fullmatch(name):
            raise _unfit("", f"{name[:80]!r} is no name for a component", "use letters, digits and _, at most 64")
        if name == WHOLE:
            raise _unfit("", f"no component may be called '{WHOLE}': that is all of them", "choose another name")
        other = folded.setdefault(name.casefold(), name)
        if other != name:
            raise _unfit("", f"'{other}' and '{name}' differ by case only", "some file systems take them for one")


def _end(edge: str, text: str, components: Mapping[str, Signature], kind: str) -> tuple[Port, TensorSpec]:
    """A port and its spec from ``component.name``."""
    component, dot, name = text.partition(".")
    if not dot or not name:
        raise _unfit(edge, f"'{text}' is not component.{kind}")
    if component not in components:
        raise _unfit(edge, f"no component '{component}'{nearest(component, components)}")
    signature = components[component]
    specs = {spec.name: spec for spec in (signature.outputs if kind == "output" else signature.inputs)}
    if name not in specs:
        raise _unfit(
            edge, f"{component} has no {kind} '{name}'{nearest(name, specs)}",
            f"{kind}s of {component}: {', '.join(specs) or 'none'}",
        )  # fmt: skip
    return Port(component, name), specs[name]


def _order(components: Mapping[str, Signature], feeds: Mapping[Port, Port]) -> tuple[str, ...]:
    waits: dict[str, set[str]] = {name: set() for name in components}
    for sink, source in feeds.items():
        waits[sink.component].add(source.component)
    order: list[str] = []
    while len(order) < len(components):
        ready = next((name for name in components if name not in order and waits[name] <= set(order)), None)
        if ready is None:
            left = ", ".join(name for name in components if name not in order)
            raise _unfit("", f"edges go round in a circle: none of {left} can be run first")
        order.append(ready)
    return tuple(order)


def _groups(components: Mapping[str, Signature], feeds: Mapping[Port, Port]) -> tuple[frozenset[str], ...]:
    groups = [{name} for name in components]
    for sink, source in feeds.items():
        touched = [group for group in groups if sink.component in group or source.component in group]
        groups = [group for group in groups if group not in touched] + [set().union(*touched)]
    return tuple(frozenset(group) for group in groups)


def _unfit(edge: str, problem: str, hint: str = "") -> InputError:
    said = f"edge {edge}: {problem}" if edge else problem
    return InputError("VLX1102", f"the components do not fit together: {said}", where=edge or "components", hint=hint)
