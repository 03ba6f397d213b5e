"""Peak memory of a build whose weights exceed 2 GB, over its weights: a build must not need many copies of a model.

``python -m tests.benchmarks.large_model [DEPTH] [--model FILE] [--keep FOLDER]``: saves a random ViT of the giant's
width (24 blocks: 2.3 GB in float32; few tokens, so that forwards are quick) and builds it for onnxruntime with the
gate on, without a profile and without the cache. A process of its own does each; this one samples the proportional
memory (PSS, mapped files included) of that process and of its children ten times a second. Exit code 1 when the peak
of the build above what its imports take is more than three times the weights.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

LIMIT = 3.0
INTERVAL_S = 0.1
WIDTH, HEADS, IMAGE, PATCH = 1408, 16, 64, 16
_READY = "imported"


@dataclass(frozen=True)
class Peak:
    """What a run took.

    Attributes:
        code: Its exit code.
        baseline: Bytes after the imports.
        peak: Bytes at most.
        anonymous: Of the peak, bytes that no file backs.
        stage: What it did at the peak.
        by_stage: Stage → bytes at most, in order.
        seconds: After the imports.
    """

    code: int
    baseline: int
    peak: int
    anonymous: int
    stage: str
    by_stage: dict[str, int]
    seconds: float


def measured(arguments: list[str]) -> Peak:
    """Run this file with ``arguments`` and watch the memory; what it prints are its stages."""
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.benchmarks.large_model", *arguments], stdout=subprocess.PIPE, bufsize=0
    )
    assert child.stdout is not None
    for line in child.stdout:
        if line.decode().strip() == _READY:
            break
    baseline, _ = memory_of(child.pid)
    os.set_blocking(child.stdout.fileno(), False)
    started, stage, pending = time.perf_counter(), "start", b""
    peak, anonymous, where = baseline, 0, stage
    by_stage: dict[str, int] = {}
    while child.poll() is None:
        found, private = memory_of(child.pid)
        pending += child.stdout.read() or b""
        *lines, pending = pending.split(b"\n")
        by_stage[stage] = max(by_stage.get(stage, 0), found)
        if found > peak:
            peak, anonymous, where = found, private, stage
        stage = lines[-1].decode() if lines else stage
        time.sleep(INTERVAL_S)
    return Peak(child.wait(), baseline, peak, anonymous, where, by_stage, time.perf_counter() - started)


def memory_of(pid: int) -> tuple[int, int]:
    """Proportional bytes of a process and all its descendants, and those of them that no file backs."""
    total = private = 0
    for each in descendants(pid):
        try:
            text = Path(f"/proc/{each}/smaps_rollup").read_text()
        except OSError:  # it ended meanwhile
            continue
        kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in text.splitlines()[1:]}
        total += kilobytes["Pss"] << 10
        private += kilobytes["Pss_Anon"] << 10
    return total, private


def descendants(pid: int) -> list[int]:
    """A process and all below it."""
    found, pending = [], [pid]
    while pending:
        current = pending.pop()
        found.append(current)
        for task in Path(f"/proc/{current}/task").glob("*/children"):
            with contextlib.suppress(OSError):  # it ended meanwhile
                pending += map(int, task.read_text().split())
    return found


def save(file: Path, depth: int) -> None:
    """In a process of its own: make the model and save it."""
    import torch

    import vlexport
    from vlexport.frontends import compat

    compat.declare_torchvision_operators()
    import timm

    torch.manual_seed(0)
    size = {"img_size": IMAGE, "patch_size": PATCH, "embed_dim": WIDTH, "num_heads": HEADS, "depth": depth}
    model = timm.models.vision_transformer.VisionTransformer(**size).eval()
    print(_READY, flush=True)  # the model is its baseline
    vlexport.save(model, file, inputs=torch.randn(1, 3, IMAGE, IMAGE))


def build(file: Path, output: Path) -> None:
    """In a process of its own: import what a build needs, then build."""
    import onnx_ir  # noqa: F401
    import onnxscript  # noqa: F401
    import torch.onnx  # noqa: F401

    from vlexport.core.config import BuildConfig
    from vlexport.core.progress import Silent
    from vlexport.stages import build as stage

    class Stages(Silent):
        def stage(self, name: str) -> AbstractContextManager[None]:
            print(name, flush=True)
            return super().stage(name)

    print(_READY, flush=True)
    stage.build(BuildConfig(model=str(file), output=str(output), profile=False, force=True), reporter=Stages())


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("depth", nargs="?", type=int, default=24)
    parser.add_argument("--model", type=Path, help="build this file, saved earlier")
    parser.add_argument("--keep", type=Path, help="folder for model and bundle, by default a temporary one")
    parser.add_argument("--record", type=Path, help="write the build's figures to this JSON file")
    parser.add_argument("--do", choices=("save", "build"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    os.environ["VLEXPORT_CACHE"] = "off"
    if chosen.do == "save":
        save(chosen.model, chosen.depth)
        return 0
    if chosen.do == "build":
        build(chosen.model, chosen.keep)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = chosen.keep or Path(scratch)
        model = chosen.model or folder / "model.pt"
        if chosen.model is None:
            report("save", measured([str(chosen.depth), "--do", "save", "--model", str(model)]), model)
        found = measured(["--do", "build", "--model", str(model), "--keep", str(folder / "bundle")])
        ratio = report("build", found, model)
        if chosen.record is not None and found.code == 0:
            from tests.record import write_figures

            write_figures(
                chosen.record, "peak memory of a build above its imports, over the weights", note="",
                weights_bytes=model.stat().st_size, ratio=round(ratio, 3), stage=found.stage,
                seconds=round(found.seconds),
            )  # fmt: skip
    return int(found.code != 0 or ratio > LIMIT)


def report(what: str, found: Peak, model: Path) -> float:
    """Print a run; returns its peak above the baseline over the weights."""
    weights = model.stat().st_size
    ratio = (found.peak - found.baseline) / weights
    print(
        f"{what}: exit {found.code}, weights {weights / 1e9:.2f} GB, baseline {found.baseline / 1e9:.2f} GB, "
        f"peak {found.peak / 1e9:.2f} GB ({found.anonymous / 1e9:.2f} GB anonymous) in '{found.stage}', "
        f"{ratio:.2f} times the weights above the baseline (limit of a build: {LIMIT:g}), {found.seconds:.0f} s"
    )
    for stage, peak in found.by_stage.items():
        print(f"  {stage}: {(peak - found.baseline) / weights:.2f}", flush=True)
    return ratio


if __name__ == "__main__":
    sys.exit(main())
