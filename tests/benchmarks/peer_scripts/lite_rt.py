"""LiteRT: the captured program converted by litert-torch, in float32, run by its interpreter with XNNPACK."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from child import Run, calibration, serve

MODEL = "model.tflite"


def build(recipe: str, source: Path, output: Path) -> None:
    import litert_torch
    import torch

    module = torch.export.load(source / "model.pt").module()
    sample = tuple(torch.from_numpy(value) for value in calibration(source, 1)[0].values())
    litert_torch.convert(module, sample, strict_export=False).export(str(output / MODEL))


def open_session(recipe: str, folder: Path, threads: int) -> Run:
    from ai_edge_litert.interpreter import Interpreter

    interpreter: Any = Interpreter(model_path=str(folder / MODEL), num_threads=threads)
    interpreter.allocate_tensors()
    # Inputs are called args_0, args_1, … in the order of forward's arguments, whatever order the file has.
    # The converter makes 32-bit integers of ids.
    inputs = sorted(interpreter.get_input_details(), key=lambda each: each["name"])
    places = [(each["index"], each["dtype"]) for each in inputs]
    first = interpreter.get_output_details()[0]["index"]

    def run(sample: Any) -> Any:
        for (place, dtype), value in zip(places, sample.values(), strict=True):
            interpreter.set_tensor(place, value.astype(dtype, copy=False))
        interpreter.invoke()
        return interpreter.get_tensor(first)

    return run


if __name__ == "__main__":
    serve(build, open_session, ("litert-torch", "ai-edge-litert"))
