"""Options of the tensorrt target."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from vlexport.core.artifact import Frozen


class TensorRTOptions(Frozen):
    """Options of the tensorrt target.

    Attributes:
        opset: Version of ONNX's standard domain; ``auto`` is the newest up to 20 that the device takes.
        engine: Compile an engine with TensorRT for RTX: ``auto`` where that makes sense and works, ``on`` to fail where
            it does not, ``off``.
        compute_capabilities: What the engine is compiled for (``8.9`` or ``8.6,8.9``); empty: those of the device, or
            whatever TensorRT for RTX covers by default (8.0, 8.6, 8.9, 12.0 and later).
        refittable: Weights of the engine can be replaced later. TensorRT 11.3 is known to drop biases in such engines.
            The compiler needs a GPU for it.
        strip_weights: Leave the weights out of the engine; it is refitted from the ONNX file on the device. The
            compiler needs a GPU for it.
        tf32: Let fp32 layers multiply in TF32, three digits instead of seven. Off: results agree with fp32.
        optimization_level: How long TensorRT looks for faster kernels on the device, 0 to 5; TensorRT for RTX ignores
            it.
        timing_cache: Keep what TensorRT, or TensorRT for RTX, measured on the device for the next build or start.
        fallback: An int8 or fp8 bundle carries the graph in fp16, too: for devices on which that is no slower.
        check_operators: Refuse operators that the device's TensorRT is known not to take.
        timeout_s: Seconds that the compiler may take.
    """

    opset: Literal["auto"] | Annotated[int, Field(ge=18, le=24)] = "auto"
    engine: Literal["auto", "on", "off"] = "auto"
    compute_capabilities: str = Field(default="", pattern=r"^(\d+\.\d(,\d+\.\d)*)?$")
    refittable: bool = False
    strip_weights: bool = False
    tf32: bool = False
    optimization_level: int | None = Field(default=None, ge=0, le=5)
    timing_cache: bool = True
    fallback: bool = True
    check_operators: bool = True
    timeout_s: float = Field(default=900.0, gt=0)
