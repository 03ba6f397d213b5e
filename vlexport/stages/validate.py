"""validate: accuracy on labelled samples and fidelity to a reference, streaming, with 95 % intervals. No torch.

The reference is a callable on the same inputs; `vlexport validate --reference MODEL` opens it with torch, or another
bundle without.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vlexport.core.artifact import Array, Session, TensorSpec
from vlexport.core.bundle import ARTIFACT_FOLDER, RECIPE_FILE, check_files, read_bundle
from vlexport.core.bundle_schema import (
    AccuracyResult,
    BadSample,
    Component,
    Disagreement,
    LatencyResult,
    MetricResult,
    Report,
)
from vlexport.core.config import read_recipe
from vlexport.core.dataset import Dataset, Sample
from vlexport.core.errors import DataError, UsageError
from vlexport.core.intervals import clopper_pearson
from vlexport.core.numerics import Accuracy, Fidelity, OutputFidelity, PairedAccuracy
from vlexport.core.progress import Reporter, Silent
from vlexport.core.samples import open_data, require_data
from vlexport.core.user_metric import CHANGE, MetricTally, UserMetric, measured_metric, open_metrics
from vlexport.core.verdict import Gate, Measured, judge, measured_drop, measured_rate, measured_regress
from vlexport.frontends.named_paths import require_reference
from vlexport.report.write import new_report, require_writable, write_report
from vlexport.stages.reference import Reference, open_reference
from vlexport.stages.write_bundle import GOLDEN_TOLERANCE
from vlexport.targets import open_target

Run = Callable[[Mapping[str, Array]], dict[str, Array]]
CLOSE_MARGIN = 10 * GOLDEN_TOLERANCE
"""A top-1 that differs on a smaller relative margin may be rounding; it is listed as close."""
TIMED = ("p50_ms", "load_ms", "regress")
"""Metrics of gates that profile measures, and validate does not."""
_OFFER = "`vlexport validate BUNDLE --data DATA --diagnose-preprocess` tries the usual ones"
_MAX_LISTED = 100
_TOP5_FROM = 6
_ENOUGH_FOR_NORMAL = 30


@dataclass(frozen=True)
class ValidateConfig:
    """What to validate.

    Attributes:
        bundle: Folder of the bundle.
        data: DATA.
        reference: Model file or bundle to compare with; empty for none.
        arch: Architecture, when the reference holds weights only.
        gates: To judge.
        threads: 0 takes the bundle's recorded number.
        skip_bad: Leave out samples that cannot be read or hold NaN, and list them in the report.
        metrics: ``FILE.py:FUNCTION`` of every metric of the user's.
        timeout_s: Seconds that one answer of the runtime may take; None waits for ever.
    """

    bundle: Path
    data: str
    reference: str = ""
    arch: str | None = None
    gates: tuple[Gate, ...] = ()
    threads: int = 0
    skip_bad: bool = False
    metrics: tuple[str, ...] = ()
    timeout_s: float | None = None

    def __post_init__(self) -> None:
        """A path given as text becomes one."""
        object.__setattr__(self, "bundle", Path(self.bundle))


def validate(config: ValidateConfig, *, reporter: Reporter | None = None) -> Report:
    """Measure a bundle on samples and add the report to ``measured/``.

    Raises:
        VlexportError: VLX02xx for the data and the metrics, VLX06xx for the bundle.
    """
    reporter = reporter or Silent()
    bundle = read_bundle(config.bundle)
    require_data(config.data)
    require_reference(config.reference, config.arch)
    metrics = open_metrics(config.metrics)
    check_files(config.bundle, bundle)
    require_writable(config.bundle)
    component = bundle.main
    target = open_target(bundle.target)
    dataset = open_data(
        config.data, inputs=component.artifact.inputs, preprocess=component.preprocess,
        labels=component.labels or None, skip_bad=config.skip_bad,
    )  # fmt: skip
    require_measured(config.gates, dataset, referenced=bool(config.reference))
    place = config.bundle / ARTIFACT_FOLDER
    opened = target.open(place, component.artifact, threads=config.threads, timeout_s=config.timeout_s)
    recipe = read_recipe(config.bundle / RECIPE_FILE) if config.reference else None
    with opened as session, open_reference(config.reference, bundle, arch=config.arch, recipe=recipe) as reference:
        found = measure_accuracy(session, dataset, component, reference=reference, metrics=metrics, reporter=reporter)
        emulator = target.probe().emulator if session.timing == "emulated" else ""
    report = new_report(bundle).model_copy(update={**found, "emulator": emulator})
    if reference is not None:
        notes = (*report.notes, *reference.notes)
        report = report.model_copy(update={"reference": reference.name, "notes": notes})
    report = judge_gates(report, config.gates)
    write_report(config.bundle, bundle, report)
    return report


@dataclass
class _Tally:
    """All that is counted while samples stream by."""

    fidelity: Fidelity = field(default_factory=Fidelity)
    ours: Accuracy = field(default_factory=Accuracy)
    theirs: Accuracy = field(default_factory=Accuracy)
    paired: PairedAccuracy = field(default_factory=PairedAccuracy)
    classes: Counter[int] = field(default_factory=Counter)
    width: int = 0  # scores of the first output
    disagreements: list[Disagreement] = field(default_factory=list)
    metrics: tuple[MetricTally, ...] = ()
    samples: int = 0
    seen_before: int = 0


def measure_accuracy(
    session: Session,
    dataset: Dataset,
    component: Component,
    *,
    reference: Run | Reference | None,
    reporter: Reporter,
    metrics: Sequence[UserMetric] = (),
    calibrated_on: Container[str] = frozenset(),
) -> dict[str, Any]:
    """Stream samples through the session, and through the reference where there is one.

    Args:
        session: The artifact.
        dataset: Samples without batch dim.
        component: Its specs.
        reference: Computes the same outputs; None for accuracy alone.
        reporter: Progress.
        metrics: The user's own.
        calibrated_on: Content hashes of the calibration samples; those that come up again are counted in a note.

    Returns:
        Fields of a :class:`Report`.

    Raises:
        DataError: VLX0202 when no sample is left, VLX0210 when there is neither a label nor a reference nor a metric.
    """
    if reference is None and not dataset.labelled and not metrics:
        raise DataError(
            "VLX0210", "the samples have no labels and there is no reference to compare with", where="--data",
            hint="give labelled samples, or --reference MODEL",
        )  # fmt: skip
    output = component.artifact.outputs[0].name
    tally = _Tally(metrics=tuple(map(MetricTally, metrics)))
    with reporter.steps("validate", len(dataset)) as advance:
        for batch, rows in _batches(dataset, component.artifact.inputs):
            inputs = _stacked(batch, component.artifact.inputs)
            ours = _rows(session.run(inputs), rows, len(batch))
            theirs = _rows(reference(inputs), rows, len(batch)) if reference is not None else None
            _count(tally, batch[:rows], ours, theirs, output)
            if calibrated_on:
                tally.seen_before += sum(sample.content_hash() in calibrated_on for sample in batch[:rows])
            for _ in range(rows):
                advance()
    if not tally.samples:
        bad = f"all {len(dataset.skipped)} samples are bad" if dataset.skipped else "the data holds no sample"
        raise DataError("VLX0202", bad, where="--data")
    accuracy = _accuracy(tally, reference is not None) if tally.ours.samples else None
    found = tuple(each.result() for each in tally.metrics)
    skipped = [skipped_phrase(dataset)] if dataset.skipped else []
    notes = [*skipped, *_overlap(tally), *_few(found), *_guessing(accuracy, tally)]
    return {
        "samples": tally.samples,
        "accuracy": accuracy,
        "fidelity": tally.fidelity.result(),
        "metrics": found,
        "skipped": len(dataset.skipped),
        "bad_samples": tuple(_bad_samples(dataset)),
        "measured": (*_measured(tally, accuracy, output), *(m for each in found for m in measured_metric(each))),
        "disagreements": tuple(tally.disagreements[:_MAX_LISTED]),
        "notes": tuple(notes),
    }


def judge_gates(report: Report, gates: Sequence[Gate]) -> Report:
    """The report with its verdicts, and the figures of size and latency among what was measured."""
    figures = list(report.measured)
    figures.append(Measured(metric="size_mb", value=report.size_bytes / 1e6, unit="MB"))
    if report.latency is not None:
        figures += _regress(report.latency)
        figures.append(Measured(metric="p50_ms", value=report.latency.p50_ms, unit="ms"))
        figures.append(Measured(metric="load_ms", value=report.latency.load_ms, unit="ms"))
    verdicts = tuple(judge(gate, figures) for gate in gates)
    return report.model_copy(update={"verdicts": verdicts, "measured": tuple(figures)})


def _regress(found: LatencyResult) -> list[Measured]:
    """Against a baseline only, and never on quick rounds, which have no interval."""
    if found.baseline_p50_ms is None or found.verdict == "quick":
        return []
    if found.ratio is None or found.ratio_low is None or found.ratio_high is None:
        return [measured_regress(found.baseline_p50_ms / found.p50_ms, None)]
    return [measured_regress(found.ratio, (found.ratio_low, found.ratio_high))]


def _batches(dataset: Dataset, inputs: Sequence[TensorSpec]) -> Iterator[tuple[list[Sample], int]]:
    """Batches as large as a fixed batch dim asks for (else 1), the last one filled up with its last sample."""
    fixed = next((s.shape[0] for s in inputs if s.shape and isinstance(s.shape[0], int)), 1)
    size = int(fixed)
    batch: list[Sample] = []
    for sample in dataset:
        batch.append(sample)
        if len(batch) == size:
            yield batch, size
            batch = []
    if batch:
        yield batch + [batch[-1]] * (size - len(batch)), len(batch)


def _stacked(batch: Sequence[Sample], inputs: Sequence[TensorSpec]) -> dict[str, Array]:
    return {spec.name: np.stack([sample.inputs[spec.name] for sample in batch]) for spec in inputs}


def _rows(outputs: Mapping[str, Array], rows: int, batch: int) -> dict[str, Array]:
    """Outputs by sample; one whose dim 0 is not the batch belongs to every sample of it, whole."""
    return {
        name: value[:rows] if value.ndim and value.shape[0] == batch else np.stack([value] * rows)
        for name, value in outputs.items()
    }


def _count(
    tally: _Tally, batch: Sequence[Sample], ours: Mapping[str, Array], theirs: Mapping[str, Array] | None, output: str
) -> None:
    tally.samples += len(batch)
    scores = ours[output]
    for row, sample in enumerate(batch):
        for metric in tally.metrics:
            metric.add(sample, _row(ours, row), None if theirs is None else _row(theirs, row))
    labels = _labels(batch, scores, required=not tally.metrics)
    if labels is not None:
        tally.ours.update(scores, labels)
        tally.classes.update(labels.tolist())
        tally.width = scores.shape[1]
    if theirs is None:
        return
    tally.fidelity.update(ours, theirs)
    if labels is not None:
        tally.theirs.update(theirs[output], labels)
        tally.paired.update(scores, theirs[output], labels)
    if scores.ndim == 2 and scores.shape[1] > 1:
        for sample, mine, reference in zip(batch, scores, theirs[output], strict=True):
            first, best = int(np.argmax(mine)), int(np.argmax(reference))
            if first != best:
                margin = _margin(reference)
                tally.disagreements.append(
                    Disagreement(
                        sample=_unicode(sample.id),
                        reference=best,
                        ours=first,
                        margin=margin,
                        close=margin <= CLOSE_MARGIN,
                    )
                )


def _row(outputs: Mapping[str, Array], row: int) -> dict[str, Array]:
    return {name: np.asarray(value[row]) for name, value in outputs.items()}


def _unicode(name: str) -> str:
    """A file name that is no Unicode, as Linux allows, in a spelling that JSON and HTML can hold."""
    return name.encode("utf-8", "backslashreplace").decode()


def _labels(batch: Sequence[Sample], scores: Array, *, required: bool) -> Array | None:
    """Class indices, or None where there are none; labels of other kinds are left to the user's metrics."""
    if batch[0].label is None:
        return None
    if scores.ndim == 2 and all(isinstance(sample.label, int) for sample in batch):
        return np.asarray([sample.label for sample in batch])
    if not required:
        return None
    raise DataError(
        "VLX0208", "built-in accuracy needs one class index a sample and one score vector as first output",
        where=batch[0].id,
        hint="give --metric FILE.py:FUNCTION, or leave the labels out to compare with a reference only",
    )  # fmt: skip


