"""The report page in a browser: what axe finds wrong, at a phone's width and a desk's, light and dark.

::

    npm install axe-core        # once, anywhere; or AXE=/path/to/axe.min.js
    python -m tests.report.accessibility [--record docs/measured/accessibility.json] [--shots FOLDER]

Needs Chromium. axe is a script, and the page's policy runs none: for axe alone the policy is taken out.
"""

from __future__ import annotations

import argparse
import html as html_text
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
WIDTHS = (390, 1280)
SCHEMES = ("light", "dark")
_POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
_FOUND = re.compile(r'<pre id="axe-found">(.*?)</pre>', re.DOTALL)
_RUN = """
axe.run(document, {resultTypes: ["violations"]}).then(found => {
  const kept = {
    version: axe.version,
    violations: found.violations.map(v => `${v.id}: ${v.nodes.length} × ${v.nodes[0].html.slice(0, 120)}`),
    passes: found.passes.length,
    plot_text: Math.round(10 * Math.min(...[...document.querySelectorAll("svg.plot text")].map(text => {
      const plot = text.ownerSVGElement;
      const scale = plot.getBoundingClientRect().width / plot.viewBox.baseVal.width;
      return scale * parseFloat(getComputedStyle(text).fontSize);
    }))) / 10,
    width: innerWidth,
    dark: matchMedia("(prefers-color-scheme: dark)").matches,
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth
  };
  const out = parent.document.createElement("pre");
  out.id = "axe-found";
  out.textContent = JSON.stringify(kept);
  parent.document.body.appendChild(out);
});
"""


def browser() -> str:
    """Chromium, or an empty string."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or ""


def axe() -> Path | None:
    """axe's script: named by the environment, or installed by npm in the checkout or above it."""
    named = os.environ.get("AXE")
    places = [Path(named)] if named else [p / "node_modules/axe-core/axe.min.js" for p in (ROOT, *ROOT.parents)]
    return next((place for place in places if place.is_file()), None)


def examine(page: str, *, width: int, scheme: str, script: Path) -> dict[str, Any]:
    """What axe finds on a page: version, violations, number of passed rules; pixels of the smallest text in a plot, and
    of sideways overflow.
    """
    open_page = _POLICY.sub("", page)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "page.html"
        run = f"<script>{script.read_text(encoding='utf-8')}</script><script>{_RUN}</script></body>"
        inner = html_text.escape(open_page.replace("</body>", run))
        # A window of Chromium is 500 pixels wide at least, a frame in it as wide as a phone.
        frame = f'<iframe style="width:{width}px;height:2400px;border:0" srcdoc="{inner}"></iframe>'
        head = '<!doctype html><meta charset="utf-8"><meta name="color-scheme" content="light dark"><body>'
        file.write_text(f"{head}{frame}</body>", encoding="utf-8")
        done = subprocess.run(
            [*_command(Path(scratch), 1500, scheme), "--virtual-time-budget=20000", "--dump-dom", file.as_uri()],
            check=True, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
    found = _FOUND.search(done.stdout)
    assert found is not None, done.stderr[-1000:]
    kept: dict[str, Any] = json.loads(html_text.unescape(found[1]))
    assert (kept.pop("width"), kept.pop("dark")) == (width, scheme == "dark"), "the page was laid out as asked"
    return kept


def shoot(page: str, file: Path, *, width: int, height: int, scheme: str) -> None:
    """Write a picture of the page."""
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch) / "page.html"
        place.write_text(page, encoding="utf-8")
        command = _command(Path(scratch), width, scheme, height)
        subprocess.run([*command, f"--screenshot={file}", place.as_uri()], check=True, capture_output=True, timeout=120)


def _command(scratch: Path, width: int, scheme: str, height: int = 2400) -> list[str]:
    return [
        browser(), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={scratch}/profile", f"--window-size={width},{height}",
        f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}",
    ]  # fmt: skip


def pages() -> Iterator[tuple[str, str]]:
    """A page with everything a report can hold, and the same with hostile names."""
    from tests.report.example_reports import CONTROL, HOSTILE, a_bundle, a_report, layers
    from vlexport.report.html import html_from_report

    for kind, name in (("plain", "image"), ("hostile", HOSTILE + CONTROL)):
        bundle = a_bundle(name, name, name)
        yield kind, html_from_report(a_report(bundle, name), bundle, layers(name))


def main() -> None:
    """Examine all pages, and record where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path)
    parser.add_argument("--shots", type=Path, help="Folder for a picture of each.")
    given = parser.parse_args()
    script = axe()
    if not browser() or script is None:
        parser.error("Chromium and axe-core are needed")
    rows = []
    for kind, page in pages():
        for scheme in SCHEMES:
            for width in WIDTHS:
                found = examine(page, width=width, scheme=scheme, script=script)
                rows.append({"page": kind, "scheme": scheme, "width": width, **found})
                print(json.dumps(rows[-1]))  # noqa: T201
                if given.shots:
                    given.shots.mkdir(parents=True, exist_ok=True)
                    name = f"{kind}-{scheme}-{width}.png"
                    shoot(page, given.shots.absolute() / name, width=width, height=3200, scheme=scheme)
    if given.record:
        version = subprocess.run([browser(), "--version"], check=True, capture_output=True, text=True).stdout.split()
        head = {
            "date": time.strftime("%Y-%m-%d", time.gmtime()), "browser": " ".join(version[:2]),
            "command": "python -m tests.report.accessibility --record docs/measured/accessibility.json",
        }  # fmt: skip
        given.record.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
