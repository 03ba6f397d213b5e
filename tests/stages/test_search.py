"""The search loop: proposals are a pure function of the trials, trials survive a kill, only what held is kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest

from vlexport.core.artifact import TensorSpec
from vlexport.core.bundle_schema import Trial
from vlexport.core.config import BuildConfig
from vlexport.core.dataset import Dataset, Sample
from vlexport.core.errors import DataError, VlexportError
from vlexport.stages.search import (
    CoordinateSteps,
    Journal,
    candidate,
    chosen,
    journal_name,
    open_journal,
    search,
    split,
)

AXES = CoordinateSteps({"t.level": ("basic", "extended"), "t.spin": ("no",), "t.arena": ("no",)})


def scripted(speeds: Mapping[str, float]):  # type: ignore[no-untyped-def]
    """An examiner whose ratio over the best so far is the quotient of scripted speeds; also what it was asked."""
    asked: list[tuple[dict[str, str], dict[str, str]]] = []

    def speed(options: Mapping[str, str]) -> float:
        product = 1.0
        for key, value in options.items():
            product *= speeds.get(f"{key}={value}", 1.0)
        return product

    def examine(options: Mapping[str, str], best: Mapping[str, str]) -> Trial:
        asked.append((dict(options), dict(best)))
        ratio = speed(options) / speed(best)
        outcome = "faster" if ratio > 1.01 else "not faster"
        return Trial(options=dict(options), outcome=outcome, ratio=ratio, ratio_low=ratio, ratio_high=ratio)

    return examine, asked


def test_fastest_step_of_each_axis_is_kept_when_it_measured_faster(tmp_path: Path) -> None:
    examine, asked = scripted({"t.level=basic": 1.1, "t.level=extended": 1.3, "t.spin=no": 0.8, "t.arena=no": 1.05})
    decision = search(AXES, examine, Journal(tmp_path / "j", resume=False))
    assert decision.finished
    assert decision.options == {"t.level": "extended", "t.arena": "no"}
    assert asked == [
        ({"t.level": "basic"}, {}),
        ({"t.level": "extended"}, {"t.level": "basic"}),
        ({"t.level": "extended", "t.spin": "no"}, {"t.level": "extended"}),
        ({"t.level": "extended", "t.arena": "no"}, {"t.level": "extended"}),
    ]


def test_last_faster_step_is_kept_when_two_of_one_axis_are_faster(tmp_path: Path) -> None:
    """The second step is measured against the first, so its smaller ratio is the larger gain."""
    examine, _ = scripted({"t.level=basic": 1.5, "t.level=extended": 1.6})
    decision = search(AXES, examine, Journal(tmp_path / "j", resume=False))
    assert [trial.ratio for trial in decision.trials[:2]] == [1.5, pytest.approx(1.6 / 1.5)]
    assert decision.options == {"t.level": "extended"}


def test_recipe_stays_as_it_is_when_nothing_is_faster(tmp_path: Path) -> None:
    examine, asked = scripted({"t.level=basic": 0.9, "t.level=extended": 1.005, "t.spin=no": 1.0, "t.arena=no": 0.99})
    decision = search(AXES, examine, Journal(tmp_path / "j", resume=False))
    assert decision.options == {}
    assert len(asked) == 4


@pytest.mark.parametrize("outcome", ["wrong", "refused", "too noisy"])
def test_candidate_is_never_kept_when_it_was_not_shown_faster(tmp_path: Path, outcome: str) -> None:
    def examine(options: Mapping[str, str], best: Mapping[str, str]) -> Trial:
        return Trial(options=dict(options), outcome=outcome, ratio=9.0, ratio_low=9.0, ratio_high=9.0, reason="why")

    assert search(AXES, examine, Journal(tmp_path / "j", resume=False)).options == {}


def test_search_stops_between_candidates_when_the_budget_is_spent(tmp_path: Path) -> None:
    examine, asked = scripted({"t.level=basic": 1.1})
    ticks = iter([0.0, 0.0, 61.0])
    decision = search(AXES, examine, Journal(tmp_path / "j", resume=False), budget_minutes=1, clock=lambda: next(ticks))
    assert not decision.finished
    assert len(asked) == 1
    assert decision.options == {"t.level": "basic"}


def test_trials_are_not_measured_again_when_a_search_resumes(tmp_path: Path) -> None:
    speeds = {"t.level=extended": 1.3, "t.arena=no": 1.05}
    examine, _ = scripted(speeds)
    whole = search(AXES, examine, Journal(tmp_path / "whole", resume=False))
    lines = (tmp_path / "whole").read_text().splitlines()
    (tmp_path / "cut").write_text("\n".join(lines[:2]) + "\n" + lines[2][: len(lines[2]) // 2])
    examine, asked = scripted(speeds)
    resumed = search(AXES, examine, Journal(tmp_path / "cut", resume=True))
    assert (resumed.options, resumed.trials) == (whole.options, whole.trials)
    assert len(asked) == len(lines) - 2
    assert (tmp_path / "cut").read_text() == (tmp_path / "whole").read_text()


def test_journal_starts_empty_when_not_resumed(tmp_path: Path) -> None:
    examine, _ = scripted({})
    search(AXES, examine, Journal(tmp_path / "j", resume=False))
    assert Journal(tmp_path / "j", resume=False).trials == []
    assert (tmp_path / "j").read_text() == ""


def test_journal_is_made_in_a_private_cache_folder_when_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLEXPORT_CACHE", str(tmp_path / "cache"))
    journal = open_journal({"a": 1}, resume=True)
    assert journal.path.parent == tmp_path / "cache"
    assert journal.path.parent.stat().st_mode & 0o777 == 0o700
    assert [file.name for file in journal.path.parent.iterdir()] == [journal_name({"a": 1})]
    journal.remove()
    assert list((tmp_path / "cache").iterdir()) == []


def test_journal_says_what_to_do_when_it_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "j").mkdir()
    with pytest.raises(VlexportError) as caught:
        Journal(tmp_path / "j", resume=False)
    assert caught.value.code == "VLX0607"
    assert "VLEXPORT_CACHE" in caught.value.hint


def test_candidate_is_a_recipe_when_options_are_laid_over_one() -> None:
    recipe = BuildConfig(model="m.pt", options={"t.level": "all", "t.spin": "yes"})
    found = candidate(recipe, {"t.level": "basic"})
    assert found.options == {"t.level": "basic", "t.spin": "yes"}
    assert recipe.options == {"t.level": "all", "t.spin": "yes"}
    assert found.model_copy(update={"options": recipe.options}) == recipe


def dataset(names: list[str], *, bad: tuple[str, ...] = (), label: int = 0) -> Dataset:
    def read() -> Iterator[Sample | DataError]:
        for number, name in enumerate(names):
            if name in bad:
                yield DataError("VLX0203", "cannot be read", where=name)
            else:
                yield Sample(name, {"x": np.full(2, number, np.float32)}, label)

    spec = TensorSpec(name="x", dtype="float32", shape=("batch", 2))
    return Dataset(kind="npz", count=lambda: len(names), read=read, inputs=[spec], labelled=True, labels=None)


NAMES = [f"class/{number:05}.png" for number in range(40)]


def test_split_is_by_hash_when_samples_are_divided() -> None:
    ids = [f"class/{number:05}.png" for number in range(5000)]
    share = sum(map(chosen, ids)) / len(ids)
    assert 0.57 < share < 0.63  # 60 %, four standard errors at 5,000 samples are 2.8 points
    parts = split(dataset(NAMES))
    choosing = [sample.id for sample in parts.choosing]
    confirming = [sample.id for sample in parts.confirming]
    assert choosing == [name for name in NAMES if chosen(name)]
    assert confirming == [name for name in NAMES if not chosen(name)]
    assert (parts.choosing_samples, parts.confirming_samples) == (len(choosing), len(confirming))
    assert (len(parts.choosing), len(parts.confirming)) == (len(choosing), len(confirming))


def test_sample_stays_on_its_side_when_others_come_and_go() -> None:
    few = {sample.id for sample in split(dataset(NAMES[::3])).choosing}
    assert few == {sample.id for sample in split(dataset(NAMES)).choosing} & set(NAMES[::3])


def test_bad_samples_are_counted_where_they_belong_when_skipped() -> None:
    bad = tuple(NAMES[:6])
    assert {chosen(name) for name in bad} == {True, False}
    whole = dataset(NAMES, bad=bad)
    whole.skip_bad = True
    parts = split(whole)
    for part, side in ((parts.choosing, True), (parts.confirming, False)):
        good = len(list(part))
        assert set(part.skipped) == {name for name in bad if chosen(name) is side}
        assert len(part) == good + len(part.skipped)
    assert parts.choosing_samples + parts.confirming_samples == len(NAMES) - len(bad)
    with pytest.raises(DataError):
        split(dataset(NAMES, bad=bad))


def test_digest_is_that_of_the_samples_chosen_on_when_data_changes() -> None:
    first = split(dataset(NAMES)).digest
    assert split(dataset(NAMES)).digest == first
    assert split(dataset(NAMES, label=1)).digest != first
    assert split(dataset(NAMES[::-1])).digest != first


def test_name_has_a_side_when_it_is_no_unicode() -> None:
    assert {chosen(f"caf\udce9-{number}.png") for number in range(30)} == {True, False}


@pytest.mark.parametrize("names", [[], [next(name for name in NAMES if chosen(name))]])
def test_split_is_refused_when_a_part_would_be_empty(names: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        split(dataset(names))
    assert caught.value.code == "VLX0202"


def test_journals_differ_when_anything_that_decides_a_trial_differs() -> None:
    key = {"source": "a", "target": "t", "cpu": "x"}
    assert journal_name(key) == journal_name(dict(reversed(key.items())))
    assert journal_name(key) != journal_name({**key, "cpu": "y"})
