"""simplify-onnx: onnxsim folds what it can infer from shapes and fuses products with their bias. Off by default.

Before → after::

    %0 = MatMul(x, @w)                      %0 = Reshape(x, @rows)
    %1 = Add(%0, @b)                   →    %1 = Gemm(%0, @w, @b)
    %2 = Shape(%1) … Slice, Squeeze         %2 = Reshape(%1, @shape)

Does not apply when: the model is larger than 2 GB, which one protobuf message cannot hold.
Options: ``tensor_limit_bytes``, the largest tensor that folding may make, and ``timeout_s``.
Numerical effect: exact up to the order of sums (1e-7 measured). Deterministic; module paths are put back.

Off unless asked for (``--set onnxruntime.simplify=true``): nodes went from 455 to 395 on deit_tiny, 49 to 49 on
resnet18, 555 to 537 on swin_tiny, 371 to 358 on levit_128s. No gain in ONNX Runtime has been shown: a rough look (one
thread, both sessions in one busy process, 7 rounds) gave median ratios of 1.02, .93, 1.01 and 1.04, swin_tiny's rounds
from .81 to 1.33; ``profile`` has not judged it. onnxsim itself took .1 to .5 s, with its process and the gate some
seconds.
onnxsim runs in a child process: its crash is this pass's error, not the build's end. Source: onnxsim 0.8.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, cast

import numpy as np
import onnx
import onnx_ir
from pydantic import Field

from vlexport.core.artifact import Artifact, Frozen
from vlexport.core.errors import CapabilityError, VlexportError
from vlexport.core.isolate import IsolatedSession
from vlexport.passes.base import Match, NearMiss
from vlexport.targets.onnx.model import OnnxModel
from vlexport.targets.onnx.simplify_session import MODEL
from vlexport.targets.onnx.whole_graph import WholeGraphPass

_SESSION = "vlexport.targets.onnx.simplify_session:open_session"
_MESSAGE_LIMIT_BYTES = (1 << 31) - (16 << 20)
"""Weights of one protobuf message of 2 GiB, with room for the graph."""


class SimplifyOnnxOptions(Frozen):
    """Options of simplify-onnx.

    Attributes:
        tensor_limit_bytes: Largest tensor that folding may make.
        timeout_s: Seconds that onnxsim may take.
    """

    tensor_limit_bytes: int = Field(default=1 << 20, ge=0)
    timeout_s: float = Field(default=300.0, gt=0)


class SimplifyOnnx(WholeGraphPass):
    """onnxsim: shapes folded, products fused with their bias."""

    name: ClassVar[str] = "simplify-onnx"
    Options: ClassVar[type[Frozen]] = SimplifyOnnxOptions
    tools: ClassVar[tuple[str, ...]] = ("onnxsim",)

    def find(self, ir: OnnxModel) -> Iterator[Match[onnx_ir.Node] | NearMiss[onnx_ir.Node]]:
        if ir.size_bytes > _MESSAGE_LIMIT_BYTES:
            yield NearMiss("whole graph", ir.nodes()[0], f"{ir.size_bytes / 1e9:.1f} GB of weights, onnxsim takes 2")

    def rewrite(self, ir: OnnxModel) -> bool:
        """All rounds in one child process.

        Raises:
            CapabilityError: VLX0408 when onnxsim is missing, fails, dies, takes too long or finds no end.
        """
        if ir.size_bytes > _MESSAGE_LIMIT_BYTES:
            return False
        if importlib.util.find_spec("onnxsim") is None:
            raise _failed("onnxsim is not installed", "pip install 'vlexport[build]' on Python 3.11 or later")
        options = cast("SimplifyOnnxOptions", self.options)
        artifact = Artifact(
            target="onnx", path="", inputs=(MODEL,), outputs=(MODEL,),
            session_options={"tensor_limit_bytes": options.tensor_limit_bytes},
        )  # fmt: skip
        given = {MODEL.name: np.frombuffer(onnx_ir.to_proto(ir.model).SerializeToString(), np.uint8)}
        try:
            with IsolatedSession(_SESSION, Path(), artifact, timeout_s=options.timeout_s, reuse=True) as session:
                made = session.run(given)
        except VlexportError as error:
            raise _failed(error.message, "leave this pass out for this model") from error
        ir.model = onnx_ir.from_proto(onnx.load_from_string(made[MODEL.name].tobytes()))
        return False


def _failed(reason: str, hint: str) -> CapabilityError:
    return CapabilityError("VLX0408", f"pass {SimplifyOnnx.name}: {reason}", where=SimplifyOnnx.name, hint=hint)
