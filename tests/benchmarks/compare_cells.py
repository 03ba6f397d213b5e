"""One cell of the comparison, a model built in one way: built, judged and timed, each once, kept as JSON.

Every result lies beside the artifact under a key of all that decides it, so that an interrupted run goes on where it
was, and nothing old is taken for new. What fails is kept too, as the line that says why.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import onnxruntime

from tests.benchmarks.compare_rows import Row
from tests.benchmarks.peers import SCRIPTS, Environment, Peer, PeerError, PeerSession, installed, last_line
from vlexport.core.code_identity import code_digest
from vlexport.core.devices import this_machine
from vlexport.core.numerics import cosine, sqnr_db
from vlexport.core.progress import Reporter
from vlexport.stages.profile import Plan, interleaved
from vlexport.targets.onnx.operator_times import operator_times

_OWN = ("vlexport", "vlexport.passes", "vlexport.targets", "vlexport.calibration")
MODEL = "model.onnx"
"""As peers of ONNX Runtime call it."""
_PRODUCTS = ("Gemm", "MatMul", "FusedMatMul", "FusedGemm", "Conv", "FusedConv")
_PROFILED_RUNS = 20


@dataclass(frozen=True)
class Built:
    """How an artifact was made.

    Attributes:
        seconds: Of the build, without starting the interpreter.
        peak_bytes: Most resident memory of the process that built it.
        size_bytes: Of all files of the artifact.
        versions: Package → version.
        load: Processes that wanted to run when the build ended, itself included; None is unknown.
    """

    seconds: float
    peak_bytes: int | None
    size_bytes: int
    versions: dict[str, str]
    load: float | None = None


@dataclass(frozen=True)
class Judged:
    """What an artifact gives, beside what the plain export gives.

    Attributes:
        samples: How many.
        sqnr_db: Signal to noise of all outputs together; None without noise.
        cosine: Mean over samples.
        agreements: Samples with the same class, or for an embedding with the same nearest other sample.
        right: Samples with the right class; None without labels.
        plain_only: Right in the plain export only; ``this_only``: right here only.
    """

    samples: int
    sqnr_db: float | None
    cosine: float
    agreements: int
    right: int | None
    plain_only: int | None
    this_only: int | None


@dataclass(frozen=True)
class Timed:
    """Latency against the plain export, both alone in their processes, interleaved.

    Attributes:
        p50_ms: Median of one batch.
        plain_ms: The plain export's, in the same rounds.
        ratio: plain / this, the median over rounds; None where the machine was too noisy to tell.
        low: Lower end of its 95 % interval; ``high`` the upper.
        rounds: Whose control held; ``repeated`` were thrown away.
        load_ms: Of opening it the first time, the runtime's import included.
        peak_bytes: Most resident memory of the process that ran it.
    """

    p50_ms: float
    plain_ms: float
    ratio: float | None
    low: float | None
    high: float | None
    rounds: int
    repeated: int
    load_ms: float
    peak_bytes: int | None


@dataclass(frozen=True)
class Fused:
    """Modules of one kind, as the bundle's account has them.

    Attributes:
        idea: attention, norm, activation; or fused attention, in the runtime's own operators.
        expected: How many of the model's modules promise to become one operator.
        found: How many did.
        reasons: Why the others did not, each once.
    """

    idea: str
    expected: int
    found: int
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Headroom:
    """What an artifact's own operators leave to be gained.

    Attributes:
        outside: Share of its time outside products and convolutions, as ONNX Runtime's profiler tells it.
    """

    outside: float


Result = TypeVar("Result", Built, Judged, Timed, Headroom)


@dataclass(frozen=True)
class Place:
    """Where cells lie.

    Attributes:
        scratch: Folder of models, environments and artifacts.
        retry: Try again what failed before.
        scripts: Folder of the peers' scripts.
    """

    scratch: Path
    retry: bool = False
    scripts: Path = SCRIPTS

    def folder(self, model: str, row: Row) -> Path:
        """Of one cell."""
        return self.scratch / "cells" / model / row.name

    def is_built(self, model: str, row: Row) -> bool:
        """Whether a row was tried before."""
        return (self.folder(model, row) / "built.json").is_file()

    def environment(self, row: Row) -> Environment:
        """The peer's."""
        return Environment(row.environment, self.scripts)

    def peer(self, row: Row, threads: int = 0) -> Peer:
        """Its process, started.

        Raises:
            PeerError: It cannot be installed.
        """
        environment = self.environment(row)
        return Peer(environment, installed(environment, self.scratch / "venvs", retry=self.retry), threads=threads)

    @contextmanager
    def opened(self, model: str, row: Row, threads: int) -> Iterator[PeerSession]:
        """A cell's artifact, open in a process of its own.

        Raises:
            PeerError: It cannot be opened.
        """
        with self.peer(row, threads) as peer:
            yield PeerSession(peer, row.recipe, self.folder(model, row) / "artifact", threads=threads)


