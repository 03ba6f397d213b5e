"""Where a node came from: the only reader and writer of node metadata.

Every node carries, in ``node.meta["custom"]["vlexport"]`` (the one key that survives saving and loading):

- ``origins``: ordinals of the nodes of the captured graph that it stands for, sorted. The *last* one is the node whose
  value it computes, so values of two Programs can be compared by it.
- ``path``: the module path (``blocks.3.attn.qkv``), empty for the root module.
- ``source``: ``file.py:LINE`` of the user's ``forward``, never an absolute path.
- ``decision``: why a pass left the node as it is, where it was asked to decide once.

Calibration tables, bisect, explain and artifact names key on these, never on FX names.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Any

from torch.fx import Graph, Node

from vlexport.ir import dialect

_KEY = "vlexport"
_KEPT = ("val", "nn_module_stack", "custom")
_NO_MODULE = "_empty_nn_module_stack"
_ROOT = re.compile(r"^L\['self'\]\.?")
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)')


def _record(node: Node) -> dict[str, Any]:
    return dict((node.meta.get("custom") or {}).get(_KEY) or {})


def _write(node: Node, record: dict[str, Any]) -> None:
    node.meta["custom"] = {**(node.meta.get("custom") or {}), _KEY: record}


def stamp(graph: Graph) -> None:
    """Give every computing node of a freshly captured graph its ordinal, module path and source line.

    Metadata that cannot travel (stack traces with absolute paths, tracer notes) is dropped.
    """
    for ordinal, node in enumerate(n for n in graph.nodes if n.op == "call_function"):
        record = {"origins": [ordinal], "path": _path_from_stack(node), "source": _source_from_trace(node)}
        node.meta = {key: node.meta[key] for key in _KEPT if key in node.meta}
        _write(node, record)


def is_stamped(graph: Graph) -> bool:
    """Whether every computing node carries origins."""
    return all(origins(n) for n in graph.nodes if n.op == "call_function")


def origins(node: Node) -> tuple[int, ...]:
    """Ordinals of the captured nodes that ``node`` stands for; empty for inputs and parameters."""
    return tuple(_record(node).get("origins", ()))


def module_path(node: Node) -> str:
    """Module path of ``node``; empty for the root module, inputs and parameters."""
    return str(_record(node).get("path", ""))


def source_line(node: Node) -> str:
    """``file.py:LINE`` of the user's code that made ``node``, or an empty string."""
    return str(_record(node).get("source", ""))


def modules(node: Node) -> tuple[tuple[str, str], ...]:
    """(path, class) of the modules around ``node``, outermost first; the root's path is empty.

    A class is ``package.module.Name``. The second call of one module has a path of its own (``act@1``).
    """
    entries = (node.meta.get("nn_module_stack") or {}).values()
    pairs = [(str(e[0]), e[1]) for e in entries if isinstance(e, (tuple, list)) and len(e) > 1]
    return tuple(
        (_ROOT.sub("", path), kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}")
        for path, kind in pairs
        if not path.startswith(_NO_MODULE)
    )


def stack(node: Node) -> tuple[str, ...]:
    """The modules around ``node``, outermost first, as exporters write them into an artifact."""
    return tuple(f"{key}: {entry}" for key, entry in (node.meta.get("nn_module_stack") or {}).items())


def lend_source_lines(graph: Graph) -> None:
    """Write every node's source line where torch's exporters look for a stack trace, and copy it into what they make.

    For graphs that are about to be lowered, never for a Program's own.
    """
    for node in graph.nodes:
        if line := source_line(node):
            node.meta["stack_trace"] = line


def describe(node: Node) -> str:
    """One phrase for messages: operator, module path and source line."""
    op = dialect.op_name(node).removesuffix(".default")
    path = module_path(node)
    source = source_line(node)
    return op + (f" in {path}" if path else "") + (f" ({source})" if source else "")


def lies_in(node: Node, pattern: str) -> bool:
    """Whether the module of ``node`` is one that a user's pattern names (``blocks.*.attn``), or lies in one."""
    path = module_path(node)
    return fnmatchcase(path, pattern) or fnmatchcase(path, f"{pattern}.*")


def remember(node: Node, decision: str) -> None:
    """Note on a node what a pass decided about it, so that the pass does not decide again."""
    _write(node, {**_record(node), "decision": decision})


def decision(node: Node) -> str:
    """What a pass decided about ``node``, or an empty string."""
    return str(_record(node).get("decision", ""))


def inherit(new: Node, *, value_of: Node, merges: Sequence[Node] = ()) -> None:
    """Stamp a node that a pass made.

    Args:
        new: The node just made.
        value_of: The node whose value ``new`` computes; path and source come from the first merged node that has a
            path, else from it.
        merges: Further nodes that ``new`` stands for.
    """
    own = origins(value_of)
    others = sorted({o for node in merges for o in origins(node)} - set(own))
    main = next((n for n in (*merges, value_of) if module_path(n)), value_of)
    _write(
        new,
        {
            "origins": [*others, *own],
            "path": module_path(main),
            "source": source_line(main),
        },
    )
    if "nn_module_stack" in main.meta:
        new.meta["nn_module_stack"] = main.meta["nn_module_stack"]


def _path_from_stack(node: Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    paths = [str(entry[0]) for entry in stack.values() if isinstance(entry, (tuple, list))]
    last = paths[-1] if paths else ""
    return "" if last.startswith(_NO_MODULE) else _ROOT.sub("", last)


def _source_from_trace(node: Node) -> str:
    """The innermost frame of a ``forward`` outside torch, with a path that names no machine."""
    found = ""
    for frame in _FRAME.finditer(node.meta.get("stack_trace") or ""):
        file = PurePosixPath(frame["file"].replace("\\", "/"))
        if "torch" in file.parts and "site-packages" in file.parts[: file.parts.index("torch")]:
            continue
        if frame["file"].startswith("torch/"):
            continue
        found = f"{_portable(file)}:{frame['line']}"
    return found


def _portable(file: PurePosixPath) -> str:
    """Path below site-packages, or the last two parts of any other absolute path."""
    parts = file.parts
    if "site-packages" in parts:
        return "/".join(parts[parts.index("site-packages") + 1 :])
    return file.name if file.is_absolute() else str(file)
