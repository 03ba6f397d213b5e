"""What ``vlexport compare A B`` tells of two bundles, as typed data. No torch."""

from __future__ import annotations

from vlexport.core.artifact import Frozen
from vlexport.core.bundle_schema import AccuracyResult, CostRecord, LatencyResult
from vlexport.core.operators import OperatorCount


class Side(Frozen):
    """One of the two bundles.

    Attributes:
        name: Its folder as it was typed.
        digest: Of its ``bundle.json``.
        size_bytes: Of the artifact, all its files.
        batch: Samples that ``cost`` counts.
        reference: What its accuracy was compared with.
        accuracy: Of its newest report that has any.
        accuracy_on: That report's date and processor.
        latency: Of its newest report that has any.
        latency_on: That report's date and processor.
    """

    name: str
    digest: str
    vlexport: str
    state: str
    target: str
    precision: str
    device_profile: str
    source_hash: str
    size_bytes: int
    cost: CostRecord
    batch: int = 1
    reference: str = ""
    accuracy: AccuracyResult | None = None
    accuracy_on: str = ""
    latency: LatencyResult | None = None
    latency_on: str = ""


class Cause(Frozen):
    """Something that was decided otherwise for B than for A.

    Attributes:
        flag: What to type, as ``--precision`` or ``--set quantize.method``; words where it is no flag (``the model``).
        a: A's value; empty for the default.
        b: B's value.
    """

    flag: str
    a: str
    b: str


class PassDifference(Frozen):
    """Changes that a pass made in each; None where it did not run."""

    name: str
    a: int | None
    b: int | None


class LayerDifference(Frozen):
    """A call of another precision: operator, module path, and what each computes it in."""

    op: str
    module: str
    a: str
    b: str


class DirectRatio(Frozen):
    """Both measured together, which alone tells which is faster.

    Attributes:
        ratio: p50 of A over that of B; above 1, B is faster.
        low: Lower end of its interval, or of its range.
        high: Upper end.
        verdict: As in :class:`~vlexport.core.bundle_schema.LatencyResult`, said of B.
        on: Date and processor.
    """

    ratio: float
    low: float
    high: float
    verdict: str
    on: str


class DirectDrop(Frozen):
    """Top-1 of A minus that of B on the same samples, in points, with its interval."""

    drop: float
    low: float
    high: float
    samples: int
    on: str


class Difference(Frozen):
    """Two bundles.

    Attributes:
        a: The first.
        b: The second.
        same: Their artifacts hold the same bytes.
        causes: What was decided otherwise and decides the artifact.
        judging: What was decided otherwise and judges or names it only.
        surroundings: Versions of tools, and the processor that built, where they differ.
        passes: Those that did not do the same in both.
        layers: Calls whose precision differs.
        operators: Operators of the lowered graphs whose number differs: ``before`` is A's, ``after`` is B's.
        ratio: Where a report of one was measured against the other.
        drop: Where a report of one was validated against the other.
    """

    a: Side
    b: Side
    same: bool
    causes: tuple[Cause, ...] = ()
    judging: tuple[Cause, ...] = ()
    surroundings: tuple[Cause, ...] = ()
    passes: tuple[PassDifference, ...] = ()
    layers: tuple[LayerDifference, ...] = ()
    operators: tuple[OperatorCount, ...] = ()
    ratio: DirectRatio | None = None
    drop: DirectDrop | None = None
