"""plan: what a build would do, in seconds: passes are applied in memory, nothing is gated, lowered or written.

All problems are found at once, where a build stops at the first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from vlexport.core.bundle_schema import CostRecord, PassRecord
from vlexport.core.config import BuildConfig
from vlexport.core.errors import CapabilityError, VlexportError
from vlexport.core.progress import Reporter, Silent
from vlexport.frontends.source import open_source
from vlexport.ir import dialect, provenance
from vlexport.ir.program import Program
from vlexport.passes.base import Pass
from vlexport.passes.pipeline import run_pipeline
from vlexport.stages.build import cost_record
from vlexport.stages.choices import (
    gates_of,
    open_dataset,
    options_of,
    output_of,
    passes_of,
    precision_of,
    profile_of,
)
from vlexport.stages.write_bundle import require_free
from vlexport.targets import open_target
from vlexport.targets.base import Brief


@dataclass(frozen=True)
class Plan:
    """What a build would do.

    Attributes:
        passes: One record per pass; gates are off.
        before: Cost of the captured graph.
        after: Cost of the graph that would be lowered.
        calls_before: Calls of the captured graph.
        calls_after: Calls of the graph that would be lowered.
        problems: Everything that would stop the build, or is likely to.
        notes: What the user should know.
    """

    passes: tuple[PassRecord, ...]
    before: CostRecord
    after: CostRecord
    calls_before: int
    calls_after: int
    problems: tuple[VlexportError, ...]
    notes: tuple[str, ...]


def plan(config: BuildConfig, *, reporter: Reporter | None = None) -> Plan:
    """Plan a build.

    Raises:
        VlexportError: When the target is unknown or the model cannot be opened; any other problem is in the plan.
    """
    reporter = reporter or Silent()
    target = open_target(config.target)
    problems: list[VlexportError] = []

    def collect(check: Callable[[], object]) -> None:
        try:
            check()
        except VlexportError as error:
            problems.append(error)

    collect(lambda: precision_of(config, target))
    collect(lambda: gates_of(config))
    brief = Brief(target.Options())
    try:
        brief = Brief(options_of(config, target), profile_of(config), threads=config.threads)
    except VlexportError as error:
        problems.append(error)
    collect(lambda: require_free(output_of(config), force=config.force))
    collect(target.require)
    collect(lambda: target.require_tools(brief))
    with reporter.stage("open the model"):
        source = open_source(config)
    for data in (config.data, config.calib):
        collect(partial(open_dataset, data, source))
    passes: list[Pass[Program]] = []
    try:
        passes = passes_of(config)
    except VlexportError as error:
        problems.append(error)
    with reporter.stage("passes"):
        program, records = run_pipeline(source.program, [*passes, *target.program_passes(brief)], gate=None)
    problems += _opaque(program)
    problems += target.problems(program, brief)
    return Plan(
        passes=records,
        before=cost_record(source.program),
        after=cost_record(program),
        calls_before=len(source.program.calls()),
        calls_after=len(program.calls()),
        problems=tuple(problems),
        notes=source.notes,
    )


def _opaque(program: Program) -> list[VlexportError]:
    """One problem for every place of an operator that nothing is known about."""
    return [
        CapabilityError(
            "VLX0503", f"{dialect.op_name(node)} is unknown: no pass looks across it, and the target may refuse it",
            where=provenance.describe(node), hint="rewrite that line with known operators, or build and see",
        )
        for node in program.calls()
        if dialect.is_opaque(node)
    ]  # fmt: skip
