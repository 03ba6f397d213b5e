"""``python -m tests.fuzz --mutations 10000 --seed 0 [--door NAME] [--record docs/measured/fuzz.json]``."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz.campaign import Tally, campaign, record, serve, table
from tests.fuzz.doors import doors_of


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutations", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--door", default="")
    parser.add_argument("--record", type=Path)
    for name in ("--child", "--model", "--bundle", "--out"):
        parser.add_argument(name, default="", help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        door = doors_of(Path(given.model), Path(given.bundle))[given.child]
        serve(door, Path(given.bundle), given.first, given.mutations, given.seed, Path(given.out))
        return 0
    started, tallies = time.perf_counter(), dict[str, Tally]()
    with tempfile.TemporaryDirectory() as place:
        os.environ["VLEXPORT_CACHE"] = str(Path(place, "cache"))
        model, bundle = seeds(Path(place))
        for name, tally in campaign(model, bundle, mutations=given.mutations, seed=given.seed, only=given.door):
            tallies[name] = tally
            print(f"{name}: {tally.mutations}, findings {len(tally.findings)}", file=sys.stderr, flush=True)
    print(table(tallies))
    found = [each for tally in tallies.values() for each in tally.findings]
    for each in found:
        print(f"{each.door} {each.index}: {each.what}")
    if given.record:
        about = {
            "command": f"python -m tests.fuzz --mutations {given.mutations} --seed {given.seed}",
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
            "machine": {"cores": os.cpu_count(), "python": sys.version.split()[0], "system": sys.platform},
            "minutes": round((time.perf_counter() - started) / 60, 1),
            "mutations": sum(each.mutations for each in tallies.values()),
            "findings": len(found),
            "doors": record(tallies),
        }
        given.record.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return 1 if found else 0


def seeds(folder: Path) -> tuple[Path, Path]:
    """A model file and a bundle of it."""
    import torch
    from torch import nn

    import vlexport
    from vlexport.core.config import BuildConfig

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 3)).eval()
    model, bundle = folder / "model.pt", folder / "made.bundle"
    vlexport.save(
        net,
        model,
        inputs=torch.rand(1, 3, 8, 8),
        preprocess="resize=8,crop=8,scale=1/255",
        labels=("red", "green", "blue"),
    )
    vlexport.build(BuildConfig(model=str(model), output=str(bundle), profile=False, threads=1))
    return model, bundle


if __name__ == "__main__":
    sys.exit(main())
