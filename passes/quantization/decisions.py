"""Decisions: one table of what is quantized and how, keyed by where values came from. No torch.

Calls and values are named by the keys of :mod:`vlexport.calibration.keys`. A target spells what stands here.
"""

from __future__ import annotations

from vlexport.core.artifact import Frozen
from vlexport.core.grids import GRIDS, Grid


class ValueDecision(Frozen):
    """A computed value that is rounded to integers.

    Attributes:
        value: Its key.
        place: What messages call it.
        low: Lower bound of the range that the integers span; of all values that share the scale.
        high: Upper bound.
        type: Name of the grid.
        scale: Step between two integers, float32.
        zero_point: The integer that stands for 0.
        for_all: Every reader gets the rounded value; else only calls that are quantized do.
    """

    value: str
    place: str
    low: float
    high: float
    type: str
    scale: float
    zero_point: int
    for_all: bool = False

    @property
    def grid(self) -> Grid:
        """Where the integers lie; ``e4m3`` has no grid."""
        return GRIDS[self.type]


class LayerDecision(Frozen):
    """A call that computes with integers.

    Attributes:
        call: Its key.
        op: Plain name of the operator.
        module: Module path.
        operands: Keys of the computed operands, in order.
        weight: Grid of the stored operand, a scale an output channel, or its palette; empty where there is none.
        block: Input features of the stored operand that share a scale; 0 where a channel has one. Of a palette, output
            channels that share it; 0 where all do.
        bias: ``int32`` at the product of both scales, or ``float``.
        output: Key of the value that is rounded again behind the call; empty where it stays in float.
        residual: Key of the value that is added to the result as it was rounded for others; empty where none is.
        dynamic: What is computed is rounded by the range that it has at that run; ``operands`` is empty then.
    """

    call: str
    op: str
    module: str
    operands: tuple[str, ...]
    weight: str = ""
    block: int = 0
    bias: str = "float"
    output: str = ""
    residual: str = ""
    dynamic: bool = False


class Decisions(Frozen):
    """Everything that is quantized in a Program.

    Attributes:
        scheme: Id of the scheme that asked for it.
        scales: Type whose numbers all scales are.
        layers: Calls, in the Program's order.
        values: Values, in the Program's order.
    """

    scheme: str
    scales: str = "float32"
    layers: tuple[LayerDecision, ...] = ()
    values: tuple[ValueDecision, ...] = ()

    def by_value(self) -> dict[str, ValueDecision]:
        """Key → decision."""
        return {each.value: each for each in self.values}

    def text(self) -> str:
        """One line a call, then one a value, for people."""
        lines = [f"scheme {self.scheme}"]
        for layer in self.layers:
            weight = f" x {layer.weight}, bias {layer.bias}" if layer.weight else ""
            output = f" -> {layer.output}" if layer.output else ""
            output += f" + {layer.residual}" if layer.residual else ""
            read = ", ".join(layer.operands) or ("ranges at run time" if layer.dynamic else "its operands in float")
            lines.append(f"{layer.op} {layer.call} in {layer.module}: {read}{weight}{output}")
        lines += [
            f"{value.value}: {value.low:.4g}…{value.high:.4g} {value.type} scale {value.scale:.4g} "
            f"zero {value.zero_point}{' for all readers' if value.for_all else ''}"
            for value in self.values
        ]
        return "\n".join(lines) + "\n"
