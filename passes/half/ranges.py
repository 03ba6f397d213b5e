"""What a Program's values span on sample inputs, and what they lose when they are rounded to a half type."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from vlexport.calibration.ranges import ValueRange
from vlexport.ir import compat, dialect
from vlexport.ir.program import Program

NOISE_SAMPLES = 2
"""What rounding loses is a mean over some 10⁵ values of a tensor; how far they reach may hang on one image."""
ATTENTION = "aten.scaled_dot_product_attention.default"


@dataclass
class Seen:
    """What was measured over all samples.

    Attributes:
        values: float32 inputs, stored tensors and results of calls → their own range, and rounding them. Ranges are of
            all samples, what rounding does is of the first :data:`NOISE_SAMPLES`.
        through: Calls → the range of their result, and its change when their operands are rounded. Only of calls that
            cost little to compute twice.
        products: Attention → bound of |q·k| before the scale: the largest row norms of queries and keys, multiplied.
    """

    values: dict[Node, ValueRange] = field(default_factory=dict)
    through: dict[Node, ValueRange] = field(default_factory=dict)
    products: dict[Node, float] = field(default_factory=dict)


def measure(program: Program, samples: Sequence[tuple[Tensor, ...]], half: torch.dtype) -> Seen:
    """Run a float32 Program on samples and look at every value.

    Args:
        program: Not changed.
        samples: One tensor per input each.
        half: ``float16`` or ``bfloat16``.
    """
    seen = Seen()
    stored = {node: program.tensors[str(node.target)] for node in program.graph.nodes if node.op == "get_attr"}
    for node, tensor in stored.items():
        _look(seen.values, node, tensor, half)
    for number, sample in enumerate(samples):
        noise = number < NOISE_SAMPLES
        held: dict[Node, Any] = {**stored, **dict(zip(program.placeholders, sample, strict=True))}
        to_come = Counter(operand for node in program.calls() for operand in node.all_input_nodes)
        for node in program.placeholders:
            _look(seen.values, node, held[node], half if noise else None)

        def watch(
            node: Node,
            value: Any,
            held: dict[Node, Any] = held,
            to_come: Counter[Node] = to_come,
            noise: bool = noise,
        ) -> None:
            _look(seen.values, node, value, half if noise else None)
            if noise and is_cheap(node) and _is_single(value):
                _look_through(seen.through, node, value, held, half)
            if dialect.op_name(node) == ATTENTION:
                query, key = held[node.args[0]], held[node.args[1]]  # type: ignore[index]
                seen.products[node] = max(seen.products.get(node, 0.0), _product(query, key))
            held[node] = value
            for operand in node.all_input_nodes:
                to_come[operand] -= 1
                if to_come[operand] == 0:
                    del held[operand]

        program.run(*sample, observe=watch)
    return seen


def is_cheap(node: Node) -> bool:
    """Whether computing a call twice costs little."""
    row = dialect.info(node)
    computes = row is not None and row.category in ("affine", "elementwise", "reduction")
    return computes and not has_product(node) and not dialect.is_cast(node)


def has_product(node: Node) -> bool:
    """Whether a call multiplies and accumulates: convolutions, linear, matmul, attention."""
    row = dialect.info(node)
    return row is not None and row.macs is not None


def _is_single(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype is torch.float32


def _rounded(value: Any, half: torch.dtype) -> Any:
    return value.to(half).float() if _is_single(value) else value


def _look(into: dict[Node, ValueRange], node: Node, value: Any, half: torch.dtype | None) -> None:
    """Widen a range, and add what rounding to ``half`` loses unless that is None."""
    found = into.setdefault(node, ValueRange())
    for leaf in compat.leaves(value):
        if not _is_single(leaf):
            continue
        if half is None:
            found.widen(leaf.detach().numpy())
        else:
            found.update(leaf.detach().numpy(), _rounded(leaf.detach(), half).numpy())


def _look_through(
    into: dict[Node, ValueRange], node: Node, value: Tensor, held: dict[Node, Any], half: torch.dtype
) -> None:
    args: Any
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: _rounded(held[n], half))
    found: Tensor = node.target(*args, **kwargs)  # type: ignore[operator]
    into.setdefault(node, ValueRange()).update(value.numpy(), found.numpy())


def _product(query: Tensor, key: Tensor) -> float:
    rows = [each.double().norm(dim=-1).amax(-1) for each in (query, key)]
    if rows[0].shape == rows[1].shape:
        return float((rows[0] * rows[1]).max())  # head by head
    return float(rows[0].max() * rows[1].max())
