"""candidates: recipes of a search, each made into an artifact in a scratch folder, judged on samples, and timed.

A candidate is a set of options laid over the recipe. What it costs to make one is shared where it can be: the model is
opened once, the source's answers are remembered, and the calibration table does not hang on which layers are kept.
"""

from __future__ import annotations

import filecmp
import hashlib
import itertools
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import vlexport
from vlexport.core.artifact import Array
from vlexport.core.bundle import ARTIFACT_FOLDER
from vlexport.core.bundle_schema import Component, LatencyResult
from vlexport.core.code_identity import code_digest
from vlexport.core.config import BuildConfig
from vlexport.core.dataset import Dataset
from vlexport.core.devices import available_cores, this_machine
from vlexport.core.errors import CapabilityError, GateError, InputError, UsageError
from vlexport.core.progress import Silent, StageClock
from vlexport.core.trials import Trial
from vlexport.core.verdict import Gate, Measured, Verdict, judge, measured_drop, measured_rate
from vlexport.frontends.sources import Sources
from vlexport.passes.pipeline import TimingHook
from vlexport.stages.choices import precision_of, scopes_of, settled_of, tools_of
from vlexport.stages.golden import check_component
from vlexport.stages.make import make
from vlexport.stages.order import Order, reason_of
from vlexport.stages.prepare import Prepared, prepared_again
from vlexport.stages.profile import Measurable, Plan, measure_latency
from vlexport.stages.quantized import Calibrated
from vlexport.stages.search import Options, Split, candidate
from vlexport.stages.validate import TIMED, Run, measure_accuracy
from vlexport.stages.whole_model import opt_inputs
from vlexport.targets.base import Target

RATES = ("drop", "top1", "top5", "agreement")
"""Metrics that are counted, so that it is known what a faultless artifact would be given."""
_KEPT_BYTES = 256 << 20
"""Most that is remembered of the source's answers."""


class Remembered:
    """The source's answers, computed once a sample.

    Args:
        run: Computes them.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._answers: dict[str, dict[str, Array]] = {}
        self._bytes = 0

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The answer to these inputs."""
        key = hashlib.sha256()
        for name, value in inputs.items():
            key.update(f"{name} {value.dtype.str} {value.shape} ".encode() + value.tobytes())
        found = self._answers.get(key.hexdigest())
        if found is None:
            found = self._run(inputs)
            self._bytes += sum(value.nbytes for value in found.values())
            if self._bytes <= _KEPT_BYTES:
                self._answers[key.hexdigest()] = found
        return found


@dataclass(frozen=True)
class Judged:
    """How a candidate did on samples.

    Attributes:
        outcome: ``holds`` all gates, ``fails`` one, or neither is shown: ``undecided``.
        figures: As in a trial.
        verdicts: One a gate.
    """

    outcome: str
    figures: dict[str, float]
    verdicts: tuple[Verdict, ...]


