"""--precision int8: from the flag to the artifact, and what is refused on the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest

import vlexport
from tests.passes.quantizing import Mixed, images
from vlexport.calibration.table import read_table
from vlexport.core.bundle import read_bundle
from vlexport.core.config import BuildConfig
from vlexport.core.errors import VlexportError
from vlexport.stages.build import BuildResult, build
from vlexport.stages.order import order_of
from vlexport.stages.quantized import require_calibrated


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("int8")
    vlexport.save(Mixed().eval(), made / "model.pt", inputs={"image": images(2, 0)})
    np.savez(made / "calib.npz", image=images(24, 1).numpy())
    np.savez(made / "few.npz", image=images(5, 1).numpy())
    with_nan = images(24, 1).numpy()
    with_nan[3, 0, 0, 0] = np.nan
    np.savez(made / "nan.npz", image=with_nan)
    return made


def config(folder: Path, output: str, **given: Any) -> BuildConfig:
    values = {"precision": "int8", "profile": False, "threads": 1, "calib": str(folder / "calib.npz"), **given}
    return BuildConfig(model=str(folder / "model.pt"), output=str(folder / output), **values)


@pytest.fixture(scope="module")
def result(folder: Path) -> BuildResult:
    return build(config(folder, "int8.bundle"))


@pytest.fixture(scope="module")
def built(result: BuildResult) -> Path:
    return result.output


def test_artifact_holds_integers_and_is_verified_when_built_in_int8(built: Path) -> None:
    bundle = read_bundle(built)
    assert (bundle.precision, bundle.state) == ("int8", "verified")
    stored = sum(each.numel() for each in Mixed().parameters())
    assert bundle.main.cost.parameters >= stored  # scales come on top
    record = next(each for each in bundle.main.passes if each.name == "quantize")
    assert (record.gate.proof, record.gate.statistic) == ("statistic", "sqnr_db")
    assert record.gate.value is not None
    assert record.gate.value >= 30
    assert {each.what.partition(" ")[0]: each.count for each in record.changes} == {"conv2d": 3, "linear": 3}
    model = onnx_ir.load(built / "artifact" / "main.onnx")
    weights = [v for v in model.graph.initializers.values() if v.shape is not None and v.shape.rank() > 1]
    assert {v.dtype for v in weights} == {onnx_ir.DataType.INT8}


def test_receipt_and_tables_say_what_is_in_integers(result: BuildResult, built: Path) -> None:
    assert any("in integers: 3 conv2d, 3 linear (scheme static-u8s" in note for note in result.report.notes)
    table = read_table(built / "calibration.json")
    decisions = json.loads((built / "quantization.json").read_text(encoding="utf-8"))
    assert table.samples == 24
    assert {"calibration.json", "quantization.json"} <= set(read_bundle(built).files)
    assert {each["value"] for each in decisions["values"]} <= {each.value for each in table.values}
    assert len(decisions["layers"]) == 6


def test_edited_range_is_used_when_a_table_is_given_and_refused_for_another_model(folder: Path, built: Path) -> None:
    table = json.loads((built / "calibration.json").read_text(encoding="utf-8"))
    table["values"][0]["low"] = -3.25
    (folder / "mine.json").write_text(json.dumps(table), encoding="utf-8")
    options = {"quantize.table": str(folder / "mine.json"), "quantize.smooth": "false"}
    with pytest.raises(VlexportError, match="it was made for another model, or for this one after other passes"):
        build(config(folder, "other.bundle", options=options))
    made = build(config(folder, "edited.bundle", options={"quantize.table": options["quantize.table"]}))
    assert any("-3.25" in note and "edited" in note for note in made.report.notes)
    assert "mine.json" not in (made.output / "recipe.toml").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def dynamic(folder: Path) -> BuildResult:
    options = {"quantize.activations": "dynamic"}
    return build(config(folder, "dynamic.bundle", calib=None, options=options))


def test_linears_find_their_ranges_at_each_run_when_asked_and_need_no_samples(dynamic: BuildResult) -> None:
    bundle = read_bundle(dynamic.output)
    assert (bundle.precision, bundle.state) == ("int8", "verified")
    assert not (dynamic.output / "calibration.json").exists()
    decisions = json.loads((dynamic.output / "quantization.json").read_text(encoding="utf-8"))
    assert [(each["op"], each["dynamic"], each["operands"]) for each in decisions["layers"]] == [
        ("linear", True, [])
    ] * 3
    assert any("in integers: 3 linear (scheme dynamic-u8s" in note for note in dynamic.report.notes)
    assert any("ranges found at each run" in note for note in dynamic.report.notes)


def test_bundle_says_which_domains_it_holds_and_what_opens_it(dynamic: BuildResult, built: Path) -> None:
    said = read_bundle(dynamic.output).compatibility
    assert said["domains"] == "ai.onnx, com.microsoft (3 DynamicQuantizeMatMul)"
    assert said["onnxruntime"] == "1.18 or later"
    model = onnx_ir.load(dynamic.output / "artifact" / "main.onnx")
    assert [node.op_type for node in model.graph if node.domain] == ["DynamicQuantizeMatMul"] * 3
    assert read_bundle(built).compatibility["domains"] == "ai.onnx", (
        "nothing of its own in a static one without attention"
    )


def test_weights_have_seven_bits_when_the_device_has_no_vnni(folder: Path) -> None:
    asked = config(folder, "avx2.bundle", device_profile="cpu-x86-avx2")
    order = order_of(asked)
    assert require_calibrated(asked, order.brief, order.target).id == "static-u8s7"


@pytest.mark.parametrize(
    ("system", "given", "scheme", "said"),
    [
        ("iOS18", {"quantize.weights_only": "int4"}, "weights-s4", ""),
        ("auto", {"quantize.weights_only": "int4"}, "", "deployment-target 18 is needed, ios17 has iOS17"),
        ("iOS16", {"quantize.weights_only": "int8"}, "weights-s8", ""),
        ("iOS16", {}, "", "deployment-target 17 is needed, ios17 has iOS16"),
    ],
)
def test_scheme_follows_the_system_that_an_option_names(
    folder: Path, system: str, given: dict[str, str], scheme: str, said: str
) -> None:
    options = {"coreml.deployment_target": system, **given}
    asked = config(folder, "ios.bundle", target="coreml", options=options)
    if scheme:
        order = order_of(asked)
        assert require_calibrated(asked, order.brief, order.target).id == scheme
        return
    with pytest.raises(VlexportError) as error:
        order_of(asked)
    assert (error.value.code, said in error.value.message) == ("VLX0502", True), error.value.message


@pytest.mark.parametrize(
    ("given", "code", "said"),
    [
        ({"calib": None}, "VLX0218", "rounds every value by the range that it has on real samples"),
        ({"calib": "few.npz"}, "VLX0214", "5 calibration samples are too few: 16 are needed"),
        ({"options": {"quantize.table": "none.json"}}, "VLX0215", "the calibration table cannot be used: No such file"),
        ({"calib": "nan.npz"}, "VLX0204", "#3"),
        ({"options": {"quantize.method": "median"}}, "VLX0703", "quantize.method"),
        (
            {"options": {"quantize.activations": "dynamic", "quantize.weights_only": "int8"}},
            "VLX0703",
            "--set quantize: weights_only leaves activations in float: it goes with no activations=dynamic",
        ),
        (
            {"options": {"quantize.activations": "dynamic", "quantize.table": "mine.json"}},
            "VLX0703",
            "table is about ranges from calibration: it does nothing with activations=dynamic",
        ),
        (
            {"options": {"quantize.weights_only": "int8", "quantize.smooth": "true"}},
            "VLX0703",
            "smooth is about ranges from calibration: it does nothing with weights_only=int8",
        ),
        ({"options": {"quantize.percentile": "99"}}, "VLX0703", "it does nothing with method=min-max"),
        (
            {"options": {"quantize.smooth": "false", "smooth-activations.shift": "false"}},
            "VLX0703",
            "--set smooth-activations.shift: pass 'smooth-activations' is not run",
        ),
        ({"passes": ("quantize",)}, "VLX0703", "it runs with --precision int8"),
        ({"precision": "fp32", "options": {"quantize.keep": "up"}}, "VLX0703", "pass 'quantize' is not run"),
        ({"target": "coreml", "precision": "fp8"}, "VLX0502", "does not run fp8"),
        ({"options": {"quantize.weights_only": "int4"}}, "VLX0502", "this runs no int4 weights"),
        ({"options": {"quantize.min_sqnr_db": "90"}}, "VLX0401", "pass quantize costs more than it may"),
    ],
)
def test_build_is_refused_when_int8_cannot_be(folder: Path, given: dict[str, Any], code: str, said: str) -> None:
    if given.get("calib"):
        given = {**given, "calib": str(folder / given["calib"])}
    with pytest.raises(VlexportError) as error:
        build(config(folder, "refused.bundle", **given))
    assert (error.value.code, said in error.value.message) == (code, True), error.value.message
    assert not (folder / "refused.bundle").exists()
