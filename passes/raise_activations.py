"""raise-activations: an activation written by hand becomes the operator, or the one spelling, that it is.

Before → after::

    %1 = div(x, 1.41421…)
    %2 = erf(%1)                →    %1 = gelu(x)
    %3 = add(%2, 1)
    %4 = mul(x, %3)
    %5 = mul(%4, 0.5)

Equation: with Φ the normal distribution and ``c = √(2/π)``::

    gelu       x/2 · (1 + erf(x/√2))
    gelu tanh  x/2 · (1 + tanh(c (x + 0.044715 x³))) = x · sigmoid(2c (x + 0.044715 x³))
    silu       x · sigmoid(x) = x/2 · (1 + tanh(x/2))
    quick gelu x · sigmoid(1.702 x)              (no operator: the spelling of passes/idioms)
    hardsigmoid  min(max(x/6 + 1/2, 0), 1),  hardswish  x · hardsigmoid(x),  relu6  min(max(x, 0), 6)

The arithmetic is read as a polynomial (passes/polynomial), so the order of its products and sums does not matter.

Does not apply when: a constant is another one (a sigmoid of 1.7 x is no quick GELU); a value on the way has another
reader; it is computed in a half type, where every step rounds and the operator would not; a one-element tensor gives
the result another shape.

Numerical effect: exact up to rounding. Constants count as the same within rounding to float32 (2e-7 relative), so
those of a model that stores them in float32 differ by as much when it is computed in float64.

Source: Hendrycks & Gimpel 2016, arXiv 1606.08415 (GELU, its approximations, SiLU); Ramachandran et al. 2017, arXiv
1710.05941 (swish); Howard et al. 2019, arXiv 1905.02244, section 5.2 (hard swish).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from vlexport.ir import dialect, provenance
from vlexport.ir.cost import parameters_stored
from vlexport.ir.program import Program
from vlexport.passes.base import Change, Effect, Match, NearMiss, Pass, Stage
from vlexport.passes.clip import CLIPS, Clip, clip
from vlexport.passes.idioms import QUICK_GELU_SLOPE, is_spelled, spell_quick_gelu
from vlexport.passes.match import Failed, Place, place_of, privacy
from vlexport.passes.polynomial import Polynomial, Terms, bases_of, close, is_arithmetic, polynomial

aten = torch.ops.aten
_MOST_STEPS = 8
_TANH_SLOPE = math.sqrt(2 / math.pi)
_CUBE = 0.044715
_HALVES: Terms = {(1, 0): 0.5, (1, 1): 0.5}
_PRODUCT: Terms = {(1, 1): 1.0}
_GATES: dict[str, tuple[Terms, float]] = {
    "aten.sigmoid.default": (_PRODUCT, 1.0),
    "aten.tanh.default": (_HALVES, 2.0),
    "aten.erf.default": (_HALVES, 1.0),
}
"""Operator of a smooth gate → what x and the gate make, and by what its operand is multiplied to be a sigmoid's."""
_ARGUMENTS: dict[str, tuple[tuple[str, Terms], ...]] = {
    "aten.erf.default": (("gelu", {(1,): math.sqrt(0.5)}),),
    "sigmoid": (
        ("silu", {(1,): 1.0}),
        ("quick gelu", {(1,): QUICK_GELU_SLOPE}),
        ("gelu tanh", {(1,): 2 * _TANH_SLOPE, (3,): 2 * _TANH_SLOPE * _CUBE}),
    ),
}
"""Kind of gate → activations by what the gate is taken of."""
_OPERATORS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "gelu": (aten.gelu.default, {}),
    "gelu tanh": (aten.gelu.default, {"approximate": "tanh"}),
    "silu": (aten.silu.default, {}),
    "relu6": (aten.relu6.default, {}),
    "hardsigmoid": (aten.hardsigmoid.default, {}),
    "hardswish": (aten.hardswish.default, {}),
}


@dataclass(frozen=True)
class Activation:
    """An activation written by hand.

    Attributes:
        kind: Which one.
        x: What it is of.
        root: The call whose value it is.
        nodes: All calls that it is made of, operands before readers.
    """

    kind: str
    x: Node
    root: Node
    nodes: tuple[Node, ...]


