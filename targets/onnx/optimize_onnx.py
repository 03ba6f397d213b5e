"""optimize-onnx: onnxscript's optimizer folds constants, merges equal nodes, drops unread ones. Off by default.

Before → after::

    %0 = Shape(@table: f32[8,4])
    %1 = Add(x, %2)                    →    %0 = Add(x, @folded: i64[2])
    %3 = Add(x, %2)                         return y: %0

Does not apply when: a constant operand has more elements than ``input_limit``, or the result more than
``output_limit`` (it is cheaper to compute than to ship); a node quantizes or dequantizes (folding it would undo the
quantization). Functions are not inlined.
Numerical effect: none but the rounding of the folded operators.

Off unless asked for (``--set onnxruntime.optimize=true``): on deit_tiny, resnet18, swin_tiny and levit_128s as the
exporter leaves them it found nothing to do (455, 49, 555, 371 nodes, before and after) in .3, .02, .4 and .2 s, because
the exporter runs the same optimizer. It earns its place behind other lowered passes.
Source: onnxscript.optimizer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, cast

import onnx_ir
import onnxscript.optimizer
from pydantic import Field

from vlexport.core.artifact import Frozen
from vlexport.core.errors import CapabilityError
from vlexport.passes.base import Match, NearMiss
from vlexport.targets.onnx.model import OnnxModel
from vlexport.targets.onnx.whole_graph import WholeGraphPass

_PATTERN = "node on constants"
_QUANTIZING = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")


class OptimizeOnnxOptions(Frozen):
    """Options of optimize-onnx.

    Attributes:
        input_limit: Elements of a constant operand above which a node is not folded.
        output_limit: Elements of a result above which it is not stored.
    """

    input_limit: int = Field(default=8192, ge=0)
    output_limit: int = Field(default=262144, ge=0)


class OptimizeOnnx(WholeGraphPass):
    """onnxscript's optimizer: constants folded, equal nodes merged, unread ones dropped."""

    name: ClassVar[str] = "optimize-onnx"
    Options: ClassVar[type[Frozen]] = OptimizeOnnxOptions
    tools: ClassVar[tuple[str, ...]] = ("onnxscript",)

    def find(self, ir: OnnxModel) -> Iterator[Match[onnx_ir.Node] | NearMiss[onnx_ir.Node]]:
        limit = cast("OptimizeOnnxOptions", self.options).input_limit
        for node in ir.nodes():
            read = [value for value in node.inputs if value is not None]
            if not read or any(value.const_value is None or not value.is_initializer() for value in read):
                continue
            sizes = [value.const_value.size for value in read if value.const_value is not None]
            if node.op_type in _QUANTIZING:
                yield NearMiss(_PATTERN, node, "folding it would undo the quantization")
            elif max(sizes) > limit:
                yield NearMiss(_PATTERN, node, f"an operand has {max(sizes)} elements, the limit is {limit}")

    def rewrite(self, ir: OnnxModel) -> bool:
        """In place, as onnxscript does it; it makes few rounds of its own.

        Raises:
            CapabilityError: VLX0408 when onnxscript fails.
        """
        options = cast("OptimizeOnnxOptions", self.options)
        try:
            onnxscript.optimizer.optimize_ir(
                ir.model,
                input_size_limit=options.input_limit,
                output_size_limit=options.output_limit,
                should_fold=lambda node: False if node.op_type in _QUANTIZING else None,
                inline=False,
            )
        except onnx_ir.passes.PassError as error:
            said = str(error.__cause__ or error).strip().splitlines() or [type(error.__cause__).__name__]
            raise CapabilityError(
                "VLX0408", f"pass {self.name}: onnxscript fails: {said[0]}", where=self.name,
                hint="leave this pass out for this model",
            ) from error  # fmt: skip
        return True