def _margin(scores: Array) -> float:
    ordered = np.sort(np.asarray(scores, np.float64))
    scale = float(np.abs(ordered).max())
    return float(ordered[-1] - ordered[-2]) / scale if scale else 0.0


def _accuracy(tally: _Tally, referenced: bool) -> AccuracyResult:
    ours, theirs = tally.ours, tally.theirs
    n = ours.samples
    low, high = clopper_pearson(ours.top1, n)
    wide = tally.width >= _TOP5_FROM
    result = AccuracyResult(
        samples=n,
        top1=100 * ours.top1 / n,
        top1_low=100 * low,
        top1_high=100 * high,
        top5=100 * ours.top5 / n if wide else None,
        majority=100 * max(tally.classes.values()) / n,
    )
    if not referenced:
        return result
    drop = measured_drop(tally.paired.only_reference, tally.paired.only_ours, n)
    return result.model_copy(
        update={
            "reference_top1": 100 * theirs.top1 / n,
            "reference_top5": 100 * theirs.top5 / n if wide else None,
            "drop": drop.value,
            "drop_low": drop.low,
            "drop_high": drop.high,
        }
    )


def _measured(tally: _Tally, accuracy: AccuracyResult | None, output: str) -> Iterator[Measured]:
    if accuracy is not None:
        yield measured_rate("top1", tally.ours.top1, tally.ours.samples)
        if accuracy.top5 is not None:
            yield measured_rate("top5", tally.ours.top5, tally.ours.samples)
        if accuracy.drop is not None:
            yield measured_drop(tally.paired.only_reference, tally.paired.only_ours, tally.paired.samples)
    fidelity: OutputFidelity | None = tally.fidelity.result().get(output)
    if fidelity is None:
        return
    yield Measured(metric="cosine", value=fidelity.cosine_mean, samples=fidelity.samples)
    yield Measured(metric="sqnr", value=fidelity.sqnr_db, samples=fidelity.samples, unit="dB")
    if fidelity.agreements is not None:
        yield measured_rate("agreement", fidelity.agreements, fidelity.samples)


