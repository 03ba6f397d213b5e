"""What ``--fold-preprocess`` promises: after the passes, no arithmetic is left at inputs whose record was rewritten."""

from __future__ import annotations

from collections.abc import Sequence

from vlexport.core.bundle_schema import PassRecord
from vlexport.core.config import BuildConfig
from vlexport.core.errors import UsageError
from vlexport.frontends.source import Source
from vlexport.ir.input_arithmetic import left_over
from vlexport.ir.program import Program
from vlexport.passes.fold_preprocess import FoldPreprocess

_NO_CONVOLUTION = "no convolution reads the input alone"


def require_folded(config: BuildConfig, source: Source, program: Program, records: Sequence[PassRecord]) -> None:
    """Refuse a Program that still computes what the preprocessing no longer does.

    Raises:
        UsageError: VLX0708 with the reason of the pass.
    """
    if not config.fold_preprocess or not left_over(program, source.preprocess):
        return
    misses = [miss for record in records if record.name == FoldPreprocess.name for miss in record.near_misses]
    reason, node = (misses[0].reason, misses[0].node) if misses else (_NO_CONVOLUTION, "")
    raise UsageError(
        "VLX0708", f"mean and std cannot go into the first convolution: {reason}", where=node or "--fold-preprocess",
        hint="leave --fold-preprocess out",
    )  # fmt: skip
