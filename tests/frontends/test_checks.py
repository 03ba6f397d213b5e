"""Checks that a model makes of its inputs' values go with what they alone read; those that shapes hang on stay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import vlexport
from tests.harness import captured
from vlexport.core.config import BuildConfig
from vlexport.frontends.source import open_archive, open_source
from vlexport.ir import dialect
from vlexport.ir.program import Program

IDS = torch.tensor([[7, 7, 7, 1, 1], [7, 1, 1, 1, 1]])
IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Checking(nn.Module):
    """Checks ids, then computes with the image and with the number that was checked."""

    def __init__(
        self, check: Callable[[Tensor], int], compute: Callable[[Tensor, int], Tensor] = lambda x, _: x
    ) -> None:
        super().__init__()
        self.check, self.compute = check, compute

    def forward(self, ids: Tensor, image: Tensor) -> Tensor:
        return self.compute(image, self.check(ids)).sum((1, 2, 3)) + ids.sum(1)


def all_have_one(ids: Tensor) -> int:
    torch._check_tensor_all((ids == 7).sum(1) > 0, lambda: "no image token")
    return 0


def at_least_three(ids: Tensor) -> int:
    count: int = (ids == 7).sum().item()  # type: ignore[assignment]
    torch._check(count >= 3)
    torch._check(count <= 8)
    return count


def exactly_four(ids: Tensor) -> int:
    count: int = (ids == 7).sum().item()  # type: ignore[assignment]
    torch._check(count == 4)
    return count


def as_many_kept(ids: Tensor) -> int:
    torch._check(ids[ids == 7].shape[0] >= 3)
    return 0


def asynchronous(ids: Tensor) -> int:
    torch._assert_async((ids == 7).any())
    return 0


def checks_of(program: Program) -> list[str]:
    return [dialect.op_name(n) for n in program.calls() if dialect.checks_at_run_time(n)]


GONE = {
    "tensor": Checking(all_have_one),
    "count": Checking(at_least_three),
    "equal": Checking(exactly_four),
    "selection": Checking(as_many_kept),
    "asynchronous": Checking(asynchronous),
    "count that is a factor": Checking(at_least_three, lambda x, n: x * n),
}


@pytest.mark.parametrize("name", GONE)
def test_checks_of_values_go_with_what_they_alone_read_when_captured(name: str, tmp_path: Path) -> None:
    model = GONE[name].eval()
    vlexport.save(model, tmp_path / "model.pt", inputs=(IDS, IMAGE))
    program = open_archive(tmp_path / "model.pt").program
    assert checks_of(program) == []
    reads_the_number = "factor" in name
    assert any(dialect.op_name(n) == "aten.item.default" for n in program.calls()) is reads_the_number
    assert bool(program.ranges.keys() - program.symbol_names().keys()) is reads_the_number
    torch.testing.assert_close(program.run(IDS, IMAGE)[0], model(IDS, IMAGE))
    program.run(*program.example)  # which the model itself refuses


@pytest.mark.parametrize(
    "compute",
    [lambda x, n: x[:, :, :n], lambda x, n: x[:, :, n : n + 3], lambda x, n: x[:, :, n - 1][..., None]],
    ids=["size", "start", "place"],
)
def test_checks_stay_when_the_layout_of_a_tensor_hangs_on_the_number(
    compute: Callable[[Tensor, int], Tensor],
) -> None:
    model = Checking(at_least_three, compute).eval()
    program = captured(model, (IDS, IMAGE), dynamic=False)
    assert "aten._assert_scalar.default" in checks_of(program)
    torch.testing.assert_close(program.run(IDS, IMAGE)[0], model(IDS, IMAGE))


def test_checks_go_when_another_tool_exported_the_program(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(Checking(at_least_three).eval(), (IDS, IMAGE), strict=False), path)
    program = open_source(BuildConfig(model=str(path), target="onnxruntime", output="unused")).program
    assert checks_of(program) == []
    assert not program.calls("aten.item.default")
