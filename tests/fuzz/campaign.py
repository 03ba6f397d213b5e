"""Mutations in child processes with bounds on memory and time; what neither opens nor is refused is a finding."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.fuzz.doors import CANARY, Door, accepted_or_refused, doors_of, prepare

MEMORY_BYTES = 8 << 30
"""Address space of a child; torch alone maps about 3 GiB of it."""
SLOW_SECONDS = 5.0
BATCH_SECONDS = 300.0
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Finding:
    """A mutation that broke the promise; ``Door.mutated(seed, index)`` makes it again."""

    door: str
    index: int
    what: str


@dataclass
class Tally:
    """What became of the mutations of one door."""

    mutations: int = 0
    codes: Counter[str] = field(default_factory=Counter)
    slowest_ms: float = 0.0
    findings: list[Finding] = field(default_factory=list)


def examine(door: Door, data: bytes, index: int, path: Path) -> tuple[str, float, str]:
    """Put the bytes in place and open them.

    Returns:
        Code or ``accepted``, milliseconds, and what is wrong, or an empty string.
    """
    path.write_bytes(data)
    before = _listing(path)
    started = time.perf_counter()
    wrong = ""
    try:
        code = accepted_or_refused(door, path)
    except Exception as error:  # the promise: nothing but errors of ours
        code = type(error).__name__
        last = traceback.extract_tb(error.__traceback__)[-1]
        ours = [
            f
            for f in traceback.extract_tb(error.__traceback__)
            if "vlexport" in f.filename and "tests" not in f.filename
        ]
        place = ours[-1] if ours else last
        wrong = f"{code}: {str(error)[:120]} ({os.path.basename(place.filename)}:{place.lineno})"
    spent_ms = (time.perf_counter() - started) * 1e3
    if not wrong and spent_ms > SLOW_SECONDS * 1e3:
        wrong = f"took {spent_ms / 1e3:.1f} s"
    if Path(CANARY).exists():
        Path(CANARY).unlink()
        wrong = "the canary ran"
    elif not wrong and door.name != "cache" and (written := _listing(path) - before):
        wrong = f"wrote {sorted(written)[0]}"
    return code, spent_ms, wrong


def _listing(path: Path) -> set[str]:
    return {each.name for place in (path.parent, Path()) for each in place.iterdir()}


def serve(door: Door, bundle: Path, first: int, count: int, seed: int, out: Path) -> None:
    """The child: one line of JSON before a mutation and one after it, so that a crash names its mutation."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    with tempfile.TemporaryDirectory() as place, contextlib.chdir(place), out.open("a", buffering=1) as lines:
        folder = Path(place, "in")
        folder.mkdir()
        path = prepare(door, folder, bundle)
        for index in range(first, first + count):
            lines.write(json.dumps({"begun": index}) + "\n")
            code, spent_ms, wrong = examine(door, door.mutated(seed, index), index, path)
            lines.write(json.dumps({"done": index, "code": code, "ms": spent_ms, "wrong": wrong}) + "\n")


def campaign(model: Path, bundle: Path, *, mutations: int, seed: int, only: str = "") -> Iterator[tuple[str, Tally]]:
    """All doors in turn, each with its share of the mutations."""
    doors = doors_of(model, bundle)
    chosen = [name for name in doors if not only or name == only]
    for position, name in enumerate(chosen):
        share = mutations // len(chosen) + (position < mutations % len(chosen))
        yield name, tally_of(doors[name], model, bundle, range(share), seed)


def tally_of(door: Door, model: Path, bundle: Path, indices: range, seed: int) -> Tally:
    """Run one door's mutations; after a crash a new child goes on behind the one that did it."""
    tally, at = Tally(), indices.start
    with tempfile.TemporaryDirectory() as place:
        out = Path(place, "lines")
        while at < indices.stop:
            out.write_text("")
            command = [
                sys.executable, "-m", "tests.fuzz", "--child", door.name, "--model", str(model),
                "--bundle", str(bundle), "--first", str(at), "--mutations", str(indices.stop - at),
                "--seed", str(seed), "--out", str(out),
            ]  # fmt: skip
            ended = _ended(command)
            last = at - 1
            for line in map(json.loads, out.read_text().splitlines()):
                if "begun" in line:
                    last = line["begun"]
                    continue
                tally.mutations += 1
                tally.codes[line["code"]] += 1
                tally.slowest_ms = max(tally.slowest_ms, line["ms"])
                if line["wrong"]:
                    tally.findings.append(Finding(door.name, line["done"], line["wrong"]))
                last, at = line["done"], line["done"] + 1
            if ended and last >= at:  # it began one that it did not end
                tally.mutations += 1
                said = _crashed(door, last, seed, model, bundle, ended)
                tally.codes[said or "crash, refused"] += 1
                if said:
                    tally.findings.append(Finding(door.name, last, said))
                at = last + 1
            elif ended:
                raise RuntimeError(f"the child of {door.name} did not start: {ended}")
    return tally


def _ended(command: list[str]) -> str:
    """How a child ended, empty when well."""
    try:
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=BATCH_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"no end within {BATCH_SECONDS:g} s"
    return "" if not found.returncode else f"exit {found.returncode}: {found.stderr.strip()[-200:]}"


def _crashed(door: Door, index: int, seed: int, model: Path, bundle: Path, ended: str) -> str:
    """Native code may take down a child of the command line, which then tells it as an error; others may not."""
    if not door.native:
        return f"the process died ({ended})"
    from vlexport.core.artifact import Artifact
    from vlexport.core.errors import VlexportError
    from vlexport.core.isolate import IsolatedSession

    with tempfile.TemporaryDirectory() as place:
        Path(place, door.file).write_bytes(door.mutated(seed, index))
        artifact = Artifact(target="onnxruntime", path=door.file, inputs=(), outputs=())
        try:
            IsolatedSession("vlexport.targets.onnx.session:open_session", Path(place), artifact, timeout_s=60).close()
        except VlexportError:
            return ""
    return f"the process died ({ended}), and a child did not"


def table(tallies: dict[str, Tally]) -> str:
    """One line a door."""
    lines = [f"{'door':<12} {'mutations':>9} {'accepted':>8} {'refused':>8} {'slowest':>9} {'findings':>8}  codes"]
    for name, each in tallies.items():
        accepted = each.codes["accepted"]
        codes = " ".join(code for code, _ in each.codes.most_common() if code != "accepted")
        lines.append(
            f"{name:<12} {each.mutations:>9} {accepted:>8} {each.mutations - accepted:>8} "
            f"{each.slowest_ms:>6.0f} ms {len(each.findings):>8}  {codes}"
        )
    return "\n".join(lines)


def record(tallies: dict[str, Tally]) -> dict[str, object]:
    """For ``docs/measured``."""
    return {
        name: {
            "mutations": each.mutations,
            "accepted": each.codes["accepted"],
            "refused": dict(sorted((code, n) for code, n in each.codes.items() if code != "accepted")),
            "slowest_ms": round(each.slowest_ms),
            "findings": [asdict(one) for one in each.findings],
        }
        for name, each in tallies.items()
    }
