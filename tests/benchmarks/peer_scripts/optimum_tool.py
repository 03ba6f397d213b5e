"""optimum-onnx: its dynamic INT8 over the plain export with its own configuration for this processor."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from child import has_vnni, serve
from onnx_session import MODEL, open_session


def build(recipe: str, source: Path, output: Path) -> None:
    from optimum.onnxruntime import ORTQuantizer
    from optimum.onnxruntime.configuration import AutoQuantizationConfig

    work = output / "optimum"
    work.mkdir()
    shutil.copyfile(source / "plain.onnx", work / MODEL)
    kind = "bert" if source.name == "minilm" else "vit"
    (work / "config.json").write_text(json.dumps({"model_type": kind}), encoding="utf-8")
    choose = AutoQuantizationConfig.avx512_vnni if has_vnni() else AutoQuantizationConfig.avx2
    ORTQuantizer.from_pretrained(work, file_name=MODEL).quantize(
        save_dir=work / "out", quantization_config=choose(is_static=False, per_channel=True)
    )
    (made,) = (work / "out").glob("*.onnx")
    shutil.copyfile(made, output / MODEL)
    shutil.rmtree(work)


if __name__ == "__main__":
    serve(build, open_session, ("optimum-onnx", "onnxruntime"))
