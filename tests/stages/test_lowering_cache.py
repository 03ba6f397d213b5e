"""A second build finds what the first one lowered: the same bundle, checked as ever, and never somebody else's."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import vlexport
from tests.targets.onnx_passes import UNFUSED
from vlexport.cli.main import main
from vlexport.core.bundle import read_bundle
from vlexport.core.cache import ENTRY_FILE, Cache
from vlexport.core.config import BuildConfig
from vlexport.core.device_profiles import device_profiles
from vlexport.core.errors import GateError
from vlexport.core.preprocess import preprocess_from_spec
from vlexport.core.progress import Silent
from vlexport.frontends.source import open_archive
from vlexport.passes.probes import Probe
from vlexport.stages.lowering_cache import lowering_key
from vlexport.targets.base import Brief
from vlexport.targets.onnx.optimize_onnx import OptimizeOnnx, OptimizeOnnxOptions
from vlexport.targets.onnxruntime import OnnxRuntimeOptions, OnnxRuntimeTarget

ROOT = Path(__file__).resolve().parents[2]
HIT = "the artifact is from the cache"
OPTIMIZED = {"onnxruntime.optimize": "true", **UNFUSED}


class Listener(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def built(model: Path, output: Path, **options: Any) -> tuple[dict[str, bytes], bool]:
    """Every file that a bundle promises, and whether its artifact came from the cache."""
    listener = Listener()
    config = BuildConfig(model=str(model), output=str(output), **{"profile": False, "threads": 1, **options})
    vlexport.build(config, reporter=listener)
    return content(output), HIT in listener.notes


def content(bundle: Path) -> dict[str, bytes]:
    files = {p.relative_to(bundle).as_posix(): p for p in bundle.rglob("*") if p.is_file()}
    return {name: file.read_bytes() for name, file in sorted(files.items()) if not name.startswith("measured/")}


@pytest.fixture
def no_lowering(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From the call on, whatever lowers fails."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("it was lowered again")

    def call() -> None:
        monkeypatch.setattr(OnnxRuntimeTarget, "lower", refuse)
        monkeypatch.setattr(OnnxRuntimeTarget, "lower_naive", refuse)

    return call


def test_bundle_is_byte_identical_when_cached_cold_warm_and_off(
    model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_lowering: Any
) -> None:
    """With a lowered pass, whose record is kept as well."""
    with monkeypatch.context() as patch:
        patch.setenv("VLEXPORT_CACHE", "off")
        off, hit = built(model_file, tmp_path / "off", options=OPTIMIZED)
        assert not hit
    cold, hit = built(model_file, tmp_path / "cold", options=OPTIMIZED)
    assert not hit
    no_lowering()
    warm, hit = built(model_file, tmp_path / "warm", options=OPTIMIZED)
    assert hit
    assert off == cold == warm
    assert json.loads(warm["bundle.json"])["components"]["main"]["passes"][-1]["name"] == "optimize-onnx"


def test_artifact_is_the_bundles_own_when_it_came_from_the_cache(
    model_file: Path, tmp_path: Path, own_cache: Path
) -> None:
    first, _ = built(model_file, tmp_path / "a")
    second, hit = built(model_file, tmp_path / "b")
    assert hit
    kept = {file.stat().st_ino for file in own_cache.rglob("*")}
    for name in ("a", "b"):
        file = tmp_path / name / "artifact/main.onnx"
        assert file.stat().st_ino not in kept
        assert file.stat().st_mode & 0o777 == (tmp_path / name / "bundle.json").stat().st_mode & 0o777
        file.write_bytes(b"edited by its owner")
    third, hit = built(model_file, tmp_path / "c")
    assert hit
    assert third == second == first


@pytest.mark.parametrize("fused", [False, True])
def test_artifact_is_found_when_only_the_seed_or_the_gate_differs_and_no_pass_ran_on_it(
    model_file: Path, tmp_path: Path, fused: bool
) -> None:
    """A pass over the lowered graph leaves its gate's figures in the bundle, which the seed decides."""
    options = {**UNFUSED, "onnxruntime.fuse_attention": str(fused).lower()}  # by default the processor decides
    built(model_file, tmp_path / "a", options=options)
    assert built(model_file, tmp_path / "b", options=options, seed=3, numeric_gate=False)[1] is not fused


