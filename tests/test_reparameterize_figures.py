"""The figures of docs/reparameterize.md and of the README are those of the record."""

from __future__ import annotations

import json
from pathlib import Path

from tests.benchmarks.reparameterize import MODELS, Gain, table

ROOT = Path(__file__).resolve().parents[1]
RECORD = json.loads((ROOT / "docs/measured/reparameterize.json").read_text(encoding="utf-8"))


def test_page_holds_the_table_when_rendered_from_the_record() -> None:
    page = (ROOT / "docs/reparameterize.md").read_text(encoding="utf-8")
    assert page.partition("<!-- latency -->\n")[2].partition("\n<!-- /latency -->")[0] == table(RECORD)
    assert [figure["model"] for figure in RECORD["figures"]] == list(MODELS)


def test_readme_tells_the_ratios_when_a_model_is_named() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (line,) = [each for each in readme.split("\n- ") if each.startswith("Branches merged")]
    for figure in RECORD["figures"]:
        ours = Gain(**figure["ours"])
        said = f"{figure['model']} {ours.ratio:.2f}×" if ours.low > 1 else f"{figure['model']} no difference shown"
        assert said in line
        assert abs(ours.ratio / figure["by_hand"]["ratio"] - 1) < 0.02
