"""bisect: which pass, and which of its matches, makes a built model differ from its source; or that the lowering does.

The way is that of a build, without its bundle: passes, narrowing, precision and target passes, lowering, the artifact.
Each leg of it is held to what came before, so that the first one that differs is the one that is named.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vlexport.core.artifact import Array, DimRange
from vlexport.core.bundle_schema import Bundle
from vlexport.core.config import BuildConfig
from vlexport.core.dataset import Dataset
from vlexport.core.errors import UsageError, VlexportError
from vlexport.core.finding import Finding, Kind, Measure
from vlexport.core.progress import Reporter, Silent
from vlexport.frontends.source import Source
from vlexport.frontends.sources import Sources, open_sources
from vlexport.ir.narrow import narrowed
from vlexport.ir.program import Program
from vlexport.passes import offered_passes
from vlexport.passes.base import Pass
from vlexport.passes.gate import FLOAT32_BOUND, NumericGate
from vlexport.passes.level import Level
from vlexport.passes.probes import Probe, make_probes
from vlexport.passes.program_level import PROGRAM
from vlexport.passes.statistic import Statistic
from vlexport.stages.bisect_artifact import ArtifactFinding, compare_artifact, compare_built
from vlexport.stages.blame import Blamed, Figure, Leg, blame, figure, legs_of, outputs_of
from vlexport.stages.choices import (
    HALF_PRECISIONS,
    INTEGER_PRECISIONS,
    lowered_passes_of,
    open_dataset,
    passes_of,
    precision_passes_of,
    unjudged,
)
from vlexport.stages.component import Optimized, clean_up, in_order
from vlexport.stages.dims import dims_of
from vlexport.stages.order import Order, configs_of, order_of
from vlexport.stages.prepare import RANGE_SAMPLES
from vlexport.stages.probe_memory import require_memory
from vlexport.stages.quantized import PROBES, calibrated, quantizing, require_single, stacked
from vlexport.stages.tokens import component_passes
from vlexport.stages.whole_model import first_samples, spread_samples

MAX_SAMPLES = 8
"""Samples of the user's that are probes."""


@dataclass
class _Trail:
    """What was seen so far."""

    reporter: Reporter
    component: str = ""
    passes: list[str] = field(default_factory=list)
    agreed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def say(self, text: str) -> None:
        """Progress."""
        self.reporter.note(f"{self.component}: {text}" if self.component else text)

    def finding(self, **found: Any) -> Finding:
        """With what was seen so far."""
        return Finding(
            component=self.component, passes=tuple(self.passes), agreed=tuple(self.agreed), notes=tuple(self.notes),
            **found,
        )  # fmt: skip


def bisect(
    config: BuildConfig,
    *,
    bound: float | None = None,
    bundle: tuple[Path, Bundle] | None = None,
    reporter: Reporter | None = None,
) -> Finding:
    """Find what makes a built model differ from its source.

    Args:
        config: What was built; one target.
        bound: For approximate passes, in the unit of their statistic, in place of what they promise.
        bundle: The bundle that was built, whose artifact is compared last.
        reporter: Where progress goes; silent by default.

    Raises:
        VlexportError: When the model or the data cannot be opened, the config contradicts itself, the target refuses
            the Program, or no output varies over the probes (VLX0402).
    """
    trail = _Trail(reporter or Silent())
    configs = configs_of(unjudged(config))
    if len(configs) != 1:
        raise UsageError(
            "VLX0701", f"bisect follows one target, '{config.target}' names {len(configs)}", where="--target",
            hint=f"as --target {next(iter(configs))}",
        )  # fmt: skip
    order = order_of(next(iter(configs.values())))
    passes_of(order.config)  # refuses wrong options before anything is opened
    with trail.reporter.stage("open the model"):
        saved = open_sources(order.config)
    if bundle is not None and bundle[1].source_hash != saved.source_hash:
        trail.notes.append("the bundle was built from another model file")
    dims = dims_of(order.config, order.target, saved.signature)
    require_memory(saved, dims)
    sources = saved.narrowed(dims)
    samples = _samples(order, sources)
    calibration = open_dataset(order.config.calib, saved, skip_bad=order.config.skip_bad)
    for name, source in saved.components.items():
        trail.component = name if saved.only is None else ""
        trail.passes.clear()
        with saved.named(name):
            passes = component_passes(order.config, saved, name, calibration)
            walk = _Walk(order, bound, trail, passes, samples.get(name, []), calibration, sources)
            own = saved.wiring.dims.own(name, dims)
            found = walk.component(source.program, sources.components[name], own, name, bundle)
        if found is not None:
            return found
    if bound is not None and not any("of its own" in each for each in trail.agreed):
        trail.notes.append("--bound is about approximate passes, and none ran")
    trail.component = ""
    return trail.finding(kind="nothing")


