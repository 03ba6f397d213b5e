"""Which calls of a Program may compute in a half type, and why the others stay in float32.

A call stays for what it is (norms, softmax, sums of many elements, what decides by equality or counts), for what was
measured (a value beyond the half type, digits that its result hangs on), or because only calls that stay stand around
it. Where a result hangs on digits, what computes its operands stays as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import Node

from vlexport.ir import compat, dialect, provenance
from vlexport.ir.program import Program
from vlexport.ir.rounded import nearest_half
from vlexport.passes.half.ranges import Seen, has_product

MANY = 64
"""Terms from which a sum stays in float32: a half sum of n equal terms may be n·2⁻¹² off."""
LOST_DB = {torch.float16: 40.0, torch.bfloat16: 25.0}
"""Rounding alone leaves about 73 dB in float16 and 55 dB in bfloat16. A value that keeps less than this lies below the
smallest normal number, or is a difference of near equals."""
SCALAR_LOSS = 0.01
"""Relative error of a written number (1e-12, 1e9) that counts as losing it."""
STAYS = "fp32: "
"""What is noted on a call that was left in float32 starts so; its reason follows."""
FEEDS = 4.0
"""A value that is so many times smaller than the sum it becomes part of rounds so much finer, and may be rounded."""

Cause = Literal["kind", "digits", "fit", "fixed", "user"]
_KINDS = {
    **dict.fromkeys(
        ("layer_norm", "group_norm", "rms_norm", "instance_norm", "var", "std", "var_mean", "norm",
         "linalg_vector_norm", "linalg_norm"),
        "a norm sums squares",
    ),
    **dict.fromkeys(("softmax", "_softmax", "log_softmax", "logsumexp"), "it sums exponentials"),
    **dict.fromkeys(
        ("cumsum", "prod", "scatter_add", "scatter_reduce", "index_add"), "it adds up, or multiplies, without bound"
    ),
    **dict.fromkeys(("topk", "sort", "argsort", "argmax", "argmin"), "rounding makes scores equal"),
    **dict.fromkeys(
        ("floor", "ceil", "round", "trunc", "remainder", "fmod", "floor_divide", "one_hot", "grid_sampler"),
        "it counts or addresses",
    ),
}  # fmt: skip
_ADDENDS = {"aten.addmm.default": ("self",), "aten.baddbmm.default": ("self",)}
_ORDERED = ("max.dim", "min.dim", "div.Tensor_mode", "div.Scalar_mode")
_SUMS = ("mean", "sum", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "avg_pool1d", "avg_pool2d")
_STARTS = ("aten.embedding.default",)


@dataclass(frozen=True)
class Kept:
    """A call that stays in float32: why, and what kind of reason that is (``fit``: a half type cannot hold it)."""

    node: Node
    reason: str
    cause: Cause


@dataclass(frozen=True)
class Choice:
    """Calls to be typed, in order, and those that stay."""

    typed: tuple[Node, ...]
    kept: tuple[Kept, ...]


def candidates(program: Program) -> list[Node]:
    """Calls that compute float32 values and were not decided yet; parts of a tuple go with the call that made it."""
    return [n for n in program.calls() if _is_candidate(n)]


def comparisons(program: Program) -> list[Node]:
    """Calls that read float32 values and make none: what compares, and what picks an index."""
    return [n for n in program.calls() if _computes(n) and not singles(n.meta["val"]) and _reads_single(n)]


def fixed(program: Program) -> list[Node]:
    """Calls of which nothing is known: their result is float32 whatever they would read."""
    return [n for n in program.calls() if dialect.is_opaque(n) and singles(n.meta["val"])]


def choose(program: Program, seen: Seen, half: torch.dtype, *, margin: float, keep: tuple[str, ...] = ()) -> Choice:
    """Decide for every candidate.

    Args:
        program: In float32.
        seen: What was measured of it.
        half: The half type.
        margin: How much larger a value may be on unseen inputs.
        keep: Patterns of module paths that stay.
    """
    stays: dict[Node, Kept] = {}
    for node in candidates(program):
        pattern = next((p for p in keep if provenance.lies_in(node, p)), None)
        why: tuple[str, Cause] | None = (f"keep={pattern}", "user") if pattern is not None else None
        why = why or _unfit(program, node, seen, half, margin) or _by_kind(program, node) or _digits(node, seen, half)
        if why is not None:
            stays[node] = Kept(node, *why)
    for kept in list(stays.values()):
        if kept.cause in ("kind", "digits") and _hangs_on_digits(kept.node, seen, half):
            for node in _feeders(kept.node, seen):
                if _is_candidate(node) and node not in stays:
                    reason = f"{provenance.describe(kept.node)} hangs on its last digits"
                    stays[node] = Kept(node, reason, "digits")
    half_ones = _reached(program, stays)
    for node in candidates(program):
        if node not in half_ones and node not in stays:
            stays[node] = Kept(node, "only calls in float32 stand around it", "kind")
    in_order = candidates(program)
    return Choice(tuple(n for n in in_order if n in half_ones), tuple(stays[n] for n in in_order if n in stays))


def singles(value: Any) -> list[Tensor]:
    """The float32 tensors of a recorded value."""
    return [leaf for leaf in compat.leaves(value) if isinstance(leaf, Tensor) and leaf.dtype is torch.float32]


def parts(node: Node) -> list[Node]:
    """The calls that read single tensors out of a tuple that ``node`` makes."""
    if isinstance(node.meta["val"], Tensor):
        return []
    return [user for user in node.users if dialect.op_name(user) == "operator.getitem"]


def _is_candidate(node: Node) -> bool:
    stays = provenance.decision(node).startswith(STAYS)  # what other passes noted there is none of ours
    return _computes(node) and bool(singles(node.meta["val"])) and not stays


def _computes(node: Node) -> bool:
    row = dialect.info(node)
    return row is not None and row.category not in ("make", "shape", "quant") and not dialect.is_cast(node)


def _reads_single(node: Node) -> bool:
    return any(singles(operand.meta["val"]) for operand in node.all_input_nodes)


def _by_kind(program: Program, node: Node) -> tuple[str, Cause] | None:
    name = dialect.plain_name(node)
    if any(isinstance(a, torch.dtype) for a in (*node.args, *node.kwargs.values())):
        return "its type is written in the model", "fixed"
    if name in _KINDS:
        return _KINDS[name], "kind"
    if dialect.op_name(node).removeprefix("aten.") in _ORDERED:
        return _KINDS["topk" if name in ("max", "min") else "floor"], "kind"
    if name in _SUMS:
        terms = _terms(program, node)
        if terms > MANY:
            return f"it sums {terms} terms", "kind"
    return None


def _terms(program: Program, node: Node) -> int:
    """How many elements one element of a sum or mean is made of."""
    operand: Any = node.args[0]
    name = dialect.plain_name(node)
    if name.startswith("avg_pool"):
        window: Any = node.args[1]
        sizes = [window] if isinstance(window, int) else list(window)
        return int(math.prod(sizes * 2 if name.endswith("2d") and len(sizes) == 1 else sizes))
    given, left = (math.prod(program.sizes(each.meta["val"].shape, {})) for each in (operand, node))
    return given // max(left, 1)


def _unfit(program: Program, node: Node, seen: Seen, half: torch.dtype, margin: float) -> tuple[str, Cause] | None:
    """Whether a half type cannot hold an operand, a written number, a product on the way, or the result."""
    limit = torch.finfo(half).max
    name = str(half).removeprefix("torch.")
    factors = _factors(node)
    for operand, found in _measured(node, seen):
        what = str(operand.target) if operand.op != "call_function" else "its result" if operand is node else "a value"
        if found.largest * (1.0 if operand.op == "get_attr" else margin) > limit:
            times = "" if operand.op == "get_attr" else f", times {margin:g}"
            return f"{what} reaches {found.largest:.2g}{times}: beyond {name}", "fit"
        if found.kept_db < LOST_DB[half] and (operand is node or operand in factors):
            return f"{what} keeps {found.kept_db:.0f} dB when rounded to {name}: too small for it", "fit"
        if found.whole and found.noise > 0.0:
            return f"{what} holds whole numbers up to {found.largest:.6g}: {name} skips some", "fit"
    for number in _numbers(node):
        near = nearest_half(number, half)
        if math.isfinite(number) and number and not abs(near - number) <= SCALAR_LOSS * abs(number):
            return f"the number {number:g} becomes {near:g} in {name}", "fit"
    product = seen.products.get(node, 0.0)
    if product * margin > limit:
        return f"q·k may reach {product:.2g} before the scale, times {margin:g}: beyond {name}", "fit"
    if product and product * _scale(node) >= 1.0 / torch.finfo(half).eps:
        return f"its logits may reach {product * _scale(node):.2g}, where {name} counts in steps of 1", "digits"
    return None


def _factors(node: Node) -> list[Any]:
    """Operands of a product that was not computed twice: a bias may be tiny beside what it is added to."""
    if not has_product(node):
        return []
    target: Any = node.target
    named = zip(target._schema.arguments, dialect.operands(node), strict=True)
    return [operand for argument, operand in named if argument.name not in ("bias", *_ADDENDS.get(str(target), ()))]


def _scale(attention: Node) -> float:
    """What q·k is multiplied by."""
    query, _, _, _, _, _, scale, *_ = dialect.operands(attention)
    return float(scale) if scale is not None else float(int(query.meta["val"].shape[-1]) ** -0.5)


def _measured(node: Node, seen: Seen) -> Iterator[tuple[Node, Any]]:
    for each in (*node.all_input_nodes, node):
        if each in seen.values and singles(each.meta["val"]):
            yield each, seen.values[each]


def _numbers(node: Node) -> list[float]:
    if not dialect.stores_scalars(node):
        return []
    return [float(a) for a in (*node.args, *node.kwargs.values()) if isinstance(a, (int, float)) and a is not True]


def _hangs_on_digits(node: Node, seen: Seen, half: torch.dtype) -> bool:
    return node in seen.through and seen.through[node].kept_db < LOST_DB[half]


def _digits(node: Node, seen: Seen, half: torch.dtype) -> tuple[str, Cause] | None:
    if not _hangs_on_digits(node, seen, half):
        return None
    return f"its result keeps {seen.through[node].kept_db:.0f} dB when its operands are rounded", "digits"


def _feeders(node: Node, seen: Seen) -> list[Node]:
    """What computes the operands of ``node``, up to where the values are so small that they round much finer."""
    found: dict[Node, None] = {}
    pending = [(operand, seen.values[operand].largest) for operand in _calls_read(node) if operand in seen.values]
    while pending:
        current, size = pending.pop()
        if current in found or current not in seen.values or seen.values[current].largest * FEEDS < size:
            continue
        found[current] = None
        row = dialect.info(current)
        if row is not None and row.category in ("elementwise", "view", "shape"):
            pending += [(operand, size) for operand in _calls_read(current)]
    return list(found)


def _calls_read(node: Node) -> list[Node]:
    return [n for n in node.all_input_nodes if n.op == "call_function"]


def _reached(program: Program, stays: dict[Node, Kept]) -> set[Node]:
    """Calls that compute in half, and all that hang together with them: a cast to and fro would gain nothing."""
    free = {n for n in candidates(program) if n not in stays}
    pending = [n for n in free if _starts(n)]
    found = set(pending)
    while pending:
        current = pending.pop()
        for near in _neighbours(current):
            if near in free and near not in found:
                found.add(near)
                pending.append(near)
    return found


def _starts(node: Node) -> bool:
    return has_product(node) or dialect.op_name(node) in _STARTS


def _neighbours(node: Node) -> list[Node]:
    """Calls whose value ``node`` reads, or which read its; through the parts of a tuple."""
    makers = [n.args[0] if dialect.op_name(n) == "operator.getitem" else n for n in node.all_input_nodes]
    readers = [user for each in (node, *parts(node)) for user in each.users]
    return [n for n in (*makers, *readers) if isinstance(n, Node)]
