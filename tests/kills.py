"""``python -m tests.kills --times 50``: builds killed at random points; no half bundle, and the next build succeeds.

Every second build replaces a bundle that stands there already (``--force``): then the old one or the new one is whole.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tests.tamper import outcome_of
from vlexport.core.cache import Cache, _intact

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Killed:
    """What a series of kills left."""

    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def build(place: Path, *, force: bool) -> subprocess.Popen[bytes]:
    """A build of ``model.pt`` into ``made``, in a process group of its own."""
    command = [sys.executable, "-m", "vlexport", "build", "model.pt", "-o", "made", "--no-profile", "--threads", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "VLEXPORT_CACHE": str(place / "cache")}
    return subprocess.Popen(
        [*command, *(["--force"] if force else [])], cwd=place, env=environment, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def kill_after(place: Path, seconds: float, *, force: bool) -> bool:
    """Start a build and kill its whole group; whether it was still running."""
    process = build(place, force=force)
    try:
        process.wait(seconds)
        return False
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True


def kill_at_work(place: Path, seconds: float, *, force: bool) -> bool:
    """Kill a build so long after it has begun to write; whether it was still running."""
    before = _names(place)
    process = build(place, force=force)
    while process.poll() is None and not any(n.startswith(".made.") for n in _names(place) - before):
        time.sleep(0.02)
    time.sleep(seconds)
    ended = process.poll() is not None
    if not ended:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return not ended


def _names(place: Path) -> set[str]:
    return {each.name for each in place.iterdir()}


def state_of(place: Path, *, stood: bool) -> tuple[str, str]:
    """What is there after a kill, and what is wrong with it."""
    made, wrong = place / "made", ""
    there = made.exists()
    if there and (code := outcome_of(made)):
        wrong = f"the bundle is not whole: verify exits with {code}"
    elif stood and not there:
        wrong = "the bundle that stood there is gone"
    if (place / "cache").is_dir() and not all(_intact(entry) for entry, _ in Cache(place / "cache").entries()):
        wrong = wrong or "an entry of the cache is damaged"
    return ("whole bundle" if there else "no bundle"), wrong


def series(model: Path, times: int, seed: int, *, whole_every: int = 10) -> Killed:
    """Kill builds one after another in one folder; every ``whole_every`` th is followed by one that may end."""
    found, chance = Killed(), random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        shutil.copy(model, place / "model.pt")
        started = time.perf_counter()
        assert build(place, force=False).wait() == 0, "a build that nobody kills succeeds"
        whole_s = time.perf_counter() - started
        for number in range(times):
            stood = number % 2 == 1
            if not stood:
                shutil.rmtree(place / "made", ignore_errors=True)
            elif not (place / "made").exists():
                assert build(place, force=True).wait() == 0
            if chance.random() < 0.5:
                shutil.rmtree(place / "cache", ignore_errors=True)
            killed = kill_after(place, chance.uniform(0.2, 1.1) * whole_s, force=stood)
            state, wrong = state_of(place, stood=stood)
            found.outcomes[f"{'killed' if killed else 'ended'}, {state}"] += 1
            if number % whole_every == whole_every - 1 and not wrong:
                code = build(place, force=True).wait()
                left = [name for name in _names(place) if name.startswith(".made.")]
                if code or outcome_of(place / "made") or left:
                    wrong = f"the next build exits with {code} and leaves {left}"
                found.outcomes["next build whole"] += not wrong
            if wrong:
                found.wrong.append(f"{number}: {wrong}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path)
    given = parser.parse_args()
    from tests.fuzz.__main__ import seeds

    with tempfile.TemporaryDirectory() as place:
        os.environ["VLEXPORT_CACHE"] = str(Path(place, "cache"))
        model, _ = seeds(Path(place))
        found = series(model, given.times, given.seed)
    for name, count in sorted(found.outcomes.items()):
        print(f"{name}: {count}")
    print("\n".join(found.wrong) or "nothing is wrong")
    if given.record:
        about = {
            "command": f"python -m tests.kills --times {given.times} --seed {given.seed}",
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
            "machine": {"cores": os.cpu_count(), "python": sys.version.split()[0], "system": sys.platform},
            "outcomes": dict(sorted(found.outcomes.items())),
            "wrong": found.wrong,
        }
        given.record.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return 1 if found.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
