"""quantize: linears and convolutions compute with 8-bit integers, at scales that calibration found.

Before → after::

    %0 = linear(x, @w: f32[8,8], @b)       %0 = quantize(x, scale, zero)
    return %0                              %1 = dequantize(%0, scale, zero)
                                      →    %2 = dequantize(@w_int8, scales, zeros, axis=0)
                                           %3 = dequantize(@b_int32, scales · scale, zeros, axis=0)
                                           %4 = linear(%1, %2, %3)
                                           return %4

What is quantized, and how, is one table of decisions, made from the target's scheme and the calibration table before
anything is changed; the target spells it. Norms, softmax and residual adds stay in float.

Does not apply when: the scheme has no rule for the operator, a weight or bias is computed, no range was measured, a
value is constant on all calibration samples, or the module is kept.
Equation: q = saturate(round(x / scale) + zero); x' = (q - zero) · scale, with scale = (high - low) / 255 for uint8 and
max|w| / 127 (7 bits: 63) a channel for weights. On samples the mean error of every layer goes into its bias.
Options: see :class:`QuantizeOptions`.
Numerical effect: rounding to 8 bits (weights to 7 where the processor's products saturate). Judged by the signal to
noise ratio of every output on calibration samples.
Source: Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference,
2018; ONNX Runtime's documentation, Quantize ONNX models, for the form with explicit quantize and dequantize operators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor
from torch.fx import Node

from vlexport.calibration.keys import value_keys
from vlexport.calibration.methods import Method, MethodName
from vlexport.calibration.table import ValueEntry
from vlexport.core.artifact import Frozen
from vlexport.core.grids import GRIDS
from vlexport.core.scheme import Kind, QuantScheme
from vlexport.ir.cost import parameters_stored
from vlexport.ir.program import Program
from vlexport.passes.base import Change, Effect, Match, NearMiss, Pass, Stage
from vlexport.passes.quantization.bias_correction import corrected, mean_errors
from vlexport.passes.quantization.decide import decide
from vlexport.passes.quantization.decisions import Decisions, LayerDecision
from vlexport.passes.quantization.named_calls import require_calls
from vlexport.passes.quantization.placement import Placement
from vlexport.passes.quantization.tighten import tightened
from vlexport.passes.statistic import Statistic

Emit = Callable[[Program, Decisions, Mapping[str, Node], LayerDecision], Change]
"""Spells one decision in a Program: the target's. Nodes are those of the Program before any was spelled, by key."""


_OF_RANGES = ("method", "percentile", "smooth", "equalize", "tighten", "correct_bias", "table")
"""Options that only calibrated ranges have a use for."""


def _split(value: object) -> object:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


class QuantizeOptions(Frozen):
    """Options of quantize.

    Attributes:
        method: How ranges follow from what calibration saw: min-max, moving-average, percentile, entropy, mse.
        percentile: Of the method percentile: how many percent of all values lie inside the range.
        keep: Modules that stay in float, with commas between; blocks.*.attn names one of every block, and what lies in
            it, #41 the call with that key in quantization.json.
        only: Modules and keys, as for keep, that alone are quantized; empty for all.
        min_samples: Calibration samples that are needed.
        min_sqnr_db: Least signal to noise ratio of an output on calibration samples.
        weights_only: Round nothing but stored weights, to int8, int4 in blocks, or palette4, palette6 and palette8:
            places in tables of 16, 64 and 256 values. Calibration samples are not needed. The artifact is smaller;
            whether it is faster depends on the target. off rounds what weights are multiplied with, too.
        activations: Where the ranges of what weights are multiplied with come from: static has one of each value, from
            calibration; dynamic finds one at every run, needs no calibration samples, and is for linears alone.
        smooth: Unlike channels behind norms and activations are made alike first (pass smooth-activations).
        equalize: Unlike channels between two linears or convolutions are made alike first (pass equalize-ranges).
        tighten: Ranges become narrower where that makes what reads them more exact.
        correct_bias: What rounding adds to a result on average is taken off the bias.
        table: A calibration table that a build of this model with these samples wrote, edited or not, in place of
            calibrating.
    """

    method: MethodName = "min-max"
    percentile: Annotated[float, Field(gt=50.0, le=100.0)] = 99.99
    keep: Annotated[tuple[str, ...], BeforeValidator(_split)] = ()
    only: Annotated[tuple[str, ...], BeforeValidator(_split)] = ()
    min_samples: int = Field(default=16, ge=1)
    min_sqnr_db: float = Field(default=10.0, ge=0.0, le=200.0)
    smooth: bool = True
    equalize: bool = True
    tighten: bool = True
    correct_bias: bool = True
    table: str = ""
    weights_only: Literal["off", "int8", "int4", "palette4", "palette6", "palette8"] = "off"
    activations: Literal["static", "dynamic"] = "static"

    @model_validator(mode="after")
    def _one_kind(self) -> QuantizeOptions:
        if self.activations == "dynamic" and self.weights_only != "off":
            raise ValueError("weights_only leaves activations in float: it goes with no activations=dynamic")
        asked = [name for name in _OF_RANGES if name in self.model_fields_set and getattr(self, name)]
        if asked and self.kind != "static":
            how = "activations=dynamic" if self.kind == "dynamic" else f"weights_only={self.weights_only}"
            raise ValueError(f"{asked[0]} is about ranges from calibration: it does nothing with {how}")
        if "percentile" in self.model_fields_set and self.method != "percentile":
            raise ValueError(f"percentile is of method=percentile: it does nothing with method={self.method}")
        return self

    @property
    def kind(self) -> Kind:
        """The kind of scheme that is asked for."""
        return self.activations if self.weights_only == "off" else "weights"

    @property
    def weight_type(self) -> str:
        """Type of weights that is asked for; empty leaves it to the scheme."""
        return "" if self.weights_only == "off" else self.weights_only

    def calibration_method(self) -> Method:
        """How ranges are chosen."""
        return Method(name=self.method, percentile=self.percentile)


