"""plan: what a build would do, in seconds: passes are applied in memory, nothing is gated, lowered or written.

All problems are found at once, where a build stops at the first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from vlexport.core.account import Account, whole_account
from vlexport.core.bundle_schema import CostRecord, PassRecord
from vlexport.core.config import BuildConfig
from vlexport.core.errors import CapabilityError, InputError, UsageError, VlexportError
from vlexport.core.progress import Reporter, Silent
from vlexport.core.tokens import AUTO, AUTO_GRID
from vlexport.core.whole import summed_cost, whole_passes
from vlexport.frontends.sources import Sources, open_sources
from vlexport.ir import dialect, provenance
from vlexport.ir.program import Program
from vlexport.passes.base import Pass
from vlexport.passes.pipeline import run_pipeline
from vlexport.passes.quantization.named_calls import require_calls
from vlexport.passes.quantization.placement import place
from vlexport.stages.account import Refusals, accounts
from vlexport.stages.choices import (
    INTEGER_PRECISIONS,
    gates_of,
    lowered_passes_of,
    open_dataset,
    options_of,
    precision_of,
    precision_passes_of,
    profile_of,
    quantize_options_of,
    settled_of,
)
from vlexport.stages.component import clean_up, cost_record
from vlexport.stages.dims import dims_of
from vlexport.stages.folded import require_folded
from vlexport.stages.order import require_judged
from vlexport.stages.probe_memory import require_memory
from vlexport.stages.quantized import require_calibrated
from vlexport.stages.searches import fusions_to_try
from vlexport.stages.tokens import component_passes
from vlexport.stages.tune import axes_of
from vlexport.stages.write_bundle import output_of, require_free
from vlexport.targets import open_target
from vlexport.targets.base import Brief, Target


@dataclass(frozen=True)
class Plan:
    """What a build would do.

    Attributes:
        passes: One record per pass; gates are off.
        lowered: Passes that would run on the lowered graph, which a plan does not make.
        before: Cost of the captured graph.
        after: Cost of the graph that would be lowered.
        calls_before: Calls of the captured graph.
        calls_after: Calls of the graph that would be lowered.
        problems: Everything that would stop the build, or is likely to.
        notes: What the user should know.
        candidates: What a search would try: option → values.
        account: What becomes of the model's own modules.
    """

    passes: tuple[PassRecord, ...]
    lowered: tuple[str, ...]
    before: CostRecord
    after: CostRecord
    calls_before: int
    calls_after: int
    problems: tuple[VlexportError, ...]
    notes: tuple[str, ...]
    candidates: dict[str, tuple[str, ...]]
    account: tuple[Account, ...]


def plan(
    config: BuildConfig, *, sources: Sources | None = None, several: bool = False, reporter: Reporter | None = None
) -> Plan:
    """Plan a build for one target.

    Args:
        config: What would be built.
        sources: The model, where it is open already.
        several: Whether it would be built beside other targets, into one folder.
        reporter: Where progress goes; silent by default.

    Raises:
        VlexportError: When the target is unknown or the model cannot be opened; any other problem is in the plan.
    """
    reporter = reporter or Silent()
    target = open_target(config.target)
    problems: list[VlexportError] = []
    notes: list[str] = []

    def collect(check: Callable[[], object]) -> None:
        try:
            check()
        except VlexportError as error:
            problems.append(error)

    precision = target.precisions[0]
    try:
        precision, _ = precision_of(config, target)
    except VlexportError as error:
        problems.append(error)
    brief = Brief(target.Options())
    try:
        brief = Brief(settled_of(config, target, precision), profile_of(config, target), precision, config.threads)
    except VlexportError as error:
        problems.append(error)
    collect(lambda: require_judged(gates_of(config), target, target.probe()))
    candidates: dict[str, tuple[str, ...]] = {}
    collect(lambda: candidates.update(axes_of(config, target, options_of(config, target))))
    if candidates:
        candidates.update(fusions_to_try(config, target, brief.options))
    if config.precision == "auto":
        candidates["precision"] = tuple(each for each in target.precisions if each != precision)
    if config.tokens == AUTO:
        candidates["tokens"] = AUTO_GRID
    lowered: list[Pass[Any]] = []
    collect(lambda: lowered.extend(lowered_passes_of(config, target, brief.options)))
    collect(lambda: require_free(output_of(config), force=config.force, several=several))
    collect(lambda: target.require_tools(brief))
    if sources is None:
        with reporter.stage("open the model"):
            sources = open_sources(config)
    collect(partial(open_dataset, config.data, sources))
    passes: dict[str, list[Pass[Program]]] = {name: [] for name in sources.components}
    try:
        calibration = open_dataset(config.calib, sources, skip_bad=config.skip_bad)
        passes.update({name: component_passes(config, sources, name, calibration) for name in sources.components})
    except VlexportError as error:
        problems.append(error)
    try:
        dims = dims_of(config, target, sources.signature)
        require_memory(sources, dims)
        sources = sources.narrowed(dims)
    except VlexportError as error:
        problems.append(error)
    before = {name: source.program for name, source in sources.components.items()}
    with reporter.stage("passes"):
        ran, account = {}, {}
        for name, program in before.items():
            refusals = Refusals()
            try:
                shared, records = run_pipeline(program, passes[name], gate=None, listener=refusals)
            except (InputError, UsageError, CapabilityError) as error:  # of the pass of --tokens: not for this model
                problems.append(error)
                rest = [each for each in passes[name] if each.stage != "tokens"]
                shared, records = run_pipeline(program, rest, gate=None, listener=refusals)
            shared, further = run_pipeline(shared, clean_up(passes[name]), gate=None)
            records = (*records, *(record for record in further if record.changes))
            account[name] = accounts(program, shared, refusals)
            collect(partial(require_folded, config, sources.components[name], shared, records))
            typed = precision_passes_of(config, precision, [program.example])
            if precision in INTEGER_PRECISIONS:
                collect(lambda: notes.append(_rounded(config, brief, target, shared)))  # noqa: B023  called at once
            ran[name] = (shared, records)
            try:
                last, more = run_pipeline(shared, [*typed, *target.program_passes(brief)], gate=None)
                ran[name] = (last, (*records, *more))
            except CapabilityError as error:  # of a pass that spells the Program for the target
                problems.append(error)
    after = {name: program for name, (program, _) in ran.items()}
    for name, program in after.items():
        source = sources.components[name]
        own = replace(brief, name=name, labels=source.labels, preprocess=source.preprocess)
        refused = target.problems(program, own)
        places = {each.where for each in refused}
        problems += [each for each in _opaque(program) if each.where not in places]
        problems += refused
    return Plan(
        passes=whole_passes({name: tuple(records) for name, (_, records) in ran.items()}),
        lowered=tuple(each.name for each in lowered),
        before=summed_cost({name: cost_record(program) for name, program in before.items()}),
        after=summed_cost({name: cost_record(program) for name, program in after.items()}),
        calls_before=sum(len(program.calls()) for program in before.values()),
        calls_after=sum(len(program.calls()) for program in after.values()),
        problems=tuple({str(each): each for each in problems}.values()),
        notes=(*sources.notes, *notes),
        candidates=candidates,
        account=whole_account(account),
    )


def _rounded(config: BuildConfig, brief: Brief, target: Target, program: Program) -> str:
    """What would be in integers; ranges are not measured by a plan, so that a constant value is not seen.

    Raises:
        UsageError: VLX0218 without calibration samples, VLX0703 for names of no module.
        CapabilityError: VLX0502 where the target has no scheme for the device, or nothing can be quantized.
    """
    scheme, options = require_calibrated(config, brief, target), quantize_options_of(config)
    require_calls(program, (*options.keep, *options.only), option="quantize.keep")
    placed = place(program, scheme, keep=options.keep, only=options.only)
    counts = Counter(dialect.plain_name(layer.node) for layer in placed.layers)
    if not counts:
        raise CapabilityError(
            "VLX0502", f"nothing of the model can be quantized by scheme {scheme.id}", where="--precision",
            hint="build it with --precision fp32",
        )  # fmt: skip
    what = ", ".join(f"{count} {op}" for op, count in counts.items())
    reasons = Counter(placed.refused.values())
    left = "; ".join(f"{count} stay in float: {why}" for why, count in reasons.items())
    kind = "weights alone" if scheme.kind == "weights" else "in integers" if scheme.on_grids else "in float8"
    return f"{kind} by scheme {scheme.id}: {what}" + (f"; {left}" if left else "")


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
