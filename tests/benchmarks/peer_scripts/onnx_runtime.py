"""ONNX Runtime with its own tools: the plain export, its transformer optimizer, onnxscript's rewriting, and INT8.

INT8 is asked for as ONNX Runtime's documentation advises: preprocessing first, weights a channel, and 7-bit weights on
a processor without VNNI; all else is left as it is by default.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from child import Arrays, calibration, has_vnni, serve
from onnx_session import MODEL, open_session

STATIC = {"static-minmax": "MinMax", "static-entropy": "Entropy", "static-percentile": "Percentile"}


def build(recipe: str, source: Path, output: Path) -> None:
    plain, made = source / "plain.onnx", output / MODEL
    if recipe == "plain":
        shutil.copyfile(plain, made)
    elif recipe == "transformers-optimizer":
        from onnxruntime.transformers.optimizer import optimize_model

        kind = "bert" if source.name == "minilm" else "vit"
        optimize_model(str(plain), model_type=kind, opt_level=0).save_model_to_file(str(made))
    elif recipe == "optimize-for-ort":
        import onnx_ir
        from onnxscript.rewriter.ort_fusions import optimize_for_ort

        result = optimize_for_ort(onnx_ir.load(plain))
        onnx_ir.save(result[0] if isinstance(result, tuple) else result, made)
    else:
        _quantize(recipe, source, output / "prepared.onnx", made)


def _quantize(recipe: str, source: Path, prepared: Path, made: Path) -> None:
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    quant_pre_process(str(source / "plain.onnx"), str(prepared), skip_symbolic_shape=True)
    shared: dict[str, Any] = {"per_channel": True, "reduce_range": not has_vnni()}
    if recipe == "dynamic":
        quantization.quantize_dynamic(str(prepared), str(made), weight_type=quantization.QuantType.QInt8, **shared)
    else:
        quantization.quantize_static(
            str(prepared), str(made), _Reader(calibration(source)),
            activation_type=quantization.QuantType.QUInt8, weight_type=quantization.QuantType.QInt8,
            calibrate_method=quantization.CalibrationMethod[STATIC[recipe]], **shared,
        )  # fmt: skip
    prepared.unlink()


class _Reader:
    """ONNX Runtime's ``CalibrationDataReader``, which cannot be named before onnxruntime is imported."""

    def __init__(self, samples: list[Arrays]) -> None:
        self._samples = iter(samples)

    def get_next(self) -> Arrays | None:
        return next(self._samples, None)


if __name__ == "__main__":
    serve(build, open_session, ("onnxruntime", "onnx", "onnxscript"))