def test_dump_is_whole_when_the_artifact_is_in_the_cache(model_file: Path, tmp_path: Path) -> None:
    built(model_file, tmp_path / "a", options=OPTIMIZED)
    assert not built(model_file, tmp_path / "b", options=OPTIMIZED, dump=str(tmp_path / "dump"))[1]
    assert len(list((tmp_path / "dump/onnxruntime/lowered").iterdir())) == 2


def test_golden_check_runs_when_the_artifact_came_from_the_cache(
    model_file: Path, other_model: Path, tmp_path: Path
) -> None:
    """An entry that is whole and wrong, as no honest build can make it."""
    built(model_file, tmp_path / "a")
    wrong, _ = built(other_model, tmp_path / "b")
    cache = Cache()
    entry = next(p for p, _ in cache.entries() if (p / "main.onnx").read_bytes() != wrong["artifact/main.onnx"])
    index = json.loads(json.loads((entry / ENTRY_FILE).read_text())["index"])
    for file in entry.iterdir():
        file.unlink()
    assert cache.keep(index["key"], tmp_path / "b/artifact", index["about"])
    with pytest.raises(GateError) as caught:
        built(model_file, tmp_path / "c")
    assert caught.value.code == "VLX0504"
    assert not (tmp_path / "c").exists()


