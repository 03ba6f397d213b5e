"""compare: what differs between two bundles, which flag made it so, and what a comment for a pull request says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from vlexport.core.bundle import read_bundle
from vlexport.core.bundle_schema import (
    AccuracyResult,
    Bundle,
    ChangeSummary,
    GateRecord,
    LatencyResult,
    PassRecord,
    Report,
    digest_of,
)
from vlexport.core.difference import Difference
from vlexport.core.operators import HeavyCall, operators_from_counts, whole_operators
from vlexport.report.difference import difference_lines, difference_markdown, verdict_phrases
from vlexport.report.write import new_report, write_report
from vlexport.stages.compare import compare
from vlexport.stages.write_bundle import write_bundle

HOSTILE = "<img src=x onerror=alert(1)> | @someone #12 [x](https://y) `z` ::warning::\x1b]0;t\x07\u202e\n# head"


def rewritten(folder: Path, *, recipe: str = "", **changes: Any) -> Bundle:
    """The bundle with other fields, its digest made anew; ``recipe`` is added to its recipe."""
    bundle = read_bundle(folder).model_copy(update=changes)
    text = (folder / "recipe.toml").read_text(encoding="utf-8")
    head, mark, tail = text.partition("\n[options]")
    return write_bundle(folder, bundle, f"{head}\n{recipe}{mark}{tail}")


def main_of(folder: Path, **changes: Any) -> dict[str, Any]:
    bundle = read_bundle(folder)
    return {"components": {"main": bundle.main.model_copy(update=changes)}}


def measured(folder: Path, **changes: Any) -> Report:
    report = new_report(read_bundle(folder)).model_copy(update=changes)
    write_report(folder, read_bundle(folder), report)
    return report


def latency(p50_ms: float, *, baseline: str = "", ratio: float | None = None, verdict: str = "alone") -> LatencyResult:
    bounds = {"ratio_low": ratio - 0.1, "ratio_high": ratio + 0.1} if ratio else {}
    return LatencyResult(
        p50_ms=p50_ms,
        load_ms=1,
        runs=99,
        threads=2,
        baseline=baseline,
        ratio=ratio,
        verdict=verdict,
        rounds=7,
        **bounds,
    )


@pytest.fixture
def twin(bundle: Path) -> Path:
    return Path(shutil.copytree(bundle, bundle.parent / "twin"))


def only(a: Path, b: Path) -> Difference:
    (found,) = compare(a, b)
    return found


# -- causes ------------------------------------------------------------------------------------------------------------


def test_nothing_made_a_difference_when_a_bundle_is_compared_with_its_copy(bundle: Path, twin: Path, cli: Any) -> None:
    found = only(bundle, twin)
    assert (found.same, found.causes, found.surroundings, found.passes, found.operators) == (True, (), (), (), ())
    code, out, _ = cli("compare", "bundle", "twin")
    assert code == 0
    assert "Cause    both artifacts hold the same bytes" in out
    assert "Next" not in out


def test_model_is_the_cause_when_only_the_weights_differ(bundle: Path, other_bundle: Path, cli: Any) -> None:
    found = only(bundle, other_bundle)
    assert [each.flag for each in found.causes] == ["the model file"]
    assert not found.same
    code, out, _ = cli("compare", "bundle", "other")
    assert code == 0
    assert "Cause    the model file sha256 " in out
    assert "made the difference" in out
    assert "Next     vlexport profile other --against bundle" in out


def test_flags_are_named_when_recipes_differ(bundle: Path, other_bundle: Path) -> None:
    source = read_bundle(bundle).source_hash
    recipe = 'precision = "int8"\ntokens = "tome:r=8"\nmax_drop = 0.5\n'
    file = other_bundle / "recipe.toml"
    file.write_text(file.read_text(encoding="utf-8").replace("numeric_gate = true", "numeric_gate = false"))
    rewritten(other_bundle, recipe=recipe, source_hash=source, precision="int8")
    text = (other_bundle / "recipe.toml").read_text(encoding="utf-8")
    write_bundle(other_bundle, read_bundle(other_bundle), f'{text}"quantize.method" = "mse"\n')
    found = only(bundle, other_bundle)
    causes = {each.flag: (each.a, each.b) for each in found.causes}
    assert causes == {
        "--precision": ("", "int8"), "--tokens": ("", "tome:r=8"), "--set quantize.method": ("", "mse"),
    }  # fmt: skip
    judging = [(each.flag, each.a, each.b) for each in found.judging]
    assert judging == [("--max-drop", "", "0.5"), ("--no-gate", "", "on")]
    (said,) = verdict_phrases(found)
    assert said.startswith("3 things were decided otherwise and made the difference together: --precision int8")


def test_one_flag_is_said_to_have_made_the_difference_when_it_is_the_only_one(bundle: Path, other_bundle: Path) -> None:
    rewritten(other_bundle, recipe='precision = "int8"\n', source_hash=read_bundle(bundle).source_hash)
    assert verdict_phrases(only(bundle, other_bundle)) == ["--precision int8 (A: not given) made the difference"]


def test_tools_are_named_when_no_flag_differs(bundle: Path, other_bundle: Path) -> None:
    first = read_bundle(bundle)
    rewritten(other_bundle, source_hash=first.source_hash, tools={**first.tools, "torch": "9.9"})
    found = only(bundle, other_bundle)
    assert found.causes == ()
    (said,) = verdict_phrases(found)
    assert said.startswith("no flag made the difference: torch 9.9 (A: ")


# -- rows --------------------------------------------------------------------------------------------------------------


def test_passes_operators_and_layers_are_listed_when_they_differ(bundle: Path, other_bundle: Path) -> None:
    main = read_bundle(other_bundle).main
    change = ChangeSummary(what="x", count=3, where=(), saved_nodes=0, saved_parameters=0, saved_macs=0)
    gate = GateRecord(worst=0.0, proof="identical", probes=1)
    more = PassRecord(
        name="quantize",
        stage="precision",
        effect="approximate",
        options={},
        changes=(change,),
        near_misses=(),
        gate=gate,
    )
    counts = operators_from_counts({}, {"conv2d": (1, 576), "quantize": (2, 0)}, ())
    layers = [{"call": "1", "op": "linear", "module": f"blocks.{n}", "weight": "s8", "new": 1} for n in range(5)]
    (other_bundle / "quantization.json").write_text(json.dumps({"scheme": "s", "layers": [*layers, {"no": "layer"}]}))
    rewritten(other_bundle, **main_of(other_bundle, passes=(*main.passes, more), operators=counts))
    found = only(bundle, other_bundle)
    assert [(each.name, each.a, each.b) for each in found.passes] == [("quantize", None, 3)]
    assert {(each.name, each.before, each.after) for each in found.operators} >= {("quantize", 0, 2), ("linear", 1, 0)}
    assert {(each.op, each.a, each.b) for each in found.layers} == {("linear", "fp32", "s8 weight")}
    lines = difference_lines(found)
    assert "Layers   5 linear: fp32 → s8 weight (blocks.0, blocks.1, blocks.2 and 2 more)" in lines
    assert "Pass     quantize: not run → 3 changes" in lines


def test_times_of_two_runs_are_not_divided_when_nobody_measured_both_together(
    bundle: Path, other_bundle: Path, cli: Any
) -> None:
    measured(bundle, latency=latency(4.0))
    measured(other_bundle, latency=latency(2.0))
    found = only(bundle, other_bundle)
    assert found.ratio is None
    out = cli("compare", "bundle", "other")[1]
    assert "measured apart" in out
    assert "as fast" not in out


@pytest.mark.parametrize(("of_b", "ratio", "verdict"), [(True, 2.0, "faster"), (False, 0.5, "slower")])
def test_ratio_is_of_b_against_a_when_either_was_measured_against_the_other(
    of_b: bool, ratio: float, verdict: str, bundle: Path, other_bundle: Path
) -> None:
    ours, theirs = (other_bundle, bundle) if of_b else (bundle, other_bundle)
    name = f"bundle {read_bundle(theirs).digest[:12]}"
    measured(ours, latency=latency(2.0, baseline=name, ratio=2.0, verdict="faster"))
    found = only(bundle, other_bundle).ratio
    assert found is not None
    assert (found.ratio, found.verdict) == (ratio, verdict)
    assert found.low < found.ratio < found.high


def test_drop_is_paired_when_one_was_validated_against_the_other(bundle: Path, other_bundle: Path) -> None:
    result = AccuracyResult(
        samples=400, top1=90.0, top1_low=87.0, top1_high=93.0, drop=1.5, drop_low=0.5, drop_high=2.5
    )
    measured(bundle, accuracy=result, reference=f"bundle {read_bundle(other_bundle).digest[:12]}")
    found = only(bundle, other_bundle)
    assert found.drop is not None  # A's drop from B: B is better
    assert (found.drop.drop, found.drop.low, found.drop.high) == (-1.5, -2.5, -0.5)
    assert found.a.accuracy == result


def test_report_of_another_bundle_is_left_out_when_it_lies_in_this_one(bundle: Path, twin: Path) -> None:
    measured(bundle, latency=latency(4.0), bundle_digest="0" * 64)
    assert only(bundle, twin).a.latency is None


# -- folders of several targets ----------------------------------------------------------------------------------------


def several(root: Path, **bundles: Path) -> Path:
    root.mkdir()
    (root / "compare.json").write_text("{}")
    for name, folder in bundles.items():
        shutil.copytree(folder, root / name)
    return root


def test_bundle_of_the_same_target_is_taken_when_a_folder_of_several_is_named(
    bundle: Path, other_bundle: Path, tmp_path: Path, cli: Any
) -> None:
    one = several(tmp_path / "one", onnxruntime=bundle, coreml=bundle)
    two = several(tmp_path / "two", onnxruntime=other_bundle)
    assert only(one, other_bundle).a.name == str(one / "onnxruntime")
    assert only(bundle, two).b.name == str(two / "onnxruntime")
    assert [each.b.name for each in compare(one, two)] == [str(two / "onnxruntime")]
    three = several(tmp_path / "three", coreml=bundle)
    cli.refused(2, "VLX0703", "compare", "two", "three", said="no target is in both")
    cli.refused(2, "VLX0703", "compare", "three", "bundle", said="holds no bundle of onnxruntime")
    assert only(one, three).a.name == str(one / "coreml")


@pytest.mark.parametrize(
    ("arguments", "exit_code", "code", "said"),
    [
        (["bundle", "nowhere"], 1, "VLX0601", "no bundle"),
        (["bundle", "twin", "--format", "markdwon"], 2, "VLX0703", "did you mean 'markdown'"),
        (["bundle"], 2, "VLX0703", "B"),
    ],
)
def test_comparison_is_refused_in_words_when_asked_wrongly(
    arguments: list[str], exit_code: int, code: str, said: str, bundle: Path, twin: Path, cli: Any
) -> None:
    cli.refused(exit_code, code, "compare", *arguments, said=said)


def test_altered_bundle_is_refused_when_compared(bundle: Path, twin: Path, cli: Any) -> None:
    (twin / "artifact" / "main.onnx").write_bytes(b"")
    cli.refused(3, "VLX0602", "compare", "bundle", "twin", said="altered")


# -- what is printed ---------------------------------------------------------------------------------------------------


def test_comment_is_markdown_without_anything_that_a_name_could_mean(bundle: Path, other_bundle: Path) -> None:
    tools = {**read_bundle(bundle).tools, HOSTILE: "1"}
    digest = rewritten(other_bundle, tools=tools).digest
    assert digest == digest_of(read_bundle(other_bundle))
    text = difference_markdown(only(bundle, other_bundle))
    assert "<img" not in text
    assert "&lt;img" in text
    for wrong in ("@someone", "#12", "[x](", "\x1b", "\u202e", "https://", "`z`"):
        assert wrong not in text, wrong
    assert text.startswith("### ")
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert len(headings) == 1  # a line break in a name begins no heading
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) >= 6
    assert {line.replace("\\|", "").count("|") for line in rows} == {5}
    assert not [line for line in difference_lines(only(bundle, other_bundle)) if line.startswith("::")]


def test_markdown_and_json_are_printed_when_asked_for(bundle: Path, other_bundle: Path, cli: Any) -> None:
    code, out, _ = cli("compare", "bundle", "other", "--format", "markdown")
    assert code == 0
    assert out.startswith("### bundle against other\n\n- the model file sha256 ")
    found = json.loads(cli("compare", "bundle", "other", "--json")[1])
    (difference,) = found["differences"]
    assert (found["ok"], difference["same"], difference["a"]["name"]) == (True, False, "bundle")


# -- operators ---------------------------------------------------------------------------------------------------------


def test_operators_are_counted_before_and_after_when_built(built: Path) -> None:
    found = read_bundle(built).main.operators
    assert found is not None
    rows = {each.name: each for each in found.counts}
    assert (rows["batch_norm"].before, rows["batch_norm"].after) == (1, 0)
    assert (rows["conv2d"].before, rows["conv2d"].after, rows["conv2d"].macs_after) == (1, 1, 576)
    assert found.heaviest[0] == HeavyCall(operator="conv2d", module="conv", macs=576)
    assert sum(each.macs_after for each in found.counts) == read_bundle(built).main.cost.macs
    assert (found.before, found.after) == (sum(r.before for r in rows.values()), sum(r.after for r in rows.values()))


def test_operators_of_components_add_up_when_a_bundle_has_several() -> None:
    heavy = (HeavyCall(operator="linear", module="head", macs=5),)
    one = operators_from_counts({"linear": (2, 9)}, {"linear": (1, 5)}, heavy)
    whole = whole_operators({"vision": one, "text": one})
    assert whole is not None
    assert (whole.before, whole.after, whole.counts[0].macs_after) == (4, 2, 10)
    assert [each.module for each in whole.heaviest] == ["text.head", "vision.head"]
    assert whole_operators({"vision": one, "text": None}) is None
    assert whole_operators({"main": one}) is one
