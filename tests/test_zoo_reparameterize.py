"""The machinery of the reparameterization zoo, what is recorded of it, and a small slice of it."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests import zoo_reparameterize
from tests.benchmarks import reparameterize
from tests.harness import captured, randomize, worst_error
from tests.zoo_child import ROOT
from tests.zoo_reparameterize import Row, failures, rendered, rows_of, run_child, table
from tests.zoo_reparameterize_examine import considered, examine, layers, optimized_by_runtime
from tests.zoo_reparameterize_models import MODELS, SMALL, pictures, subject
from vlexport.ir import provenance
from vlexport.ir.cost import cost
from vlexport.passes.pipeline import run_pipeline

RECORD = ROOT / "docs/measured/zoo_reparameterize.json"
GOOD = Row(
    "m", "done", switch="timm", layers=(9, 4, 4), norms=(9, 0), layers_run=(9, 4, 4), norms_run=(1, 0, 0),
    parameters=(4_000_000, 3_000_000), macs=(5_000_000, 4_000_000), macs_oracle=4_000_000, variation=0.05, error=1e-6,
    error_oracle=1e-6, error64=1e-15, seconds=0.5, lowered={"tensorrt": "yes", "coreml": "yes"},
)  # fmt: skip


def recorded() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8"))
    return found


def test_page_is_that_of_the_record_when_it_is_committed() -> None:
    text = (ROOT / "docs/reparameterize.md").read_text(encoding="utf-8")
    assert rendered(text, recorded()) == text, "python -m tests.zoo_reparameterize --render --record … --docs …"


def test_promise_is_kept_when_a_row_is_no_known_exception() -> None:
    rows = rows_of(recorded())
    assert failures(rows) == []
    assert rows


@pytest.mark.zoo
def test_record_holds_every_model_when_it_is_complete() -> None:
    assert [row.model for row in rows_of(recorded())] == list(MODELS)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (replace(GOOD, outcome="crashed", reason="KeyError: x"), "crashed: KeyError: x"),
        (replace(GOOD, error=2e-4), "differs from eager by 0.0002"),
        (replace(GOOD, error=float("nan")), "differs from eager by nan"),
        (replace(GOOD, error=None), "was not run"),
        (replace(GOOD, error64=1e-8), "differs from eager by 1e-08"),
        (replace(GOOD, variation=1e-3), "outputs do not vary (0.001)"),
        (replace(GOOD, variation=float("nan")), "outputs do not vary (nan)"),
        (replace(GOOD, layers=(9, 4, 5)), "5 layers, by hand 4"),
        (replace(GOOD, layers_run=(9, 4, 5)), "5 layers in ONNX Runtime, by hand 4"),
        (replace(GOOD, norms_run=(1, 0, 1)), "1 batch norms in ONNX Runtime, by hand 0"),
        (replace(GOOD, macs=(4, 5)), "1 MACs more than before the pass"),
        (replace(GOOD, parameters=(4, 6)), "2 parameters more than before the pass"),
        (replace(GOOD, lowered={"coreml": "VLX0503: x"}), "coreml does not take it: VLX0503: x"),
    ],
)
def test_failure_is_named_when_a_row_breaks_the_promise(row: Row, said: str) -> None:
    assert failures([GOOD]) == []
    (found,) = failures([GOOD, row])
    assert said in found
    assert found.startswith("m: ")


@pytest.mark.parametrize(
    ("ours", "by_hand", "said"),
    [
        (1.94, 2.0, []),
        (1.93, 2.0, ["m: 1.930 is 0.965 of 2.000 by hand"]),
        (math.nan, 2.0, ["m: nan is nan of 2.000 by hand", "m: not faster than the plain export (nan at least)"]),
        (0.95, 0.95, ["m: not faster than the plain export (0.950 at least)"]),
    ],
)
def test_latency_is_judged_by_the_ratio_by_hand_when_both_are_measured(
    ours: float, by_hand: float, said: list[str]
) -> None:
    gains = [reparameterize.Gain(10.0, 10.0 / each, each, each, each, 7, 0) for each in (ours, by_hand)]
    assert reparameterize.failures([reparameterize.Row("m", *gains)]) == said


def test_row_says_why_when_its_process_takes_too_long() -> None:
    row = run_child("repvgg_a0", 0.01)
    assert (row.model, row.outcome, row.reason) == ("repvgg_a0", "died", "stopped after 0 s")


def test_only_what_has_changed_is_run_when_the_record_holds_the_rest(tmp_path: Path, monkeypatch: Any) -> None:
    asked: list[str] = []

    def child(name: str, timeout_s: float) -> Row:
        asked.append(name)
        return replace(GOOD, model=name)

    monkeypatch.setattr(zoo_reparameterize, "run_child", child)
    words = ["zoo_reparameterize", "--record", str(tmp_path / "r.json"), "--only", "repvgg_a0"]
    monkeypatch.setattr("sys.argv", words)
    assert zoo_reparameterize.main() == 0
    assert zoo_reparameterize.main() == 0
    assert asked == ["repvgg_a0"]
    monkeypatch.setattr(zoo_reparameterize, "code", lambda: "another")
    zoo_reparameterize.main()
    assert asked == ["repvgg_a0", "repvgg_a0"]
    (kept,) = rows_of(json.loads((tmp_path / "r.json").read_text(encoding="utf-8")))
    assert replace(kept, versions="", code="") == replace(GOOD, model="repvgg_a0")


def test_reasons_are_numbered_remarks_when_the_table_is_rendered() -> None:
    refused = replace(GOOD, model="n", outcome="refused", reason="VLX0301: a|b")
    rows = [GOOD, refused, replace(GOOD, model="o", error64=None, lowered={"tensorrt": "VLX0503: c", "coreml": "yes"})]
    text = table({"rows": [asdict(row) for row in rows]})
    told = "| m | 9 → 4 (4) | 9 → 4 (4) | 1 → 0 (0) | 1e-06 | 1e-15 | 1e-06 | 5 % | 4.00 → 3.00 | 0.005 → 0.004 | 0.5 |"
    assert f"{told} yes | yes |" in text
    assert "| n | refused [1] | - |" in text
    assert "| 1e-06 | - | 1e-06 |" in text
    assert text.endswith("| no [2] | yes |\n\n1. VLX0301: a\\|b\n2. VLX0503: c\n")
    widths = {line.count("|") - line.count("\\|") for line in text.splitlines() if line.startswith("| ")}
    assert len(widths) == 1


def test_products_count_as_layers_only_when_they_read_a_stored_matrix() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.linear = nn.Conv2d(3, 4, 1), nn.Linear(4, 4)
            self.matrix = nn.Parameter(torch.ones(4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.linear(self.conv(x).mean((2, 3))) @ self.matrix
            return y @ y.transpose(0, 1) + y.new_ones(1)

    assert layers(captured(Net(), torch.ones(2, 3, 4, 4), dynamic=None)) == 3


def test_pictures_are_the_same_and_differ_from_each_other_when_drawn_twice() -> None:
    drawn = pictures((3, 16, 16))
    assert torch.equal(drawn, pictures((3, 16, 16)))
    assert drawn.shape == (8, 3, 16, 16)
    assert float(drawn.mean((1, 2, 3)).std()) > 0.1


def test_statistics_and_scales_are_drawn_when_a_model_is_made() -> None:
    norms = [each for each in subject(SMALL).module.modules() if isinstance(each, nn.BatchNorm2d)]
    variances = torch.cat([each.running_var for each in norms])
    assert 0.5 <= float(variances.min()) < 0.6 < 1.4 < float(variances.max()) <= 1.5
    assert all(float(each.bias.detach().std()) > 0.01 and float(each.weight.detach().std()) > 0.1 for each in norms)


def test_small_model_is_merged_as_by_hand_when_the_pass_runs() -> None:
    made = subject(SMALL)
    example = torch.zeros(1, *made.shape)
    source, by_hand = captured(made.module, example).double(), captured(made.oracle(made.module), example)
    after, _ = run_pipeline(source, considered(), gate=None)
    assert layers(after) == layers(by_hand) == 25
    assert layers(source) == 59
    assert source.calls("aten.batch_norm.default")
    around_pools = {"layers.3.norm1", "layers.3.attention.norm", "norm"}
    assert {provenance.module_path(each) for each in after.calls("aten.batch_norm.default")} <= around_pools
    assert cost(after).macs == cost(by_hand).macs < cost(source).macs
    assert cost(after).parameters < cost(source).parameters
    given = pictures(made.shape, 2).double()
    assert worst_error(after.run(given), source.run(given)) <= zoo_reparameterize.MAX_ERROR64


def test_layers_are_those_that_run_when_onnx_runtime_optimises(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.after, self.alone = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8)
            self.linear = nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.after(self.conv(x)).relu()
            scores: torch.Tensor = self.linear(self.alone(y).mean((2, 3)))
            return scores

    net = randomize(Net())
    given = pictures((3, 8, 8), 4)
    found = optimized_by_runtime(tmp_path / "plain", captured(net, given[:1]), given, naive=True)
    assert found.layers + found.norms == 3, "the first batch norm goes into its convolution, the other one stays"
    with torch.no_grad():
        assert worst_error((found.output,), (net(given),)) <= 1e-5


@pytest.mark.zoo
@pytest.mark.parametrize("name", [SMALL, "repvgg_a0"])
def test_promise_is_kept_when_a_model_is_examined(name: str, tmp_path: Path) -> None:
    row = examine(name, tmp_path)
    assert failures([row]) == []
    assert row.layers_run[2] < row.layers_run[0], "ONNX Runtime does it anyway"
