"""Olive: its workflow over the plain export, transformer optimization and then dynamic INT8, run by ONNX Runtime."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from child import serve
from onnx_session import MODEL, open_session


def build(recipe: str, source: Path, output: Path) -> None:
    from olive.workflows import run

    kind = "bert" if source.name == "minilm" else "vit"
    passes: dict[str, Any] = {"optimize": {"type": "OrtTransformersOptimization", "model_type": kind, "opt_level": 0}}
    if recipe == "int8":
        passes["quantize"] = {"type": "OnnxDynamicQuantization"}
    work = output / "olive"
    run(
        {
            "input_model": {"type": "ONNXModel", "model_path": str(source / "plain.onnx")},
            "passes": passes,
            "output_dir": str(work / "out"),
            "cache_dir": str(work / "cache"),
            "log_severity_level": 3,
        }
    )
    (made,) = (file for file in (work / "out").rglob("*.onnx"))
    shutil.copyfile(made, output / MODEL)
    shutil.rmtree(work)


if __name__ == "__main__":
    serve(build, open_session, ("olive-ai", "onnxruntime"))
