"""account: what the model's own modules promise, and what the passes made one operator of.

The module tree says "12 attention modules", the graph says "12 scaled_dot_product_attention". Where the two differ, the
account names the modules and why. A module is expected to become one operator when its class and what was captured in
it say so; of nested ones the innermost counts, so a wrapper is not counted beside what it wraps. Operators are traced
to modules by their origins, which every pass keeps.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node

from vlexport.core.account import Account, Idea, Missing
from vlexport.core.bundle_schema import PassRecord
from vlexport.ir import dialect, provenance
from vlexport.ir.program import Program
from vlexport.passes.base import NearMiss, Pass
from vlexport.passes.idioms import quick_gelu
from vlexport.passes.match import Found

_PRODUCTS = ("matmul", "mm", "bmm", "baddbmm", "einsum")
_SOFTMAX = ("softmax", "_softmax")
_ATTENTION = ("scaled_dot_product_attention",)
_NORMS = ("layer_norm", "rms_norm", "group_norm", "instance_norm", "batch_norm")
_STATISTICS = ("mean", "var", "var_mean", "std", "sum", "linalg_vector_norm", "norm")
_ACTIVATIONS = ("gelu", "silu", "hardswish", "hardsigmoid", "mish", "quick_gelu")
_FUSIONS = {
    "fuse-qattention": "QAttention", "fuse-attention": "Attention", "fuse-biased-attention": "Attention",
    "fuse-multi-head-attention": "MultiHeadAttention",
}  # fmt: skip
"""Lowered pass → the operator that it makes of attention."""
_SHOWN = 6
"""Operators that a reason lists."""


@dataclass(frozen=True)
class _Promise:
    """What makes a module one of an idea.

    Attributes:
        idea: Which.
        called: Fits the name of its class.
        operators: What it should become one of.
        told_by: Passes whose near misses say why it did not.
    """

    idea: Idea
    called: re.Pattern[str]
    operators: tuple[str, ...]
    told_by: tuple[str, ...]

    def is_kept(self, held: Counter[str]) -> bool:
        """Whether what a module holds computes the idea, spelled out or not."""
        if self.idea == "attention":
            return bool(held[_ATTENTION[0]]) or _spells_attention(held)
        if self.idea == "norm":
            return any(held[name] for name in (*_NORMS, *_STATISTICS))
        return not any(_is_affine(name) for name in held)


_PROMISES = (
    _Promise("attention", re.compile(""), _ATTENTION, ("raise-attention",)),
    _Promise(
        "norm", re.compile(r"(layer|rms|group|batch|instance)_?norm|^norm$", re.IGNORECASE), _NORMS,
        ("raise-norms", "reparameterize"),
    ),
    _Promise(
        "activation", re.compile(r"gelu|silu|swish|hard_?sigmoid|mish", re.IGNORECASE), _ACTIVATIONS,
        ("raise-activations",),
    ),
)  # fmt: skip
"""Attention is known by what it holds, whatever its class is called: two products of computed values and a softmax."""


def _spells_attention(held: Counter[str]) -> bool:
    return any(held[name] for name in _SOFTMAX) and sum(held[name] for name in _PRODUCTS) > 1


@dataclass
class Refusals:
    """Near misses of all passes with the module they lie in: a listener of the runner. A record keeps 50 a pass only.

    Attributes:
        told: (pass, module path, reason), in the order they came.
    """

    told: list[tuple[str, str, str]] = field(default_factory=list)

    def __call__(self, applied: Pass[Any], misses: Sequence[NearMiss[Any]]) -> None:
        """Keep what a pass reports."""
        self.told += [(applied.name, provenance.module_path(miss.node), miss.reason) for miss in misses]

    def reasons(self, module: str, passes: Iterable[str]) -> list[str]:
        """What the first of some passes that said anything said of a module and of what lies in it, each once."""
        for name in passes:
            found = [why for told_by, path, why in self.told if told_by == name and _lies_in(path, module)]
            if found:
                return list(dict.fromkeys(found))
        return []


@dataclass
class _Module:
    """A module of the user's model.

    Attributes:
        of: Name of its class, without the package.
        held: Operator → calls in it that depend on the input, in it and below.
        origins: Their ordinals.
    """

    of: str
    held: Counter[str] = field(default_factory=Counter)
    origins: set[int] = field(default_factory=set)


def accounts(source: Program, optimized: Program, refusals: Refusals) -> tuple[Account, ...]:
    """Expected modules against found operators, an account for every idea of which there is any.

    Args:
        source: As captured.
        optimized: After the passes.
        refusals: What the passes said on the way.
    """
    modules = _modules(source)
    made: dict[int, list[Node]] = {}
    for node in optimized.calls():
        for origin in provenance.origins(node):
            made.setdefault(origin, []).append(node)
    live = _live(optimized)
    called = {node: _called(optimized, node) for node in optimized.calls()}
    found = (_account(promise, modules, made, called, live, refusals) for promise in _PROMISES)
    return tuple(each for each in found if each.expected or each.beyond)


def fusion_accounts(records: Sequence[PassRecord]) -> tuple[Account, ...]:
    """What became of attention in the lowered passes that fuse it; nothing where none of them ran or found any.

    Args:
        records: Of a target's lowered passes, in the order they ran: each sees what those before it left.
    """
    ran = [record for record in records if record.name in _FUSIONS]
    fates: Counter[str] = Counter()
    for record in ran:
        fates[_FUSIONS[record.name]] += sum(change.count for change in record.changes)
    missing: dict[str, list[str]] = {}
    for miss in ran[-1].near_misses if ran else ():
        missing.setdefault(miss.reason, []).append(miss.node.partition(" in ")[2].partition(" (")[0])
    found, left = fates.total(), sum(map(len, missing.values()))
    if not found + left:
        return ()
    told = tuple(Missing(of="softmax", reason=why, modules=tuple(paths)) for why, paths in missing.items())
    return (
        Account(
            idea="fused attention", expected=found + left, found=found, fates=dict((+fates).most_common()), missing=told
        ),
    )


def _account(
    promise: _Promise,
    modules: Mapping[str, _Module],
    made: Mapping[int, list[Node]],
    called: Mapping[Node, str],
    live: set[Node],
    refusals: Refusals,
) -> Account:
    fates: Counter[str] = Counter()
    missing: dict[tuple[str, str], list[str]] = {}
    claimed: set[Node] = set()
    expected = _innermost({p: m for p, m in modules.items() if promise.called.search(m.of) and promise.is_kept(m.held)})
    for path in expected:
        module = modules[path]
        now = list(dict.fromkeys(node for origin in sorted(module.origins) for node in made.get(origin, ())))
        claimed.update(now)
        fate = _fate(promise, module, {node: called[node] for node in now}, live)
        if fate:
            fates[fate] += 1
            continue
        reasons = refusals.reasons(path, promise.told_by) or [_spelled(promise, now)]
        missing.setdefault((module.of, "; ".join(reasons)), []).append(path)
    others = [node for node, name in called.items() if name in promise.operators and node not in claimed]
    return Account(
        idea=promise.idea,
        expected=len(expected),
        found=sum(fates.values()),
        fates=dict(fates.most_common()),
        beyond=len(others),
        missing=tuple(Missing(of=of, reason=why, modules=tuple(paths)) for (of, why), paths in missing.items()),
    )


def _called(optimized: Program, node: Node) -> str:
    """What an operator is called; the last call of an idea that ATen has no operator for has that idea's name."""
    name = dialect.plain_name(node)
    return "quick_gelu" if name == "mul" and isinstance(quick_gelu(optimized, node), Found) else name