def _bad_samples(dataset: Dataset) -> Iterator[BadSample]:
    for name, error in list(dataset.skipped.items())[:_MAX_LISTED]:
        yield BadSample(sample=_unicode(name), code=error.code, reason=_unicode(error.message))


def skipped_phrase(dataset: Dataset, what: str = "samples") -> str:
    """How many samples were left out because they are bad, and the first three of them."""
    names = [_unicode(name) for name in dataset.skipped]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{len(names)} of {len(dataset)} {what} are bad and were skipped: {', '.join(names[:3])}{more}"


def _overlap(tally: _Tally) -> Iterator[str]:
    if tally.seen_before:
        yield (
            f"{tally.seen_before} of {tally.samples} evaluation samples are calibration samples as well: "
            "what is measured on them flatters"
        )


def _few(found: Sequence[MetricResult]) -> Iterator[str]:
    for each in found:
        if each.samples < _ENOUGH_FOR_NORMAL:
            yield f"{each.name}: {each.samples} samples are few for a normal interval, which is then too narrow"
        elif each.low == each.high:
            yield f"{each.name} is the same for all {each.samples} samples: its normal interval has no width"


def _guessing(accuracy: AccuracyResult | None, tally: _Tally) -> list[str]:
    """Warn when the float reference is hardly better than always answering the commonest class; stop at chance.

    Raises:
        DataError: VLX0211 when it is not above one in as many as the model has classes either.
    """
    if accuracy is None:
        return []
    counted = tally.theirs if tally.theirs.samples else tally.ours
    who = "the reference" if tally.theirs.samples else "the artifact"
    low, _ = clopper_pearson(counted.top1, counted.samples)
    top1 = 100 * counted.top1 / counted.samples
    classes = max(tally.width, 2)
    said = f"{who} is right on {top1:.1f} % of {counted.samples}"
    if counted.top1 * classes <= counted.samples and counted.samples >= 10 * classes:
        raise DataError(
            "VLX0211", f"{said}, no better than guessing among {classes} classes", where="--data",
            hint="check the preprocessing (mean, std, range, RGB or BGR, crop) and the order of labels; "
            f"{_OFFER}, on a bundle that was built without --data",
        )  # fmt: skip
    if 100 * low <= accuracy.majority:
        return [
            f"{said}, not clearly above the commonest class ({accuracy.majority:.1f} %): "
            f"check preprocessing and label order; {_OFFER}"
        ]
    return []


def require_measured(gates: Sequence[Gate], dataset: Dataset, *, referenced: bool) -> None:
    """Refuse gates on what a run will not measure, before it.

    Raises:
        UsageError: VLX0804.
    """
    for gate in gates:
        lacks = _lacks(gate.metric, labelled=dataset.labelled, referenced=referenced)
        if lacks:
            raise UsageError("VLX0804", f"gate {gate} needs {lacks[0]}", where=f"--gate {gate}", hint=lacks[1])


def _lacks(metric: str, *, labelled: bool, referenced: bool) -> tuple[str, str] | None:
    if metric in TIMED:
        return "a latency, which validate does not measure", "give it to `vlexport profile`"
    if metric.endswith(CHANGE) and not referenced:
        return "a reference to compare with", "add --reference MODEL"
    if metric in ("drop", "top1", "top5") and not labelled:
        without = '; without labels, --gate "agreement>=99" compares answers' if metric == "drop" else ""
        return "labelled samples", f"give class folders, or .npz with `label`{without}"
    if metric in ("drop", "agreement", "cosine", "sqnr") and not referenced:
        return "a reference to compare with", "add --reference MODEL"
    return None
