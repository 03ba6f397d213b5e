"""--precision fp16: from the flag to the artifact, and what is refused on the way."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest
import torch
from torch import Tensor

from tests.passes.test_cast_floats import TOKENS, Model
from vlexport.core.bundle import read_bundle
from vlexport.core.bundle_schema import Report
from vlexport.core.config import BuildConfig
from vlexport.core.errors import VlexportError
from vlexport.passes import ON_REQUEST
from vlexport.passes.cast_floats import CastFloats
from vlexport.report.receipt import receipt
from vlexport.stages.build import build
from vlexport.stages.choices import options_of, passes_of, precision_passes_of
from vlexport.stages.plan import plan
from vlexport.stages.write_bundle import GOLDEN_TOLERANCE, golden_tolerance
from vlexport.targets import open_target


def config(model: Path, output: Path, **given: Any) -> BuildConfig:
    return BuildConfig(**{"model": str(model), "output": str(output), "precision": "fp16", "profile": False, **given})


@pytest.fixture(scope="module")
def half(model_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("half") / "half.bundle"
    build(config(model_file, output, threads=1))
    return output


def test_artifact_is_half_the_size_and_right_when_built_in_fp16(half: Path, built: Path) -> None:
    bundle, single = read_bundle(half), read_bundle(built)
    assert (bundle.precision, bundle.state) == ("fp16", "verified")
    assert bundle.main.golden.tolerance == golden_tolerance("fp16") == 2e-2
    assert single.main.golden.tolerance == GOLDEN_TOLERANCE == golden_tolerance("int4")
    assert 2 * bundle.main.cost.size_bytes == single.main.cost.size_bytes
    record = next(each for each in bundle.main.passes if each.name == "cast-floats")
    assert (record.name, record.effect, record.options["dtype"]) == ("cast-floats", "approximate", "fp16")
    assert (record.gate.proof, record.gate.statistic, record.gate.bound) == ("statistic", "sqnr_db", 40.0)
    model = onnx_ir.load(half / "artifact" / "main.onnx")
    weights = Counter(v.dtype for v in model.graph.initializers.values() if v.shape is not None and v.shape.rank() > 1)
    assert weights == {onnx_ir.DataType.FLOAT16: 2}
    products = [v.dtype for n in model.graph if n.op_type in ("MatMul", "Gemm", "Conv") for v in n.inputs]
    assert products
    assert set(products) == {onnx_ir.DataType.FLOAT16}
    assert {v.dtype for v in (*model.graph.inputs, *model.graph.outputs)} == {onnx_ir.DataType.FLOAT}


def test_bundle_is_byte_identical_when_built_again_in_fp16(half: Path, model_file: Path, tmp_path: Path) -> None:
    build(config(model_file, tmp_path / "again", threads=1))
    assert (tmp_path / "again" / "bundle.json").read_bytes() == (half / "bundle.json").read_bytes()


def test_record_is_plain_json_when_written(half: Path) -> None:
    records = json.loads((half / "bundle.json").read_text(encoding="utf-8"))["components"]["main"]["passes"]
    (typed,) = (each for each in records if each["name"] == "cast-floats")
    assert typed["gate"]["value"] > 40


def test_calibration_samples_widen_ranges_when_given(model_file: Path, tmp_path: Path) -> None:
    """Samples so large that half cannot hold them are seen although example and draws are small."""
    images = np.full((3, 3, 8, 8), 6e4, np.float32)
    np.savez(tmp_path / "large.npz", image=images + np.arange(3, dtype=np.float32)[:, None, None, None])
    build(config(model_file, tmp_path / "out", calib=str(tmp_path / "large.npz")))
    passes = read_bundle(tmp_path / "out").main.passes
    misses = [miss for each in passes if each.name == "cast-floats" for miss in each.near_misses]
    assert any("image reaches 6e+04, times 2" in miss.reason for miss in misses)


def test_strict_build_fails_with_3_and_leaves_nothing_when_a_value_overflows(tmp_path: Path) -> None:
    import vlexport

    def large(h: Tensor, m: Model) -> Tensor:
        return m.second(torch.exp(h.sigmoid() + 8) * torch.exp(h.tanh() + 8))  # type: ignore[no-any-return]

    vlexport.save(Model(large).eval(), tmp_path / "model.pt", inputs=TOKENS)
    with pytest.raises(VlexportError) as caught:
        build(config(tmp_path / "model.pt", tmp_path / "out", options={"cast-floats.strict": "true"}))
    assert (caught.value.code, caught.value.exit_code) == ("VLX0409", 3)
    assert "its result reaches" in caught.value.message
    assert caught.value.where.startswith("aten.mul")
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]


@pytest.mark.parametrize(
    ("given", "code", "said"),
    [
        ({"precision": "bf16"}, "VLX0502", "no bf16 kernels"),
        ({"options": {"cast-floats.dtype": "bf16"}}, "VLX0703", "contradicts --precision fp16"),
        ({"options": {"cast-floats.dtyp": "fp16"}}, "VLX0703", "did you mean 'dtype'"),
        ({"options": {"cast-floats.margin": "0"}}, "VLX0703", "greater than or equal to 1"),
        ({"options": {"cast-floats.keep": "no.such"}}, "VLX0703", "no module is called 'no.such'"),
        ({"precision": "fp32", "options": {"cast-floats.margin": "4"}}, "VLX0703", "'cast-floats' is not run"),
        ({"passes": ("cast-floats",)}, "VLX0703", "it runs with --precision fp16 or bf16"),
    ],
)
def test_build_is_refused_in_words_when_precision_and_options_do_not_go_together(
    given: dict[str, Any], code: str, said: str, model_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(VlexportError) as caught:
        build(config(model_file, tmp_path / "out", **given))
    assert caught.value.code == code
    assert said in caught.value.message
    assert not (tmp_path / "out").exists()


def test_hint_names_the_flag_when_an_option_of_the_pass_is_set_without_it(model_file: Path, tmp_path: Path) -> None:
    asked = config(model_file, tmp_path / "out", precision=None, options={"cast-floats.margin": "4"})
    with pytest.raises(VlexportError) as caught:
        options_of(asked, open_target("onnxruntime"))
    assert caught.value.hint == "add --precision fp16"


def test_options_and_samples_reach_the_pass_when_it_runs(model_file: Path, tmp_path: Path) -> None:
    asked = config(model_file, tmp_path, options={"cast-floats.keep": "a.b, c", "cast-floats.margin": "3"})
    (made,) = precision_passes_of(asked, "fp16", [(TOKENS,)])
    assert isinstance(made, CastFloats)
    assert (made.options.keep, made.options.margin, len(made.samples)) == (("a.b", "c"), 3.0, 1)
    assert [each.name for each in passes_of(asked) if each.name in ON_REQUEST] == []


def test_plan_shows_the_pass_and_collects_the_refusal_when_precision_is_given(model_file: Path, tmp_path: Path) -> None:
    assert plan(config(model_file, tmp_path / "out")).passes[-1].name == "cast-floats"
    refused = plan(config(model_file, tmp_path / "out", precision="bf16"))
    assert [problem.code for problem in refused.problems] == ["VLX0502"]


def test_receipt_says_what_the_pass_cost_when_built_in_fp16(half: Path) -> None:
    report = Report.model_validate_json(next((half / "measured").rglob("report.json")).read_text(encoding="utf-8"))
    checked = next(line for line in receipt(read_bundle(half), report, "x") if line.startswith("Checked"))
    assert "cast-floats sqnr_db " in checked
    assert "(bound 40)" in checked
