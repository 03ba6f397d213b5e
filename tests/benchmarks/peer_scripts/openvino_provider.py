"""ONNX Runtime with the OpenVINO provider, over the plain export, in FP32 and as the provider is by default."""

from __future__ import annotations

import shutil
from pathlib import Path

from child import Run, serve

MODEL = "model.onnx"
PROVIDER = "OpenVINOExecutionProvider"


def build(recipe: str, source: Path, output: Path) -> None:
    shutil.copyfile(source / "plain.onnx", output / MODEL)


def open_session(recipe: str, folder: Path, threads: int) -> Run:
    import onnxruntime

    choices = {"device_type": "CPU", "num_of_threads": str(threads)}
    if recipe == "fp32":
        choices["precision"] = "FP32"
    session = onnxruntime.InferenceSession(folder / MODEL, providers=[(PROVIDER, choices)])
    if PROVIDER not in session.get_providers():
        raise RuntimeError(f"{PROVIDER} did not load: {session.get_providers()}")
    first = session.get_outputs()[0].name
    return lambda sample: session.run([first], sample)[0]


if __name__ == "__main__":
    serve(build, open_session, ("onnxruntime-openvino",))