class RaiseActivations(Pass[Program]):
    """An activation written by hand becomes the operator, or the one spelling, that it is."""

    name: ClassVar[str] = "raise-activations"
    stage: ClassVar[Stage] = "raise"
    effect: ClassVar[Effect] = "exact"

    def find(self, ir: Program) -> Iterator[Match | NearMiss]:
        for node in ir.calls():
            name = dialect.op_name(node)
            found: Activation | Failed | None = None
            if name in _GATES:
                found = _smooth(ir, node)
            elif name in CLIPS or name == "aten.hardsigmoid.default":
                found = _hard(ir, node)
            if isinstance(found, Failed):
                yield NearMiss("activation by hand", found.node, found.reason)
            elif found is not None:
                yield Match(found.root, found.nodes, (found.kind, place_of(found.x, found.nodes)))

    def apply(self, ir: Program, match: Match) -> Change:
        root = match.node
        kind: str
        place: Place
        kind, place = match.data
        where = tuple(dict.fromkeys(provenance.module_path(n) for n in match.nodes))
        calls, parameters = len(ir.calls()), parameters_stored(ir)
        if kind == "quick gelu":
            new = spell_quick_gelu(ir, place.value, before=root, merges=match.nodes)
        else:
            target, options = _OPERATORS[kind]
            new = ir.add_call(target, (place.value,), options, before=root, value_of=root, merges=match.nodes)
        ir.replace(root, new)
        return Change(
            what=f"{kind} raised", where=where, saved_nodes=calls - len(ir.calls()),
            saved_parameters=parameters - parameters_stored(ir),
        )  # fmt: skip


def _smooth(program: Program, gate: Node) -> Activation | Failed | None:
    """The activation that a sigmoid, tanh or erf is the gate of."""
    name = dialect.op_name(gate)
    wanted, factor = _GATES[name]
    known = _ARGUMENTS.get(name, _ARGUMENTS["sigmoid"])
    miss: Failed | None = None
    for x in bases_of(program, gate.args[0]):
        inside = polynomial(program, gate.args[0], [x])
        if isinstance(inside, Failed):
            continue
        terms = {key: factor * each for key, each in inside.terms.items()}
        kind = next((kind for kind, argument in known if close(terms, argument)), None)
        outside = _made_with(program, x, gate, lambda found: close(found.terms, wanted))
        if outside is None:
            other = _made_with(program, x, gate, lambda found: (1, 1) in found.terms)
            if kind is not None and other is not None:
                miss = miss or Failed(other[0], _wrong_product(name, other[1].terms, wanted), 0)
            continue
        root, product = outside
        nodes = (*inside.nodes, gate, *product.nodes)
        if kind is None:
            miss = miss or Failed(gate, _wrong_argument(name, inside.terms, known), 0)
        elif kind != "quick gelu" or not is_spelled(program, root):
            return _checked(Activation(kind, x, root, nodes))
        else:
            return None
    return miss


def _hard(program: Program, gate: Node) -> Activation | Failed | None:
    """The activation that a value between two limits is, or is the gate of."""
    if dialect.op_name(gate) == "aten.hardsigmoid.default":
        return _hard_swish(program, gate)
    held = clip(program, gate) if gate.meta["val"].is_floating_point() else None
    if held is None or any(dialect.op_name(user) in CLIPS and clip(program, user) for user in gate.users):
        return None  # a further limit stands around it: that one is looked at
    miss: Failed | None = None
    best: Activation | None = None
    for x in bases_of(program, held.of):
        inside = polynomial(program, held.of, [x])
        if isinstance(inside, Failed) or any(key not in ((0,), (1,)) for key in inside.terms):
            continue
        for key, kind in (((1, 1), "hardswish"), ((0, 1), "hardsigmoid")):
            outside = _made_with(program, x, gate, _is_hard(inside, held, key))
            if outside is not None:
                nodes = (*inside.nodes, *held.nodes, *outside[1].nodes)
                best = best or Activation(kind, x, outside[0], nodes)
        other = _made_with(program, x, gate, lambda found: found.terms.keys() == {(1, 1)})
        if other is not None:
            miss = miss or Failed(gate, _wrong_limits(inside, held, other[1]), 0)
        if _is_hard_sigmoid(inside, held, None, (0, 1)):
            best = best or Activation("hardsigmoid", x, gate, (*inside.nodes, *held.nodes))
    if best is None and (held.low, held.high) == (0.0, 6.0) and dialect.op_name(gate) != "aten.relu6.default":
        best = Activation("relu6", held.of, gate, held.nodes)
    return _checked(best) if best is not None else miss


def _hard_swish(program: Program, gate: Node) -> Activation | Failed | None:
    x: Any = gate.args[0]
    outside = _made_with(program, x, gate, lambda found: close(found.terms, _PRODUCT))
    return _checked(Activation("hardswish", x, outside[0], (gate, *outside[1].nodes))) if outside is not None else None


