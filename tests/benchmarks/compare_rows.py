"""The rows of the comparison: who builds, and how. A new flag of ours, or a new recipe of a peer, is one line here."""

from __future__ import annotations

from dataclasses import dataclass

OURS = "vlexport_here"
OURS_OPENVINO = "vlexport_openvino"
PLAIN = "plain"
MERGED = "_merged"
"""Ends the name of a model whose plain export is of the form that its authors merge it to."""
_CALIBRATED = "--calib {source}/calibration.npz"
_DYNAMIC = f"{_CALIBRATED} --set quantize.activations=dynamic"
_JUDGED = "--set quantize.min_sqnr_db=0"
"""The bound on noise is left to the samples that judge: two logits of one sample say little of a model that chooses."""
_TOME = "tome:r=0+0+0+64+0+48+0+40+0+30+0+0"
_EVIT = "evit:keep=0.7,layers=4+6+8+10,squeeze=true"
_OPENVINO = "--set onnxruntime.provider=openvino"
_OPENVINO_INT8 = f"--precision int8 {_CALIBRATED} {_OPENVINO} --set onnxruntime.provider_floats=bf16"


@dataclass(frozen=True)
class Row:
    """One way to build.

    Attributes:
        name: Short, and a folder's name.
        shown: In tables.
        environment: Of ``peer_scripts``.
        recipe: Of that script; ours is a line of flags.
        precision: What most of its arithmetic is, in words.
        models: That alone are built so; none is all.
    """

    name: str
    shown: str
    environment: str
    recipe: str
    precision: str
    models: tuple[str, ...] = ()

    @property
    def ours(self) -> bool:
        """Whether vlexport builds it."""
        return self.environment in (OURS, OURS_OPENVINO)


ROWS = (
    Row(PLAIN, "plain export, ONNX Runtime", "onnx_runtime", "plain", "fp32"),
    Row("vlexport-fp32", "vlexport", OURS, "", "fp32"),
    Row("vlexport-int8", "vlexport --precision int8", OURS, f"--precision int8 {_CALIBRATED}", "int8"),
    Row(
        "vlexport-dynamic", "vlexport --precision int8, dynamic", OURS,
        f"--precision int8 {_DYNAMIC}", "int8",
    ),
    Row(
        "vlexport-dynamic-evit", "vlexport --precision int8 --tokens evit, dynamic", OURS,
        f"--precision int8 {_DYNAMIC} --tokens {_EVIT} {_JUDGED}", "int8", ("solar_cells",),
    ),
    Row(
        "vlexport-dynamic-tome", "vlexport --precision int8 --tokens tome, dynamic", OURS,
        f"--precision int8 {_DYNAMIC} --tokens {_TOME} {_JUDGED}", "int8", ("solar_cells",),
    ),
    Row(
        "vlexport-int8-tokens", "vlexport --precision int8 --tokens tome", OURS,
        f"--precision int8 {_CALIBRATED} --tokens {_TOME}", "int8", ("solar_cells",),
    ),
    Row("vlexport-openvino-fp32", "vlexport, OpenVINO provider", OURS_OPENVINO, _OPENVINO, "fp32"),
    Row(
        "vlexport-openvino-bf16", "vlexport, OpenVINO provider, bf16", OURS_OPENVINO,
        f"{_OPENVINO} --set onnxruntime.provider_floats=bf16", "bf16",
    ),
    Row(
        "vlexport-openvino-bf16-evit", "vlexport --tokens evit, OpenVINO provider, bf16", OURS_OPENVINO,
        f"{_OPENVINO} --set onnxruntime.provider_floats=bf16 --tokens {_EVIT}", "bf16", ("solar_cells",),
    ),
    Row(
        "vlexport-openvino-int8", "vlexport --precision int8, OpenVINO provider, bf16", OURS_OPENVINO, _OPENVINO_INT8,
        "int8, bf16",
    ),
    Row(
        "vlexport-openvino-int8-f32", "vlexport --precision int8, OpenVINO provider", OURS_OPENVINO,
        f"--precision int8 {_CALIBRATED} {_OPENVINO}", "int8",
    ),
    Row(
        "vlexport-openvino-tokens", "vlexport --precision int8 --tokens tome, OpenVINO provider, bf16", OURS_OPENVINO,
        f"{_OPENVINO_INT8} --tokens {_TOME}", "int8, bf16", ("solar_cells",),
    ),
    Row("ort-transformers", "onnxruntime.transformers optimizer", "onnx_runtime", "transformers-optimizer", "fp32"),
    Row("ort-onnxscript", "onnxscript optimize_for_ort", "onnx_runtime", "optimize-for-ort", "fp32"),
    Row("ort-static-minmax", "ONNX Runtime static, min-max", "onnx_runtime", "static-minmax", "int8"),
    Row("ort-static-entropy", "ONNX Runtime static, entropy", "onnx_runtime", "static-entropy", "int8"),
    Row("ort-static-percentile", "ONNX Runtime static, percentile", "onnx_runtime", "static-percentile", "int8"),
    Row("ort-dynamic", "ONNX Runtime dynamic", "onnx_runtime", "dynamic", "int8"),
    Row("optimum-dynamic", "optimum-onnx dynamic", "optimum_tool", "int8", "int8"),
    Row("olive-fp32", "Olive, transformer optimization", "olive_tool", "fp32", "fp32"),
    Row("olive-int8", "Olive, the same and dynamic", "olive_tool", "int8", "int8"),
    Row("ort-openvino-fp32", "ONNX Runtime's OpenVINO provider", "openvino_provider", "fp32", "fp32"),
    Row("openvino-fp32", "OpenVINO", "open_vino", "fp32", "fp32"),
    Row("openvino-default", "OpenVINO as it is by default", "open_vino", "default", "its choice"),
    Row("openvino-nncf", "NNCF (transformer), OpenVINO", "open_vino", "nncf-int8", "int8"),
    Row("torch-eager", "PyTorch, eager", "torch_native", "eager", "fp32"),
    Row("torch-compiled", "PyTorch, torch.compile", "torch_native", "compiled", "fp32"),
    Row("torchao-int8", "torchao PT2E for x86, torch.compile", "torch_native", "torchao-int8", "int8"),
    Row("executorch-fp32", "ExecuTorch, XNNPACK", "execu_torch", "fp32", "fp32"),
    Row("executorch-int8", "ExecuTorch, XNNPACK quantizer", "execu_torch", "int8", "int8"),
    Row("litert-fp32", "LiteRT", "lite_rt", "fp32", "fp32"),
)  # fmt: skip
"""The first is what every other is compared with."""
FOR_ALL_MODELS = (PLAIN, "vlexport-fp32")
"""Rows of models that not everyone builds."""


def rows_of(model: str, everyone: bool, wanted: tuple[str, ...] = ()) -> tuple[Row, ...]:
    """The rows of a model, the plain export first.

    Args:
        model: Its name.
        everyone: Whether all peers build it.
        wanted: Names, or parts of names; none takes all. What is a name stands for that row alone. The plain export is
            always there.
    """
    names = {row.name for row in ROWS}
    found = [row for row in ROWS if everyone or row.name in FOR_ALL_MODELS]
    found = [row for row in found if not row.models or model in row.models]
    if wanted:
        found = [
            row
            for row in found
            if row.name == PLAIN or any(each == row.name or (each not in names and each in row.name) for each in wanted)
        ]
    return tuple(found)
