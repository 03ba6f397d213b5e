"""How soon a new machine tells something useful: seconds of each step from a clone to the first figures.

::

    python -m tests.benchmarks.first_number [--folder FOLDER] [--record docs/measured/first_number.json]

The checkout is cloned, a virtualenv is made and the half that builds is installed as README.md says; then commands are
run, each for the first time. Installing is the network's and told apart. The model is a deit_small that this
interpreter saves beforehand (it needs timm); the new virtualenv has no timm. A run that was stopped goes on in the
same ``--folder`` with the step that is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 60.0
"""The first useful number shall be there so soon, installing aside."""
MODEL = "deit_small_patch16_224"
_MADE = f"""
import sys, torch, vlexport
from vlexport.frontends import compat
compat.declare_torchvision_operators()  # timm imports torchvision, whose own may not fit this torch
import timm
torch.manual_seed(0)
net = timm.create_model("{MODEL}").eval()
spec = "resize=248:bicubic,crop=224,scale=1/255,mean=imagenet,std=imagenet"
vlexport.save(net, sys.argv[1], inputs=torch.randn(1, 3, 224, 224), preprocess=spec)
"""
_FIGURES = (re.compile(r"[\d.]+ [GM]MACs"), re.compile(r"p50 [\d.]+ ms"))
"""Of each kind the first that a command tells."""


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        name: As it is told.
        command: In the folder; ``PYTHON`` is the new virtualenv's, ``vlexport`` its command.
        network: Whether it waits for a package index.
    """

    name: str
    command: tuple[str, ...]
    network: bool = False

    @property
    def is_ours(self) -> bool:
        """Whether it is a command of vlexport."""
        return self.command[0] == "vlexport"


STEPS = (
    Step("clone", ("git", "clone", "--quiet", str(ROOT), "checkout")),
    Step("virtualenv", (sys.executable, "-m", "venv", "env")),
    Step(
        "install",
        ("PYTHON", "-m", "pip", "install", "-q", "-c", "checkout/constraints.txt", "-e", "checkout[build,onnxruntime]"),
        network=True,
    ),
    *(
        Step(f"vlexport {' '.join(words)}", ("vlexport", *words))
        for words in (
            ("inspect", "model.pt"),
            ("inspect", "model.pt", "--for", "jetson-orin-jp6"),
            ("build", "model.pt", "--plan"),
            ("build", "model.pt", "-o", "first.bundle"),
        )
    ),
)


def run(step: Step, folder: Path) -> dict[str, Any]:
    """Seconds of a step, and the first figures that it tells.

    Raises:
        SystemExit: Where it fails.
    """
    programs = {"PYTHON": folder / "env/bin/python", "vlexport": folder / "env/bin/vlexport"}
    first, *others = step.command
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment["VLEXPORT_CACHE"] = str(folder / "cache")
    started = time.perf_counter()
    done = subprocess.run(
        [str(programs.get(first, first)), *others], cwd=folder, env=environment, capture_output=True, text=True
    )
    spent = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"{step.name}: exit {done.returncode}\n{done.stderr[-2000:]}")
    told = [kind.search(done.stdout) for kind in _FIGURES] if step.is_ours else []
    said = [each.group() for each in told if each is not None]
    return {"name": step.name, "seconds": round(spent, 1), "network": step.network, "said": said}


def measure(folder: Path) -> list[dict[str, Any]]:
    """Every step's row, those that are known already from ``steps.json``."""
    known = folder / "steps.json"
    rows: list[dict[str, Any]] = json.loads(known.read_text(encoding="utf-8")) if known.is_file() else []
    if not (folder / "model.pt").is_file():
        subprocess.run([sys.executable, "-c", _MADE, str(folder / "model.pt")], cwd=ROOT, check=True)
    for step in STEPS[len(rows) :]:
        rows.append(run(step, folder))
        known.write_text(json.dumps(rows), encoding="utf-8")
        print(f"{rows[-1]['seconds']:7.1f} s  {step.name}  {', '.join(rows[-1]['said'])}", flush=True)
    return rows


def table(record: dict[str, Any]) -> str:
    """The record as a table of a page."""
    lines = ["| step | seconds | tells |", "|---|---|---|"]
    for row in record["rows"]:
        name = f"`{row['name']}`" if row["name"].startswith("vlexport") else row["name"]
        apart = " (the network's)" if row["network"] else ""
        lines.append(f"| {name}{apart} | {row['seconds']:.1f} | {', '.join(row['said'])} |")
    machine = record["machine"]
    return "\n".join(
        [
            *lines,
            "",
            f"{record['model']}, {record['date']}, {machine['cpu']}, {machine['cores']} cores, "
            f"load average {record['load']:.1f}; "
            f"`{record['command']}`.",
        ]
    )


def main() -> None:
    """Measure, print, and record where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="Where to work, and to go on; a temporary one by default.")
    parser.add_argument("--record", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vlexport-") as scratch:
        folder = (given.folder or Path(scratch)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        rows = measure(folder)
    first = next(row for row in rows if row["said"])
    print(f"first useful number after {first['seconds']} s: {first['said'][0]}; within {LIMIT_S:g} s: "
          f"{'yes' if first['seconds'] <= LIMIT_S else 'no'}")  # fmt: skip
    if given.record:
        from vlexport.core.devices import this_machine

        head = {
            "date": time.strftime("%Y-%m-%d", time.gmtime()), "machine": this_machine().model_dump(mode="json"),
            "command": "python -m tests.benchmarks.first_number --record docs/measured/first_number.json",
            "model": MODEL, "load": round(os.getloadavg()[1], 1),
        }  # fmt: skip
        given.record.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
