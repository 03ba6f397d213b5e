"""Our quantization operators on the way to TensorRT: what its table says of them, and what the compiler does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir
import pytest
from torch import Tensor, nn

from tests.harness import captured
from tests.targets.test_onnx_quantized import Blocks, Float8, Integers, buffers, drawn
from vlexport.core.device_profiles import device_profiles
from vlexport.ir.quant_ops import DEQUANTIZE, QUANTIZE
from vlexport.targets.onnx.lower import onnx_from_program
from vlexport.targets.tensorrt.op_support import unsupported

_ASK = """
import json, sys
from pathlib import Path
from vlexport.targets.tensorrt.compiler import Request, _compiled
found = {}
for file in sorted(Path(sys.argv[1]).iterdir()):
    for capability in ("8.6", "8.9"):
        engine, report = _compiled(file, Request(compute_capabilities=(capability,)))
        found[f"{file.stem} {capability}"] = len(engine) > 0
print("FOUND" + json.dumps(found))
"""


class Symmetric(nn.Module):
    """As the scheme static-s8 has it: int8 around 0 on both sides, a float bias."""

    def __init__(self) -> None:
        super().__init__()
        rng = np.random.default_rng(0)
        buffers(
            self, xs=np.float32(0.02), xz=np.int8(0), w=rng.integers(-127, 128, (16, 8)).astype(np.int8),
            ws=rng.uniform(0.001, 0.004, 16).astype(np.float32), wz=np.zeros(16, np.int8),
            b=rng.normal(size=16).astype(np.float32),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = DEQUANTIZE(QUANTIZE(x, self.xs, self.xz), self.xs, self.xz)
        return nn.functional.linear(x, DEQUANTIZE(self.w, self.ws, self.wz, 0), self.b)


@pytest.fixture(scope="module")
def models() -> dict[str, onnx_ir.Model]:
    nets = {
        "symmetric": (Symmetric(), (1, 8), 20), "asymmetric": (Integers(), (1, 3, 8, 8), 20),
        "float8": (Float8(), (1, 8), 20), "int4": (Blocks(), (1, 32), 21),
    }  # fmt: skip
    return {
        name: onnx_from_program(captured(net, drawn(*shape), dynamic=False), opset=opset)
        for name, (net, shape, opset) in nets.items()
    }


def test_table_refuses_zero_points_when_asked(models: dict[str, onnx_ir.Model]) -> None:
    said = {
        name: {each.reason for each in unsupported(model, device_profiles()["rtx"])} for name, model in models.items()
    }
    assert said["symmetric"] == said["float8"] == said["int4"] == set()
    assert any("zero point is not 0" in reason for reason in said["asymmetric"])


def test_compiler_takes_what_the_schemes_say_and_float8_from_8_9_on(
    models: dict[str, onnx_ir.Model], tmp_path: Path
) -> None:
    for name, model in models.items():
        (tmp_path / f"{name}.onnx").write_bytes(onnx_ir.to_proto(model).SerializeToString())
    done = subprocess.run(
        [sys.executable, "-c", _ASK, str(tmp_path)], capture_output=True, text=True, timeout=120,
        cwd=Path(__file__).resolve().parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("FOUND"))[5:])
    assert found == {
        "symmetric 8.6": True, "symmetric 8.9": True, "asymmetric 8.6": False, "asymmetric 8.9": False,
        "float8 8.6": False, "float8 8.9": True, "int4 8.6": True, "int4 8.9": True,
    }  # fmt: skip
