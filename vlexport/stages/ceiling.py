"""ceiling: how fast plain products of matrices run on this machine, as what an artifact is set beside. No torch.

Measured in the runtime that runs the artifact, with the same options and threads, in a process of its own: what it
reaches is the most that linears and convolutions can, and the rest of a model's time is everything else.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from vlexport.core.artifact import Array, Artifact, TensorSpec
from vlexport.core.bundle_schema import Ceiling
from vlexport.targets.base import Target

SECONDS = 0.5
"""Of runs, a product."""
_WARMUP = 3
_MIN_RUNS, _MAX_RUNS = 5, 500
_FAST = 10
"""Percentile of the runs that counts: other programs make runs slower, never faster."""


def ceilings(
    target: Target, artifact: Artifact, precision: str, *, threads: int, timeout_s: float | None = None
) -> tuple[Ceiling, ...]:
    """Measure the target's plain products; empty where it has none.

    Args:
        target: Of the artifact.
        artifact: Its session options count.
        precision: Of the artifact.
        threads: As the artifact was measured with.
        timeout_s: Seconds that one answer of a runtime may take.
    """
    found = []
    with tempfile.TemporaryDirectory(prefix="vlexport-") as scratch:
        folder = Path(scratch)
        for each in target.plain_products(artifact, precision, folder):
            inputs = {spec.name: _drawn(spec) for spec in each.artifact.inputs}
            with target.open(folder, each.artifact, threads=threads, timeout_s=timeout_s) as session:
                once_ms = min(session.time_ms(inputs, warmup=_WARMUP, runs=3))
                runs = max(_MIN_RUNS, min(_MAX_RUNS, round(SECONDS * 1e3 / max(once_ms, 1e-3))))
                fast_ms = float(np.percentile(session.time_ms(inputs, warmup=1, runs=runs), _FAST))
            found.append(Ceiling(kind=each.kind, gops=gops(each.macs, fast_ms)))
    return tuple(found)


def gops(macs: int, ms: float) -> float:
    """Billions of multiplications and additions a second.

    Args:
        macs: Multiply-accumulates of a run; each counts as two.
        ms: Milliseconds of a run.
    """
    return 2 * macs / max(ms, 1e-9) / 1e6


def _drawn(spec: TensorSpec) -> Array:
    """Seeded values of an input whose shape is fixed."""
    shape = tuple(int(size) for size in spec.shape)
    drawn, dtype = np.random.default_rng(1), np.dtype(spec.dtype)
    return drawn.standard_normal(shape).astype(dtype) if dtype.kind == "f" else drawn.integers(0, 127, shape, dtype)
