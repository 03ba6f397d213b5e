"""Faults planted in the rules of the affine domain: each must be caught by the gate or by the harness."""

from __future__ import annotations

import inspect
import textwrap
import types
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from tests.harness import captured, randomize
from tests.passes.test_mutations import caught_by, image, layers
from tests.passes.test_reparameterize import Branches, conv
from vlexport.ir.program import Program
from vlexport.passes.affine import expression, kernel, reading
from vlexport.passes.reparameterize import Reparameterize


@dataclass(frozen=True)
class Fault:
    """``old`` becomes ``new`` in one function; ``subject`` makes a program on which it matters."""

    module: types.ModuleType
    name: str
    old: str
    new: str
    subject: Callable[[], Program]
    caught_by: str


def sums(*branches: nn.Module, channels: int = 4, identity: bool = False) -> Callable[[], Program]:
    def build() -> Program:
        torch.manual_seed(0)
        model = randomize(Branches(*branches, identity=identity))
        return captured(model, image(1, channels, 7, 7))

    return build


CONV = layers(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6))
FAULTS = {
    "rsqrt is sqrt": Fault(reading, "_batch_norm", "torch.rsqrt(", "torch.sqrt(", CONV, "gate"),
    "a large epsilon is dropped": Fault(
        reading, "_batch_norm", " + float(epsilon)", "",
        layers(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, eps=1e-3)), "gate",
    ),
    "a small epsilon is dropped": Fault(
        reading, "_batch_norm", " + float(epsilon)", "",
        layers(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, eps=1e-7)), "harness",
    ),
    "the mean is added": Fault(reading, "_batch_norm", "shift = -program", "shift = program", CONV, "gate"),
    "beta is left out": Fault(reading, "_batch_norm", "if beta is not None", "if False", CONV, "gate"),
    "a pool divides by nothing": Fault(
        reading, "_pool", "1.0 / (divisor or math.prod(kernels))", "1.0",
        sums(conv(4, 4), nn.Sequential(nn.AvgPool2d(3, 1, 1), nn.BatchNorm2d(4))), "gate",
    ),
    "a biased border is merged": Fault(
        expression, "_border", "if early.biased:", "if False:",
        layers(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 3, padding=1), shape=(1, 4, 6, 6)), "gate",
    ),
    "padding between two kernels is merged": Fault(
        expression, "_border",
        "return \"zero padding stands between the two kernels, so the border is no convolution\"",
        "pass",
        layers(
            nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.Conv2d(8, 1, 3, padding=1, bias=False), shape=(1, 4, 6, 6)
        ), "gate",
    ),
    "small kernels are not centred": Fault(
        kernel, "in_taps", "map(Taps.place, taps, wider)", "(slice(0, t.count) for t in taps)",
        sums(conv(4, 4), conv(4, 4, 1)), "gate",
    ),
    "groups are mixed up": Fault(
        kernel, "windows", "// (outputs // groups)", "% groups", sums(conv(4, 4, groups=2), identity=True), "gate",
    ),
    "a bias is not carried through": Fault(
        kernel, "_summed_taps", ".sum(2)", ".mean(2)",
        layers(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 3), shape=(1, 4, 6, 6)), "gate",
    ),
}  # fmt: skip


def plant(fault: Fault, patch: pytest.MonkeyPatch) -> None:
    """Put the faulty function where the sound one is looked up."""
    source = textwrap.dedent(inspect.getsource(getattr(fault.module, fault.name)))
    assert source.count(fault.old) == 1, "the fault must hit one place"
    scope = dict(vars(fault.module))
    exec(compile(source.replace(fault.old, fault.new), str(fault.module.__file__), "exec"), scope)
    sound, faulty = getattr(fault.module, fault.name), scope[fault.name]
    patch.setattr(fault.module, fault.name, faulty)
    for name, rule in reading._RULES.items():
        if rule is sound:
            patch.setitem(reading._RULES, name, faulty)


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_caught_when(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = FAULTS[name]
    program = fault.subject()
    with monkeypatch.context() as patch:
        plant(fault, patch)
        mechanism, words = caught_by(Reparameterize(), program)
    assert mechanism == fault.caught_by, words
    if mechanism == "gate":
        assert "reparameterize" in words, "the pass is named"
