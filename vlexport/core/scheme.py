"""QuantScheme: how a target wants a model quantized, on which device, as data with sources. No torch.

Each target keeps its own in ``targets/<id>/schemes.json``, the preferred one first. A pass that decides what is
quantized, and what spells it for the target, read the same scheme.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from importlib import resources
from typing import Literal

from pydantic import Field, model_validator

from vlexport.core.artifact import Frozen
from vlexport.core.bundle_schema import Machine
from vlexport.core.device_profiles import THIS, DeviceProfile
from vlexport.core.errors import CapabilityError
from vlexport.core.grids import GRIDS
from vlexport.core.palettes import PALETTES

Kind = Literal["static", "dynamic", "weights"]
QUANTIZED = ("int8", "fp8")
"""Precisions for which values are rounded to 8 bits."""
FILE = "schemes.json"
E4M3 = "e4m3"
"""The one type of a quantized tensor that is no grid of integers."""
_VERSION = re.compile(r"\d+(?:\.\d+)*")


class TensorRule(Frozen):
    """How one tensor of a call is quantized.

    Attributes:
        type: Name of a grid, ``e4m3``, or a palette.
        symmetric: No zero point, or that in the grid's middle.
        granularity: One scale for the tensor, for each output channel, or for each block of neighbours; one palette for
            the tensor or for each group of output channels.
        block: Neighbours that share a scale, or output channels that share a palette.
        dynamic: The range is found when the model runs.
        fixed_scale: A scale that holds whatever is measured, as of a softmax, whose values are known.
    """

    type: str
    symmetric: bool
    granularity: Literal["tensor", "channel", "block", "group"] = "tensor"
    block: int = Field(default=0, ge=0)
    dynamic: bool = False
    fixed_scale: float | None = Field(default=None, gt=0.0)

    @model_validator(mode="after")
    def _consistent(self) -> TensorRule:
        if self.type not in (*GRIDS, E4M3, *PALETTES):
            raise ValueError(f"no type '{self.type}'")
        if (self.granularity in ("block", "group")) != (self.block > 0):
            raise ValueError("blocks and groups have a size, and nothing else has")
        if self.granularity not in (("tensor", "group") if self.type in PALETTES else ("tensor", "channel", "block")):
            raise ValueError(f"{self.type} goes by no {self.granularity}")
        if self.type == E4M3 and not self.symmetric:
            raise ValueError("e4m3 has no zero point")
        return self


class LayerRule(Frozen):
    """How calls of some operators are quantized.

    Attributes:
        operators: Plain names (``linear``).
        activation: Of operands that are computed; None leaves them in float.
        weight: Of the operand that is stored; None where there is none, or it stays in float.
        bias: What a stored bias becomes: ``int32`` at the product of both scales, or it stays ``float``.
        output: What is asked of the result: ``quantized`` where the integer kernel needs its scale, else ``free``.
        why: Why so.
    """

    operators: tuple[str, ...]
    activation: TensorRule | None
    weight: TensorRule | None = None
    bias: Literal["int32", "float"] = "float"
    output: Literal["quantized", "free"] = "free"
    why: str


class QuantScheme(Frozen):
    """One way in which a target runs quantized models.

    Attributes:
        id: Its name within the target.
        precision: What ``--precision`` calls it.
        kind: Ranges of activations are ``static``, from calibration, or ``dynamic``, found at run time; or nothing but
            ``weights`` is quantized.
        instruction_set: Processor flags of which the device has at least one; empty asks for none.
        facts: Name of a device fact → its least version; a device with several has to have one such.
        layers: What is quantized; operators that are in none stay in float.
        shared: Plain names of operators through which one scale goes, so that values stay integers.
        in_float: Plain names of operators that stay in float although a kernel exists, and why.
        residual: Plain names of products; what is added to their results is read as it was rounded for others of them.
        scales: Type whose numbers scales are: ``float16`` where what is not quantized computes in it, so that a scale
            says the same in either type.
        remark: What a user should know of such an artifact before relying on it; said in the receipt.
        sources: What each statement rests on.
    """

    id: str
    precision: Literal["int8", "fp8"]
    kind: Kind = "static"
    instruction_set: tuple[str, ...] = ()
    facts: dict[str, str] = Field(default_factory=dict)
    layers: tuple[LayerRule, ...]
    shared: tuple[str, ...] = ()
    in_float: dict[str, str] = Field(default_factory=dict)
    residual: tuple[str, ...] = ()
    scales: Literal["float32", "float16"] = "float32"
    remark: str = ""
    sources: dict[str, str]

    @model_validator(mode="after")
    def _distinct(self) -> QuantScheme:
        named = [name for layer in self.layers for name in layer.operators]
        if len(set(named)) != len(named):
            raise ValueError(f"{self.id}: an operator has two rules")
        if both := set(named) & set(self.in_float):
            raise ValueError(f"{self.id}: {sorted(both)[0]} is quantized and in float")
        return self

    def layer(self, operator: str) -> LayerRule | None:
        """The rule for a call, by its plain name."""
        return next((each for each in self.layers if operator in each.operators), None)

    @property
    def on_grids(self) -> bool:
        """Whether all that is rounded lies on grids of integers. float8 keeps its digits at any size of a value."""
        rules = [rule for each in self.layers for rule in (each.activation, each.weight) if rule is not None]
        return all(rule.type in GRIDS for rule in rules)

    def weight_types(self) -> frozenset[str]:
        """Types that stored operands are rounded to."""
        return frozenset(each.weight.type for each in self.layers if each.weight is not None)

    def why_not(self, device: DeviceProfile, machine: Machine) -> str:
        """Why a device does not run it, or an empty string.

        Args:
            device: Where the model will run.
            machine: This machine, which the profile ``this`` stands for.
        """
        flags = machine.instruction_set if device.id == THIS else device.instruction_set
        if self.instruction_set and not set(self.instruction_set) & set(flags):
            return f"{device.id} has none of {', '.join(self.instruction_set)}"
        for name, least in self.facts.items():
            fact = device.facts.get(name)
            if fact is None:
                return f"nothing is known of the {name} of {device.id}"
            if not any(_parts(found) >= _parts(least) for found in _VERSION.findall(fact.value)):
                return f"{name} {least} is needed, {device.id} has {fact.value}"
        return ""


def read_schemes(package: str) -> tuple[QuantScheme, ...]:
    """The schemes of a target, from ``schemes.json`` in its package."""
    text = resources.files(package).joinpath(FILE).read_text(encoding="utf-8")
    return tuple(QuantScheme.model_validate({"id": name, **each}) for name, each in json.loads(text).items())


def choose_scheme(
    schemes: Sequence[QuantScheme],
    precision: str,
    device: DeviceProfile,
    machine: Machine,
    *,
    kind: Kind = "static",
    weight: str = "",
) -> QuantScheme:
    """The first scheme that fits.

    Args:
        schemes: Of one target, the preferred first.
        precision: ``int8`` or ``fp8``.
        device: Where the model will run.
        machine: This machine.
        kind: Where the ranges of activations come from, if they are quantized.
        weight: Type that stored operands shall have; empty for any.

    Raises:
        CapabilityError: VLX0502 with the reason for each that does not fit.
    """
    asked = [each for each in schemes if each.precision == precision and each.kind == kind]
    asked = [each for each in asked if not weight or weight in each.weight_types()]
    what = f"{weight} {kind}" if weight else f"{kind} {precision}"
    reasons = []
    for each in asked:
        why = each.why_not(device, machine)
        if not why:
            return each
        reasons.append(f"{each.id}: {why}")
    raise CapabilityError(
        "VLX0502", f"{device.id} runs no {what}: {'; '.join(reasons) or 'the target has no such scheme'}",
        where="--precision", hint="choose another precision, or another device with --for",
    )  # fmt: skip


def _parts(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))
