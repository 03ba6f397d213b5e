"""What a target says before lowering is what lowering then does: coremltools and torch's exporter are asked."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.harness import captured
from vlexport.core.artifact import DimRange
from vlexport.core.errors import CapabilityError, VlexportError
from vlexport.ir import dialect
from vlexport.ir.narrow import narrowed
from vlexport.ir.program import Program
from vlexport.passes.pipeline import run_pipeline
from vlexport.targets import open_target
from vlexport.targets.base import Brief
from vlexport.targets.coreml import compat, quantized
from vlexport.targets.coreml.op_support import converts, table

HIGH = (2, 2, 2, 2, 3, 6)


class Net(nn.Module):
    """One function, below a module path."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


class Outer(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.inner = Net(function)

    def forward(self, x: Tensor) -> Any:
        return self.inner(x)


def attention(x: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(x, x, x)


CALLS: dict[str, Callable[[Tensor], Any]] = {
    "relu": torch.relu,
    "attention of 4 dims": attention,
    "attention of 5 dims": lambda x: attention(x[:, None]),
    "attention of 3 dims": lambda x: attention(x[:, 0]),
    "stable sort": lambda x: x.sort(dim=-1, stable=True)[0],
    "product": lambda x: x.prod(1),
    "windows": lambda x: x.unfold(2, 3, 3),
    "bfloat16": lambda x: (x.bfloat16() * 2).float(),
    "6 dims there and back": lambda x: x.reshape(HIGH).permute(0, 2, 4, 1, 3, 5).reshape(2, 12, 12) * 2,
    "6 dims and flat": lambda x: x.reshape(HIGH).reshape(2, -1) * 2,
    "6 dims computed with": lambda x: (x.reshape(HIGH).permute(0, 2, 4, 1, 3, 5) + 1).reshape(2, -1),
    "6 dims returned": lambda x: x.reshape(HIGH).permute(0, 2, 4, 1, 3, 5),
    "6 dims by broadcasting": lambda x: (x[:, :, :, :, None, None] * torch.ones(3, 2)).sum((-1, -2)),
}
REFUSED = {
    "coreml": {
        "stable sort": "coremltools has no conversion for it",
        "product": "coremltools has no conversion for it",
        "windows": "coremltools has no conversion for it",
        "bfloat16": "Core ML has no bfloat16",
        "6 dims computed with": "it gives a tensor of 6 dims, Core ML takes 5",
        "6 dims returned": "it gives a tensor of 6 dims, Core ML takes 5",
        "6 dims by broadcasting": "it gives a tensor of 6 dims, Core ML takes 5",
    },
    "onnxruntime": {
        "stable sort": "torch's exporter has no function for it",
        "attention of 3 dims": "torch's exporter takes attention over 4 dims, not 3",
        "attention of 5 dims": "torch's exporter takes attention over 4 dims, not 5",
    },
}


def program_of(name: str) -> Program:
    program = captured(Outer(CALLS[name]), torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0)))
    return narrowed(program, {dim: DimRange(min=2, max=2, opt=2) for dim in program.signature.dims})


def ask(target_name: str, program: Program, folder: Path) -> tuple[list[VlexportError], str]:
    """What the target says beforehand, and the code of what lowering then raises."""
    target = open_target(target_name)
    brief = Brief(target.Options())
    spelled, _ = run_pipeline(program, target.program_passes(brief), gate=None)
    said = list(target.problems(spelled, brief))
    try:
        target.lower(spelled, folder, brief)
    except CapabilityError as error:
        return said, error.code
    return said, ""


@pytest.mark.parametrize("name", CALLS)
def test_coreml_says_what_coremltools_does_when_asked(name: str, tmp_path: Path) -> None:
    agree("coreml", name, tmp_path)


@pytest.mark.parametrize("name", ["relu", "stable sort", *(each for each in CALLS if each.startswith("attention"))])
def test_onnxruntime_says_what_the_exporter_does_when_asked(name: str, tmp_path: Path) -> None:
    agree("onnxruntime", name, tmp_path)


def agree(target: str, name: str, folder: Path) -> None:
    said, raised = ask(target, program_of(name), folder / "artifact")
    reason = REFUSED[target].get(name)
    assert raised == ("VLX0503" if reason else ""), "the table of this test is wrong"
    if reason is None:
        assert said == []
        return
    assert said
    for each in said:
        assert each.code == "VLX0503"
        assert each.message.endswith(reason)
        assert re.search(r" in inner.*\(\w+\.py:\d+\)", each.where), "module path and source line"


def test_tensorrt_says_every_call_that_the_exporter_refuses_when_asked() -> None:
    target = open_target("tensorrt")
    program = captured(
        Outer(lambda x: attention(x[:, None]) + attention(x[:, :, None]).reshape(2, 1, 4, 6, 6)),
        torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0)),
    )
    said = target.problems(program, Brief(target.Options()))
    assert [each.message.partition(": ")[2] for each in said] == [REFUSED["onnxruntime"]["attention of 5 dims"]] * 2


def test_table_is_that_of_the_installed_coremltools_when_asked() -> None:
    quantized.register()
    assert [name for name in dialect.OPS if converts(name) != compat.has_conversion(name)] == []
    listed = [f"aten.{plain}.{each}" for plain, overloads in table()["aten"].items() for each in overloads.split()]
    assert [name for name in listed if not compat.has_conversion(name)] == []
    assert [name for name in table()["python"].split() if not compat.has_conversion(name)] == []
    assert not compat.has_conversion("aten.no_such.default")
