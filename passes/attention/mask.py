"""The mask of an attention, in one spelling: nothing, ``is_causal``, a boolean mask, or a float mask.

What is added to the scores and what overwrites them is taken apart into its parts, each in its smallest shape, and put
together again. A part that follows from stored tensors alone is looked at: zeros go; one that hides places, but none of
a query's keys all, is a boolean mask; the lower triangle is ``is_causal``.

A hidden place's weight is 0, since ``exp`` of less than −745 is; so what is hidden by :data:`HIDES` or less and what is
hidden by −∞ are the same, as long as each query sees a key.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from vlexport.ir import dialect
from vlexport.ir.program import Program
from vlexport.passes.attention.arrangement import Made, Stored, Tree, arranged, made_count
from vlexport.passes.attention.axes import Axes, Axis, aligned, axes_before, is_layout, leaves, sizes_of
from vlexport.passes.attention.scores import Hidden, RefusedError, Term, number_of
from vlexport.passes.attention.site import Site
from vlexport.passes.attention.stored_values import StoredValues

aten = torch.ops.aten
HIDES = -3e4
"""What a mask adds where it hides; no less is taken for it. Scores of one query would have to differ by as much."""
ABSORBS = -1e30
"""Below this a float64 holds nothing of a score that is added: hiding by adding and by overwriting are the same."""
_PLAIN = 1e3
_TOGETHER = "several masks hide places: together they may hide all keys of a query"
_SEES_NOTHING = "a mask hides all keys of a query: softmax gives no number there, attention gives 0"
_MAX_UP = 32
_PASSES_ON = (
    "aten.mul.Tensor", "aten.mul.Scalar", "aten.div.Tensor", "aten.div.Scalar", "aten.clone.default",
    "aten.expand.default", "aten.slice.Tensor", "aten.select.int", "aten.cat.default",
)  # fmt: skip
"""What leaves −∞ where it is."""


@dataclass(frozen=True)
class Mask:
    """What attention is called with: the operand, or None, and ``is_causal``."""

    operand: Tree | None
    causal: bool


@dataclass(frozen=True)
class _Shown:
    """Places that are seen, known. ``node`` holds just that, where one does."""

    value: Tensor
    axes: Axes
    node: Node | None


def mask_of(ir: Program, values: StoredValues, site: Site, wanted: Axes) -> Mask:
    """The mask of an attention.

    Args:
        ir: Where it stands.
        values: Of ``ir``.
        site: The attention.
        wanted: Axes of the scores: batch, heads, rows, keys.

    Raises:
        RefusedError: Where attention has no mask that does the same.
    """
    terms: list[Term] = []
    hidden = list(site.hidden)
    for term in site.terms:
        for part in _parts(ir, values, term, site):
            if isinstance(part, Term):
                terms.append(part)
            else:
                hidden.append(part)
    shown: list[_Shown] = []
    terms = list(_looked_at(values, terms, site, shown))
    known = [values.of(term.node) for term in terms]
    plain = all(v is None or _is_plain(v * t.weight) for v, t in zip(known, terms, strict=True))
    seen_at_run_time: Hidden | None = None
    trees: list[Tree] = []
    for each in hidden:
        value = values.of(each.node)
        if value is not None:
            visible = value if not each.when else value.logical_not()
            if visible.all():
                continue
            if not _sees_a_key(visible, each.axes, site.keys):
                if each.at is not site.root:
                    raise RefusedError(each.at, _SEES_NOTHING)
                seen_at_run_time = each
                continue
            if each.fill > HIDES:
                raise RefusedError(each.at, f"scores are overwritten by {each.fill:g}, which hides nothing for certain")
            if each.fill > float("-inf") and any(v is None for v in known):
                raise RefusedError(each.at, f"scores are overwritten by {each.fill:g} beside a computed mask")
            if each.fill > float("-inf") and not plain:
                raise RefusedError(each.at, _TOGETHER)
            shown.append(_Shown(visible, each.axes, None if each.when else each.node))
        elif each.at is site.root and not terms and not shown:
            seen_at_run_time = each
        elif each.fill > ABSORBS or each.fill == float("-inf"):
            raise RefusedError(
                each.at, f"a computed mask overwrites scores by {each.fill:g}: where it hides all keys of a query, "
                "attention would give another value",
            )  # fmt: skip
        else:
            trees.append(_added(ir, each, site, wanted))
    infinite = [v for v in known if v is not None and bool(v.isinf().any())]
    if len(shown) + len(infinite) + len(trees) > 1:  # where no key is left, the order of what overwrites decides
        raise RefusedError(site.root, _TOGETHER)
    trees = [_weighted(_smallest(ir, t.node, t.axes, wanted, site), t.weight) for t in terms] + trees
    _require_dtype(terms, site)
    if seen_at_run_time is not None:
        return Mask(_smallest(ir, seen_at_run_time.node, seen_at_run_time.axes, wanted, site), causal=False)
    total: Tree | None = None
    for tree in trees:
        total = tree if total is None else Made(aten.add.Tensor, (total, tree))
    if not shown:
        return Mask(total, site.causal)
    if total is None and _is_lower_triangle(shown[0], wanted):
        return Mask(None, causal=True)
    node = shown[0].node or Stored("visible", shown[0].value.contiguous())
    visible_tree = _stored(_smallest(ir, node, shown[0].axes, wanted, site))
    if total is None:
        return Mask(visible_tree, causal=False)
    return Mask(Made(aten.where.ScalarOther, (visible_tree, total, float("-inf"))), causal=False)


def _parts(ir: Program, values: StoredValues, term: Term, site: Site) -> Iterator[Term | Hidden]:
    """What a float mask is the sum of, and what overwrites it."""
    node, axes = _top(term.node, term.axes)
    name = dialect.op_name(node)
    operands = dialect.operands(node) if node.op == "call_function" else ()
    if name == "aten.add.Tensor" and operands[2] == 1 and all(isinstance(a, Node) for a in operands[:2]):
        for operand in operands[:2]:
            yield from _parts(ir, values, Term(operand, aligned(operand, axes), term.weight), site)
        return
    if name in ("aten.where.ScalarOther", "aten.where.self") and isinstance(operands[1], Node):
        condition, kept = operands[:2]
        fill = number_of(ir, operands[2])
        seen = values.of(condition)
        around = aligned(condition, axes)
        useful = fill is not None and term.weight == 1 and seen is not None and _sees_a_key(seen, around, site.keys)
        if useful and seen is not None and fill is not None and (fill <= HIDES or bool(seen.all())):
            yield Hidden(condition, around, False, fill, site.root)
            yield from _parts(ir, values, Term(kept, aligned(kept, axes), term.weight), site)
            return
    if len(site.nodes) > 1 and values.of(node) is None and _hides_at_run_time(ir, node):
        raise RefusedError(
            node, "a computed mask adds −inf: where it hides all keys, attention would give another value"
        )
    yield term


def _hides_at_run_time(ir: Program, node: Node) -> bool:
    """Whether −∞ is written where a computed condition says so, by a call or above what only scales, cuts or joins."""
    pending = [node]
    for _ in range(_MAX_UP):
        if not pending:
            return False
        node = pending.pop()
        name = dialect.op_name(node)
        if name.startswith(("aten.where.", "aten.masked_fill.")):
            if any(number_of(ir, operand) == float("-inf") for operand in node.args):
                return True
        elif name in _PASSES_ON or is_layout(node) or dialect.is_cast(node):
            pending += node.all_input_nodes
    return False


def _is_plain(value: Tensor) -> bool:
    """Whether a term neither hides nor makes up for what hides."""
    return bool(value.abs().max() <= _PLAIN)


def _sees_a_key(visible: Tensor, axes: Axes, keys: Axis) -> bool:
    """Whether there is a key for every query."""
    along = [i for i, axis in enumerate(axes) if set(leaves(axis)) & set(leaves(keys))]
    for dim in reversed(along):
        visible = visible.any(dim)
    return bool(visible.all())


def _top(node: Node, axes: Axes) -> tuple[Node, Axes]:
    """The value above all layout calls."""
    for source, above in _sources(node, axes):
        node, axes = source, above
    return node, axes


def _looked_at(values: StoredValues, terms: list[Term], site: Site, shown: list[_Shown]) -> Iterator[Term]:
    """Terms that stay; those that only hide go to ``shown``."""
    known = [values.of(term.node) for term in terms]
    nothing = [value is not None and not value.any() for value in known]
    for term, value in zip(terms, known, strict=True):
        if value is not None and len(site.nodes) > 1 and not _sees_a_key(value > float("-inf"), term.axes, site.keys):
            raise RefusedError(site.root, _SEES_NOTHING)
    for place, (term, value) in enumerate(zip(terms, known, strict=True)):
        if nothing[place]:
            continue
        others = [v for i, v in enumerate(known) if i != place]
        plain = all(v is not None and _is_plain(v) for v in others)
        if value is not None and plain and term.weight > 0:
            seen = value == 0
            if bool((seen | (value * term.weight <= HIDES)).all()) and _sees_a_key(seen, term.axes, site.keys):
                shown.append(_Shown(seen, term.axes, None))
                continue
        yield term


def _added(ir: Program, hidden: Hidden, site: Site, wanted: Axes) -> Tree:
    zero = Stored("zero", torch.zeros((), dtype=site.root.meta["val"].dtype))
    condition = _smallest(ir, hidden.node, hidden.axes, wanted, site)
    if hidden.when:
        return Made(aten.where.ScalarSelf, (condition, hidden.fill, zero))
    return Made(aten.where.ScalarOther, (condition, zero, hidden.fill))


def _stored(tree: Tree) -> Tree:
    """A new tensor is stored in the shape that is wanted."""
    if not (isinstance(tree, Made) and tree.target is aten.reshape.default and isinstance(tree.args[0], Stored)):
        return tree
    source, sizes = tree.args
    if all(isinstance(size, int) for size in sizes):
        return Stored(source.name, source.value.reshape(sizes))
    return tree


def _weighted(tree: Tree, weight: float) -> Tree:
    return tree if weight == 1 else Made(aten.mul.Tensor, (tree, weight))


def _require_dtype(terms: list[Term], site: Site) -> None:
    for term in terms:
        own, wanted = term.node.meta["val"].dtype, site.root.meta["val"].dtype
        if own != wanted:
            raise RefusedError(term.node, f"the mask is {own}, the scores are {wanted}".replace("torch.", ""))


def _sources(node: Node, axes: Axes) -> Iterator[tuple[Node, Axes]]:
    """A mask and what stands above it, through layout calls and repetitions."""
    yield node, axes
    for _ in range(_MAX_UP):
        if is_layout(node):
            above = axes_before(node, axes)
            if above is None:
                return
            axes = above
        elif dialect.op_name(node) == "aten.expand.default":
            source = sizes_of(node.all_input_nodes[0])
            hidden = len(axes) - len(source)
            axes = tuple(() if size == 1 else axes[hidden + i] for i, size in enumerate(source))
        else:
            return
        node = node.all_input_nodes[0]
        yield node, axes


def _smallest(ir: Program, node: Node | Stored, axes: Axes, wanted: Axes, site: Site) -> Tree:
    """A mask's part in the scores' axes, 1 where it is repeated over all of one."""
    sources = list(_sources(node, axes)) if isinstance(node, Node) else [(node, axes)]
    own = {atom for axis in sources[-1][1] for atom in leaves(axis)}
    goal = tuple(axis if set(leaves(axis)) & own else () for axis in wanted)
    best: Tree | None = None
    for each, around in sources:
        tree = arranged(ir, each, _within(around, own), goal)
        if tree is not None and (best is None or made_count(tree) <= made_count(best)):
            best = tree
    if best is None:
        raise RefusedError(site.root, "the mask's axes are not those of the scores")
    return best


def _within(axes: Axes, own: set[Any]) -> Axes:
    return tuple(tuple(leaves(axis)) for axis in axes) if own else axes


def _is_lower_triangle(shown: _Shown, wanted: Axes) -> bool:
    """Whether a query sees itself and what stands before it, both counted from the first."""
    rows, keys = (leaves(axis) for axis in wanted[-2:])
    value = shown.value
    if value.ndim < 2 or value[..., 0, 0].numel() != 1:
        return False
    square, around = value.reshape(value.shape[-2:]), [leaves(a) for a in shown.axes[-2:]]
    if around == [keys, rows]:
        square, around = square.mT, around[::-1]
    if around != [rows, keys]:
        return False
    return torch.equal(square, torch.ones_like(square).tril())
