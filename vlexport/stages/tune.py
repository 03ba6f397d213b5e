"""autotune: an artifact's other session options, each in a child process, measured against the best so far. No torch.

A candidate must open, reproduce the golden vectors and be faster in every quick round; with samples it must then answer
as the recipe as it stands does, within the golden tolerance, and fail no gate. The last one standing is measured
against the recipe as it stands in full rounds, and adopted only when the 95 % interval of the ratio lies above 1: a
search that tries enough candidates always finds one that looks faster.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import vlexport
from vlexport.core.artifact import Array, Artifact, Frozen
from vlexport.core.bundle import ARTIFACT_FOLDER, file_record
from vlexport.core.bundle_schema import Component, Trial, Tuning
from vlexport.core.config import BuildConfig
from vlexport.core.dataset import Dataset
from vlexport.core.device_profiles import device_profile
from vlexport.core.devices import this_machine
from vlexport.core.errors import CODES, CapabilityError, GateError, UsageError
from vlexport.core.isolate import IsolatedSession
from vlexport.core.progress import Reporter, Silent
from vlexport.core.scheme import QUANTIZED
from vlexport.core.tokens import AUTO
from vlexport.core.user_metric import UserMetric
from vlexport.core.verdict import Gate, judge
from vlexport.stages.golden import check_component
from vlexport.stages.profile import FULL, QUICK, Measurable, Plan, measure_latency
from vlexport.stages.search import CoordinateSteps, Journal, Options, Split, candidate, open_journal, search, split
from vlexport.stages.validate import TIMED, Run, measure_accuracy
from vlexport.targets.base import Target

CHOOSE: Plan = QUICK
CONFIRM: Plan = FULL
_REFUSALS = ("VLX0505", "VLX0506")


@dataclass(frozen=True)
class Subject:
    """What the candidates of a search are variations of.

    Attributes:
        config: The recipe as it stands.
        target: Its options are searched.
        folder: Holds the artifact and the golden vectors.
        component: The artifact and its specs.
        source_hash: Of the model.
        source: Computes what the artifact should, for gates that compare.
        inputs: What latency is measured on.
        gates: Those on accuracy judge candidates, too.
        metrics: The user's own.
        tools: Versions of what takes part.
        threads: For the runtime.
    """

    config: BuildConfig
    target: Target
    folder: Path
    component: Component
    source_hash: str
    source: Run
    inputs: Mapping[str, Array]
    gates: tuple[Gate, ...]
    metrics: tuple[UserMetric, ...]
    tools: Mapping[str, str]
    threads: int

    def artifact(self, options: Options) -> Artifact:
        """The artifact of a candidate: the same files, opened otherwise."""
        if not options:
            return self.component.artifact
        scoped = candidate(self.config, options).scoped_options(self.target.id)
        return self.target.retuned(self.component.artifact, self.target.check_options(scoped))

    def measurable(self, name: str, options: Options) -> Measurable:
        """A candidate, for timing."""
        return Measurable(name, self.target, self.folder / ARTIFACT_FOLDER, self.artifact(options))


@dataclass(frozen=True)
class Tuned:
    """What a search left behind.

    Attributes:
        config: The recipe with what was adopted.
        component: With the artifact as it is to be opened.
        tuning: For the report.
        dataset: The samples to report accuracy on; None without data.
        journal: To be removed once the recipe is written, where the search came to its end.
    """

    config: BuildConfig
    component: Component
    tuning: Tuning
    dataset: Dataset | None
    journal: Journal

    def finish(self) -> None:
        """The decision is on disk: forget the trials, unless the budget cut the search short."""
        if self.tuning.finished:
            self.journal.remove()


def axes_of(config: BuildConfig, target: Target, options: Frozen) -> dict[str, tuple[str, ...]]:
    """What ``--autotune`` would try, ``SCOPE.NAME`` → values; empty without it. An option that was given stays.

    Raises:
        UsageError: VLX0805 when there is nothing to search, nothing is measured, or its flags stand alone.
    """
    if not config.autotune:
        flag = "--resume" if config.resume else "--budget-minutes" if config.budget_minutes is not None else ""
        if flag and not searches_otherwise(config):
            raise UsageError("VLX0805", f"{flag} without a search", where=flag, hint="add --autotune, or leave it out")
        return {}
    if not config.profile:
        raise _unsearchable("--autotune measures latency, --no-profile forbids it", "leave one of them out")
    profile = device_profile(config.device_profile or target.default_device, target=target.id)
    if not profile.is_this(this_machine()):
        raise _unsearchable(
            f"--autotune measures on this machine, which is no {profile.id}",
            "leave --for out, or search on that device",
        )
    found = target.tunables(options)
    if not found:
        raise _unsearchable(f"{target.id} has no options to search", "leave --autotune out")
    free = {f"{target.id}.{name}": values for name, values in found.items() if name not in options.model_fields_set}
    if not free:
        raise _unsearchable(
            f"every option that could be searched is given: {', '.join(found)}",
            "leave out a --set, or the recipe's line",
        )
    return free


def searches_otherwise(config: BuildConfig) -> bool:
    """Whether a config asks for a search that is none of session options."""
    layers = config.max_drop is not None and config.precision in QUANTIZED
    return layers or config.precision == "auto" or config.tokens == AUTO


def require_searchable(config: BuildConfig, components: Collection[str]) -> None:
    """Refuse a search over several components.

    Raises:
        UsageError: VLX0805.
    """
    if config.autotune and len(components) > 1:
        raise _unsearchable(
            f"--autotune searches the options of one model, this one has {len(components)} components",
            "build a component by itself with --autotune and give what it finds with --set",
        )


def autotune(
    subject: Subject, axes: Mapping[str, tuple[str, ...]], dataset: Dataset | None, *,
    budget_minutes: float | None = None, reporter: Reporter | None = None,
) -> Tuned:  # fmt: skip
    """Search the options of ``axes``.

    Args:
        subject: What is varied.
        axes: As of :func:`axes_of`.
        dataset: Labelled samples; None judges candidates by the golden vectors alone.
        budget_minutes: What other searches have left of the budget; None for all of it.
        reporter: Progress.

    Raises:
        GateError: VLX0504 when the recipe as it stands does not reproduce the golden vectors.
        CapabilityError: VLX0803 when times on the target's session mean nothing; VLX0505, VLX0506 when it fails.
        DataError: VLX02xx for the samples.
        BundleError: VLX0607 when the journal cannot be written.
    """
    reporter = reporter or Silent()
    _require_sound(subject)
    parts = split(dataset) if dataset is not None else None
    config = subject.config
    journal = open_journal(_key(subject, axes, parts), resume=config.resume)
    if config.resume:
        count = len(journal.trials)
        reporter.note(f"{count} trials are known already" if count else "nothing to resume: the search starts anew")
    examiner = Examiner(subject, parts)
    left = config.budget_minutes if budget_minutes is None else budget_minutes
    with reporter.steps("autotune", sum(map(len, axes.values()))) as advance:
        for _ in journal.trials:
            advance()

        def examine(options: Options, best: Options) -> Trial:
            trial = examiner.examine(options, best)
            advance()
            return trial

        decision = search(CoordinateSteps(axes), examine, journal, budget_minutes=left)
    confirmation = None
    if decision.options:
        with reporter.stage("confirm"):
            confirmation = examiner.confirm(decision.options)
    kept = decision.options if confirmation is not None and confirmation.outcome == "faster" else {}
    tuning = Tuning(
        trials=decision.trials,
        confirmation=confirmation,
        adopted=kept,
        finished=decision.finished,
        choosing_samples=parts.choosing_samples if parts is not None else 0,
        confirming_samples=parts.confirming_samples if parts is not None else 0,
    )
    return Tuned(
        config=candidate(config, kept),
        component=subject.component.model_copy(update={"artifact": subject.artifact(kept)}),
        tuning=tuning,
        dataset=parts.confirming if parts is not None else None,
        journal=journal,
    )


class Examiner:
    """Judges and measures candidates.

    Args:
        subject: What they are variations of.
        parts: Samples to choose and to confirm on; None judges by the golden vectors alone.
    """

    def __init__(self, subject: Subject, parts: Split | None) -> None:
        self._subject = subject
        self._parts = parts

    def examine(self, options: Options, best: Options) -> Trial:
        """A candidate against the best so far, in quick rounds."""
        return self._trial(options, best, CHOOSE, self._parts.choosing if self._parts is not None else None)

    def confirm(self, options: Options) -> Trial:
        """The winner against the recipe as it stands, in full rounds and on the samples not looked at before."""
        return self._trial(options, {}, CONFIRM, self._parts.confirming if self._parts is not None else None)

    def _trial(self, options: Options, against: Options, plan: Plan, samples: Dataset | None) -> Trial:
        try:
            trial = self._measured(plan, options, against)
            wrong = self._wrong(options, samples) if trial.outcome == "faster" and samples is not None else ""
        except GateError as error:
            return _unmeasured(options, against, "wrong", error.message)
        except CapabilityError as error:
            if error.code not in _REFUSALS:
                raise
            return _unmeasured(options, against, "refused", f"{error.code}: {CODES[error.code]}")
        return _unmeasured(options, against, "wrong", wrong) if wrong else trial

    def _measured(self, plan: Plan, options: Options, against: Options) -> Trial:
        """The candidate's latency, once it has reproduced the golden vectors."""
        subject = self._subject
        with self._open(options) as session:
            check_component(session, subject.folder, subject.component, code="VLX0504")
        found = measure_latency(
            subject.measurable("candidate", options), subject.inputs,
            baseline=subject.measurable("best so far", against), plan=plan, threads=subject.threads,
            reporter=Silent(),
        )  # fmt: skip
        if found.ratio is None or found.ratio_low is None:
            why = f"the baseline drifted in {found.repeated} rounds"
            return _unmeasured(options, against, "too noisy", why)
        return Trial(
            options=dict(options),
            against=dict(against),
            outcome="faster" if found.ratio_low > 1 else "not faster",
            ratio=found.ratio,
            ratio_low=found.ratio_low,
            ratio_high=found.ratio_high,
        )

    def _open(self, options: Options) -> IsolatedSession:
        subject = self._subject
        return subject.target.open(subject.folder / ARTIFACT_FOLDER, subject.artifact(options), threads=subject.threads)

    def _wrong(self, options: Options, samples: Dataset) -> str:
        """Why a candidate's answers on samples are not good enough, or an empty string."""
        subject = self._subject
        bound = subject.component.golden.tolerance
        with self._open(options) as session:
            with self._open({}) as standing:
                found = measure_accuracy(
                    session, samples, subject.component, reference=standing.run, reporter=Silent(),
                    metrics=subject.metrics,
                )  # fmt: skip
            for name, each in found["fidelity"].items():
                if not each.relative_error <= bound:
                    return (
                        f"output {name} differs from the recipe as it stands by {each.relative_error:.1e} "
                        f"on {each.samples} samples (bound {bound:.0e})"
                    )
            judged = [gate for gate in subject.gates if gate.metric not in (*TIMED, "size_mb")]
            if not judged:
                return ""
            found = measure_accuracy(
                session, samples, subject.component, reference=subject.source, reporter=Silent(),
                metrics=subject.metrics,
            )  # fmt: skip
        verdicts = [judge(gate, found["measured"]) for gate in judged]
        return next((f"gate {verdict}" for verdict in verdicts if verdict.outcome == "fail"), "")


