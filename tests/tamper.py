"""``python -m tests.tamper --times 200``: mutations of a bundle, of which ``verify`` must catch every one.

Exit 3 says that a bundle was altered, exit 1 that it is none any more or that a path leaves it. What a bundle records
is mutated: any byte of ``bundle.json``, the recipe, the artifact and the golden vectors, and the tree of files.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from vlexport.core.errors import VlexportError
from vlexport.stages.verify import verify

Tamper = Callable[[Path, random.Random], str]


def _recorded(bundle: Path, chance: random.Random) -> Path:
    """A file of the bundle, each as likely as any other."""
    found = [path for path in sorted(bundle.rglob("*")) if path.is_file() and "measured" not in path.parts]
    return chance.choice(found)


def one_byte(bundle: Path, chance: random.Random) -> str:
    """Another value for one byte."""
    file = _recorded(bundle, chance)
    content = bytearray(file.read_bytes())
    at = chance.randrange(len(content))
    content[at] ^= chance.randrange(1, 256)
    file.write_bytes(content)
    return f"{file.name} byte {at}"


def inserted(bundle: Path, chance: random.Random) -> str:
    """One byte more, white space among them."""
    file = _recorded(bundle, chance)
    content = file.read_bytes()
    at = chance.randrange(len(content) + 1)
    file.write_bytes(content[:at] + chance.choice((b" ", b"\n", b"\0", b"{")) + content[at:])
    return f"{file.name} inserted at {at}"


def truncated(bundle: Path, chance: random.Random) -> str:
    """A file cut off."""
    file = _recorded(bundle, chance)
    content = file.read_bytes()
    file.write_bytes(content[: chance.randrange(len(content))])
    return f"{file.name} cut"


def removed(bundle: Path, chance: random.Random) -> str:
    """A file gone, or a folder in its place."""
    file = _recorded(bundle, chance)
    file.unlink()
    if chance.random() < 0.3:
        file.mkdir()
    return f"{file.name} removed"


def swapped(bundle: Path, chance: random.Random) -> str:
    """The content of two files changed over."""
    one, other = _recorded(bundle, chance), _recorded(bundle, chance)
    while one.read_bytes() == other.read_bytes():
        other = _recorded(bundle, chance)
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    return f"{one.name} and {other.name} swapped"


def added(bundle: Path, chance: random.Random) -> str:
    """A file, hidden or not, or a link, in a folder whose files are all recorded."""
    place = bundle / chance.choice(("artifact", "golden/main"))
    name = chance.choice(("extra.bin", ".hidden", "main.onnx.data", "sub/extra"))
    (place / name).parent.mkdir(exist_ok=True)
    if chance.random() < 0.3:
        (place / name).symlink_to("/etc/hostname")
    else:
        (place / name).write_bytes(b"x")
    return f"{name} added"


def linked(bundle: Path, chance: random.Random) -> str:
    """A file or folder moved out of the bundle, a link in its place: content and hash are right."""
    path = chance.choice([_recorded(bundle, chance), bundle / "artifact", bundle / "golden"])
    away = bundle.with_name("away")
    path.rename(away)
    path.symlink_to(away)
    return f"{path.name} linked"


def edited(bundle: Path, chance: random.Random) -> str:
    """A value of ``bundle.json`` replaced, its digest left as it was."""
    from tests.fuzz.mutate import edit_json

    file = bundle / "bundle.json"
    before = file.read_bytes()
    while True:
        after = edit_json(before, chance)
        if after != before:
            file.write_bytes(after)
            return "bundle.json edited"


TAMPERS: tuple[Tamper, ...] = (
    one_byte,
    one_byte,
    one_byte,
    inserted,
    truncated,
    removed,
    swapped,
    added,
    linked,
    edited,
)


def outcome_of(folder: Path) -> int:
    """Exit code of verify, in this process."""
    try:
        verify(folder)
    except VlexportError as error:
        return error.exit_code
    return 0


def caught(built: Path, times: int, seed: int) -> tuple[Counter[str], list[str]]:
    """Exit codes by kind of mutation, and the mutations that went through."""
    codes: Counter[str] = Counter()
    missed: list[str] = []
    for number in range(times):
        chance = random.Random(f"{seed} {number}")
        with tempfile.TemporaryDirectory() as place:
            bundle = Path(shutil.copytree(built, Path(place, "bundle")))
            tamper = TAMPERS[number % len(TAMPERS)]
            what = tamper(bundle, chance)
            code = outcome_of(bundle)
        codes[f"{tamper.__name__} exit {code}"] += 1
        if code not in (1, 3):
            missed.append(f"{number}: {what}: exit {code}")
    return codes, missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path)
    given = parser.parse_args()
    from tests.fuzz.__main__ import seeds

    with tempfile.TemporaryDirectory() as place:
        os.environ["VLEXPORT_CACHE"] = str(Path(place, "cache"))
        _, built = seeds(Path(place))
        intact = outcome_of(built)
        codes, missed = caught(built, given.times, given.seed)
    print(f"intact: exit {intact}; {given.times} mutations, {len(missed)} missed")
    for name, count in sorted(codes.items()):
        print(f"  {name}: {count}")
    print("\n".join(missed))
    if given.record:
        about = {
            "command": f"python -m tests.tamper --times {given.times} --seed {given.seed}",
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
            "machine": {"cores": os.cpu_count(), "python": sys.version.split()[0], "system": sys.platform},
            "intact_exit": intact,
            "mutations": given.times,
            "missed": len(missed),
            "outcomes": dict(sorted(codes.items())),
        }
        given.record.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return 1 if missed or intact else 0


if __name__ == "__main__":
    sys.exit(main())
