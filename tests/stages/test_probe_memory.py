"""Sizes that do not fit in memory are refused before anything is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.harness import captured
from vlexport.cli.main import main
from vlexport.core import memory
from vlexport.core.memory import available_memory_bytes
from vlexport.ir.run_memory import run_bytes
from vlexport.stages import probe_memory


class Growing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x] * 10, dim=1).sum(1)


def test_bytes_are_those_of_inputs_and_the_largest_value_twice() -> None:
    program = captured(Growing(), torch.randn(2, 4))
    assert run_bytes(program, {"batch": 1}) == 2 * (16 + 160)
    assert run_bytes(program, {"batch": 1000}) == 1000 * run_bytes(program, {"batch": 1})


@pytest.mark.parametrize("command", [["build", "--no-profile"], ["build", "--plan"], ["bisect"]], ids=" ".join)
def test_sizes_are_refused_in_words_when_no_machine_holds_them(
    command: list[str], model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    code = main([command[0], str(model_file), *command[1:], "--dynamic", "batch=900000000:999999999"])
    found = capfd.readouterr()
    assert code == 1
    assert "VLX0410: one run at batch=900000000 takes 2764.80 GB" in found.out + found.err
    assert list(tmp_path.iterdir()) == []


def test_sizes_are_taken_when_they_fit_in_what_is_free(model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlexport.core.artifact import DimRange
    from vlexport.core.config import BuildConfig
    from vlexport.core.errors import InputError
    from vlexport.frontends.sources import open_sources

    sources = open_sources(BuildConfig(model=str(model_file)))
    dims = {"batch": DimRange(min=10, max=20, opt=10)}
    needed = 10 * 2 * 2 * 3 * 8 * 8 * 4
    monkeypatch.setattr(probe_memory, "available_memory_bytes", lambda: needed)
    probe_memory.require_memory(sources, dims)
    monkeypatch.setattr(probe_memory, "available_memory_bytes", lambda: needed - 1)
    with pytest.raises(InputError, match=r"batch=10 takes 30\.7 kB, 30\.7 kB are free"):
        probe_memory.require_memory(sources, dims)
    monkeypatch.setattr(probe_memory, "available_memory_bytes", lambda: None)
    probe_memory.require_memory(sources, {"batch": DimRange(min=10**9, max=10**9, opt=10**9)})


def test_free_memory_is_the_container_s_when_it_is_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = available_memory_bytes()
    assert whole is None or whole > 0
    (tmp_path / "max").write_text("5000000\n")
    (tmp_path / "current").write_text("1000000\n")
    monkeypatch.setattr(memory, "_GROUP_LIMITS", ((str(tmp_path / "max"), str(tmp_path / "current")),))
    assert available_memory_bytes() == 4_000_000
    (tmp_path / "max").write_text("max\n")
    assert available_memory_bytes() != 4_000_000