def flip(entry: Path) -> None:
    whole = bytearray((entry / "main.onnx").read_bytes())
    whole[len(whole) // 2] ^= 1
    (entry / "main.onnx").write_bytes(whole)


def test_artifact_is_made_anew_when_its_entry_is_damaged(model_file: Path, tmp_path: Path) -> None:
    first, _ = built(model_file, tmp_path / "a")
    damages: tuple[Callable[[Path], None], ...] = (
        flip,
        lambda entry: (entry / "main.onnx").unlink(),
        lambda entry: os.truncate(entry / ENTRY_FILE, 100),
    )
    for number, damage in enumerate(damages):
        ((entry, _),) = Cache().entries()
        damage(entry)
        assert built(model_file, tmp_path / f"b{number}") == (first, False)
    assert built(model_file, tmp_path / "c") == (first, True)


def test_build_goes_on_and_says_so_when_the_cache_cannot_be_written(
    model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VLEXPORT_CACHE", str(tmp_path / "file"))
    assert main(["build", str(model_file), "-o", str(tmp_path / "a"), "--no-profile"]) == 0
    assert "the cache is not used: the cache folder cannot be made" in capfd.readouterr().err
    monkeypatch.setenv("VLEXPORT_CACHE", str(tmp_path / "c"))

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vlexport.core.cache._seal", full)
    assert main(["build", str(model_file), "-o", str(tmp_path / "b"), "--no-profile"]) == 0
    assert "the artifact could not be kept in the cache: No space left on device" in capfd.readouterr().err
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_plain_export_is_found_when_profiled_after_a_build(
    model_file: Path, tmp_path: Path, no_lowering: Any, capfd: Any
) -> None:
    place = tmp_path / "a"
    assert main(["build", str(model_file), "-o", str(place), "--threads", "1"]) == 0
    assert "plain export is from the cache" not in capfd.readouterr().err
    no_lowering()
    code = main(["profile", str(place), "--against", "naive", "--reference", str(model_file), "--quick"])
    said = capfd.readouterr()
    assert code in (0, 5), said.err
    assert "the plain export is from the cache" in said.err
    assert "against naive" in said.out


# -- the key -----------------------------------------------------------------------------------------------------------


def key(program: Any, **more: Any) -> Any:
    about = {"options": OnnxRuntimeOptions()}
    about |= {name: more.pop(name) for name in [f.name for f in dataclasses.fields(Brief)] if name in more}
    return lowering_key("lower", OnnxRuntimeTarget(), program, Brief(**about), **more)


@pytest.fixture
def program(model_file: Path) -> Any:
    return open_archive(model_file).program


def distinct(*keys: Any) -> int:
    return len({json.dumps(each, sort_keys=True) for each in keys})


def test_key_changes_when_something_else_is_asked_for(program: Any, other_model: Path) -> None:
    others = [
        {"options": OnnxRuntimeOptions(opset=19)},
        {"options": OnnxRuntimeOptions(graph_optimization="basic")},
        {"passes": [OptimizeOnnx()]},
        {"threads": 2},
        {"device": device_profiles()["cpu-x86-avx2"]},
        {"precision": "fp16"},
        {"name": "head"},
        {"labels": ("cat", "dog")},
        {"preprocess": {"x": preprocess_from_spec("resize=8,crop=8")}},
    ]
    found = [key(program), *(key(program, **other) for other in others), key(open_archive(other_model).program)]
    assert distinct(*found, lowering_key("naive", OnnxRuntimeTarget(), program)) == 12


def test_key_changes_when_code_or_tools_do(program: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first = key(program)
    assert first == key(program)
    assert set(first["code"]) >= {"core", "ir", "passes", "targets", "stages"}
    monkeypatch.setattr("vlexport.stages.lowering_cache.code_digest", lambda name: name)
    code = key(program)
    monkeypatch.setattr(OnnxRuntimeTarget, "tools", lambda self: {"onnx": "0"})
    tools = key(program)
    monkeypatch.setattr(vlexport, "__version__", "9")
    assert distinct(first, code, tools, key(program)) == 4


def test_key_holds_options_and_probes_of_lowered_passes_when_there_are_any(program: Any) -> None:
    probes = [Probe("draw", (torch.zeros(1, 3, 8, 8),))], [Probe("draw", (torch.ones(1, 3, 8, 8),))]
    passes = [OptimizeOnnx()], [OptimizeOnnx(OptimizeOnnxOptions(input_limit=1))]
    found = [key(program, passes=p, probes=q) for p in passes for q in (*probes, None)]
    assert distinct(*found) == 6
    assert key(program, probes=probes[0]) == key(program, probes=probes[1]) == key(program)


def test_nothing_is_kept_when_a_pass_is_more_than_its_options(program: Any) -> None:
    odd = OptimizeOnnx()
    odd.extra = "what the key cannot hold"  # type: ignore[attr-defined]
    assert key(program, passes=[odd]) is None


def test_nothing_is_kept_when_the_code_of_the_target_lies_in_no_file(program: Any) -> None:
    loose = type("Loose", (OnnxRuntimeTarget,), {"__module__": "__main__"})
    assert lowering_key("lower", loose(), program) is None


# -- several processes -------------------------------------------------------------------------------------------------


def test_bundles_are_identical_and_a_third_build_hits_when_two_run_at_once(
    model_file: Path, tmp_path: Path, own_cache: Path
) -> None:
    def start(name: str) -> subprocess.Popen[str]:
        command = ["build", str(model_file), "-o", str(tmp_path / name), "--no-profile", "--threads", "1"]
        return subprocess.Popen(
            [sys.executable, "-m", "vlexport", *command],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    both = [start("a"), start("b")]
    said = [each.communicate(timeout=300) for each in both]
    assert [each.returncode for each in both] == [0, 0], said
    assert len(Cache().entries()) == 1
    assert sorted(p.name for p in own_cache.iterdir()) == [p.name for p, _ in Cache().entries()]
    third = start("c")  # a process of its own, too: what other tests have put on this one's path is in the key
    assert HIT in third.communicate(timeout=300)[1]
    assert content(tmp_path / "a") == content(tmp_path / "b") == content(tmp_path / "c")
    assert read_bundle(tmp_path / "c").state == "verified"
