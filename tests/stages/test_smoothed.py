"""Calibration where channels are made alike: the ranges of one run are those that a second one would show."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.calibration.planted import dataset
from tests.passes.quantizing import SCHEMES, images, program_of, ranges
from vlexport.calibration.keys import model_key
from vlexport.core.config import BuildConfig
from vlexport.ir.program import Program
from vlexport.stages.component import Optimized
from vlexport.stages.order import order_of
from vlexport.stages.quantized import Calibrated, calibrated

SAMPLES = 16


class Uneven(nn.Module):
    """Unlike channels between convolutions, behind a norm that a view is read of, and behind an activation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(21)
        self.stem, self.mix = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, 2, 1)
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.last, self.head = nn.LayerNorm(16), nn.Linear(16, 5)
        with torch.no_grad():
            self.stem.weight[3] *= 60.0
            self.mix.weight[:, 3] /= 60.0
            for norm, reader in ((self.norm, self.up), (self.last, self.head)):
                norm.weight[[2, 7]] *= 50.0
                norm.bias.normal_()
                reader.weight[:, [2, 7]] /= 50.0
            self.up.weight[5] *= 50.0
            self.down.weight[:, 5] /= 50.0

    def forward(self, image: Tensor) -> Tensor:
        x = self.mix(nn.functional.max_pool2d(torch.relu(self.stem(image)), 2))
        x = x.flatten(2).transpose(1, 2)
        x = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        return self.head(self.last(x).mean(1))


@pytest.fixture(scope="module")
def uneven() -> Program:
    return program_of(Uneven())


def runs_of(program: Program, monkeypatch: pytest.MonkeyPatch, **options: str) -> tuple[Calibrated, int]:
    """What calibration makes of a Program, and how often a model ran over single samples for it."""
    counted: list[int] = []
    run = Program.run

    def counting(self: Program, *inputs: Tensor, **more: Any) -> Any:
        counted.append(len(inputs[0]))
        return run(self, *inputs, **more)

    config = BuildConfig(
        model="m", output="o", target="onnxruntime", precision="int8", calib="c", options=options, profile=False,
        device_profile="cpu-x86-vnni",
    )  # fmt: skip
    order = order_of(config)
    with monkeypatch.context() as patch:
        patch.setattr(Program, "run", counting)
        found = calibrated(
            Optimized(program, (), None, ()), [(images(2, 5),)], target=order.target, brief=order.brief, config=config,
            samples=dataset(images(SAMPLES, 1).numpy(), program),
        )  # fmt: skip
    return found, counted.count(1)


def test_model_runs_once_a_sample_when_ranges_are_of_extremes(uneven: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    found, runs = runs_of(uneven, monkeypatch)
    assert runs == SAMPLES
    program = found.optimized.program
    done = {change.what for record in found.optimized.records for change in record.changes}
    assert len(done) == 3, "between convolutions, behind norms, and behind the activation"
    measured = ranges(program, SCHEMES["static-u8s8"], images(SAMPLES, 1))
    assert found.table is not None
    assert (found.table.key, found.table.samples) == (measured.key, SAMPLES)
    assert found.table.key.model == model_key(program)
    assert [(each.value, each.place) for each in found.table.values] == [(e.value, e.place) for e in measured.values]
    for ours, theirs in zip(found.table.values, measured.values, strict=True):
        near = 1e-5 * max(-theirs.low, theirs.high)
        assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), rel=0, abs=near)
        assert (ours.measured, ours.extremes, ours.channels) == ((ours.low, ours.high),) * 2 + (None,)


@pytest.mark.parametrize(
    ("options", "runs"),
    [
        ({"quantize.method": "percentile"}, 2),
        ({"quantize.method": "moving-average"}, 2),
        ({"quantize.method": "entropy", "quantize.smooth": "false", "quantize.equalize": "false"}, 1),
        ({"quantize.smooth": "false"}, 1),
    ],
)
def test_model_runs_again_when_counts_are_of_values_that_were_made_alike(
    uneven: Program, monkeypatch: pytest.MonkeyPatch, options: dict[str, str], runs: int
) -> None:
    found, seen = runs_of(uneven, monkeypatch, **options)
    assert seen == runs * SAMPLES
    measured = ranges(
        found.optimized.program, SCHEMES["static-u8s8"], images(SAMPLES, 1), options.get("quantize.method", "min-max")
    )
    assert found.table is not None
    assert found.table.key == measured.key
    assert [(e.value, e.low) for e in found.table.values] == [
        (e.value, pytest.approx(e.low, rel=1e-5, abs=1e-5)) for e in measured.values
    ]
