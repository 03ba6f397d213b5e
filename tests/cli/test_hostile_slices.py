"""A slice of every campaign on hostile files; the whole ones are commands: ``python -m tests.fuzz`` and its kin."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

import vlexport
from tests.fuzz import campaign
from tests.fuzz.campaign import examine, tally_of
from tests.fuzz.doors import CANARY, Door, doors_of, prepare
from tests.kills import kill_at_work, state_of
from tests.tamper import TAMPERS, caught, outcome_of
from vlexport.core.config import BuildConfig

pytestmark = pytest.mark.filterwarnings("ignore:Duplicate name")
EACH = 40
SEED = 1


@pytest.fixture(scope="module")
def doors(model_file: Path, built: Path) -> dict[str, Door]:
    return doors_of(model_file, built)


HERE = (
    *("archive", "checkpoint", "exported", "safetensors", "shards", "preprocessor"),
    *("bundle", "golden", "recipe", "components", "npz", "jsonl", "image", "cache"),
)


@pytest.mark.parametrize("name", HERE)
def test_file_opens_or_is_refused_with_a_code_when_it_is_mutated(
    name: str, doors: dict[str, Door], built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    door = doors[name]
    path = prepare(door, tmp_path / "in", built)
    code, _, wrong = examine(door, door.seeds[0], -1, path)
    assert (code, wrong) == ("accepted", ""), "what nobody mutated opens"
    found = [(index, examine(door, door.mutated(SEED, index), index, path)) for index in range(EACH)]
    assert [(index, wrong) for index, (_, _, wrong) in found if wrong] == []
    refused = sum(code.startswith("VLX") for _, (code, _, _) in found)
    assert refused > EACH // 4 or name == "cache", "a damaged entry of the cache is no error: it is made anew"


def test_all_doors_are_tried_when_they_are_listed(doors: dict[str, Door]) -> None:
    assert {*HERE, "onnx"} == set(doors)


def test_native_code_refuses_with_a_code_when_the_artifact_is_mutated(
    doors: dict[str, Door], model_file: Path, built: Path
) -> None:
    tally = tally_of(doors["onnx"], model_file, built, range(EACH), SEED)
    assert (tally.mutations, tally.findings) == (EACH, [])
    assert tally.codes["VLX0505"] > EACH // 4


def test_finding_is_seen_when_a_reader_breaks_its_promise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()

    def wrong_of(opens: Any) -> str:
        return examine(Door("x", "x", (b"x",), (), opens), b"x", 0, tmp_path / "in" / "x")[2]

    assert wrong_of(lambda path: {}["absent"]).startswith("KeyError")
    assert wrong_of(lambda path: Path(CANARY).touch()) == "the canary ran"
    assert wrong_of(lambda path: path.with_name("y").touch()) == "wrote y"
    monkeypatch.setattr(campaign, "SLOW_SECONDS", -1.0)
    assert wrong_of(lambda path: None).startswith("took ")


def test_mutation_is_the_same_when_it_is_made_again(doors: dict[str, Door]) -> None:
    for door in doors.values():
        first = [door.mutated(7, index) for index in range(8)]
        assert first == [door.mutated(7, index) for index in range(8)]
        assert len(set(first)) > 4, door.name


def test_verify_catches_every_mutation_of_a_bundle(built: Path) -> None:
    assert outcome_of(built) == 0
    codes, missed = caught(built, 2 * len(TAMPERS), SEED)
    assert missed == []
    assert sum(codes.values()) == 2 * len(TAMPERS)
    assert outcome_of(built) == 0


def test_verify_says_no_bundle_when_there_is_none(tmp_path: Path) -> None:
    assert outcome_of(tmp_path) == 1


def test_no_half_bundle_is_left_when_builds_are_killed(model_file: Path, built: Path, tmp_path: Path) -> None:
    shutil.copy(model_file, tmp_path / "model.pt")
    chance = random.Random(SEED)
    for number in range(3):
        if number == 2:
            shutil.copytree(built, tmp_path / "made", dirs_exist_ok=True)
        assert kill_at_work(tmp_path, chance.uniform(0.0, 0.6), force=number > 0) or (tmp_path / "made").exists()
        assert state_of(tmp_path, stood=number == 2)[1] == ""
    output = tmp_path / "made"
    vlexport.build(BuildConfig(model=str(model_file), output=str(output), profile=False, threads=1, force=True))
    assert outcome_of(output) == 0
    assert [each.name for each in tmp_path.iterdir() if each.name.startswith(".made.")] == []


def test_half_a_bundle_is_seen_when_it_is_left(built: Path, tmp_path: Path) -> None:
    assert state_of(tmp_path, stood=True)[1] == "the bundle that stood there is gone"
    shutil.copytree(built, tmp_path / "made")
    assert state_of(tmp_path, stood=True) == ("whole bundle", "")
    os.truncate(tmp_path / "made/artifact/main.onnx", random.Random(0).randrange(9))
    assert state_of(tmp_path, stood=False)[1] == "the bundle is not whole: verify exits with 3"
