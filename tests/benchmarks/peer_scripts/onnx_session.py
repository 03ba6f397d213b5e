"""A session of ONNX Runtime at its highest level of graph optimisation, for every peer that ends in an ONNX file."""

from __future__ import annotations

from pathlib import Path

from child import Run

MODEL = "model.onnx"


def open_session(recipe: str, folder: Path, threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = onnxruntime.InferenceSession(folder / MODEL, options, providers=["CPUExecutionProvider"])
    first = session.get_outputs()[0].name
    return lambda sample: session.run([first], sample)[0]
