"""Which ONNX operators a TensorRT takes, checked against a table with sources before anything is built.

``op_support.json`` holds, for every operator, since which version it is taken and with which types; ``op_limits`` holds
what a type cannot say. The table may lag behind TensorRT: it judges what it knows and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from importlib import resources
from typing import Any

import onnx_ir

from vlexport.core.artifact import Frozen
from vlexport.core.device_profiles import DeviceProfile
from vlexport.core.errors import CapabilityError
from vlexport.targets.onnx.model import describe, module_path
from vlexport.targets.tensorrt.op_limits import EVERYWHERE, LIMITS, RTX_LIMITS

_STANDARD = ("", "ai.onnx")
_TYPED_INPUT = {"Where": 1, "OneHot": 2}
"""The operand that the table's types are about, where it is not the first."""
_TYPED_OUTPUT = ("ConstantOfShape", "Constant", "EyeLike", "RandomNormalLike", "RandomUniformLike")
_UNTYPED = ("If", "Loop", "Scan")


class Problem(Frozen):
    """A node that a TensorRT refuses.

    Attributes:
        node: Its name in the graph.
        operator: Its ONNX operator.
        described: Operator, module path and name in one phrase.
        path: The module of the user's model that it comes from, or empty.
        line: ``file.py:LINE`` of the user's code, or empty.
        reason: Why it is refused.
    """

    node: str
    operator: str
    described: str
    path: str
    line: str
    reason: str

    @property
    def where(self) -> str:
        """Node, module path and source line."""
        return self.described + (f", {self.line}" if self.line else "")

    def error(self, device: DeviceProfile) -> CapabilityError:
        """As what a plan lists and a build raises."""
        return CapabilityError(
            "VLX0503", f"{runtime_of(device)} takes no such {self.operator}: {self.reason}", where=self.where,
            hint="rewrite that line with other operators; if that TensorRT is known to take it, "
            "--set tensorrt.check_operators=false",
        )  # fmt: skip


@lru_cache(maxsize=1)
def table() -> dict[str, Any]:
    """``op_support.json``: sources, types, operators by version."""
    text = resources.files("vlexport.targets.tensorrt").joinpath("op_support.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def runtime_of(device: DeviceProfile) -> str:
    """What reads the graph on a device, for messages."""
    if "tensorrt-rtx" in device.facts:
        return f"TensorRT for RTX {device.facts['tensorrt-rtx'].value}"
    return f"TensorRT {device.facts['tensorrt'].value}" if "tensorrt" in device.facts else "TensorRT"


def largest_opset(device: DeviceProfile) -> int:
    """The newest opset that the device's parser takes; of an unknown version, that of the newest in the table."""
    if "opset-max" in device.facts:
        return int(device.facts["opset-max"].value)
    return int(table()["opset_max"][-1]["opset"])


def oldest_tensorrt(opset: int) -> str:
    """The oldest TensorRT in the table whose parser takes an opset."""
    return next(str(row["since"]) for row in table()["opset_max"] if row["opset"] >= opset)


def unsupported(model: onnx_ir.Model, device: DeviceProfile, lines: Mapping[str, str] | None = None) -> list[Problem]:
    """Every node that TensorRT on a device refuses.

    Args:
        model: With shapes and types.
        device: Whose version decides; the newest in the table where the profile names none.
        lines: Node name → source line.
    """
    found = []
    for node in onnx_ir.traversal.RecursiveGraphIterator(model.graph):
        reason = _refused(node, device)
        if reason:
            name = str(node.name or "")
            found.append(
                Problem(
                    node=name, operator=node.op_type, described=describe(node), path=module_path(node),
                    line=(lines or {}).get(name, ""), reason=reason,
                )
            )  # fmt: skip
    return found


def _refused(node: onnx_ir.Node, device: DeviceProfile) -> str:
    if node.domain not in _STANDARD:
        return f"its domain {node.domain} is not ONNX's own"
    rows = table()["operators"].get(node.op_type)
    if rows is None:
        return "its parser has no such operator"
    version = _numbers(device.facts["tensorrt"].value) if "tensorrt" in device.facts else None
    known = [row for row in rows if version is None or _numbers(row["since"]) <= version]
    if not known:
        return f"the operator came with TensorRT {rows[0]['since']}"
    rtx = "tensorrt-rtx" in device.facts
    if rtx and node.op_type in table()["rtx_lacks"]:
        return "it ships no implementation of the operator"
    own = [limits[node.op_type] for limits in (LIMITS, *([RTX_LIMITS] if rtx else [])) if node.op_type in limits]
    reasons = [_wrong_type(node, known[-1]["types"]), *(limit(node) for limit in (*EVERYWHERE, *own))]
    return next(filter(None, reasons), "")


def _wrong_type(node: onnx_ir.Node, groups: str) -> str:
    if node.op_type in _UNTYPED:
        return ""
    values = node.outputs if node.op_type in _TYPED_OUTPUT or not node.inputs else node.inputs
    position = 0 if values is node.outputs else _TYPED_INPUT.get(node.op_type, 0)
    value = values[position] if len(values) > position else None
    if value is None or value.dtype is None:
        return ""
    taken = [name for group in groups.split() for name in table()["types"][group]]
    name = value.dtype.name
    # The parser casts DOUBLE to FLOAT. Source: the note above the table.
    if name in taken or (name == "DOUBLE" and "FLOAT" in taken):
        return ""
    return f"its type is {name}, it takes {', '.join(taken)}"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))
