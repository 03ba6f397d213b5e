"""The report page in a browser: drawn, accessible, and as recorded."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from tests.report.accessibility import ROOT, SCHEMES, WIDTHS, axe, browser, examine
from tests.report.example_reports import HOSTILE, a_bundle, a_report, layers
from vlexport.report.html import html_from_report

CHROMIUM = Path("/usr/bin/chromium")


@pytest.mark.skipif(not CHROMIUM.exists(), reason=f"{CHROMIUM} is not installed")
@pytest.mark.parametrize("width", [400, 1200])
def test_page_is_drawn_when_a_browser_opens_it(width: int, tmp_path: Path) -> None:
    bundle = a_bundle(HOSTILE, HOSTILE, HOSTILE)
    (tmp_path / "report.html").write_text(html_from_report(a_report(bundle, HOSTILE), bundle), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path}/profile",
             f"--screenshot={tmp_path}/page.png", f"--window-size={width},1600"]  # fmt: skip
    subprocess.run(
        [str(CHROMIUM), *flags, (tmp_path / "report.html").as_uri()], check=True, capture_output=True, timeout=60
    )
    with Image.open(tmp_path / "page.png") as drawn:
        colours = drawn.convert("RGB").getcolors(1 << 24)
        assert drawn.width == width
    assert colours is not None
    assert len(colours) > 20  # text, cards and bars, not a blank page
    assert not [c for _, c in colours if c == (0, 0, 0)] or len(colours) > 50


@pytest.mark.skipif(not browser() or axe() is None, reason="needs Chromium and axe-core: npm install axe-core")
@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
def test_axe_finds_nothing_when_it_looks_at_the_page(width: int, scheme: str) -> None:
    bundle = a_bundle()
    text = html_from_report(a_report(bundle), bundle, layers("block"))
    script = axe()
    assert script is not None
    found = examine(text, width=width, scheme=scheme, script=script)
    assert (found["violations"], found["overflow"]) == ([], 0)
    assert found["passes"] > 25
    assert found["plot_text"] >= 10
    broken = examine(text.replace('lang="en"', ""), width=width, scheme=scheme, script=script)
    assert [each.partition(":")[0] for each in broken["violations"]] == ["html-has-lang"]  # it sees what is wrong


def test_recorded_pages_have_no_fault_when_axe_looked_at_them() -> None:
    record = json.loads((ROOT / "docs/measured/accessibility.json").read_text(encoding="utf-8"))
    seen = {(row["page"], row["scheme"], row["width"]) for row in record["rows"]}
    assert seen == {(page, scheme, width) for page in ("plain", "hostile") for scheme in SCHEMES for width in WIDTHS}
    assert [row for row in record["rows"] if row["violations"] or row["overflow"]] == []
    assert all(row["passes"] > 25 for row in record["rows"])
    assert all(row["plot_text"] >= 10 for row in record["rows"]), "read on a phone"
