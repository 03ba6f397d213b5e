"""The line that says how a package is used names the class and the arguments that Xcode makes of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.harness import captured
from vlexport.core.artifact import Artifact, DimRange
from vlexport.core.preprocess import preprocess_from_spec
from vlexport.ir.narrow import narrowed
from vlexport.ir.program import Program
from vlexport.targets.base import Brief
from vlexport.targets.coreml import CoreMLOptions, CoreMLTarget
from vlexport.targets.coreml.mil import read_package

LINE = re.compile(r"    try (\w+)\(configuration: \.init\(\)\)\.prediction\((.*)\)\.(\w+)  // Swift, with (\S+) in .*")


class Both(nn.Module):
    def forward(self, default: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        return {"tokens": default.mean((2, 3)) + tokens, "in": tokens * 2}


class Photo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(image.mean((2, 3)))


def fixed(program: Program) -> Program:
    return narrowed(program, {dim: DimRange(min=1, max=1, opt=1) for dim in program.signature.dims})


def classifier() -> Program:
    return fixed(captured(Photo(), torch.randn(1, 3, 4, 4)))


@pytest.mark.parametrize("kind", ["arrays", "photo and label"])
def test_class_and_arguments_are_those_of_the_package_when_shown(kind: str, tmp_path: Path) -> None:
    if kind == "arrays":
        program = fixed(captured(Both(), {"default": torch.randn(1, 3, 4, 4), "tokens": torch.randn(1, 3)}))
        brief = Brief(CoreMLOptions(name="Both"), precision="fp32")
    else:
        program = classifier()
        how = preprocess_from_spec("resize=4x4,scale=1/255")
        options = CoreMLOptions(name="SolarCells", inputs="image")
        brief = Brief(options, precision="fp32", labels=("cat", "dog"), preprocess={"image": how})
    target = CoreMLTarget()
    artifact = target.lower(program, tmp_path, brief)
    package = read_package(tmp_path / artifact.path)
    (line,) = target.usage(artifact, "out/x.bundle")
    found = LINE.fullmatch(line)
    assert found is not None, line
    name, arguments, result, path = found.groups()
    assert (name, path) == (Path(artifact.path).stem, f"out/x.bundle/artifact/{artifact.path}")
    assert [each.split(": ")[0] for each in arguments.split(", ")] == [feature.name for feature in package.inputs]
    assert result == package.outputs[0].name
    if kind == "arrays":
        assert "default_: default_" in arguments, "a keyword of Swift"


def test_no_line_is_made_when_several_components_are_several_classes() -> None:
    artifact = Artifact(target="coreml", path="pipeline.json", inputs=(), outputs=())
    assert tuple(CoreMLTarget().usage(artifact, "b")) == ()