def _samples(order: Order, sources: Sources) -> dict[str, list[dict[str, Array]]]:
    """Component → what it is given on the first samples of ``--data`` or ``--calib``."""
    config = order.config
    data = config.data or config.calib
    dataset = open_dataset(data, sources, skip_bad=config.skip_bad)
    return first_samples(dataset, sources, count=max(MAX_SAMPLES, RANGE_SAMPLES))


@dataclass(frozen=True)
class _Walk:
    """One component's way from its source to the artifact."""

    order: Order
    bound: float | None
    trail: _Trail
    passes: Sequence[Pass[Program]]
    samples: Sequence[Mapping[str, Array]]
    calibration: Dataset | None
    sources: Sources

    def component(
        self, program: Program, source: Source, dims: Mapping[str, DimRange], name: str,
        bundle: tuple[Path, Bundle] | None,
    ) -> Finding | None:  # fmt: skip
        """What differs on the way, or None.

        Args:
            program: As saved.
            source: The same with the sizes that the target takes.
            dims: Those that were narrowed.
            name: Of the component.
            bundle: As for :func:`bisect`.
        """
        probes = self._probes(program)
        NumericGate(program, probes)  # refuses probes that show nothing
        for shared in (self.passes, clean_up(self.passes)):
            program, found = self._legs(program, shared, probes, PROGRAM)
            if found is not None:
                return found
        if dims:
            probes = self._probes(source.program)
            program, found = self._narrowed(program, dims, probes)
            if found is not None:
                return found
        brief, config = self.order.brief, self.order.config
        again = [each for each in self.passes if each.stage == "normalize"] if dims else []
        seen = [probe.values for probe in probes]
        seen += [in_order(source.program, sample) for sample in self.samples[MAX_SAMPLES:]]
        typed = precision_passes_of(config, brief.precision, seen) if brief.precision in HALF_PRECISIONS else []
        for own in (again, typed):
            program, found = self._legs(program, own, probes, PROGRAM)
            if found is not None:
                return found
        owed = source.program
        if brief.precision in INTEGER_PRECISIONS:
            program, probes, found = self._rounded(program, name)
            if found is not None:
                return found
            owed = program  # the artifact owes what the Program in integers computes; what that costs is judged above
        program, found = self._legs(program, self.order.target.program_passes(brief), probes, PROGRAM)
        if found is not None:
            return found
        return self._lowered(source, owed, program, name, probes, bundle)

    def _rounded(self, program: Program, name: str) -> tuple[Program, list[Probe], Finding | None]:
        """The Program in integers, judged on calibration samples: a seeded draw lies outside of their ranges."""
        require_single(self.sources)
        given = spread_samples(self.calibration, self.sources, count=PROBES)[name] if self.calibration else []
        rows = [in_order(program, each) for each in given]
        probes = stacked(program, rows) if rows else self._probes(program)
        order = self.order
        ready = calibrated(
            Optimized(program, (), probes, ()), rows, target=order.target, brief=order.brief, config=order.config,
            samples=self.calibration, reporter=self.trail.reporter,
        )  # fmt: skip
        program = ready.optimized.program
        self.trail.agreed += [f"{each.name} ({each.gate.worst:.1e})" for each in ready.optimized.records]
        rounding = quantizing(
            program, ready.table, rows, target=order.target, brief=order.brief, config=order.config
        )  # fmt: skip
        after, found = self._legs(program, rounding.passes, probes, PROGRAM)
        return after, probes, found

    def _probes(self, program: Program) -> list[Probe]:
        given = [in_order(program, sample) for sample in self.samples[:MAX_SAMPLES]]
        made = make_probes(program, calibration=given[0] if given else None, seed=self.order.config.seed)
        return made + [Probe(f"sample {i}", values) for i, values in enumerate(given[1:], 2)]

    def _legs(
        self, graph: Any, passes: Sequence[Pass[Any]], probes: Sequence[Probe], level: Level[Any]
    ) -> tuple[Any, Finding | None]:
        """The graph behind all passes, and what differs."""
        for group in legs_of(passes):
            statistic = self._statistic(group[0])
            leg = Leg(graph, group, probes, outputs_of(graph, probes, level), level, statistic)
            before = len(self.trail.passes)
            self.trail.passes += [each.name for each in group]
            graph, found = blame(leg, self.trail.say)
            if found is not None:
                return graph, self._blamed(found, leg, before + found.position, level)
            now = figure(leg, graph)
            own = f", {statistic.name} within {statistic.bound:g} of its own" if statistic is not None else ""
            said = f" ({now.value:.1e}{own})" if now is not None else ""
            self.trail.agreed.append(f"{', '.join(each.name for each in group)}{said}")
        return graph, None

    def _statistic(self, each: Pass[Any]) -> Statistic | None:
        declared = each.statistic if each.effect == "approximate" else None
        if declared is None or self.bound is None:
            return declared
        return replace(declared, bound=self.bound)

    def _blamed(self, found: Blamed, leg: Leg, position: int, level: Level[Any]) -> Finding:
        culprit, statistic = found.culprit, leg.statistic
        offer = next(iter(offered_passes().get(culprit.name, ())), None)
        return self.trail.finding(
            kind="pass" if level is PROGRAM else "lowered pass", culprit=culprit.name, stage=culprit.stage,
            effect=culprit.effect, distribution="" if offer is None or offer.built_in else offer.origin,
            position=position, match=found.match, matches=found.matches, node=found.node,
            change=found.change.what if found.change is not None else "",
            statistic=statistic.name if statistic is not None else "max|a−b| / max|b|",
            bound=statistic.bound if statistic is not None else FLOAT32_BOUND, before=_measure(found.before, leg),
            after=_measure(found.after, leg), reason=found.reason, where=found.where,
        )  # fmt: skip

    def _narrowed(
        self, program: Program, dims: Mapping[str, DimRange], probes: Sequence[Probe]
    ) -> tuple[Program, Finding | None]:
        """The Program with the sizes that the target takes: it computes what the wider one does."""
        leg = Leg(program, (), probes, outputs_of(program, probes))
        made = narrowed(program, dims)
        after = figure(leg, made)
        if after is None or not after.value <= FLOAT32_BOUND:
            return made, self.trail.finding(
                kind="narrowing", bound=FLOAT32_BOUND, after=_measure(after, leg), node=", ".join(dims),
                change=f"{', '.join(dims)} takes fewer sizes",
            )  # fmt: skip
        self.trail.agreed.append(f"narrowing {', '.join(dims)} ({after.value:.1e})")
        return made, None

    def _lowered(
        self, source: Source, owed: Program, program: Program, name: str, probes: Sequence[Probe],
        bundle: tuple[Path, Bundle] | None,
    ) -> Finding | None:  # fmt: skip
        """The lowered passes and the artifact, which owes what ``owed`` computes."""
        order, trail = self.order, self.trail
        brief = replace(order.brief, name=name, labels=source.labels, preprocess=source.preprocess)
        wanted = lowered_passes_of(order.config, order.target, brief.options)
        inside: list[Finding] = []

        def rewrite(lowered: Any) -> Any:
            after, found = self._legs(lowered, wanted, probes, order.target.lowered_level())
            inside.extend([found] if found is not None else [])
            return after

        with tempfile.TemporaryDirectory(prefix="vlexport-") as scratch:
            with trail.reporter.stage(f"lower to {order.target.id}"):
                artifact = order.target.lower(
                    program, Path(scratch), replace(brief, rewrite=rewrite) if wanted else brief
                )
            if inside:
                return inside[0]
            found = compare_artifact(order, owed, program, artifact, Path(scratch), probes)
        if found.differs:
            return self._from_artifact(found, "drift" if found.agrees_with_program else "lowering")
        (trail.notes if found.note else trail.agreed).append(found.note or found.words)
        if bundle is None or found.note:
            return None
        try:
            built = compare_built(order, bundle, name, owed, program, probes)
        except VlexportError as error:
            trail.notes.append(f"the bundle's artifact was not compared: {error.message}")
            return None
        if built.differs:
            return self._from_artifact(built, "bundle")
        trail.agreed.append(f"the bundle's {built.words}")
        return None

    def _from_artifact(self, found: ArtifactFinding, kind: Kind) -> Finding:
        after = Measure(value=found.error, probe=found.probe, output=found.output)
        return self.trail.finding(kind=kind, bound=found.bound, after=after, reason=found.words, cure=found.cure)


def _measure(found: Figure | None, leg: Leg) -> Measure | None:
    """A figure with the name of its output, which graphs of every level have in their signature."""
    if found is None:
        return None
    return Measure(value=found.value, probe=found.probe, output=leg.start.signature.outputs[found.output].name)
