"""OpenVINO: the plain export converted, in FP32, as it is by default, and quantized by NNCF.

By default OpenVINO computes in bfloat16 where the processor can: that is a row of its own, and ``fp32`` forbids it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from child import Run, calibration, serve

MODEL = "model.xml"


def build(recipe: str, source: Path, output: Path) -> None:
    import openvino

    model = openvino.convert_model(source / "plain.onnx")
    if recipe == "nncf-int8":
        import nncf

        samples = calibration(source)
        model = nncf.quantize(
            model, nncf.Dataset(samples), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(samples)
        )
    openvino.save_model(model, output / MODEL, compress_to_fp16=False)


def open_session(recipe: str, folder: Path, threads: int) -> Run:
    import openvino

    config: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    if recipe == "fp32":
        config["INFERENCE_PRECISION_HINT"] = "f32"
    compiled = openvino.Core().compile_model(folder / MODEL, "CPU", config)
    request = compiled.create_infer_request()
    first = compiled.output(0)
    return lambda sample: request.infer(sample)[first]


if __name__ == "__main__":
    serve(build, open_session, ("openvino", "nncf"))
