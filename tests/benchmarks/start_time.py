"""How long the command line takes to say anything, in units of ``python -c pass``, and what it imports meanwhile.

::

    python tests/benchmarks/start_time.py [--rounds 15] [--record docs/measured/start_time.json]

Each round runs the empty interpreter, then every command line, each a process of its own; the figure is the median of
the rounds' ratios of processor time (user and system, which others on the machine disturb least) and of wall time.
Imports above one millisecond are listed by ``-X importtime``, each with what it brings along.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = (("--help",), ("--version",), ("build", "--help"), ("explain", "VLX0503"), ("targets", "--help"))
LIMIT = 15.0
"""``vlexport --help`` may take as many empty interpreters as this."""
_LINE = re.compile(r"import time:\s*(\d+) \|\s*(\d+) \|(\s*)(\S+)")
_SHOWN_US = 1000


def spent(arguments: list[str]) -> tuple[float, float]:
    """Wall and processor seconds of one process."""
    before, started = os.times(), time.perf_counter()
    subprocess.run(arguments, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = os.times()
    processor = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - started, processor


def heavy_imports(command: tuple[str, ...]) -> dict[str, float]:
    """Packages by the milliseconds that their modules take to import, without what they import in turn."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "vlexport", *command],
        cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    packages: dict[str, int] = {}
    for own, _, _, name in _LINE.findall(done.stderr):
        package = name.partition(".")[0]
        packages[package] = packages.get(package, 0) + int(own)
    ranked = sorted(packages.items(), key=lambda item: -item[1])
    return {name: round(us / 1000, 1) for name, us in ranked if us >= _SHOWN_US}


def measure(rounds: int) -> dict[str, object]:
    """Medians over rounds, and the imports of every command line."""
    empty = [sys.executable, "-c", "pass"]
    ours = {" ".join(command): [sys.executable, "-m", "vlexport", *command] for command in COMMANDS}
    for arguments in (empty, *ours.values()):
        spent(arguments)  # byte code is written, files are read
    base: list[tuple[float, float]] = []
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ours}
    for _ in range(rounds):
        base.append(spent(empty))
        for name, arguments in ours.items():
            found[name].append(spent(arguments))
    rows = {}
    for name, times in found.items():
        ratios = [[mine[i] / theirs[i] for mine, theirs in zip(times, base, strict=True)] for i in (0, 1)]
        rows[name] = {
            "wall_ms": round(1000 * statistics.median(wall for wall, _ in times), 1),
            "wall_ratio": round(statistics.median(ratios[0]), 2),
            "processor_ratio": round(statistics.median(ratios[1]), 2),
            "imports_ms": heavy_imports(COMMANDS[list(ours).index(name)]),
        }
    return {"empty_ms": round(1000 * statistics.median(wall for wall, _ in base), 1), "rounds": rounds, "rows": rows}


def table(record: dict[str, Any]) -> str:
    """The record as a table of a page."""
    lines = ["| command | times `python -c pass` | imports that take longest |", "|---|---|---|"]
    for name, row in record["rows"].items():
        longest = ", ".join(f"{package} {ms:.0f} ms" for package, ms in list(row["imports_ms"].items())[:3])
        lines.append(f"| `vlexport {name}` | {row['wall_ratio']:.1f} | {longest} |")
    said = f"{record['date']}, {record['machine']['cpu']}, {record['machine']['cores']} cores; `{record['command']}`."
    return "\n".join([*lines, "", said])


def main() -> None:
    """Measure, print, and record where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--record", type=Path)
    given = parser.parse_args()
    result = measure(given.rounds)
    print(f"python -c pass: {result['empty_ms']} ms (median of {given.rounds})")
    rows = result["rows"]
    assert isinstance(rows, dict)
    for name, row in rows.items():
        print(f"vlexport {name}: {row['wall_ms']} ms, {row['wall_ratio']}x wall, {row['processor_ratio']}x processor")
        print("   " + ", ".join(f"{package} {ms} ms" for package, ms in list(row["imports_ms"].items())[:8]))
    held = rows["--help"]["wall_ratio"] <= LIMIT
    print(f"--help within {LIMIT:g} empty interpreters: {'yes' if held else 'no'}")
    if given.record:
        from vlexport.core.devices import this_machine

        head = {
            "date": time.strftime("%Y-%m-%d", time.gmtime()), "machine": this_machine().model_dump(mode="json"),
            "command": "python tests/benchmarks/start_time.py --record docs/measured/start_time.json",
        }  # fmt: skip
        given.record.write_text(json.dumps({**head, **result}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
