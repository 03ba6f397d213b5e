"""layer_search: which layers return to float so that a model in integers holds its gates, found on samples.

Which layer is sensitive is measured on calibration samples in PyTorch, without any on the gate's own draws; whether the
gates hold, on the artifact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch

from vlexport.core.dataset import Dataset
from vlexport.core.errors import GateError
from vlexport.core.numerics import sqnr_db
from vlexport.core.progress import Reporter, Silent
from vlexport.core.trials import SearchRecord, Trial
from vlexport.passes.pipeline import TimingHook
from vlexport.passes.probes import as_array
from vlexport.passes.quantization.named_calls import name_of
from vlexport.stages.candidates import Bench, guarded
from vlexport.stages.choices import quantize_options_of
from vlexport.stages.component import in_order
from vlexport.stages.make import calibration_rows, specialized_for
from vlexport.stages.quantized import Quantizing, calibrated, quantizing
from vlexport.stages.return_layers import KEEP, ONLY, ReturnLayers
from vlexport.stages.search import Decision, Journal, Options, Split, open_journal, search

_SILENT_DB = 200.0
"""Stands for a layer whose rounding no output shows."""
_SHOWN = 4


@dataclass(frozen=True)
class Kept:
    """What a search over layers decided.

    Attributes:
        options: Laid over the recipe; empty where all layers stay in integers.
        record: For the report.
        journal: To be removed once the recipe is written, where the search came to its end.
        parts: Samples that were chosen on, and the others; None where the first candidate held and nothing was chosen.
    """

    options: dict[str, str]
    record: SearchRecord
    journal: Journal
    parts: Split | None


def keep_layers(
    bench: Bench, options: Options, dataset: Dataset, parts: Split, *, budget_minutes: float | None, resume: bool,
    reporter: Reporter | None = None,
) -> Kept:  # fmt: skip
    """Return layers to float until the gates on accuracy hold.

    Args:
        bench: Makes and judges candidates.
        options: What every candidate has beside its layers, as ``precision``.
        dataset: All samples: the recipe as it stands is judged on these.
        parts: The same, divided.
        budget_minutes: No candidate is begun after so many minutes.
        resume: Go on with what an earlier search wrote.
        reporter: Shows progress.

    Raises:
        GateError: VLX0811 when the gates hold for no share of the layers.
        VlexportError: When the recipe as it stands cannot be made, for another reason than its numbers.
    """
    reporter = reporter or Silent()
    found = _Layers(bench, dict(options), dataset, parts, reporter)
    strategy = ReturnLayers(found.names, given=quantize_options_of(bench.order_of(options).config).keep)
    journal = open_journal(bench.key(parts, f"layers {dict(options)}", found.names), resume=resume)
    if resume:
        count = len(journal.trials)
        reporter.note(f"{count} trials are known already" if count else "nothing to resume: the search starts anew")

    with reporter.steps("layers", len(found.names)) as advance:
        for _ in journal.trials:
            advance()

        def examine(candidate: Options, best: Options) -> Trial:
            trial = found.examine(candidate, best)
            if ONLY not in candidate:
                reporter.note(f"{_phrase(trial, strategy, len(found.names))}")
            advance()
            return trial

        decision = search(strategy, examine, journal, budget_minutes=budget_minutes)
    return _kept(strategy, decision, journal, parts, bench)


class _Layers:
    """The layers of a model in integers, and what becomes of it with some of them in float."""

    def __init__(
        self, bench: Bench, options: dict[str, str], dataset: Dataset, parts: Split, reporter: Reporter
    ) -> None:
        self.bench, self.options, self.dataset, self.parts = bench, options, dataset, parts
        order, prepared, sources = bench.order_of(options), bench.prepared, bench.sources
        ((name, source),) = sources.components.items()
        shared = specialized_for(order, prepared, sources, name, TimingHook())
        self._rows = [in_order(source.program, each) for each in calibration_rows(prepared, sources)]
        bench.calibrated = calibrated(
            shared, self._rows, target=order.target, brief=order.brief, config=order.config,
            samples=prepared.calibration, cache=prepared.cache, reporter=reporter,
        )  # fmt: skip
        self._ready = bench.calibrated
        program, drawn = self._ready.optimized.program, self._ready.optimized.probes or ()
        self._probes = self._rows or [each.values for each in drawn] or [program.example]
        self._answers = [program.run(*each) for each in self._probes]
        whole = self._quantizing({})
        self.names = tuple(dict.fromkeys(name_of(each.module, each.call) for each in whole.decisions.layers))

    def _quantizing(self, candidate: Options) -> Quantizing:
        bench = self.bench
        order = bench.order_of({**self.options, **candidate})
        return quantizing(
            self._ready.optimized.program, self._ready.table, self._rows, target=order.target, brief=order.brief,
            config=order.config,
        )  # fmt: skip

    def examine(self, candidate: Options, best: Options) -> Trial:
        """A layer alone by its noise, any other candidate by the gates."""
        if ONLY in candidate:
            return guarded(candidate, {}, lambda: self._alone(candidate))
        return guarded(candidate, best, lambda: self._judged(candidate, best))

    def _alone(self, candidate: Options) -> Trial:
        rounded = self._ready.optimized.program.copy()
        self._quantizing(candidate).passes[0].run(rounded)
        worst = _SILENT_DB
        for probe, answers in zip(self._probes, self._answers, strict=True):
            for ours, reference in zip(rounded.run(*probe), answers, strict=True):
                if reference.dtype is torch.float32:
                    worst = min(worst, sqnr_db(as_array(ours), as_array(reference)))
        return Trial(options=dict(candidate), outcome="measured", figures={"sqnr_db": round(worst, 2)})

    def _judged(self, candidate: Options, best: Options) -> Trial:
        samples = self.parts.choosing if candidate else self.dataset
        try:
            found = self.bench.judge({**self.options, **candidate}, samples)
        finally:
            self.bench.forget({**self.options, **candidate})
        kept = len([name for name in candidate.get(KEEP, "").split(",") if name])
        return Trial.model_validate(
            {
                "options": dict(candidate),
                "against": dict(best),
                "outcome": found.outcome,
                "figures": {**found.figures, "layers": float(len(self.names) - kept)},
                "reason": "; ".join(str(each) for each in found.verdicts if each.outcome != "pass"),
            }
        )


def _kept(strategy: ReturnLayers, decision: Decision, journal: Journal, parts: Split, bench: Bench) -> Kept:
    trials, count = decision.trials, len(strategy.layers)
    judged = tuple(trial for trial in trials if ONLY not in trial.options)
    near = strategy.nearest(trials)
    if near is None or near.outcome == "fails":
        raise _nothing_holds(strategy, judged, bench, finished=decision.finished)
    options, said = dict(near.options), _phrase(near, strategy, count)
    searched = len(judged) > 1
    if near.outcome == "undecided":
        said += "; the samples do not decide"
    if not decision.finished:
        said += "; the budget ended the search, --resume goes on"
    if searched:
        said += f"; accuracy is that of the {parts.confirming_samples} samples not chosen on"
    record = SearchRecord(
        about="layers",
        said=said,
        trials=judged,
        adopted=options,
        finished=decision.finished,
        choosing_samples=parts.choosing_samples if searched else 0,
        confirming_samples=parts.confirming_samples if searched else 0,
        sensitivities=strategy.sensitivities(trials) if searched else {},
    )
    return Kept(options, record, journal, parts if searched else None)


def _nothing_holds(strategy: ReturnLayers, judged: Sequence[Trial], bench: Bench, *, finished: bool) -> GateError:
    count = len(strategy.layers)
    reached = "; ".join(_phrase(trial, strategy, count) for trial in judged[-_SHOWN:]) or "nothing was judged"
    gates = " and ".join(map(str, bench.gates))
    what = "holds with no share of the layers in integers" if finished else "does not hold yet"
    hint = (
        "build with --precision fp32, give more calibration samples or another --set quantize.method, or allow more"
        if finished
        else "give more --budget-minutes with --resume, which goes on where this search ended"
    )
    return GateError("VLX0811", f"{gates} {what}: {reached}", where="--max-drop", hint=hint)


def _phrase(trial: Trial, strategy: ReturnLayers, count: int) -> str:
    """What a candidate is, and what it lost."""
    returned = strategy.returned(trial)
    shown = ", ".join(returned[:_SHOWN]) + (f" and {len(returned) - _SHOWN} more" if len(returned) > _SHOWN else "")
    what = f"{count - len(returned)} of {count} layers in integers" + (f", {shown} in float" if returned else "")
    figures = trial.figures
    if "drop" in figures:
        low, high = cast("tuple[float, float]", (figures.get("drop_low"), figures.get("drop_high")))
        return f"{what}: drop {figures['drop']:.2f} points (95 %: {low:.2f} to {high:.2f}), {trial.outcome}"
    return f"{what}: {trial.reason or trial.outcome}"