def _unmeasured(
    options: Options, against: Options, outcome: Literal["wrong", "refused", "too noisy"], reason: str
) -> Trial:
    return Trial(options=dict(options), against=dict(against), outcome=outcome, reason=reason)


def _require_sound(subject: Subject) -> None:
    """The recipe as it stands runs, is right, and can be timed."""
    place = subject.folder / ARTIFACT_FOLDER
    with subject.target.open(place, subject.component.artifact, threads=subject.threads) as session:
        if session.timing != "real":
            raise CapabilityError(
                "VLX0803", f"--autotune chooses by latency, and the target's timing is {session.timing}",
                where="--autotune", hint="leave --autotune out",
            )  # fmt: skip
        check_component(session, subject.folder, subject.component, code="VLX0504")


def _key(subject: Subject, axes: Mapping[str, tuple[str, ...]], parts: Split | None) -> dict[str, object]:
    """Everything that a trial depends on."""
    place = subject.folder / ARTIFACT_FOLDER
    machine = this_machine()
    return {
        "vlexport": vlexport.__version__,
        "tools": dict(subject.tools),
        "source": subject.source_hash,
        "recipe": subject.config.recipe(),
        "artifact": {
            file.relative_to(place).as_posix(): file_record(file).sha256
            for file in sorted(place.rglob("*"))
            if file.is_file()
        },
        "axes": {name: list(values) for name, values in axes.items()},
        "machine": [machine.cpu, list(machine.instruction_set), machine.cores],
        "threads": subject.threads,
        "samples": parts.digest if parts is not None else "",
        "metrics": [metric.name for metric in subject.metrics],
        "rounds": [CHOOSE.rounds, CHOOSE.block_seconds],
    }


def _unsearchable(why: str, hint: str) -> UsageError:
    return UsageError("VLX0805", why, where="--autotune", hint=hint)