def _on_grids(decisions: Decisions) -> bool:
    """Whether all that is rounded lies on grids of integers, channel by channel: nothing is refined of the rest."""
    types = {each.type for each in decisions.values} | {each.weight for each in decisions.layers if each.weight}
    return not types - GRIDS.keys() and all(each.operands and not each.block for each in decisions.layers)


class Quantize(Pass[Program]):
    """Linears and convolutions compute with 8-bit integers, at scales that calibration found."""

    name: ClassVar[str] = "quantize"
    stage: ClassVar[Stage] = "precision"
    effect: ClassVar[Effect] = "approximate"
    Options: ClassVar[type[Frozen]] = QuantizeOptions
    options: QuantizeOptions

    def __init__(
        self,
        options: Frozen | None = None,
        *,
        scheme: QuantScheme | None = None,
        ranges: Mapping[str, ValueEntry] | None = None,
        emit: Emit | None = None,
        samples: Sequence[tuple[Tensor, ...]] = (),
    ) -> None:
        """Without a scheme of the target, ranges of its calibration and its way to spell them, nothing is found.

        Args:
            options: Typed options.
            scheme: What the target wants.
            ranges: Key of a value → its range.
            emit: The target's spelling.
            samples: What ranges are narrowed and biases corrected on, one tensor per input each; without any, none is.
        """
        super().__init__(options)
        self.samples = samples
        self._tightened: dict[str, Decisions] = {}
        self.scheme = scheme
        self.ranges = ranges or {}
        self.emit = emit

    @property
    def statistic(self) -> Statistic:
        """Signal to noise ratio."""
        method = f"try another method (--set {self.name}.method=percentile), " if self.options.kind == "static" else ""
        hint = (
            f"keep that module in float (--set {self.name}.keep=MODULE), {method}or accept more noise "
            f"(--set {self.name}.min_sqnr_db=…)"
        )
        return Statistic("sqnr_db", self.options.min_sqnr_db, hint=hint)

    def decisions(self, ir: Program) -> Decisions:
        """The table for a Program that is in float still.

        Raises:
            UsageError: VLX0703 when ``keep`` or ``only`` names no module.
        """
        self._require_named(ir)
        if self.scheme is None:
            return Decisions(scheme="")
        return self._decide(ir, self.scheme)[0]

    def _decide(self, ir: Program, scheme: QuantScheme) -> tuple[Decisions, Placement]:
        found, placed = decide(ir, scheme, self.ranges, keep=self.options.keep, only=self.options.only)
        if not self.options.tighten or not self.samples or not _on_grids(found):
            return found, placed
        known = found.text()
        if known not in self._tightened:  # asked for the record, and again when it is applied
            self._tightened[known] = tightened(ir, found, scheme, self.samples)
        return self._tightened[known], placed

    def find(self, ir: Program) -> Iterator[Match | NearMiss]:
        """Every call that can be quantized, and why the others stay in float.

        Raises:
            UsageError: VLX0703 when ``keep`` or ``only`` names no module.
        """
        self._require_named(ir)
        if self.scheme is None or self.emit is None:
            return
        decisions, placed = self._decide(ir, self.scheme)
        nodes = {key: node for node, key in value_keys(ir).items()}
        for node, why in placed.refused.items():
            yield NearMiss("quantized", node, why)
        lacking = mean_errors(ir, decisions, self.samples) if self.options.correct_bias and _on_grids(decisions) else {}
        for layer in decisions.layers:
            node = nodes[layer.call]
            yield Match(node, (node,), (decisions, nodes, layer, lacking.get(layer.call)))

    def _require_named(self, ir: Program) -> None:
        require_calls(ir, self.options.keep, option=f"{self.name}.keep")
        require_calls(ir, self.options.only, option=f"{self.name}.only")

    def apply(self, ir: Program, match: Match) -> Change:
        """Let the target spell one call."""
        assert self.emit is not None
        decisions, nodes, layer, lacking = match.data
        if lacking is None:
            return self.emit(ir, decisions, nodes, layer)
        stored = parameters_stored(ir)
        corrected(ir, nodes[layer.call], lacking)
        change = self.emit(ir, decisions, nodes, layer)
        return change.model_copy(update={"saved_parameters": stored - parameters_stored(ir)})

    def run(self, ir: Program, *, limit: int | None = None) -> tuple[list[Change], list[NearMiss]]:
        """Decide once, on the Program that was calibrated, then spell call by call: keys are those of that Program."""
        found = list(self.find(ir))
        misses = [each for each in found if isinstance(each, NearMiss)]
        matches = [each for each in found if isinstance(each, Match)]
        return [self.apply(ir, match) for match in matches[:limit]], misses