def _fate(promise: _Promise, module: _Module, now: Mapping[Node, str], live: set[Node]) -> str:
    """What a module became, or nothing where it is not one operator."""
    if not now:
        return "unread"
    if promise.idea == "attention" and _spells_attention(_held(now, live)):
        return ""
    single = next((name for name in now.values() if name in promise.operators), "")
    if single or promise.idea != "norm" or not module.held["batch_norm"]:
        return single
    taken_up = next(filter(_is_affine, now.values()), "")
    return f"folded into {taken_up}" if taken_up else ""


def _spelled(promise: _Promise, now: Sequence[Node]) -> str:
    """The reason where no pass gave one: what the module is spelled with, without its layout and its layers."""
    rows = [(dialect.plain_name(node), dialect.info(node)) for node in now]
    names = list(
        dict.fromkeys(
            name
            for name, row in rows
            if row is None or name in _PRODUCTS or row.category not in ("view", "shape", "make", "affine")
        )
    )
    shown = ", ".join(names[:_SHOWN]) + (" …" if len(names) > _SHOWN else "")
    return f"spelled with {shown}, in a way that no pass knows" if shown else f"no {promise.idea} was captured in it"


def _modules(source: Program) -> dict[str, _Module]:
    """Path → module, of all that hold a call which depends on an input, in the order they are first entered."""
    live = _live(source)
    found: dict[str, _Module] = {}
    for node in source.calls():
        held = _held((node,), live)
        for path, kind in provenance.modules(node) if held else ():
            module = found.setdefault(path, _Module(kind.rpartition(".")[2]))
            module.held.update(held)
            module.origins.update(provenance.origins(node))
    return found


def _held(nodes: Iterable[Node], live: set[Node]) -> Counter[str]:
    """Operators among some calls by plain name, of those that depend on an input; a product where both factors do."""
    found: Counter[str] = Counter()
    for node in nodes:
        name = dialect.plain_name(node)
        factors = [operand in live for operand in node.all_input_nodes]
        if node in live and (name not in _PRODUCTS or sum(factors) >= min(2, len(factors))):
            found[name] += 1
    return found


def _live(program: Program) -> set[Node]:
    """Nodes that depend on an input, if only on its batch."""
    found: set[Node] = set(program.placeholders)
    for node in program.calls():
        if any(operand in found for operand in node.all_input_nodes):
            found.add(node)
    return found


def _is_affine(name: str) -> bool:
    row = dialect.OPS.get(f"aten.{name}.default")
    return row is not None and row.category == "affine"


def _innermost(modules: Mapping[str, _Module]) -> list[str]:
    """Those in which none of the others lies."""
    around = {path[: match.start()] for path in modules for match in re.finditer(r"\.", path)}
    around |= {""} if any(modules.keys() - {""}) else set()
    return [path for path in modules if path not in around]


def _lies_in(path: str, module: str) -> bool:
    return not module or path == module or path.startswith(f"{module}.")
