"""Which forms are written: the farthest root of which one operator costs no more than what it replaces.

What a merge replaces is counted on the graph as it stands: a value that something else reads stays, and is no saving.

The rule: fewer calls or fewer MACs, never more MACs, and no more weights read unless MACs fall. Weights are counted
where they are read; one that another operator shares stays stored for it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from vlexport.ir import dialect
from vlexport.ir.program import Program
from vlexport.passes.affine.analysis import Analysis, Form, Miss
from vlexport.passes.affine.expression import elements, is_identity
from vlexport.passes.affine.taps import Taps
from vlexport.passes.layout.axis_maps import sizes_of, steps
from vlexport.passes.layout.views import Call, calls_of

PATTERN = "one convolution"


@dataclass(frozen=True)
class Merge:
    """One operator in place of several.

    Attributes:
        value: The node whose value it computes.
        form: What it computes.
        taps: Of its kernel.
        padding: Of every axis.
        views: Calls that arrange the root's axes before.
        consumed: Calls that nobody reads afterwards, ``value`` among them, operands before readers.
        macs: MACs of those calls, and of the one operator.
        weights: Weights that those calls read, and those of the one operator.
    """

    value: Node
    form: Form
    taps: tuple[Taps, ...]
    padding: tuple[int, ...]
    views: tuple[Call, ...]
    consumed: tuple[Node, ...]
    macs: tuple[int, int]
    weights: tuple[int, int]


def best(analysis: Analysis, node: Node) -> Merge | Miss | None:
    """The first of a value's forms that is worth it, that of the farthest root first; or why none is."""
    why: Miss | None = None
    for form in analysis.forms[node]:
        found = _worth(analysis, node, form)
        if isinstance(found, Merge):
            return found
        why = why or found
    return why


def _worth(analysis: Analysis, node: Node, form: Form) -> Merge | Miss | None:
    if is_identity(form.expression):
        return None
    consumed = _consumed(node, form.root)
    if len(consumed) < 2:
        shared = _shared(consumed, node, form)
        return Miss(PATTERN, shared) if shared and form.pays else None
    merge = written(analysis, node, form, consumed)
    if not isinstance(merge, Merge):
        return merge
    (macs, own_macs), (weights, own) = merge.macs, merge.weights
    calls = len(merge.views) + 1
    if own_macs > macs:
        return Miss(PATTERN, _dearer(consumed, node, form, macs))
    if own_macs == macs and own > weights:
        return Miss(PATTERN, f"it would need {own:,} weights for {weights:,}, and no fewer MACs")
    if calls > len(consumed) or (calls == len(consumed) and own_macs == macs):
        return Miss(PATTERN, "more reshapes and permutes would be left than operators saved")
    return merge


def written(analysis: Analysis, node: Node, form: Form, consumed: tuple[Node, ...]) -> Merge | Miss | None:
    """A form as one operator in place of ``consumed``, whether worth it or not; why or nothing where there is none."""
    fit = analysis.fitted(form)
    if fit is None:
        return Miss(PATTERN, "one convolution would need unequal padding on both sides")
    views = _views(form)
    if views is None or not any(form.root in each.all_input_nodes for each in consumed):
        return None
    program, spec = analysis.program, form.expression.spec
    macs = sum(map(analysis.macs, consumed))
    weights = sum(weights_read(program, each) for each in consumed)
    own = elements(spec, fit[0]) + (spec.outputs if spec.biased else 0)
    return Merge(node, form, *fit, views, consumed, (macs, form.macs), (weights, own))


def _views(form: Form) -> tuple[Call, ...] | None:
    if form.view is None:
        return ()
    before = sizes_of(form.root.meta["val"])
    found = (calls_of(spelling, before) for spelling in steps(form.view))
    return next((tuple(calls) for calls in found if calls is not None), None)


def _dearer(consumed: tuple[Node, ...], node: Node, form: Form, macs: int) -> str:
    shared = _shared(consumed, node, form)
    return shared or f"as one operator it would cost {form.macs:,} MACs, as it stands {macs:,}"


def _shared(consumed: tuple[Node, ...], node: Node, form: Form) -> str:
    """The first value on the way that something else reads too."""
    for each in _inside(node, form.root):
        others = [user for user in each.users if user not in consumed]
        if each not in consumed and others:
            return f"the {dialect.plain_name(each)}'s output is used by {len(others)} other(s)"
    return ""


def _inside(node: Node, root: Node) -> list[Node]:
    """Calls between a root and a value, readers first."""
    seen: dict[Node, None] = {}
    pending = [node]
    while pending:
        current = pending.pop()
        if current not in seen and current is not root and current.op == "call_function":
            seen[current] = None
            pending.extend(current.all_input_nodes)
    return list(seen)


def _consumed(node: Node, root: Node) -> tuple[Node, ...]:
    """What nobody reads when nobody reads ``node`` any more, up to ``root``; operands before readers."""
    gone: dict[Node, None] = {node: None}
    pending = [each for each in node.all_input_nodes if each is not root]
    while pending:
        operand = pending.pop()
        if operand in gone or operand.op != "call_function" or not gone.keys() >= set(operand.users):
            continue
        gone[operand] = None
        pending.extend(each for each in operand.all_input_nodes if each is not root)
    return tuple(reversed(gone))


def weights_read(program: Program, node: Node) -> int:
    """Elements of the stored floating tensors that a call reads."""
    stored = (program.tensor_of(each) for each in node.all_input_nodes)
    return sum(tensor.numel() for tensor in stored if tensor is not None and tensor.is_floating_point())
