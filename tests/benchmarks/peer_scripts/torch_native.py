"""PyTorch itself: the captured program run eagerly, compiled by inductor, and quantized by torchao for inductor."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from child import Run, calibration, serve

MODEL = "model.pt2"


def build(recipe: str, source: Path, output: Path) -> None:
    if recipe != "torchao-int8":
        shutil.copyfile(source / "model.pt", output / MODEL)
        if recipe == "compiled":  # what inductor makes lies in its cache then
            open_session(recipe, output, 0)(calibration(source, 1)[0])
        return
    import torch
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    samples = [tuple(torch.from_numpy(value) for value in each.values()) for each in calibration(source)]
    with torch.no_grad():
        prepared = prepare_pt2e(torch.export.load(source / "model.pt").module(), quantizer)
        for sample in samples:
            prepared(*sample)
        torch.export.save(torch.export.export(convert_pt2e(prepared), samples[0]), output / MODEL)


def open_session(recipe: str, folder: Path, threads: int) -> Run:
    import torch

    if threads:
        torch.set_num_threads(threads)
    if recipe == "torchao-int8":
        import torchao.quantization.pt2e.quantize_pt2e  # noqa: F401  (the operators of the file)
    module: Any = torch.export.load(folder / MODEL).module()
    if recipe != "eager":
        module = torch.compile(module)

    def run(sample: Any) -> Any:
        with torch.inference_mode():
            found = module(*(torch.from_numpy(value) for value in sample.values()))
        return (found[0] if isinstance(found, (tuple, list)) else found).numpy()

    return run


if __name__ == "__main__":
    serve(build, open_session, ("torch", "torchao"))
