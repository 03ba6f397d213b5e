"""What the compiler made of a quantized graph: which types the layers of an engine multiply. No torch.

With detailed profiling verbosity the builder logs a line for every layer of the engine, with the type of each operand.
An engine itself can be asked only where there is a GPU to load it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

_LAYER = re.compile(r"Name: ([^,]+), LayerType: (\w+), (.*)")
_PRODUCTS = ("gemm", "correlation", "runtime_fusion")
"""Kinds of layers that multiply, or may: products of matrices, convolutions, and what was fused around either."""
_ATTENTION = "_gemm_mha"
"""How names begin of layers that compute a whole attention."""
_PARTS = re.compile(r"(Inputs|Constants|Outputs): \[")
_OPERAND = re.compile(r"Dimensions: \[([\d,]*)\].*?Datatype: (\w+)")


def products(messages: Iterable[str]) -> dict[str, int]:
    """``Int8 x Int8`` → how many layers read these two types: of the first input, and of the largest operand beside it.

    Layers that compute a whole attention count as ``attention in FP8``.

    Args:
        messages: What the builder logged. Layers that read one operand multiply nothing and do not count.
    """
    found: Counter[str] = Counter()
    for line in (line for message in messages for line in message.splitlines()):
        layer = _LAYER.match(line)
        if layer is None:
            continue
        parts = dict(_parts(layer[3]))
        inputs = _OPERAND.findall(parts.get("Inputs", ""))
        if layer[1].startswith(_ATTENTION) and inputs:
            found[f"attention in {inputs[0][1]}"] += 1
        if layer[2] not in _PRODUCTS:
            continue
        others = [*inputs[1:], *_OPERAND.findall(parts.get("Constants", ""))]
        if inputs and others:
            found[f"{inputs[0][1]} x {max(others, key=_elements)[1]}"] += 1
    return dict(sorted(found.items()))


def _parts(text: str) -> Iterable[tuple[str, str]]:
    starts = list(_PARTS.finditer(text))
    ends = [*(each.start() for each in starts[1:]), len(text)]
    return ((each[1], text[each.end() : end]) for each, end in zip(starts, ends, strict=True))


def _elements(operand: tuple[str, str]) -> int:
    count = 1
    for size in filter(None, operand[0].split(",")):
        count *= int(size)
    return count