def build_key(place: Place, row: Row, source: Path) -> str:
    """Of all that decides an artifact."""
    code = [code_digest(each) for each in _OWN] if row.ours else []
    return _key(place.environment(row).digest(), row.recipe, _digest(source, "built_from"), *code)


def _digest(source: Path, what: str) -> str:
    found: str = json.loads((source / "model.json").read_text(encoding="utf-8"))[what]
    return found


def build(place: Place, row: Row, source: Path) -> Built:
    """The artifact of a row, made once.

    Args:
        place: Where.
        row: How.
        source: The prepared model's folder, which bears its name.

    Raises:
        PeerError: It cannot be made.
    """
    folder = place.folder(source.name, row)
    key = build_key(place, row, source)

    def make() -> Built:
        with place.peer(row) as peer:
            shutil.rmtree(folder / "artifact", ignore_errors=True)
            (folder / "artifact").mkdir(parents=True)
            reply = peer.ask(do="build", recipe=row.recipe, source=str(source), output=str(folder / "artifact"))
            versions = peer.ask(do="versions")["versions"]
        size = sum(f.stat().st_size for f in (folder / "artifact").rglob("*") if f.is_file())
        return Built(reply["seconds"], reply["peak_bytes"], size, versions, round(os.getloadavg()[0], 1))

    return _once(folder / "built.json", key, Built, make, retry=place.retry)


def fused(place: Place, row: Row, source: Path) -> tuple[Fused, ...]:
    """What the bundle of a row says of the model's modules; nothing of a row that is not ours."""
    if not row.ours:
        return ()
    bundle = json.loads((place.folder(source.name, row) / "artifact/bundle/bundle.json").read_text(encoding="utf-8"))
    return tuple(
        Fused(each["idea"], each["expected"], each["found"], tuple(dict.fromkeys(m["reason"] for m in each["missing"])))
        for part in bundle["components"].values()
        for each in part["account"]
    )


def judge(place: Place, row: Row, source: Path, *, embedding: bool, plain: Row, threads: int) -> Judged:
    """The outputs of all samples, beside those of the plain export.

    Raises:
        PeerError: It does not run.
    """
    outputs = _outputs(place, row, source, threads)
    reference = _outputs(place, plain, source, threads)
    key = _key(hashlib.sha256(outputs.tobytes()).hexdigest(), hashlib.sha256(reference.tobytes()).hexdigest())
    labels = np.load(source / "labels.npy") if (source / "labels.npy").is_file() else None
    file = place.folder(source.name, row) / "judged.json"
    return _once(file, key, Judged, lambda: compared(outputs, reference, labels, embedding=embedding), retry=False)


def _outputs(place: Place, row: Row, source: Path, threads: int) -> np.ndarray:
    """First outputs ``(N, ...)``, kept under the key of the artifact and of this machine's instruction set."""
    key = _key(build_key(place, row, source), _digest(source, "judged_on"), *this_machine().instruction_set)
    folder = place.folder(source.name, row)
    file = folder / f"outputs-{key[:16]}.npy"
    if not file.is_file():
        with place.opened(source.name, row, threads) as session:
            found = session.run_all(source / "samples.npz")
        for old in folder.glob("outputs-*.npy"):
            old.unlink()
        part = folder / "outputs.part.npy"
        np.save(part, found)
        part.replace(file)
    return np.load(file, allow_pickle=False)