class Bench:
    """Makes candidates of one order, keeps them while it lives, and judges them.

    Args:
        order: The recipe as it stands, and its gates.
        prepared: Model and data.
        sources: The model with the sizes that the target takes.
        scratch: Folder for artifacts.
        source: Computes what the source does.
    """

    def __init__(self, order: Order, prepared: Prepared, sources: Sources, scratch: Path, source: Run) -> None:
        self.order = order
        self.prepared = prepared
        self.sources = sources
        self.gates = accuracy_gates(order.gates)
        self.reference = source if isinstance(source, Remembered) else Remembered(source)
        self.calibrated: Calibrated | None = None
        self._scratch = scratch
        self._made: dict[str, tuple[Order, Component, Path]] = {}
        self._numbers = itertools.count()

    def order_of(self, options: Options) -> Order:
        """What a candidate asks for.

        Raises:
            UsageError: VLX0703.
            CapabilityError: VLX0502.
        """
        target = self.order.target
        config = without_idle(candidate(self.order.config, options), target)
        precision, reason = precision_of(config, target)
        brief = replace(self.order.brief, options=settled_of(config, target, precision), precision=precision)
        return replace(self.order, config=config, brief=brief, reason=reason_of(target, brief, reason))

    def make(self, options: Options) -> tuple[Order, Component, Path]:
        """A candidate's order, artifact and folder.

        Raises:
            VlexportError: As a build would.
        """
        key = repr(sorted(options.items()))
        if key not in self._made:
            asked, prepared = self.order_of(options), self.prepared
            order = replace(asked, config=asked.config.model_copy(update={"dump": None}))
            if order.config.tokens != self.order.config.tokens:
                prepared = prepared_again(prepared, order.config)
            folder = self._scratch / str(next(self._numbers))
            folder.mkdir()
            clock, known = StageClock(Silent()), self.calibrated
            made = make(order, prepared, self.sources, folder, clock, TimingHook(), known=known, beside=False)
            ((component),) = made.components.values()
            self._made[key] = (order, component, folder)
        return self._made[key]

    def is_same(self, options: Options, other: Options) -> bool:
        """Whether two candidates have the same files, opened in the same way."""
        (_, mine, here), (_, its, there) = self.make(options), self.make(other)
        return mine.artifact == its.artifact and _same_files(here / ARTIFACT_FOLDER, there / ARTIFACT_FOLDER)

    def forget(self, options: Options) -> None:
        """A candidate is not needed again: its files go."""
        made = self._made.pop(repr(sorted(options.items())), None)
        if made is not None:
            shutil.rmtree(made[2])

    def measurable(self, name: str, options: Options) -> Measurable:
        """A candidate, for timing."""
        order, component, folder = self.make(options)
        return Measurable(name, order.target, folder / ARTIFACT_FOLDER, component.artifact)

    def latency(self, options: Options, against: Options, plan: Plan) -> LatencyResult:
        """A candidate's latency against another's, in interleaved rounds."""
        return measure_latency(
            self.measurable("candidate", options), opt_inputs(self.sources, self.order.config.seed),
            baseline=self.measurable("best so far", against), plan=plan, threads=self._threads, reporter=Silent(),
        )  # fmt: skip

    def judge(self, options: Options, samples: Dataset) -> Judged:
        """A candidate on samples. Too few of them for a faultless artifact to pass let the figure itself decide.

        Args:
            options: The candidate.
            samples: Samples.

        Raises:
            GateError: VLX0401, VLX0504 for a candidate whose numbers are wrong.
            CapabilityError: VLX05xx for one that does not run.
        """
        order, component, folder = self.make(options)
        place = folder / ARTIFACT_FOLDER
        with order.target.open(place, component.artifact, threads=self._threads) as session:
            check_component(session, folder, component, code="VLX0504")
            found = measure_accuracy(
                session, samples, component, reference=self.reference, reporter=Silent(),
                metrics=self.prepared.metrics,
            )  # fmt: skip
        measured: list[Measured] = list(found["measured"])
        verdicts = tuple(judge(gate, measured) for gate in self.gates)
        outcomes = {_outcome(verdict) for verdict in verdicts}
        worst = next((each for each in ("fails", "undecided") if each in outcomes), "holds")
        return Judged(worst, _figures(measured), verdicts)

    def key(self, parts: Split | None, what: str, candidates: Sequence[str]) -> dict[str, object]:
        """Everything that a trial of a search depends on, as JSON values."""
        machine = this_machine()
        config, order = self.order.config, self.order
        return {
            "vlexport": vlexport.__version__,
            "code": code_digest("vlexport"),
            "what": what,
            "candidates": list(candidates),
            "source": self.sources.source_hash,
            "recipe": config.recipe(),
            "target": order.target.id,
            "tools": tools_of(config, order.target),
            "device": order.brief.device.id,
            "machine": [machine.cpu, list(machine.instruction_set), machine.cores],
            "threads": self._threads,
            "samples": parts.digest if parts is not None else "",
            "calibration": self._calibration(),
            "gates": [str(gate) for gate in order.gates],
            "metrics": [metric.name for metric in self.prepared.metrics],
        }

    def _calibration(self) -> str:
        digest = hashlib.sha256()
        for sample in self.prepared.calibration or ():
            digest.update(sample.content_hash().encode())
        return digest.hexdigest()

    @property
    def _threads(self) -> int:
        return self.order.config.threads or available_cores()


def without_idle(config: BuildConfig, target: Target) -> BuildConfig:
    """A config without options of passes that its own precision and tokens do not run, but another candidate's do."""
    known = scopes_of(config, target)
    kept = {key: value for key, value in config.options.items() if key.partition(".")[0] in known}
    return config.model_copy(update={"options": kept}) if kept != config.options else config


def accuracy_gates(gates: Sequence[Gate]) -> tuple[Gate, ...]:
    """Those that samples judge, and no clock or scale."""
    return tuple(gate for gate in gates if gate.metric not in (*TIMED, "size_mb"))


def guarded(options: Options, against: Options, examine: Callable[[], Trial]) -> Trial:
    """A trial, or why there is none: a candidate that is wrong or refused ends no search."""
    try:
        return examine()
    except GateError as error:
        return Trial(options=dict(options), against=dict(against), outcome="wrong", reason=error.message)
    except (CapabilityError, UsageError, InputError) as error:
        reason = f"{error.code}: {error.message}"
        return Trial(options=dict(options), against=dict(against), outcome="refused", reason=reason)


def _same_files(here: Path, there: Path) -> bool:
    """Whether two folders hold the same bytes under the same names; read as far as the first that differs."""
    mine, its = ({f.relative_to(folder) for f in folder.rglob("*") if f.is_file()} for folder in (here, there))
    return mine == its and all(filecmp.cmp(here / name, there / name, shallow=False) for name in mine)


def _outcome(verdict: Verdict) -> str:
    if verdict.outcome != "inconclusive":
        return "holds" if verdict.outcome == "pass" else "fails"
    if verdict.gate.holds(verdict.measured.value) and not _provable(verdict):
        return "holds"
    return "undecided"


def _provable(verdict: Verdict) -> bool:
    """Whether an artifact without a single wrong answer would pass a gate on so many samples."""
    samples, metric = verdict.measured.samples or 0, verdict.gate.metric
    if not samples or metric not in RATES:
        return True
    best = measured_drop(0, 0, samples) if metric == "drop" else measured_rate(metric, samples, samples)
    return judge(verdict.gate, [best]).outcome == "pass"


def _figures(measured: Sequence[Measured]) -> dict[str, float]:
    found = {}
    for each in measured:
        if each.metric in ("drop", "agreement", "top1", "cosine"):
            found[each.metric] = round(each.value, 4)
        if each.metric == "drop" and each.low is not None and each.high is not None:
            found |= {"drop_low": round(each.low, 4), "drop_high": round(each.high, 4)}
    return found
