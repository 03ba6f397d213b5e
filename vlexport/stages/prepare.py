"""prepare: what all targets of a build share: the opened model and data, and the passes that no target owns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from vlexport.core.artifact import Array, DimRange
from vlexport.core.cache import Cache, open_cache
from vlexport.core.config import BuildConfig
from vlexport.core.dataset import Dataset
from vlexport.core.errors import UsageError
from vlexport.core.progress import Reporter, StageClock
from vlexport.core.user_metric import UserMetric, open_metrics
from vlexport.frontends.sources import Sources, open_sources
from vlexport.ir.program import Program
from vlexport.passes.base import Pass
from vlexport.passes.pipeline import TimingHook
from vlexport.stages.choices import (
    HALF_PRECISIONS,
    open_dataset,
    passes_of,
)
from vlexport.stages.component import (
    Optimized,
    optimize_component,
    specialize_component,
)
from vlexport.stages.dims import dims_of
from vlexport.stages.folded import require_folded
from vlexport.stages.order import Order
from vlexport.stages.probe_memory import require_memory
from vlexport.stages.tokens import component_passes
from vlexport.stages.tune import require_searchable
from vlexport.stages.validate import TIMED, require_measured
from vlexport.stages.whole_model import first_samples
from vlexport.stages.write_bundle import require_folder

RANGE_SAMPLES = 16
"""Calibration samples that ranges are measured on: the largest value of a layer settles within a few images."""


@dataclass(frozen=True)
class Prepared:
    """What all targets share.

    Attributes:
        sources: The model.
        optimized: Component → after the passes that no target owns.
        passes: Component → those passes.
        dataset: Evaluation samples.
        calibration: Calibration samples.
        metrics: The user's own.
        cache: Where artifacts and plain exports may be found; None makes them anew.
        seconds: Stage → seconds spent so far.
        specialized: Component, dims and precision → what targets that agree in them share, once one has made it.
    """

    sources: Sources
    optimized: dict[str, Optimized]
    passes: Mapping[str, Sequence[Pass[Program]]]
    dataset: Dataset | None
    calibration: Dataset | None
    metrics: tuple[UserMetric, ...]
    cache: Cache | None
    seconds: dict[str, float]
    specialized: dict[tuple[str, str, str], Optimized] = field(default_factory=dict)


def prepare(config: BuildConfig, orders: Sequence[Order], reporter: Reporter) -> Prepared:
    """Open model and data, and run the passes that no target owns.

    Raises:
        VlexportError: With the code and exit code of whatever is wrong.
    """
    clock = StageClock(reporter)
    passes_of(config)  # refuses wrong options before anything is opened
    metrics = open_metrics(config.metric)
    require_folder(config.dump)
    with clock.stage("open the model"):
        sources = open_sources(config)
    require_searchable(config, sources.components)
    dataset = open_dataset(config.data, sources, skip_bad=config.skip_bad)
    if dataset is not None:
        for order in orders:
            require_measured([g for g in order.gates if g.metric not in TIMED], dataset, referenced=True)
    calibration = open_dataset(config.calib, sources, skip_bad=config.skip_bad)
    samples = first_samples(calibration, sources, count=1)
    _require_dims(orders, sources)
    timing = TimingHook()
    with clock.stage("passes"):
        passes, optimized = _optimized(config, sources, calibration, samples, timing)
    seconds = {**clock.seconds, **pass_seconds(timing)}
    return Prepared(sources, optimized, passes, dataset, calibration, metrics, open_cache(reporter), seconds)


def prepared_again(prepared: Prepared, config: BuildConfig) -> Prepared:
    """The same model and data behind other passes: those of another ``--tokens``.

    Raises:
        VlexportError: VLX04xx, VLX0703.
    """
    samples = first_samples(prepared.calibration, prepared.sources, count=1)
    passes, optimized = _optimized(config, prepared.sources, prepared.calibration, samples, TimingHook())
    return replace(prepared, passes=passes, optimized=optimized, specialized={})


def _optimized(
    config: BuildConfig,
    sources: Sources,
    calibration: Dataset | None,
    samples: Mapping[str, Sequence[Mapping[str, Array]]],
    timing: TimingHook,
) -> tuple[dict[str, list[Pass[Program]]], dict[str, Optimized]]:
    """Component → passes that no target owns, and what they made of it."""
    passes = {name: component_passes(config, sources, name, calibration) for name in sources.components}
    optimized: dict[str, Optimized] = {}
    for name, source in sources.components.items():
        with sources.named(name):
            optimized[name] = optimize_component(
                source, passes[name], config=config, samples=samples.get(name, ()),
                dump=dump_of(config, sources, name), hooks=[timing],
            )  # fmt: skip
            require_folded(config, source, optimized[name].program, optimized[name].records)
    return passes, optimized


def _require_dims(orders: Sequence[Order], sources: Sources) -> None:
    """Refuse sizes that no target takes before any work is done; those that one does not take refuse that one later.

    Raises:
        UsageError: VLX0703, VLX0706.
        InputError: VLX0410.
    """
    refused: list[UsageError] = []
    for order in orders:
        try:
            require_memory(sources, dims_of(order.config, order.target, sources.signature))
        except UsageError as error:  # noqa: PERF203  a handful of targets
            refused.append(error)
        else:
            return
    if refused:
        raise refused[0]


def specialized(
    prepared: Prepared,
    sources: Sources,
    name: str,
    dims: Mapping[str, DimRange],
    precision: str,
    config: BuildConfig,
    dump: Path | None,
    timing: TimingHook,
) -> Optimized:
    """A component narrowed and typed: made for the first target that asks, found by the others."""
    own = prepared.sources.wiring.dims.own(name, dims)
    key = (name, str(sorted(own.items())), precision)
    if key not in prepared.specialized:
        count = RANGE_SAMPLES if precision in HALF_PRECISIONS else 1
        samples = first_samples(prepared.calibration, sources, count=count) if own or count > 1 else {}
        prepared.specialized[key] = specialize_component(
            prepared.optimized[name], sources.components[name], dims=own,
            again=[p for p in prepared.passes[name] if p.stage == "normalize"], precision=precision, config=config,
            samples=samples.get(name, ()), dump=dump, hooks=[timing],
        )  # fmt: skip
    return prepared.specialized[key]


def dump_of(config: BuildConfig, sources: Sources, name: str, *parts: str) -> Path | None:
    """Where a component's graph goes after every pass; None without ``--dump``."""
    if not config.dump:
        return None
    return Path(config.dump).joinpath(name if sources.only is None else "", *parts)


def pass_seconds(timing: TimingHook) -> dict[str, float]:
    """Seconds of every pass, by ``pass NAME``."""
    return {f"pass {name}": spent for name, spent in timing.seconds.items()}
