"""What lies in a bundle and in its reports, as typed data. Schema v1; no torch.

Readers accept earlier versions and refuse later ones in words. ``artifact/``, ``golden/``, ``bundle.json`` and the
recipe hold no time, host, path or measurement; measurements live in ``measured/``.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from vlexport.core.account import Account
from vlexport.core.artifact import Artifact, DimRange, Frozen, Signature, TensorSpec
from vlexport.core.numerics import OutputFidelity
from vlexport.core.operators import Operators
from vlexport.core.preprocess import Preprocess
from vlexport.core.trials import SearchRecord, Trial, Tuning
from vlexport.core.verdict import Measured, Verdict

BUNDLE_SCHEMA = 1
REPORT_SCHEMA = 1
Proof = Literal["identical", "float32", "float64", "unproved", "off", "statistic"]
StatisticName = Literal["sqnr_db", "cosine", "max_relative"]


class Change(Frozen):
    """What one application of a pass did.

    Attributes:
        what: One phrase (``batch norm folded into conv2d``).
        where: Module paths concerned.
        saved_nodes: Calls fewer than before.
        saved_parameters: Tensor elements fewer than before.
        saved_macs: Multiply-accumulates fewer than before.
    """

    what: str
    where: tuple[str, ...] = ()
    saved_nodes: int = 0
    saved_parameters: int = 0
    saved_macs: int = 0


class ChangeSummary(Frozen):
    """All changes of one pass with the same ``what``."""

    what: str
    count: int
    where: tuple[str, ...]
    saved_nodes: int
    saved_parameters: int
    saved_macs: int


class NearMissRecord(Frozen):
    """A place where a pass nearly applied: pattern, node (operator, module path, source line) and the reason."""

    pattern: str
    node: str
    reason: str


class GateRecord(Frozen):
    """The numeric gate's finding after one pass.

    Attributes:
        worst: Largest ``max|a−b| / max|b|`` over outputs and probes, rounded to one digit.
        proof: ``identical`` (nothing changed), ``float32`` (within the bound), ``float64`` (above it, and proven to be
            rounding in float64), ``unproved`` (above it, model too large for the float64 run), ``off``, ``statistic``
            (an approximate pass kept the bound that it declares).
        probes: Number of probes compared.
        set_aside: Rows that disagree only because a selection in them hangs on rounding, and do not count.
        statistic: What an approximate pass is judged by: ``sqnr_db``, ``cosine`` or ``max_relative``.
        value: The worst floating output's statistic, rounded towards the worse; None where there is none.
        bound: What the pass promises of it.
        agreement: Least share of equal elements of an integer or boolean output; None where there is none.
    """

    worst: float
    proof: Proof
    probes: int
    set_aside: int = 0
    statistic: StatisticName | None = None
    value: float | None = None
    bound: float | None = None
    agreement: float | None = None


class PassRecord(Frozen):
    """One pass of a build."""

    name: str
    stage: str
    effect: str
    options: dict[str, Any]
    changes: tuple[ChangeSummary, ...]
    near_misses: tuple[NearMissRecord, ...]
    gate: GateRecord


class CostRecord(Frozen):
    """MACs with dims at their opt, parameters and bytes of the lowered graph; ``opaque`` ops count nothing."""

    macs: int
    parameters: int
    size_bytes: int
    opaque: tuple[str, ...] = ()


class Golden(Frozen):
    """Golden vectors of one component: relative file names and the bound for ``max|a−b| / max|b|``.

    Attributes:
        inputs: File.
        outputs: File.
        tolerance: The bound.
        tipping: Rows (dim 0) in which the program itself chooses other tokens, or moves far in integers, once the last
            digits of the inputs move. It is left out of the JSON where there are none.
        tipping_tolerance: The bound for these: what the program's outputs moved by then, and as much again.
    """

    inputs: str
    outputs: str
    tolerance: float
    tipping: tuple[int, ...] = ()
    tipping_tolerance: float = 0.0

    @model_serializer(mode="wrap")
    def _without_unused(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = plain(self)
        return {k: v for k, v in values.items() if self.tipping or not k.startswith("tipping")}


class Component(Frozen):
    """One graph of a bundle.

    Attributes:
        artifact: What the target made; its path is relative to ``artifact/``, or to the component's folder in it where
            there are several.
        dims: Ranges of the dynamic dims.
        preprocess: Input name → how an image becomes that input.
        labels: Class names by index of the first output, if known.
        golden: Its golden vectors, every dynamic dim two above its smallest size where its range allows: a size that
            capture does not trace with.
        golden_smallest: Golden vectors at the smallest sizes; None where no dim is dynamic.
        passes: What was done to the graph, in order.
        cost: What one run costs.
        account: Expected modules against found operators; left out of the JSON where there are none.
        operators: What the graph consists of, before and after the passes; bundles of earlier versions have none.
    """

    artifact: Artifact
    dims: dict[str, DimRange]
    preprocess: dict[str, Preprocess]
    labels: tuple[str, ...]
    golden: Golden
    golden_smallest: Golden | None = None
    passes: tuple[PassRecord, ...]
    cost: CostRecord
    account: tuple[Account, ...] = ()
    operators: Operators | None = None

    @model_serializer(mode="wrap")
    def _without_unknown(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A graph without such modules has no account; one that nobody counted, no operators."""
        values: dict[str, Any] = plain(self)
        return {k: v for k, v in values.items() if v or k not in ("account", "operators")}


