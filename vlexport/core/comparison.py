"""``compare.json``: what a build for several targets made, as typed data. No torch."""

from __future__ import annotations

from vlexport.core.artifact import Frozen
from vlexport.core.bundle_schema import REPORT_SCHEMA, AccuracyResult, LatencyResult


class Compared(Frozen):
    """One target of a build for several.

    Attributes:
        target: Its id.
        error: Code and words of why there is no bundle; then nothing else is set.
        digest: Of the bundle, which lies in the folder of the target's name.
    """

    target: str
    error: str = ""
    digest: str = ""
    state: str = ""
    precision: str = ""
    device_profile: str = ""
    size_bytes: int | None = None
    accuracy: AccuracyResult | None = None
    latency: LatencyResult | None = None


class Comparison(Frozen):
    """``compare.json``: one row a target."""

    schema_version: int = REPORT_SCHEMA
    vlexport: str
    rows: tuple[Compared, ...]
