"""searches: what a build searches before it makes its artifact: tokens, precision, layers in float, fusions.

::

    --tokens auto     the fastest of a small grid that holds the gates
    --precision auto  the fastest of the target's precisions that holds them, as measured on this machine
    --max-drop P      with a precision in integers: the fewest layers in float with which they hold
    --autotune        the fastest of the target's fusions on and off, as measured; options of a session come later

What is decided becomes part of the recipe; a build from that recipe measures nothing.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from vlexport.core.artifact import Frozen
from vlexport.core.config import BuildConfig
from vlexport.core.dataset import Dataset
from vlexport.core.errors import CapabilityError, DataError, GateError, UsageError
from vlexport.core.progress import StageClock
from vlexport.core.tokens import AUTO, AUTO_GRID
from vlexport.core.trials import SearchRecord
from vlexport.frontends.sources import Sources
from vlexport.stages.candidates import Bench, accuracy_gates
from vlexport.stages.choices import INTEGER_PRECISIONS
from vlexport.stages.fastest import fastest
from vlexport.stages.layer_search import Kept, keep_layers
from vlexport.stages.order import Order, why_unmeasured
from vlexport.stages.prepare import Prepared, prepared_again
from vlexport.stages.quantized import require_calibrated
from vlexport.stages.search import Journal, Split, split
from vlexport.stages.validate import Run
from vlexport.targets.base import Target


@dataclass
class Chosen:
    """What the searches of a build decided.

    Attributes:
        order: With the recipe as it is now.
        prepared: Behind the passes of that recipe.
        reference: Computes what the source does.
        records: One a search, for the report.
        notes: What was asked for and not searched, and why.
        confirming: Samples to report accuracy on; None where nothing was chosen on samples.
        journals: To be removed once the recipe is written.
        started: When the searches began, on the monotonic clock: the budget is for all of them.
    """

    order: Order
    prepared: Prepared
    reference: Run
    records: list[SearchRecord] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    confirming: Dataset | None = None
    journals: list[Journal] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def minutes_left(self) -> float | None:
        """Of the budget; None without one."""
        budget = self.order.config.budget_minutes
        return None if budget is None else max(budget - (time.monotonic() - self.started) / 60, 0.0)

    def finish(self) -> None:
        """The decisions are on disk: forget the trials of searches that came to their end."""
        for record, journal in zip(self.records, self.journals, strict=True):
            if record.finished:
                journal.remove()


def choose(order: Order, prepared: Prepared, sources: Sources, clock: StageClock) -> Chosen:
    """Search whatever the order leaves open.

    Args:
        order: What is asked for.
        prepared: Model and data.
        sources: The model with the sizes that the target takes.
        clock: Told how long it took.

    Raises:
        UsageError: VLX0805 for a search that cannot be made.
        GateError: VLX0811 when the gates hold with no share of the layers in integers.
        VlexportError: When the recipe as it stands cannot be made.
    """
    chosen = Chosen(order, prepared, sources.run)
    others = order.config.tokens == AUTO or order.config.precision == "auto" or _layers_open(order, prepared)
    if not (others or order.axes):
        return chosen
    with tempfile.TemporaryDirectory(prefix="vlexport-") as scratch:
        searches = _Searches(chosen, sources, clock, Path(scratch))
        if order.config.tokens == AUTO:
            with clock.stage("search tokens"):
                searches.tokens()
        if order.config.precision == "auto":
            with clock.stage("search precision"):
                searches.precision()
        elif _layers_open(chosen.order, prepared):
            with clock.stage("search layers"):
                searches.layers()
        if order.axes:
            with clock.stage("search fusions"):
                searches.fusions()
    return chosen


class _Searches:
    """One search after the other, each on what the one before has decided."""

    def __init__(self, chosen: Chosen, sources: Sources, clock: StageClock, scratch: Path) -> None:
        self._chosen, self._sources, self._clock, self._scratch = chosen, sources, clock, scratch
        self._parts: Split | None = None

    def tokens(self) -> None:
        """``--tokens auto``."""
        chosen = self._chosen
        _require_one(self._sources, "--tokens auto")
        _require_gates(chosen.order)
        why = why_unmeasured(chosen.order)
        if why:
            raise UsageError(
                "VLX0805", f"--tokens auto chooses by latency: {why}", where="--tokens", hint="give a method and a rate"
            )
        chosen.order = replace(chosen.order, config=chosen.order.config.model_copy(update={"tokens": None}))
        bench = self._bench()
        found = fastest(
            bench, "tokens", [{"tokens": each} for each in AUTO_GRID], self._split(), time_all=True,
            budget_minutes=self._chosen.minutes_left(), resume=chosen.order.config.resume,
            reporter=self._clock.reporter,
        )  # fmt: skip
        self._adopt(bench, found.options, found.record, found.journal, resolve=False)
        if found.options:
            chosen.prepared = prepared_again(chosen.prepared, chosen.order.config)

    def precision(self) -> None:
        """``--precision auto``."""
        chosen, config = self._chosen, self._chosen.order.config
        chosen.order = replace(
            chosen.order, config=config.model_copy(update={"precision": chosen.order.brief.precision})
        )
        why = why_unmeasured(chosen.order)
        if why:
            chosen.notes.append(f"precision {chosen.order.brief.precision} follows the device profile: {why}")
        bench = self._bench()
        candidates = [] if why else self._precisions(bench)
        if not candidates:
            chosen.order = bench.order_of({})
            return
        found = fastest(
            bench, "precision", candidates, self._split(), time_all=False, budget_minutes=self._chosen.minutes_left(),
            resume=config.resume, reporter=self._clock.reporter,
        )  # fmt: skip
        self._adopt(bench, found.options, found.record, found.journal)
        chosen.order = replace(chosen.order, reason="the fastest that holds the gates, as measured here")

    def layers(self) -> None:
        """``--max-drop`` with integers."""
        bench = self._bench()
        kept = self._kept(bench, {})
        if kept is not None:
            self._adopt(bench, kept.options, kept.record, kept.journal, chose=kept.parts is not None)

    def fusions(self) -> None:
        """``--autotune``: fusions that nobody asked for, each the other way round."""
        order = self._chosen.order
        open_ones = fusions_to_try(order.config, order.target, order.brief.options)
        wanted = [{name: value} for name, values in open_ones.items() for value in values]
        if not wanted:
            return
        bench = self._bench()
        found = fastest(
            bench, "fusions", wanted, None, time_all=True, budget_minutes=self._chosen.minutes_left(),
            resume=order.config.resume, reporter=self._clock.reporter,
        )  # fmt: skip
        self._adopt(bench, found.options, found.record, found.journal, chose=False, resolve=False)

    def _precisions(self, bench: Bench) -> list[dict[str, str]]:
        """Precisions beside the default that can be tried; notes say why others are not."""
        chosen, order = self._chosen, self._chosen.order
        found: list[dict[str, str]] = []
        for precision in order.target.precisions:
            if precision == order.brief.precision:
                continue
            why = self._why_untried(precision)
            options = {"precision": precision}
            if not why and precision in INTEGER_PRECISIONS and order.config.max_drop is not None:
                try:
                    kept = self._kept(bench, options)
                except GateError as error:
                    why = error.message
                else:
                    if kept is not None:
                        chosen.records.append(kept.record)
                        chosen.journals.append(kept.journal)
                        options |= kept.options
            if why:
                chosen.notes.append(f"{precision} was not chosen: {why}")
            else:
                found.append(options)
        return found

    def _why_untried(self, precision: str) -> str:
        order = self._chosen.order
        if not accuracy_gates(order.gates):
            return "no gate says how much accuracy it may cost; add --max-drop P --data DATA"
        if precision not in INTEGER_PRECISIONS:
            return ""
        if self._sources.only is None:
            return "a model of several components is not quantized in this version"
        try:
            require_calibrated(order.config, replace(order.brief, precision=precision), order.target)
        except CapabilityError as error:
            return error.message
        except UsageError as error:
            if error.code != "VLX0218":
                raise
            return "it needs calibration samples; add --calib DATA"
        return ""

    def _kept(self, bench: Bench, options: dict[str, str]) -> Kept | None:
        """Layers to keep in float, or None where there are too few samples to choose on."""
        chosen, dataset = self._chosen, self._chosen.prepared.dataset
        assert dataset is not None
        try:
            parts = self._split()
        except DataError as error:
            if error.code != "VLX0202":
                raise
            chosen.notes.append(f"layers are not searched: {error.message}")
            return None
        assert parts is not None
        return keep_layers(
            bench, options, dataset, parts, budget_minutes=self._chosen.minutes_left(),
            resume=chosen.order.config.resume, reporter=self._clock.reporter,
        )  # fmt: skip

    def _bench(self) -> Bench:
        scratch = self._scratch / str(len(list(self._scratch.iterdir())))
        scratch.mkdir()
        bench = Bench(self._chosen.order, self._chosen.prepared, self._sources, scratch, self._chosen.reference)
        self._chosen.reference = bench.reference
        return bench

    def _adopt(
        self, bench: Bench, options: dict[str, str], record: SearchRecord, journal: Journal, *, chose: bool = True,
        resolve: bool = True,
    ) -> None:  # fmt: skip
        chosen, order = self._chosen, bench.order_of(options)
        chosen.order = _resolved(order) if resolve else order
        chosen.records.append(record)
        chosen.journals.append(journal)
        if chose and self._parts is not None:
            chosen.confirming = self._parts.confirming

    def _split(self) -> Split | None:
        """The samples, divided once; None without any, or where no gate is about them."""
        dataset = self._chosen.prepared.dataset
        if dataset is None or not accuracy_gates(self._chosen.order.gates):
            return None
        self._parts = self._parts or split(dataset)
        return self._parts


def _resolved(order: Order) -> Order:
    """``--max-drop`` as a gate, which judges and searches nothing: the recipe holds what the search has found."""
    config = order.config
    if config.max_drop is None:
        return order
    gates = (*config.gate, f"drop<={config.max_drop:g}")
    return replace(order, config=config.model_copy(update={"gate": gates, "max_drop": None}))


def fusions_to_try(config: BuildConfig, target: Target, settled: Frozen) -> dict[str, tuple[str, ...]]:
    """Fusions that a search may turn on or off, and what else it may lower for: ``SCOPE.NAME`` → the other values.

    What was given is not tried.

    Args:
        config: What was asked for.
        target: Whose fusions.
        settled: Its options as they are without a search.
    """
    names = [each.option for each in target.lowered if each.searched]
    found = {name: (str(not getattr(settled, name)).lower(),) for name in names} | dict(target.relowered(settled))
    return {f"{target.id}.{k}": values for k, values in found.items() if f"{target.id}.{k}" not in config.options}


def _layers_open(order: Order, prepared: Prepared) -> bool:
    """Whether layers may have to return to float."""
    asked = order.brief.precision in INTEGER_PRECISIONS and order.config.max_drop is not None
    return asked and prepared.dataset is not None and order.probe.available


def _require_one(sources: Sources, flag: str) -> None:
    if sources.only is None:
        raise UsageError(
            "VLX0805", f"{flag} searches one model, this one has {len(sources.components)} components",
            where=flag.partition(" ")[0], hint="build a component by itself and give what it finds",
        )  # fmt: skip


def _require_gates(order: Order) -> None:
    if not accuracy_gates(order.gates):
        raise UsageError(
            "VLX0805", "--tokens auto takes the fastest that holds a gate on accuracy, and there is none",
            where="--tokens", hint="add --max-drop P --data DATA, or --gate \"agreement>=99\" without labels",
        )  # fmt: skip