class FileRecord(Frozen):
    """Content of one file of the bundle."""

    sha256: str
    size_bytes: int


class Bundle(Frozen):
    """``bundle.json``.

    Attributes:
        schema_version: Version of this schema.
        vlexport: Version of the tool that wrote it.
        state: ``built``, or ``verified`` when the golden check passed on the machine that built it.
        target: Id of the target.
        precision: Precision of the artifact.
        source_hash: SHA-256 of the model file's content; never its path.
        components: Name → graph; a single one is called ``main``.
        edges: ``(component.output, component.input)`` pairs.
        golden: Golden vectors of all components together, where there are several; left out of the JSON otherwise.
        golden_smallest: The same at the smallest sizes.
        tools: Versions of what took part.
        instruction_set: What the building machine's processor offers; results may differ slightly on another.
        compatibility: Facts that a device can be checked against before it opens the artifact.
        files: Path inside the bundle → content, for everything the promise of identical bytes covers.
        digest: SHA-256 of this object's canonical JSON without this field. Detects accident, not an attacker.
    """

    schema_version: int = BUNDLE_SCHEMA
    vlexport: str
    state: Literal["built", "verified"]
    target: str
    precision: str
    device_profile: str
    source_hash: str
    components: dict[str, Component]
    edges: tuple[tuple[str, str], ...] = ()
    golden: Golden | None = None
    golden_smallest: Golden | None = None
    tools: dict[str, str]
    instruction_set: tuple[str, ...]
    compatibility: dict[str, str]
    files: dict[str, FileRecord]
    digest: str = ""

    @property
    def main(self) -> Component:
        """The single component, or all of them wired together as one."""
        from vlexport.core.whole import whole_component

        return whole_component(self)

    @model_serializer(mode="wrap")
    def _without_unused(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What only bundles of several components have is not written for the others."""
        values: dict[str, Any] = plain(self)
        return {k: v for k, v in values.items() if v is not None or k not in ("golden", "golden_smallest")}

    def signature(self) -> Signature:
        """Inputs, outputs and dims of the whole."""
        main = self.main
        return Signature(inputs=main.artifact.inputs, outputs=main.artifact.outputs, dims=main.dims)


class Machine(Frozen):
    """Where something was measured; ``memory_pages`` as :mod:`vlexport.core.huge_pages` tells. No host or user name."""

    cpu: str
    instruction_set: tuple[str, ...]
    cores: int
    system: str
    python: str
    memory_pages: str = ""


class AccuracyResult(Frozen):
    """Accuracy on labelled samples, percent and percentage points, with 95 % intervals.

    Attributes:
        samples: Number of samples.
        top1: Top-1 accuracy with its exact (Clopper-Pearson) interval.
        top5: Top-5 accuracy; None with five classes or fewer.
        reference_top1: The reference's, where there is one.
        drop: Reference minus ours, paired, with Tango's score interval.
        majority: Share of the commonest class.
    """

    samples: int
    top1: float
    top1_low: float
    top1_high: float
    top5: float | None = None
    reference_top1: float | None = None
    reference_top5: float | None = None
    drop: float | None = None
    drop_low: float | None = None
    drop_high: float | None = None
    majority: float = 0.0


class Disagreement(Frozen):
    """A sample whose top-1 differs from the reference's.

    Attributes:
        sample: Its id.
        reference: The reference's class index.
        ours: Ours.
        margin: Reference's best score minus its second, over its largest absolute score.
        close: The margin is within 10 × the golden tolerance: rounding may decide it.
    """

    sample: str
    reference: int
    ours: int
    margin: float
    close: bool


class MetricResult(Frozen):
    """A metric of the user's: the mean over samples of what his function returned, each with its 95 % interval.

    Attributes:
        name: Name of the function.
        samples: Number of samples.
        value: Mean of ours.
        low: Lower bound of the normal interval over samples; infinite for one sample.
        high: Upper bound.
        reference: Mean of the reference's, where there is one.
        change: Ours minus the reference's, paired by sample.
        change_low: Lower bound of its normal interval.
        change_high: Upper bound.
    """

    name: str
    samples: int
    value: float
    low: float
    high: float
    reference: float | None = None
    change: float | None = None
    change_low: float | None = None
    change_high: float | None = None


class BadSample(Frozen):
    """A sample that was left out: its id, the code of its error and what is wrong with it."""

    sample: str
    code: str
    reason: str


class OperatorTime(Frozen):
    """What the runtime's own profiler says of one kind of operator, as it runs them.

    Attributes:
        operator: As the runtime calls it, behind its own fusions.
        count: How many there are in one run.
        ms: Milliseconds of all of them together in one run, measured apart from the latency.
    """

    operator: str
    count: int
    ms: float


class Ceiling(Frozen):
    """How fast a plain product of matrices ran in the same runtime, with the same threads.

    Attributes:
        kind: ``fp32`` or ``int8``.
        gops: Billions of multiplications and additions a second.
    """

    kind: str
    gops: float


class LatencyResult(Frozen):
    """Latency of one artifact, and against a baseline where one was given.

    Attributes:
        p50_ms: Median over all runs of rounds that held, at ``batch`` samples a run (opt dims), milliseconds.
        p90_ms: The time that nine runs of ten stay within; None with fewer than 20 runs.
        p99_ms: The same for 99 of 100; None with fewer than 200 runs.
        load_ms: First opening in a fresh process, milliseconds, without importing the runtime.
        cold_load_ms: The same with importing it.
        warm_load_ms: Opening a second time in the same process.
        peak_memory_bytes: The most memory that the process held at once up to the last run at ``batch``, with
            interpreter and runtime; None where this system does not tell.
        batch: Samples a run.
        throughput: Samples a second at ``batch``, from the mean of the same runs.
        large_batch: The batch that was asked for beside it.
        large_batch_p50_ms: Median of a run at it, measured alone, after the rounds.
        large_batch_throughput: Samples a second at it.
        baseline_p50_ms: Median of the baseline's runs.
        ratio: Median over rounds of baseline p50 / our p50; above 1 is faster.
        ratio_low: Lower bound of the ratio's 95 % interval (of its range, where there are too few rounds for one).
        rounds: Rounds whose control held.
        repeated: Rounds thrown away because the baseline drifted by more than 5 %.
        verdict: ``faster``, ``slower``, ``no difference shown``, ``too noisy to tell``, ``quick`` (too few rounds for
            an interval) or ``alone`` (nothing to compare with).
        operators: Where the time goes, the longest first; empty where the runtime does not tell, or nobody asked.
        baseline_operators: The same of the baseline.
        gops: Billions of multiplications and additions a second at ``p50_ms``, as the bundle's cost counts them; None
            where nobody asked.
        ceilings: What plain products reach on the same machine; empty where nobody asked, or there is nothing to
            measure.
    """

    p50_ms: float
    load_ms: float
    runs: int
    threads: int
    baseline: str = ""
    baseline_p50_ms: float | None = None
    baseline_load_ms: float | None = None
    baseline_size_bytes: int | None = None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    rounds: int = 0
    repeated: int = 0
    verdict: str = "alone"
    p90_ms: float | None = None
    p99_ms: float | None = None
    cold_load_ms: float | None = None
    warm_load_ms: float | None = None
    peak_memory_bytes: int | None = None
    batch: int = 1
    throughput: float | None = None
    large_batch: int | None = None
    large_batch_p50_ms: float | None = None
    large_batch_throughput: float | None = None
    operators: tuple[OperatorTime, ...] = ()
    baseline_operators: tuple[OperatorTime, ...] = ()
    gops: float | None = None
    ceilings: tuple[Ceiling, ...] = ()


class Report(Frozen):
    """``report.json``: what was measured on one machine, on one day.

    Attributes:
        reference: What the artifact was compared with (``source program``, ``model``, a bundle's digest) or empty.
        notes: What the reader should know.
        disagreements: Samples whose top-1 differs from the reference's, at most 100.
        metrics: What the user's own metrics gave.
        skipped: Samples that were left out because they are bad.
        bad_samples: The first 100 of them.
        tuning: What a search over options of opening the artifact tried and decided, where there was one.
        searches: The same of those that decided what the artifact is.
        emulator: What ran the artifact in place of the target's own runtime; empty where that did, or nothing did.
    """

    schema_version: int = REPORT_SCHEMA
    vlexport: str
    date: str
    bundle_digest: str
    target: str
    precision: str
    machine: Machine
    emulator: str = ""
    size_bytes: int
    cost: CostRecord
    reference: str = ""
    samples: int = 0
    accuracy: AccuracyResult | None = None
    fidelity: dict[str, OutputFidelity] = Field(default_factory=dict)
    metrics: tuple[MetricResult, ...] = ()
    skipped: int = 0
    bad_samples: tuple[BadSample, ...] = ()
    measured: tuple[Measured, ...] = ()
    disagreements: tuple[Disagreement, ...] = ()
    latency: LatencyResult | None = None
    tuning: Tuning | None = None
    searches: tuple[SearchRecord, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    passes: tuple[PassRecord, ...] = ()
    stage_seconds: dict[str, float] = Field(default_factory=dict)
    notes: tuple[str, ...] = ()


def plain_json(value: Frozen) -> Any:
    """Typed data as strict JSON values; infinities and NaN become strings."""
    return json.loads(value.model_dump_json())


def canonical_json(value: Any) -> str:
    """The one spelling of a JSON value: sorted keys, no spaces, no NaN, a final newline is not part of it."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest_of(bundle: Bundle) -> str:
    """SHA-256 of the canonical JSON without the ``digest`` field."""
    payload = {key: value for key, value in plain_json(bundle).items() if key != "digest"}
    return hashlib.sha256(canonical_json(payload).encode()).hexdigest()


__all__ = [
    "AccuracyResult",
    "Artifact",
    "BadSample",
    "Bundle",
    "Change",
    "ChangeSummary",
    "Component",
    "CostRecord",
    "FileRecord",
    "GateRecord",
    "Golden",
    "LatencyResult",
    "Machine",
    "MetricResult",
    "NearMissRecord",
    "OutputFidelity",
    "PassRecord",
    "Proof",
    "Report",
    "SearchRecord",
    "TensorSpec",
    "Trial",
    "Tuning",
    "canonical_json",
    "digest_of",
    "plain_json",
]
