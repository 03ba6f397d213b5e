"""fastest: of some candidates the fastest that holds the gates, against the recipe as it stands.

Every candidate is judged on samples first and then timed against the same recipe, so that the figures of all can be set
side by side. The winner is timed again in full rounds, and adopted only when the 95 % interval of the ratio lies
above 1: what measured slower is never chosen, and is said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlexport.core.dataset import Dataset
from vlexport.core.progress import Reporter, Silent
from vlexport.core.trials import SearchRecord, Trial, lost
from vlexport.stages.candidates import Bench, Judged, guarded
from vlexport.stages.profile import FULL, QUICK, Plan
from vlexport.stages.search import Decision, Journal, Options, Split, open_journal, search

CHOOSE: Plan = QUICK
CONFIRM: Plan = FULL


@dataclass(frozen=True)
class FastestOf:
    """Tries all candidates in order, and keeps the fastest of those that hold the gates.

    Attributes:
        candidates: Options laid over the recipe, each.
    """

    candidates: tuple[dict[str, str], ...]

    def propose(self, trials: Sequence[Trial]) -> dict[str, str] | None:
        """The first that was not tried."""
        seen = [trial.options for trial in trials]
        return next((dict(each) for each in self.candidates if each not in seen), None)

    def best(self, trials: Sequence[Trial]) -> dict[str, str]:
        """The fastest that holds; the recipe as it stands where none is faster."""
        faster = [trial for trial in trials if trial.outcome == "faster"]
        found = max(faster, key=lambda trial: trial.ratio or 0.0, default=None)
        return dict(found.options) if found is not None else {}


@dataclass(frozen=True)
class Fastest:
    """What was decided.

    Attributes:
        options: Laid over the recipe; empty where it stands.
        record: For the report.
        journal: To be removed once the recipe is written, where the search came to its end.
    """

    options: dict[str, str]
    record: SearchRecord
    journal: Journal


def fastest(
    bench: Bench, about: str, candidates: Sequence[dict[str, str]], parts: Split | None, *, time_all: bool,
    budget_minutes: float | None, resume: bool, reporter: Reporter | None = None,
) -> Fastest:  # fmt: skip
    """Choose.

    Args:
        bench: Makes, judges and times candidates.
        about: ``precision``, ``tokens`` or ``fusions``.
        candidates: Beside the recipe as it stands.
        parts: Samples; None where no gate is on accuracy.
        time_all: Time those that fail the gates too, so that all can be compared.
        budget_minutes: No candidate is begun after so many minutes.
        resume: Go on with what an earlier search wrote.
        reporter: Shows progress.

    Raises:
        BundleError: VLX0607 when the journal cannot be written.
        VlexportError: When the recipe as it stands cannot be made.
    """
    reporter = reporter or Silent()
    bench.make({})
    strategy = FastestOf(tuple(candidates))
    journal = open_journal(bench.key(parts, about, [repr(sorted(each.items())) for each in candidates]), resume=resume)
    samples = parts.choosing if parts is not None else None
    with reporter.steps(about, len(candidates)) as advance:
        for _ in journal.trials:
            advance()

        def examine(options: Options, best: Options) -> Trial:
            trial = guarded(options, {}, lambda: _trial(bench, options, samples, time_all=time_all))
            reporter.note(f"{shown_options(options)}: {trial_phrase(trial)}")
            advance()
            return trial

        decision = search(strategy, examine, journal, budget_minutes=budget_minutes)
    confirmed = None
    if decision.options:
        with reporter.stage("confirm"):
            confirmed = guarded(decision.options, {}, lambda: _timed(bench, decision.options, CONFIRM, {}))
    kept = decision.options if confirmed is not None and confirmed.outcome == "faster" else {}
    record = SearchRecord.model_validate(
        {
            "about": about,
            "said": _said(about, decision, confirmed, kept),
            "trials": decision.trials,
            "adopted": kept,
            "finished": decision.finished,
            "choosing_samples": parts.choosing_samples if parts is not None else 0,
            "confirming_samples": parts.confirming_samples if parts is not None else 0,
            "front": front(decision.trials),
        }
    )
    return Fastest(kept, record, journal)


def front(trials: Sequence[Trial]) -> tuple[int, ...]:
    """Numbers of the trials that no other one beats in both drop and speed, the fastest first.

    The recipe as it stands, which loses nothing at a ratio of 1, is one of those that may beat them.
    """
    points = [
        (number, trial.ratio, loss)
        for number, trial in enumerate(trials)
        if trial.ratio is not None and (loss := lost(trial)) is not None
    ]
    rivals = [(ratio, loss) for _, ratio, loss in points] + [(1.0, 0.0)]
    kept = [
        (ratio, number)
        for number, ratio, loss in points
        if not any(r >= ratio and x <= loss and (r, x) != (ratio, loss) for r, x in rivals)
    ]
    return tuple(number for _, number in sorted(kept, reverse=True))


def trial_phrase(trial: Trial) -> str:
    """Outcome and figures of a candidate."""
    parts: list[str] = [trial.outcome]
    if trial.ratio is not None:
        parts.append(f"{trial.ratio:.2f}× ({trial.ratio_low:.2f} to {trial.ratio_high:.2f})")
    if "drop" in trial.figures:
        parts.append(f"drop {trial.figures['drop']:.2f} points")
    if trial.reason:
        parts.append(trial.reason)
    return ", ".join(parts)


def shown_options(options: Options) -> str:
    """Options as they stand in a recipe, without the layers."""
    return " ".join(f"{key} {value}" if "." not in key else key for key, value in options.items())


def _trial(bench: Bench, options: Options, samples: Dataset | None, *, time_all: bool) -> Trial:
    if bench.is_same(options, {}):
        return Trial(options=dict(options), outcome="not faster", reason="it changes nothing here")
    judged = bench.judge(options, samples) if samples is not None else None
    figures = dict(judged.figures) if judged is not None else {}
    figures["gmacs"] = round(bench.make(options)[1].cost.macs / 1e9, 4)
    if judged is None or judged.outcome == "holds":
        return _timed(bench, options, CHOOSE, figures)
    if time_all:
        return _with_verdict(_timed(bench, options, CHOOSE, figures), judged)
    return _with_verdict(Trial(options=dict(options), outcome="measured", figures=figures), judged)


def _with_verdict(trial: Trial, judged: Judged) -> Trial:
    reason = "; ".join(f"gate {each}" for each in judged.verdicts if each.outcome != "pass")
    return Trial.model_validate({**trial.model_dump(), "outcome": judged.outcome, "reason": reason})


def _timed(bench: Bench, options: Options, plan: Plan, figures: dict[str, float]) -> Trial:
    found = bench.latency(options, {}, plan)
    if found.ratio is None or found.ratio_low is None:
        why = f"the baseline drifted in {found.repeated} rounds"
        return Trial(options=dict(options), outcome="too noisy", reason=why, figures=figures)
    return Trial(
        options=dict(options),
        outcome="faster" if found.ratio_low > 1 else "not faster",
        ratio=found.ratio,
        ratio_low=found.ratio_low,
        ratio_high=found.ratio_high,
        figures=figures,
    )


def _said(about: str, decision: Decision, confirmed: Trial | None, kept: Options) -> str:
    count = len(decision.trials)
    tried = f"{count} candidate{'s' if count != 1 else ''}"
    if kept and confirmed is not None:
        said = f"{shown_options(kept)} of {tried}: {trial_phrase(confirmed)}, confirmed"
    elif confirmed is not None:
        said = f"the recipe stands: {shown_options(confirmed.options)} was not confirmed: {trial_phrase(confirmed)}"
    else:
        each = "; ".join(f"{shown_options(trial.options)}: {trial_phrase(trial)}" for trial in decision.trials[:2])
        said = f"the recipe stands: none of {tried} is faster and holds the gates" + (f" ({each})" if each else "")
    return said if decision.finished else f"{said}; the budget ended the search, --resume goes on"
