"""attention_operator: one operator of ONNX Runtime in the place of a site, serving those who read parts of it.

::

    k ─→ mean                   →   y, present = com.microsoft.Attention(x, w, b)       present: (2, batch, heads,
    q[:, :, :1] ─→ q₀ · kᵀ          k = present[0]                                       length, width)
                                    q₀ = reshape(x[:, :1] · w_q + b_q)

Key and value are given out as the operator's second output, which copies both: measured at 1.5 to 7 % of it, where a
projection of the key alone would be a sixth. A query of one position is projected once more.

Source: ONNX Runtime, contributed operators, com.microsoft.Attention (``present``); tried without ``past``, with and
without a bias, and as com.microsoft.QAttention has it, with 1.18.1 and 1.32.0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir

from vlexport.targets.onnx.attention_site import NoSite, Site
from vlexport.targets.onnx.attention_taps import KEY, QUERY, Tap
from vlexport.targets.onnx.model import OnnxModel
from vlexport.targets.onnx.rewriting import CONTRIB, Attributes, drop_unread, insert, stored, take_place

Project = Callable[[onnx_ir.Node, onnx_ir.Value], onnx_ir.Value]
"""Puts what projects a query in front of a node: one position of what is projected → (batch, 1, heads · width)."""


def require_servable(found: Site, value: onnx_ir.Value) -> None:
    """Refuse a site whose readers ask for a position that is not the same one at every length.

    Args:
        found: The site.
        value: What is projected: (batch, length, depth).

    Raises:
        NoSite: With the reason.
    """
    length = value.shape[1] if value.shape is not None else None
    if not isinstance(length, int) and any(each.part == QUERY for each in found.taps):
        raise NoSite("others read a query, and the number of positions is known at run time alone")


def written(
    model: OnnxModel, found: Site, kind: str, operands: Sequence[onnx_ir.Value | None], *,
    project: Project, attributes: Attributes | None = None,
) -> onnx_ir.Node:  # fmt: skip
    """Put the operator in front of what makes the site's result now, and let others read of it what they read.

    Args:
        model: Changed in place.
        found: The site.
        kind: Operator.
        operands: Its inputs, what is projected first.
        project: Projects the query of one position.
        attributes: Its attributes; those of the site by default.
    """
    last = found.made.producer()
    assert last is not None
    given = found.attributes() if attributes is None else attributes
    node = insert(model, last, kind, operands, domain=CONTRIB, attributes=given, origin=found.softmax)
    if found.taps:
        _serve(model, found, node, project)
    return node


def become(
    model: OnnxModel, found: Site, kind: str, operands: Sequence[onnx_ir.Value | None], *,
    project: Project, attributes: Attributes | None = None,
) -> None:  # fmt: skip
    """Put the operator in the place of all of a site."""
    node = written(model, found, kind, operands, project=project, attributes=attributes)
    take_place(model, found.made, node, origin=found.softmax, rows=found.rows)
    in_order(model, found)


def in_order(model: OnnxModel, found: Site) -> None:
    """Put readers of taps behind the operator that they read now."""
    if found.taps:
        model.model.graph.sort()


def cut(
    model: OnnxModel, before: onnx_ir.Node, value: onnx_ir.Value, at: tuple[int, int, int], *, name: str
) -> onnx_ir.Value:
    """A part of a value along one axis.

    Args:
        model: Changed in place.
        before: The node is put in front of this one.
        value: What is cut.
        at: Start, end and axis.
        name: Of the node.
    """
    start, end, axis = (
        stored(model, f"{name}_{what}", np.array([number], np.int64))
        for what, number in zip(("start", "end", "axis"), at, strict=True)
    )
    made = insert(model, before, "Slice", [value, start, end, axis], origin=before, name=name).outputs[0]
    made.type = value.type
    return made


def _serve(model: OnnxModel, found: Site, node: onnx_ir.Node, project: Project) -> None:
    """Let the readers of taps read the operator."""
    kept = {part: _kept(model, found, node, part) for part in {each.part for each in found.taps} - {QUERY}}
    for tap in found.taps:
        made = _query(model, found, node, tap, project) if tap.part == QUERY else kept[tap.part]
        if tap.order != tuple(range(len(tap.order))):
            name = f"{made.name}_{''.join(map(str, tap.order))}"
            turned = insert(
                model, node, "Transpose", [made], attributes={"perm": list(tap.order)}, origin=node, name=name
            )
            made = turned.outputs[0]
        made.type, made.shape = tap.read.type, tap.read.shape
        for user, index in tap.users:
            user.replace_input_with(index, made)
        maker = tap.read.producer()
        if maker is not None:
            drop_unread(model, maker)


def _kept(model: OnnxModel, found: Site, node: onnx_ir.Node, part: int) -> onnx_ir.Value:
    """The key or the value, (batch, heads, length, width), of the operator's second output."""
    if len(node.outputs) < 2:
        node.resize_outputs(2)
        node.outputs[1].name = f"{node.name}_present"
        node.outputs[1].type = found.made.type
    name = f"{node.name}_{'key' if part == KEY else 'value_in_heads'}"
    index = stored(model, f"{name}_index", np.array(part - KEY, np.int64))
    return insert(
        model, node, "Gather", [node.outputs[1], index], attributes={"axis": 0}, origin=node, name=name
    ).outputs[0]


def _query(model: OnnxModel, found: Site, node: onnx_ir.Node, tap: Tap, project: Project) -> onnx_ir.Value:
    """One position of the query, (batch, heads, 1, width)."""
    read, name = node.inputs[0], f"{node.name}_query_{tap.position}"
    assert read is not None
    position = cut(model, node, read, (tap.position, tap.position + 1, 1), name=f"{name}_read")
    flat = project(node, position)
    width = len(found.parts[QUERY].columns) // found.heads
    shape = stored(model, f"{name}_shape", np.array([-1, found.heads, 1, width], np.int64))
    return insert(model, node, "Reshape", [flat, shape], origin=node, name=name).outputs[0]
