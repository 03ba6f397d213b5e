"""ExecuTorch with XNNPACK: in float32, and quantized by its own quantizer (PT2E)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from child import Run, calibration, serve

MODEL = "model.pte"


def build(recipe: str, source: Path, output: Path) -> None:
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    module = torch.export.load(source / "model.pt").module()
    if recipe == "int8":
        module = _quantized(module, source)
    sample = tuple(torch.from_numpy(value) for value in calibration(source, 1)[0].values())
    exported = torch.export.export(module, sample)
    lowered = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()]).to_executorch()
    with (output / MODEL).open("wb") as file:
        lowered.write_to_file(file)


def _quantized(module: Any, source: Path) -> Any:
    import torch
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    samples = [tuple(torch.from_numpy(value) for value in each.values()) for each in calibration(source)]
    with torch.no_grad():
        prepared = prepare_pt2e(module, quantizer)
        for sample in samples:
            prepared(*sample)
        return convert_pt2e(prepared)


def open_session(recipe: str, folder: Path, threads: int) -> Run:
    import torch
    from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
    from executorch.runtime import Runtime

    _unsafe_reset_threadpool(threads)
    method: Any = Runtime.get().load_program(folder / MODEL).load_method("forward")

    def run(sample: Any) -> Any:
        return method.execute(tuple(torch.from_numpy(value) for value in sample.values()))[0].numpy()

    return run


if __name__ == "__main__":
    serve(build, open_session, ("executorch", "torch"))
