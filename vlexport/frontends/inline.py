"""Regions that torch wraps for a mode (``no_grad``, ``autocast(enabled=False)``) become plain calls again.

At inference such a mode changes nothing; a region in which autocast is *on* does, and is refused.
"""

from __future__ import annotations

import operator
from typing import Any

from torch.export import ExportedProgram
from torch.fx import Node

from vlexport.core.errors import CaptureError

_SUBGRAPH_ARGUMENT = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}
"""Higher-order operator → position of its sub-graph; the arguments behind it are the sub-graph's inputs."""


def inline_regions(exported: ExportedProgram) -> ExportedProgram:
    """Inline every wrapped region, in place.

    Raises:
        CaptureError: VLX0303 when ``forward`` switches autocast on for the CPU.
    """
    regions = [n for n in exported.graph.nodes if _region_name(n) in _SUBGRAPH_ARGUMENT]
    for node in regions:
        _inline(exported, node)
    return inline_regions(exported) if regions else exported  # regions may hold regions


def _region_name(node: Node) -> str:
    return getattr(node.target, "__name__", "") if node.op == "call_function" else ""


def _inline(exported: ExportedProgram, node: Node) -> None:
    name = _region_name(node)
    if name == "wrap_with_autocast" and node.args[0] == "cpu" and node.args[2]:
        raise CaptureError(
            "VLX0303",
            "forward switches autocast on, so its precision is not the model's own",
            hint="take torch.autocast out of forward; a build chooses precision with --precision",
        )
    position = _SUBGRAPH_ARGUMENT[name]
    reader: Any = node.args[position]
    subgraph = getattr(exported.graph_module, reader.target).graph
    mapping: dict[Node, Any] = {}
    operands = iter(node.args[position + 1 :])
    results: Any = ()
    with exported.graph.inserting_before(node):
        for inner in subgraph.nodes:
            if inner.op == "placeholder":
                mapping[inner] = next(operands)
            elif inner.op == "output":
                results = inner.args[0]
            else:
                mapping[inner] = exported.graph.node_copy(inner, mapping.__getitem__)
                mapping[inner].meta = dict(inner.meta)
                if inner.op == "get_attr":  # a region inside this one
                    held = f"{reader.target}_{inner.target}"
                    setattr(
                        exported.graph_module,
                        held,
                        getattr(getattr(exported.graph_module, reader.target), inner.target),
                    )
                    mapping[inner].target = held
    for user in list(node.users):
        assert user.target is operator.getitem
        user.replace_all_uses_with(mapping[results[user.args[1]]])
        _rename_output(exported, user.name, mapping[results[user.args[1]]].name)
        exported.graph.erase_node(user)
    exported.graph.erase_node(node)
    if not reader.users:
        exported.graph.erase_node(reader)


def _rename_output(exported: ExportedProgram, old: str, new: str) -> None:
    for spec in exported.graph_signature.output_specs:
        if getattr(spec.arg, "name", None) == old:
            spec.arg.name = new