def _is_hard(inside: Polynomial, held: Clip, key: tuple[int, int]) -> Callable[[Polynomial], bool]:
    """Whether a polynomial is the hard sigmoid, or x times it: a multiple of one product, and of 1 for the former."""
    allowed = {key, (0, 0)} if key == (0, 1) else {key}

    def accepts(found: Polynomial) -> bool:
        alone = found.terms.get(key, 0.0) > 0.0 and found.terms.keys() <= allowed
        return alone and _is_hard_sigmoid(inside, held, found, key)

    return accepts


def _is_hard_sigmoid(inside: Polynomial, held: Clip, product: Polynomial | None, key: tuple[int, int]) -> bool:
    """Whether slope, shift and limits, each times what the gate is multiplied by, are those of the hard sigmoid."""
    scale = product.terms[key] if product is not None else 1.0
    shift = product.terms.get((0, 0), 0.0) if product is not None else 0.0
    found: Terms = {
        (0,): scale * inside.terms.get((1,), 0.0),
        (1,): scale * inside.terms.get((0,), 0.0) + shift,
        (2,): 1.0 + scale * held.low + shift,  # the lower limit is 0: compared as 1 + 0
        (3,): scale * held.high + shift,
    }
    return close(found, {(0,): 1 / 6, (1,): 0.5, (2,): 1.0, (3,): 1.0})


def _made_with(
    program: Program, x: Node, gate: Node, accepts: Callable[[Polynomial], bool]
) -> tuple[Node, Polynomial] | None:
    """The farthest call above ``gate`` whose polynomial in ``x`` and ``gate`` is accepted; None when none is."""
    best: tuple[Node, Polynomial] | None = None
    current = gate
    for _ in range(_MOST_STEPS):
        for user in current.users:
            found = polynomial(program, user, [x, gate]) if is_arithmetic(user) else None
            if isinstance(found, Polynomial):
                break
        else:
            return best
        if accepts(found):
            best = (user, found)
        current = user
    return best


def _checked(found: Activation) -> Activation | Failed:
    """The activation, or why it stays as it is."""
    nodes = tuple(dict.fromkeys(found.nodes))
    x, root = found.x.meta["val"], found.root.meta["val"]
    if x.dtype not in (torch.float32, torch.float64) and found.kind != "relu6":  # limits alone round nothing
        name = str(x.dtype).removeprefix("torch.")
        return Failed(found.root, f"by hand it rounds to {name} after every step, the operator only once", 0)
    if x.dtype is not root.dtype or tuple(x.shape) != tuple(root.shape):
        return Failed(found.root, f"the result has another shape or dtype than what {found.kind} is taken of", 0)
    shared = privacy(nodes, found.root)
    return shared if shared is not None else Activation(found.kind, found.x, found.root, nodes)


def _shown(terms: Terms) -> str:
    """``1.7·x + 0.04·x³`` for a polynomial in one value."""
    powers = {0: "", 1: "·x", 2: "·x²", 3: "·x³", 4: "·x⁴"}
    return " + ".join(f"{value:.7g}{powers[key[0]]}" for key, value in sorted(terms.items())) or "0"


def _wrong_argument(name: str, terms: Terms, known: tuple[tuple[str, Terms], ...]) -> str:
    scale = _GATES[name][1]
    listed = ", ".join(f"{_shown({k: v / scale for k, v in each.items()})} ({kind})" for kind, each in known)
    return f"its {dialect.plain_name(name)} is of {_shown(terms)}, not of {listed}"


def _wrong_product(name: str, found: Terms, wanted: Terms) -> str:
    gate = dialect.plain_name(name)
    names: dict[tuple[int, ...], str] = {(0, 0): "1", (1, 0): "x", (0, 1): gate, (1, 1): f"x·{gate}"}

    def shown(terms: Terms) -> str:
        return " + ".join(f"{value:.7g}·{names.get(key, 'a power')}" for key, value in sorted(terms.items()))

    return f"it makes {shown(found)}, not {shown(wanted)}"


def _wrong_limits(inside: Polynomial, held: Clip, product: Polynomial) -> str:
    scale = product.terms[1, 1]
    return (
        f"it multiplies x by {scale:.7g} times {_shown(inside.terms)} between {held.low:g} and {held.high:g}, "
        "not by 1/6 times 3 + x between 0 and 6 (hardswish)"
    )
