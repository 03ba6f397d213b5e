"""Accuracy with intervals, fidelity with disagreements, verdicts, and what is refused rather than measured."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vlexport
from vlexport.cli.main import main
from vlexport.core.bundle_schema import Report
from vlexport.core.config import BuildConfig
from vlexport.core.errors import VlexportError
from vlexport.core.verdict import gate_from_text
from vlexport.stages.validate import CLOSE_MARGIN, ValidateConfig, validate


def measured(bundle: Path, data: str, **options: Any) -> Report:
    return validate(ValidateConfig(bundle, data, **options))


def refused(code: str, bundle: Path, data: str, **options: Any) -> VlexportError:
    before = sorted(str(p) for p in bundle.rglob("*"))
    with pytest.raises(VlexportError) as caught:
        measured(bundle, data, **options)
    assert caught.value.code == code
    assert sorted(str(p) for p in bundle.rglob("*")) == before
    return caught.value


# DATA of every kind


def test_accuracy_is_counted_when_data_are_class_folders(bundle: Path, make: Any) -> None:
    for name, colour in (("red/1", 0), ("red/2", 1), ("green/1", 1), ("blue/1", 2), ("blue/2", 2)):
        make.photo(Path("photos") / f"{name}.png", colour)
    found = measured(bundle, "photos").accuracy
    assert found is not None
    assert (found.samples, found.top1, found.majority) == (5, 80.0, 40.0)  # red/2 is green
    assert (found.top5, found.reference_top1, found.drop) == (None, None, None)


def test_accuracy_is_counted_when_data_is_npz(bundle: Path, make: Any) -> None:
    found = measured(bundle, make.npz(Path("x.npz"), [0, 1, 2] * 8)).accuracy
    assert found is not None
    assert (found.samples, found.top1, found.top1_high) == (24, 100.0, 100.0)
    assert found.top1_low == pytest.approx(100 * 0.025 ** (1 / 24))  # exact interval where all are right
    mixed = measured(bundle, make.npz(Path("y.npz"), [0, 1, 2, 0], [0, 1, 1, 1])).accuracy
    assert mixed is not None
    assert mixed.top1 == 50.0
    assert (mixed.top1_low, mixed.top1_high) == pytest.approx((6.7586, 93.2414), abs=1e-3)  # Clopper-Pearson, 2 of 4


def test_accuracy_is_counted_when_data_is_a_function(bundle: Path, make: Any) -> None:
    np.save("images.npy", np.stack([make.image(c, c) for c in (0, 1, 2)]))
    Path("d.py").write_text(
        "import numpy\ndef samples():\n"
        "    for label, image in zip(('red', 'green', 'green'), numpy.load('images.npy')):\n"
        "        yield {'image': image, 'label': label}\n"
    )
    found = measured(bundle, "d.py:samples").accuracy
    assert found is not None
    assert (found.samples, round(found.top1, 2)) == (3, 66.67)


def test_fidelity_alone_is_measured_when_samples_have_no_labels(bundle: Path, model_file: Path, make: Any) -> None:
    report = measured(bundle, make.npz(Path("x.npz"), [0, 1, 2], []), reference=str(model_file))
    found = report.fidelity["output"]
    assert (report.accuracy, report.reference, report.samples) == (None, "model", 3)
    assert (found.samples, found.agreements, report.disagreements) == (3, 3, ())
    assert found.cosine_min > 1 - 1e-6
    assert found.sqnr_db > 80  # fp32 against fp32


def test_data_without_labels_is_refused_when_there_is_no_reference(bundle: Path, make: Any) -> None:
    error = refused("VLX0210", bundle, make.npz(Path("x.npz"), [0, 1, 2], []))
    assert "--reference" in error.hint


# References


def test_reference_bundle_is_compared_without_torch_when_given(bundle: Path, make: Any) -> None:
    make.npz(Path("x.npz"), [0, 1, 2])
    code = (
        "import sys; sys.modules['torch'] = None; from vlexport.cli.main import main; "
        "raise SystemExit(main(['validate', 'bundle', '--data', 'x.npz', '--reference', 'bundle', '--json']))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    report = Report.model_validate(json.loads(found.stdout)["report"])
    assert re.fullmatch("bundle [0-9a-f]{12}", report.reference)
    assert report.fidelity["output"].sqnr_db == np.inf
    assert report.fidelity["output"].relative_error == 0


def test_gate_on_sqnr_passes_when_there_is_no_noise_at_all(bundle: Path, make: Any) -> None:
    gates = (gate_from_text("sqnr>=30"), gate_from_text("agreement>=1"))
    report = measured(bundle, make.npz(Path("x.npz"), [0, 1, 2]), reference=str(bundle), gates=gates)
    assert [v.outcome for v in report.verdicts] == ["pass", "pass"]


def test_reference_model_needs_torch_in_words_when_it_is_missing(bundle: Path, model_file: Path, make: Any) -> None:
    make.npz(Path("x.npz"), [0, 1, 2])
    code = (
        "import sys; sys.modules['torch'] = None; from vlexport.cli.main import main; "
        f"raise SystemExit(main(['validate', 'bundle', '--data', 'x.npz', '--reference', {str(model_file)!r}]))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert "torch, which is not installed" in found.stderr


def test_reference_is_refused_when_its_names_differ(bundle: Path, tmp_path: Path, make: Any) -> None:
    class Net(nn.Module):
        def forward(self, picture: Tensor) -> Tensor:
            return picture.mean(dim=(2, 3))

    vlexport.save(Net().eval(), tmp_path / "n.pt", inputs=torch.rand(1, 3, 8, 8))
    error = refused("VLX0507", bundle, make.npz(Path("x.npz"), [0]), reference="n.pt")
    assert "picture" in error.message
    refused("VLX0101", bundle, "x.npz", reference="nowhere.pt")
    Path("empty").mkdir()
    refused("VLX0102", bundle, "x.npz", reference="empty")


def test_disagreements_are_listed_with_margins_when_top1_differs(bundle: Path, other_bundle: Path, make: Any) -> None:
    images = np.stack([make.image(0, 1), make.image(2, 2), make.image(1, 3), make.image(0, 4)])
    images[3, 1] = images[3, 0] * (1 - 1e-4)  # red and green nearly tie
    np.savez("x.npz", image=images, label=np.array([0, 2, 1, 0]))
    report = measured(bundle, "x.npz", reference=str(other_bundle))
    assert [d.sample for d in report.disagreements] == ["#0", "#2", "#3"]
    assert [(d.reference, d.ours, d.close) for d in report.disagreements] == [
        (1, 0, False),
        (0, 1, False),
        (1, 0, True),
    ]
    with vlexport.load(other_bundle) as loaded:
        scores = np.sort(loaded.run({"image": images})["output"].astype(np.float64), axis=1)
    for found, row in zip(report.disagreements, scores[[0, 2, 3]], strict=True):
        assert found.margin == pytest.approx((row[-1] - row[-2]) / np.abs(row).max(), rel=1e-4)
    assert report.disagreements[2].margin < CLOSE_MARGIN < report.disagreements[0].margin
    assert report.fidelity["output"].agreements == 1
    assert report.accuracy is not None
    assert (report.accuracy.top1, report.accuracy.reference_top1, report.accuracy.drop) == (100.0, 25.0, -75.0)


# Verdicts


@pytest.mark.parametrize(
    ("gate", "exit_code", "said"),
    [
        ("top1>=80", 0, "top1>=80: pass"),
        ("drop<=20", 0, "drop<=20: pass"),
        ("top1>=99", 5, "samples would decide, 24 were given"),
        ("drop<=0.5", 5, "samples would decide, 24 were given"),
        ("size_mb<=1", 0, "size_mb<=1: pass"),
        ("size_mb>=1", 3, "size_mb>=1: fail"),
    ],
)
def test_exit_code_follows_the_verdict_when_a_gate_is_judged(
    gate: str, exit_code: int, said: str, bundle: Path, model_file: Path, make: Any, capfd: Any
) -> None:
    data = make.npz(Path("x.npz"), [0, 1, 2] * 8)
    arguments = ["validate", "bundle", "--data", data, "--reference", str(model_file), "--gate", gate]
    assert main(arguments) == exit_code
    assert said in capfd.readouterr().out


def test_named_sample_count_decides_when_that_many_are_given(bundle: Path, make: Any) -> None:
    gates = (gate_from_text("top1>=80"),)
    small = measured(bundle, make.npz(Path("a.npz"), [0, 1, 2] * 3), gates=gates).verdicts[0]
    assert small.outcome == "inconclusive"
    needed = small.samples_needed
    assert needed is not None
    enough = measured(bundle, make.npz(Path("b.npz"), [i % 3 for i in range(needed)]), gates=gates).verdicts[0]
    fewer = measured(bundle, make.npz(Path("c.npz"), [i % 3 for i in range(needed - 1)]), gates=gates).verdicts[0]
    assert (enough.outcome, fewer.outcome) == ("pass", "inconclusive")


def test_gate_fails_when_the_drop_is_large(other_bundle: Path, bundle: Path, model_file: Path, make: Any) -> None:
    data = make.npz(Path("x.npz"), [0, 1, 2] * 8)
    arguments = ["validate", "other", "--data", data, "--reference", str(model_file), "--max-drop", "0.5"]
    assert main(arguments) == 3
    report = Report.model_validate_json(Path("other/measured/local-2/report.json").read_text())
    assert report.accuracy is not None
    assert report.accuracy.drop == pytest.approx(200 / 3)
    assert report.verdicts[0].outcome == "fail"


def test_fail_outweighs_inconclusive_when_there_are_both(bundle: Path, model_file: Path, make: Any) -> None:
    data = make.npz(Path("x.npz"), [0, 1, 2] * 8)
    assert main(["validate", "bundle", "--data", data, "--gate", "top1>=99", "--gate", "size_mb>=1"]) == 3


# Guessing


def test_reference_at_chance_is_an_error_when_samples_are_many(bundle: Path, make: Any) -> None:
    colours = [i % 3 for i in range(36)]
    data = make.npz(Path("x.npz"), colours, [(c + i // 3) % 3 for i, c in enumerate(colours)])
    error = refused("VLX0211", bundle, data)
    assert "guessing among 3 classes" in error.message
    assert "preprocessing" in error.hint


def test_chance_is_judged_on_the_reference_when_there_is_one(other_bundle: Path, model_file: Path, make: Any) -> None:
    data = make.npz(other_bundle.parent / "x.npz", [0, 1] * 18)
    refused("VLX0211", other_bundle, data)  # alone, it is always wrong
    report = measured(other_bundle, data, reference=str(model_file))  # against a good reference that is a finding
    assert report.accuracy is not None
    assert (report.accuracy.top1, report.accuracy.reference_top1) == (0.0, 100.0)
    assert report.notes == ()


def test_guess_is_only_warned_of_when_it_is_above_chance_or_samples_are_few(bundle: Path, make: Any) -> None:
    few = measured(bundle, make.npz(Path("x.npz"), [0, 1, 2], [1, 2, 0]))
    assert "preprocessing and label order" in few.notes[0]
    # 20 of 30 right where 19 are of one class: above 1/3, not above the commonest class
    colours = [0] * 14 + [1] * 5 + [0] * 5 + [1, 2] * 3
    common = measured(bundle, make.npz(Path("y.npz"), colours, [0] * 19 + [1] * 5 + [1, 2] * 3))
    assert "commonest class" in common.notes[0]
    good = measured(bundle, make.npz(Path("z.npz"), [0, 1, 2] * 8))
    assert good.notes == ()


# Metrics of the user's

RIGHT = "def right(outputs, label):\n    return outputs['output'].argmax() == label\n"


def test_own_metric_is_a_mean_with_interval_and_paired_change_when_given(
    bundle: Path, other_bundle: Path, make: Any
) -> None:
    Path("m.py").write_text(RIGHT)
    data = make.npz(Path("x.npz"), [0, 1, 2, 2] * 10)
    report = measured(bundle, data, reference=str(other_bundle), metrics=("m.py:right",))
    (found,) = report.metrics
    assert (found.name, found.samples, found.value) == ("right", 40, 1)
    assert (found.reference, found.change) == pytest.approx((0.5, 0.5), rel=1e-14)
    half = 1.959964 * (0.25 * 40 / 39 / 40) ** 0.5  # of 20 zeros and 20 ones
    assert (found.low, found.high) == (1, 1)
    assert (found.change_low, found.change_high) == pytest.approx((0.5 - half, 0.5 + half), rel=1e-5)
    assert report.accuracy is not None  # labels are class indices, so the built-in figures are there as well
    assert any("no width" in note for note in report.notes)
    page = (bundle / "measured/local-2/report.html").read_text()
    assert "Own metrics" in page
    assert "<code>right</code>" in page


@pytest.mark.parametrize(
    ("gate", "exit_code"),
    [("right>=0.4", 0), ("right>=0.9", 3), ("right>=0.6", 5), ("right.change>=0", 0), ("right.change>0", 3)],
)
def test_own_metric_is_judged_when_a_gate_names_it(
    gate: str, exit_code: int, bundle: Path, make: Any, capfd: Any
) -> None:
    Path("m.py").write_text(RIGHT)
    colours = [0, 1, 2, 2] * 10
    data = make.npz(Path("x.npz"), colours, [c if i % 3 else (c + 1) % 3 for i, c in enumerate(colours)])  # 65 % right
    options = ["--reference", "bundle", "--metric", "m.py:right", "--gate", gate]
    assert main(["validate", "bundle", "--data", data, *options]) == exit_code
    assert f"gate {gate}: " in capfd.readouterr().out


@pytest.mark.parametrize("label", ["numpy.zeros((4, 4))", "{'boxes': [1, 2]}", "0.25", "None"])
def test_own_metric_gets_the_label_as_it_is_when_it_is_no_class(label: str, bundle: Path, make: Any) -> None:
    np.save("images.npy", np.stack([make.image(c, c) for c in (0, 1, 2)]))
    Path("d.py").write_text(
        f"import numpy\ndef samples():\n    return [(image, {label}) for image in numpy.load('images.npy')]\n"
    )
    Path("m.py").write_text(
        "import numpy\ndef same(outputs, label):\n"
        f"    assert outputs['output'].shape == (3,)\n    wanted = {label}\n"
        "    return numpy.array_equal(label, wanted) if isinstance(wanted, numpy.ndarray) else label == wanted\n"
    )
    report = measured(bundle, "d.py:samples", metrics=("m.py:same",))
    assert (report.accuracy, report.metrics[0].value, report.metrics[0].samples) == (None, 1.0, 3)
    assert any("few for a normal interval" in note for note in report.notes)
    if label != "None":
        assert "--metric" in refused("VLX0208", bundle, "d.py:samples").hint


def test_own_metric_is_refused_before_anything_runs_when_it_cannot_be_used(bundle: Path, make: Any) -> None:
    data = make.npz(Path("x.npz"), [0, 1, 2])
    Path("m.py").write_text("def right(outputs, label):\n    return outputs['scores']\n")
    assert "m.py:2" in refused("VLX0212", bundle, data, metrics=("m.py:right",)).message
    refused("VLX0212", bundle, data, metrics=("m.py:wrong",))
    refused("VLX0201", bundle, data, metrics=("nowhere.py:right",))
    gates = (gate_from_text("right.change>=0", extra=["right.change"]),)
    assert "--reference" in refused("VLX0804", bundle, data, metrics=("m.py:right",), gates=gates).hint


@pytest.mark.parametrize("name", ["metric", "gate"])
def test_code_and_its_metric_are_refused_when_a_recipe_names_them(name: str, model_file: Path, capfd: Any) -> None:
    value = {"metric": "m.py:right", "gate": "right>=0.5"}[name]
    recipe = model_file.parent / f"{name}.toml"
    recipe.write_text(f'{name} = ["{value}"]\n')
    assert main(["build", str(model_file), "--recipe", str(recipe), "-o", str(recipe) + ".bundle"]) == 2
    err = capfd.readouterr().err
    assert "may not name code" in err if name == "metric" else "no metric is called 'right'" in err


# Bad samples


def test_bad_samples_are_counted_and_listed_when_skipped(bundle: Path, make: Any, capfd: Any) -> None:
    for name, colour in (("red/1", 0), ("green/1", 1), ("blue/1", 2)):
        make.photo(Path("photos") / f"{name}.png", colour)
    (Path("photos") / "red" / "<b>2.png").write_bytes(b"broken")
    assert main(["validate", "bundle", "--data", "photos"]) == 1
    assert "red/<b>2.png" in capfd.readouterr().err
    assert main(["validate", "bundle", "--data", "photos", "--skip-bad"]) == 0
    assert "1 of 4 samples are bad and were skipped: red/<b>2.png" in capfd.readouterr().out
    report = Report.model_validate_json((bundle / "measured/local-2/report.json").read_text())
    assert (report.samples, report.skipped) == (3, 1)
    assert [(bad.sample, bad.code) for bad in report.bad_samples] == [("red/<b>2.png", "VLX0203")]
    page = (bundle / "measured/local-2/report.html").read_text()
    assert "red/&lt;b&gt;2.png" in page
    assert "<b>2.png" not in page


def test_all_samples_bad_is_an_error_when_they_are_skipped(bundle: Path) -> None:
    np.savez("x.npz", image=np.full((3, 3, 8, 8), np.nan, np.float32), label=np.arange(3))
    assert "all 3 samples are bad" in refused("VLX0202", bundle, "x.npz", skip_bad=True).message


# Another bundle to beat, and calibration samples that come up again


@pytest.mark.parametrize(
    ("bundles", "exit_code", "said"),
    [(("bundle", "other"), 0, "pass, drop is -66.67"), (("other", "bundle"), 3, "fail, drop is 66.67"),
     (("bundle", "bundle"), 5, "samples would decide")],
)  # fmt: skip
def test_drop_against_the_baseline_is_judged_when_given(
    bundles: tuple[str, str], exit_code: int, said: str, bundle: Path, other_bundle: Path, make: Any, capfd: Any
) -> None:
    data = make.npz(Path("x.npz"), [0, 1, 2] * 8)
    arguments = ["validate", bundles[0], "--data", data, "--baseline", bundles[1], "--max-regress", "0.5"]
    assert main(arguments) == exit_code
    out = capfd.readouterr().out
    assert "gate drop<=0.5: " in out
    assert said in out


@pytest.mark.parametrize(
    ("arguments", "exit_code", "said"),
    [
        (["--max-regress", "1"], 2, "--baseline BUNDLE"),
        (["--baseline", "bundle", "--reference", "bundle"], 2, "both given"),
        (["--baseline", "nowhere"], 1, "VLX0601"),
    ],
)
def test_baseline_is_refused_when_it_is_none(
    arguments: list[str], exit_code: int, said: str, bundle: Path, make: Any, capfd: Any
) -> None:
    assert main(["validate", "bundle", "--data", make.npz(Path("x.npz"), [0, 1, 2]), *arguments]) == exit_code
    assert said in capfd.readouterr().err


def test_build_warns_with_the_count_when_calibration_samples_are_evaluated_on(
    model_file: Path, make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    colours = [0, 1, 2] * 4
    data = make.npz(Path("x.npz"), colours)
    images = np.load(data)["image"]
    images[5] = np.nan
    np.savez("calib.npz", image=np.concatenate([images[4:7], images[4:5] + 1]))  # 4 and 6; one is bad, one is new
    Path("m.py").write_text(RIGHT)
    made = vlexport.build(
        BuildConfig(
            model=str(model_file), output="b", profile=False, threads=1, data=data, calib="calib.npz", skip_bad=True,
            metric=("m.py:right",), gate=("right>=0.5", "right.change>=-1"),
        )
    )  # fmt: skip
    assert [v.outcome for v in made.report.verdicts] == ["pass", "pass"]
    notes = " | ".join(made.report.notes)
    assert "2 of 12 evaluation samples are calibration samples as well" in notes
    assert "1 of 4 calibration samples are bad and were skipped: #1" in notes
    assert "metric" not in Path("b/recipe.toml").read_text()


# Batches


class FixedFour(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        scores = image.mean(dim=(2, 3))
        return scores * 2 if image.shape[0] == 4 else scores * 3


def test_every_sample_counts_once_when_a_fixed_batch_is_filled_up(tmp_path: Path, make: Any) -> None:
    vlexport.save(FixedFour().eval(), tmp_path / "m.pt", inputs=torch.rand(4, 3, 8, 8))
    vlexport.build(BuildConfig(model=str(tmp_path / "m.pt"), output=str(tmp_path / "b"), profile=False))
    colours = [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    labels = [*colours[:9], 1]  # the last one, which fills the batch up, is wrong
    data = make.npz(tmp_path / "x.npz", colours, labels)
    report = measured(tmp_path / "b", data, reference=str(tmp_path / "m.pt"))
    assert report.accuracy is not None
    assert (report.samples, report.accuracy.samples, report.accuracy.top1) == (10, 10, 90.0)
    assert report.fidelity["output"].samples == 10
    assert report.fidelity["output"].relative_error < 1e-5


def test_labels_are_refused_when_the_first_output_is_no_score_vector(tmp_path: Path) -> None:
    class Dense(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            return image * 2

    vlexport.save(Dense().eval(), tmp_path / "m.pt", inputs=torch.rand(1, 3, 4, 4))
    vlexport.build(BuildConfig(model=str(tmp_path / "m.pt"), output=str(tmp_path / "b"), profile=False))
    np.savez(tmp_path / "x.npz", image=np.ones((2, 3, 4, 4), np.float32), label=np.array([0, 1]))
    error = refused("VLX0208", tmp_path / "b", str(tmp_path / "x.npz"))
    assert "one score vector" in error.message


# Reports


def test_report_is_added_and_indexed_when_validated_again(bundle: Path, make: Any, capfd: Any) -> None:
    data = make.npz(Path("x.npz"), [0, 1, 2])
    bundle_json = (bundle / "bundle.json").read_bytes()
    (bundle / "measured" / "local-3").write_text("somebody's file")
    for _ in range(2):
        assert main(["validate", "bundle", "--data", data]) == 0
    index = json.loads((bundle / "measured/index.json").read_text())
    assert index == {"schema_version": 1, "reports": ["local-1", "local-2", "local-4"]}
    report = Report.model_validate_json((bundle / "measured/local-4/report.json").read_text())
    assert report.bundle_digest == json.loads(bundle_json)["digest"]
    assert "<html" in (bundle / "measured/local-4/report.html").read_text()
    assert (bundle / "bundle.json").read_bytes() == bundle_json
    assert not [p for p in (bundle / "measured").iterdir() if p.name.startswith(".")]
    assert main(["verify", "bundle"]) == 0


def test_report_is_not_left_half_written_when_the_page_cannot_be_made(
    bundle: Path, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("vlexport.report.write.html_from_report", broken)
    before = sorted(str(p) for p in bundle.rglob("*"))
    with pytest.raises(KeyboardInterrupt):
        measured(bundle, make.npz(Path("x.npz"), [0, 1, 2]))
    assert sorted(str(p) for p in bundle.rglob("*")) == before
