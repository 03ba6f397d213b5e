"""Bundles for Core ML: what is not measured here is said, and each package has a name of its own."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import vlexport
from tests.targets.test_coreml import Net, brief, captured
from vlexport.cli.main import main
from vlexport.core.bundle_schema import Bundle, Component, CostRecord
from vlexport.core.config import BuildConfig, config_from
from vlexport.stages.write_bundle import write_bundle, write_golden
from vlexport.targets.coreml import CoreMLTarget


def test_profile_says_not_measured_here_when_the_bundle_is_for_apple(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    program, folder = captured(Net(), torch.rand(1, 3, 8, 8)), tmp_path / "cells.bundle"
    artifact = CoreMLTarget().lower(program, folder / "artifact", brief())
    image = np.zeros((1, 3, 8, 8), np.float32)
    golden = write_golden(folder, "main", {"image": image}, {"output": program.run(torch.from_numpy(image))[0].numpy()})
    component = Component(artifact=artifact, dims={}, preprocess={}, labels=(), golden=golden, passes=(),
                          cost=CostRecord(macs=0, parameters=0, size_bytes=0))  # fmt: skip
    write_bundle(
        folder,
        Bundle(vlexport="0", state="built", target="coreml", precision="fp16", device_profile="ios17", source_hash="",
               components={"main": component}, tools=CoreMLTarget().tools(), instruction_set=(),
               compatibility=CoreMLTarget().compatibility(brief()), files={}),
        "",
    )  # fmt: skip
    assert main(["profile", str(folder)]) == 4
    said = capfd.readouterr()
    text = said.out + said.err
    assert "not measured here" in text
    assert "Core ML runs on Apple systems" in text
    assert re.search(r"\d\s*(ms|µs|×)", text) is None
    assert not (folder / "measured").exists()


def test_packages_get_two_class_names_when_two_models_are_built(tmp_path: Path) -> None:
    """And the recipe says them, so that a replay from a file of another name gives the same bytes."""
    module = nn.Sequential(nn.Linear(4, 3)).eval()
    for name in ("left_eye", "right eye 2"):
        vlexport.save(module, tmp_path / f"{name}.pt", inputs=torch.randn(1, 4))
    made = {}
    for name in ("left_eye", "right eye 2"):
        config = BuildConfig(model=str(tmp_path / f"{name}.pt"), target="coreml", output=str(tmp_path / name))
        made[name] = vlexport.build(config)
    paths = [each.bundle.main.artifact.path for each in made.values()]
    assert paths == ["LeftEye.mlpackage", "RightEye2.mlpackage"]
    recipe = tmp_path / "left_eye/recipe.toml"
    again = config_from({"model": str(tmp_path / "right eye 2.pt"), "output": str(tmp_path / "again")}, recipe=recipe)
    assert vlexport.build(again).bundle.main.artifact.path == "LeftEye.mlpackage"