def compared(outputs: np.ndarray, reference: np.ndarray, labels: np.ndarray | None, *, embedding: bool) -> Judged:
    """Two sets of outputs ``(N, ...)``; the second is the reference."""
    outputs, reference = (each.reshape(len(each), -1).astype(np.float64) for each in (outputs, reference))
    if outputs.shape != reference.shape:
        raise PeerError(f"its outputs are {outputs.shape}, the plain export's {reference.shape}")
    chosen, expected = (_nearest(each) if embedding else each.argmax(1) for each in (outputs, reference))
    noise = sqnr_db(outputs, reference)
    right, expected_right = (None, None) if labels is None else (chosen == labels, expected == labels)
    return Judged(
        samples=len(outputs),
        sqnr_db=noise if np.isfinite(noise) else None,
        cosine=float(np.mean([cosine(a, b) for a, b in zip(outputs, reference, strict=True)])),
        agreements=int((chosen == expected).sum()),
        right=None if right is None else int(right.sum()),
        plain_only=None if right is None else int((expected_right & ~right).sum()),
        this_only=None if right is None else int((right & ~expected_right).sum()),
    )


def _nearest(vectors: np.ndarray) -> np.ndarray:
    """Index of the other sample with the largest cosine."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    likeness = unit @ unit.T
    np.fill_diagonal(likeness, -np.inf)
    found: np.ndarray = likeness.argmax(1)
    return found


def headroom(place: Place, row: Row, source: Path, threads: int) -> Headroom:
    """Where the time of an ONNX file goes, in a session of this process.

    Args:
        place: Where the row's artifact lies.
        row: Of ONNX Runtime, built before.
        source: The prepared model's folder.
        threads: For the session.

    Raises:
        PeerError: It was not built.
    """
    folder = place.folder(source.name, row)
    inputs = _first_batch(source)

    def make() -> Headroom:
        with tempfile.TemporaryDirectory(prefix="vlexport-peer-") as scratch:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            options.enable_profiling, options.profile_file_prefix = True, str(Path(scratch) / "trace")
            try:
                session = onnxruntime.InferenceSession(folder / "artifact" / MODEL, options)
            except Exception as error:  # onnxruntime's exceptions share no public base class
                raise PeerError(last_line(str(error))) from error
            for _ in range(_PROFILED_RUNS):
                session.run(None, inputs)
            spent = operator_times(Path(session.end_profiling()), runs=_PROFILED_RUNS)
        whole = sum(ms for _, ms in spent.values())
        return Headroom(1 - sum(ms for name, (_, ms) in spent.items() if name in _PRODUCTS) / whole)

    key = _key(build_key(place, row, source), str(threads), this_machine().model_dump_json())
    return _once(folder / "headroom.json", key, Headroom, make, retry=place.retry)


def _first_batch(source: Path) -> dict[str, np.ndarray]:
    batch = json.loads((source / "model.json").read_text(encoding="utf-8")).get("batch", 1)
    with np.load(source / "samples.npz", allow_pickle=False) as archive:
        return {name: archive[name][:batch] for name in archive.files}


def time_cell(
    place: Place, row: Row, source: Path, *, plain: Row, plan: Plan, threads: int, reporter: Reporter
) -> Timed:
    """Latency against the plain export.

    Raises:
        PeerError: It does not run.
    """
    rows = [build_key(place, each, source) for each in (row, plain)]
    key = _key(*rows, repr(plan), str(threads), this_machine().model_dump_json())
    inputs = _first_batch(source)

    def make() -> Timed:
        with place.opened(source.name, row, threads) as mine, place.opened(source.name, plain, threads) as other:
            found = interleaved(mine, other, inputs, plan, threads, reporter)
            return Timed(
                p50_ms=found.p50_ms, plain_ms=found.baseline_p50_ms or 0.0, ratio=found.ratio, low=found.ratio_low,
                high=found.ratio_high, rounds=found.rounds, repeated=found.repeated, load_ms=mine.cold_load_ms,
                peak_bytes=mine.peak_memory_bytes(),
            )  # fmt: skip

    return _once(place.folder(source.name, row) / "timed.json", key, Timed, make, retry=place.retry)


def _once(file: Path, key: str, kind: type[Result], make: Callable[[], Result], *, retry: bool) -> Result:
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if known.get("key") == key and not (known["failed"] and retry):
        if known["failed"]:
            raise PeerError(known["failed"])
        return kind(**known["found"])
    file.parent.mkdir(parents=True, exist_ok=True)
    failed, found = "", None
    try:
        found = make()
    except PeerError as error:
        failed = str(error)
    whole = {"key": key, "failed": failed, "found": None if found is None else dataclasses.asdict(found)}
    half = file.with_suffix(".part")
    half.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    half.replace(file)
    if found is None:
        raise PeerError(failed)
    return found


def _key(*parts: str | None) -> str:
    return hashlib.sha256("\0".join(str(part) for part in parts).encode()).hexdigest()
