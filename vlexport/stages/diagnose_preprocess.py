"""diagnose_preprocess: is the recorded preprocessing the one that the model was trained with? No torch.

Wrong preprocessing is the commonest false loss of accuracy. The usual ones are tried on some hundred labelled photos,
each against the recorded one on the same photos, first ranges and colour order together, then resize and crop, then
ranges again where the size was wrong. A variant that is clearly worse is given up early. Every interval is Tango's, at
a level that all variants share (Bonferroni), so that trying many does not make one of them look better by chance.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import NormalDist

import numpy as np
from PIL import Image

from vlexport.core.artifact import Array, TensorSpec
from vlexport.core.bundle import ARTIFACT_FOLDER, RECIPE_FILE, check_files, read_bundle
from vlexport.core.bundle_schema import Component
from vlexport.core.config import read_recipe
from vlexport.core.dataset import Dataset, Sample
from vlexport.core.errors import DataError
from vlexport.core.intervals import tango
from vlexport.core.preprocess import Preprocess
from vlexport.core.preprocess_diagnosis import Axis, Diagnosis, Round, Standing, Trial
from vlexport.core.preprocess_variants import Variant, variants
from vlexport.core.progress import Reporter, Silent
from vlexport.core.samples import open_data, require_data
from vlexport.frontends.named_paths import require_reference
from vlexport.stages.reference import open_reference
from vlexport.targets import open_target

Run = Callable[[Mapping[str, Array]], dict[str, Array]]
LOOKS_AT = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
"""Shares of the samples after which variants that are clearly worse are given up."""
_RAW = Preprocess(scale=1.0)
_ERROR = 0.05


@dataclass(frozen=True)
class DiagnoseConfig:
    """What to diagnose.

    Attributes:
        bundle: Folder of the bundle.
        data: DATA that yields photos, labelled.
        reference: Model file or bundle that computes instead of the artifact; empty for the artifact.
        arch: Architecture, when the reference holds weights only.
        threads: 0 takes the bundle's recorded number.
        timeout_s: Seconds that one answer of the runtime may take; None waits for ever.
        samples: About how many to use; they are drawn by a hash of their ids.
        skip_bad: Leave out samples that cannot be read.
    """

    bundle: Path
    data: str
    reference: str = ""
    arch: str | None = None
    threads: int = 0
    timeout_s: float | None = None
    samples: int = 400
    skip_bad: bool = False


def diagnose_preprocess(config: DiagnoseConfig, *, reporter: Reporter | None = None) -> Diagnosis:
    """Try the usual preprocessings on a bundle.

    Raises:
        DataError: VLX0206 where the bundle records none, VLX0716 where it cannot be varied, VLX02xx for the data.
        VlexportError: VLX06xx for the bundle.
    """
    folder = Path(config.bundle)
    bundle = read_bundle(folder)
    require_data(config.data)
    require_reference(config.reference, config.arch)
    check_files(folder, bundle)
    component = bundle.main
    recipe = read_recipe(folder / RECIPE_FILE)
    name = photo_input(component, folded=bool(recipe.get("fold_preprocess")))
    photos = open_photos(config.data, component, name, config.samples, skip_bad=config.skip_bad)
    target = open_target(bundle.target)
    opened = target.open(
        folder / ARTIFACT_FOLDER, component.artifact, threads=config.threads, timeout_s=config.timeout_s
    )
    with opened as session, open_reference(config.reference, bundle, arch=config.arch, recipe=recipe) as reference:
        run = session.run if reference is None else reference.compute
        said = "the artifact" if reference is None else f"the {reference.name}"
        return diagnose(run, photos, component, name, runner=said, reporter=reporter)


def photo_input(component: Component, *, folded: bool) -> str:
    """Name of the one input that a photo fills.

    Raises:
        DataError: VLX0716 where there is none or several, or where the graph does a part of the preprocessing.
    """
    names = list(component.preprocess)
    if len(names) == 1 and not folded:
        return names[0]
    why, hint = "the graph does mean and std itself", "build it without --fold-preprocess"
    if not folded:
        why = f"photos fill {len(names)} of its inputs, and one is wanted"
        hint = "give the model its preprocessing with --preprocess" if not names else "diagnose each part by itself"
    raise DataError("VLX0716", f"this bundle's preprocessing cannot be varied: {why}", where=str(names), hint=hint)


def open_photos(data: str, component: Component, name: str, samples: int, *, skip_bad: bool = False) -> Dataset:
    """About so many labelled samples with photos as they are: pixels 0 to 255, of any size.

    Raises:
        DataError: VLX0210 without labels, VLX0716 where the data gives arrays instead of photos.
    """
    any_size = TensorSpec(name=name, dtype="float32", shape=("batch", 3, "height", "width"))
    inputs = [any_size if spec.name == name else spec for spec in component.artifact.inputs]

    def opened(raw: Preprocess) -> Dataset:
        return open_data(
            data, inputs=inputs, preprocess={**component.preprocess, name: raw}, labels=component.labels or None,
            skip_bad=skip_bad,
        )  # fmt: skip

    found = opened(_RAW)
    if not found.labelled:
        raise DataError(
            "VLX0210", "the samples have no labels, and which preprocessing is right is told by them", where="--data",
            hint="give labelled photos",
        )  # fmt: skip
    first, halved = (next(iter(each), None) for each in (found, opened(_RAW.model_copy(update={"scale": 0.5}))))
    if first is not None and halved is not None and _is_array(first.inputs[name], halved.inputs[name]):
        raise DataError(
            "VLX0716", "the data gives arrays, which are preprocessed already", where=data,
            hint="give photos: class folders, .jsonl with file names, or a function that yields pillow images",
        )  # fmt: skip
    share = samples / max(len(found), 1)
    return found if share >= 1 else found.part(lambda each: _place(each) < share, round(share * len(found)))


def _is_array(value: Array, halved: Array) -> bool:
    """Whether a value does not follow its preprocessing; of a black photo that cannot be told."""
    return bool(value.any()) and np.array_equal(value, halved)


def _place(sample_id: str, draw: int = 0) -> float:
    """A number from 0 to 1, below 1, that depends on the id and on which draw it is."""
    digest = hashlib.sha256(f"{draw} {sample_id}".encode("utf-8", "backslashreplace")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _is_between(bounds: tuple[float, float], sample_id: str) -> bool:
    """Whether a sample's turn comes between two shares of all."""
    return bounds[0] <= _place(sample_id, 1) < bounds[1]


@dataclass
class _Tried:
    """A variant, on which samples it was right, in their order, and whether its input was ever another."""

    variant: Variant
    right: list[bool]
    distinct: bool = False

    @property
    def spec(self) -> str:
        return self.variant.preprocess.to_spec()


def diagnose(
    run: Run, photos: Dataset, component: Component, name: str, *, runner: str, reporter: Reporter | None = None
) -> Diagnosis:
    """Try the usual preprocessings.

    Args:
        run: Computes the outputs.
        photos: As :func:`open_photos` gives them.
        component: Its first output scores classes.
        name: The input that photos fill.
        runner: What ``run`` is, in words.
        reporter: Progress.

    Raises:
        DataError: VLX0202 when no sample is left, VLX0208 when the labels are no class indices.
    """
    reporter = reporter or Silent()
    recorded = component.preprocess[name]
    size = _size_of(component, name)
    tries = sum(len(variants(recorded, axis, size)) for axis in ("range", "size"))
    z = NormalDist().inv_cdf(1 - _ERROR / max(tries, 1) / 2)
    bench = _Bench(run, photos, component, name, z, reporter)
    base = Variant("as recorded", "range", recorded)
    rounds: list[Round] = []
    known: dict[str, list[bool]] = {}
    for axis in ("range", "size", "range"):
        if len(rounds) == 2 and not rounds[1].took:
            break
        found, tried = bench.round(axis, base, variants(base.preprocess, axis, size))
        rounds.append(found)
        known |= {each.spec: each.right for each in tried}
        base = next((each.variant for each in tried if each.spec == found.took), base)
    ours, theirs = known[base.preprocess.to_spec()], known[recorded.to_spec()]
    gain, low, high = _paired(ours, theirs, z)
    untold = [trial for each in rounds for trial in each.trials if trial.standing == "cannot tell"]
    named = base.preprocess != recorded
    return Diagnosis(
        input=name, recorded=recorded.to_spec(), verdict="named" if named else "cannot tell" if untold else "stands",
        line=base.preprocess.to_spec(), samples=len(theirs), recorded_top1=_percent(theirs), top1=_percent(ours),
        gain=gain, gain_low=low, gain_high=high, confidence=1 - _ERROR / max(tries, 1), rounds=tuple(rounds),
        runner=runner,
    )  # fmt: skip


@dataclass(frozen=True)
class _Bench:
    """Where variants are tried."""

    run: Run
    photos: Dataset
    component: Component
    name: str
    z: float
    reporter: Reporter

    def round(self, axis: Axis, base: Variant, candidates: Sequence[Variant]) -> tuple[Round, list[_Tried]]:
        """Try variants against a base; also gives what was seen on every sample."""
        first = _Tried(base, [])
        left = [first, *(_Tried(each, []) for each in candidates)]  # the base stays first: all are held against it
        given_up: list[_Tried] = []
        with self.reporter.steps(f"diagnose {axis}", len(self.photos)) as advance:
            for bounds in itertools.pairwise((0.0, *LOOKS_AT)):
                # Drawn by their ids: in a folder's own order the first photos are all of one class.
                for sample in self.photos.part(partial(_is_between, bounds), len(self.photos)):
                    self._count(left, sample)
                    advance()
                worse = [each for each in left if each is not first and self._is_worse(each, left)]
                given_up += worse if bounds[1] < 1 else []
                left = [each for each in left if each not in given_up]
        if not first.right:
            raise DataError("VLX0202", "the data holds no sample that can be read", where="--data")
        trials = tuple(self._trial(each, first) for each in (*left[1:], *given_up))
        better = [each for each, trial in zip(left[1:], trials, strict=False) if trial.standing == "better"]
        best = max(better, key=lambda each: sum(each.right), default=first)
        others = [each for each in left if each is not best and (each.distinct or each is first)]
        rest = [each for each in others if not self._differs(each, best)]
        took = best.spec if best is not first else ""
        found = Round(
            axis=axis, began_with=first.spec, trials=trials, took=took,
            alike=tuple(each.variant.what for each in rest),
        )  # fmt: skip
        return found, left

    def _count(self, tried: Sequence[_Tried], sample: Sample) -> None:
        """Whether each variant is right on a sample; equal inputs are computed once."""
        if not isinstance(sample.label, int):
            raise DataError(
                "VLX0208", "which preprocessing is right is told by one class index a sample", where=sample.id,
                hint="give labels that are classes",
            )  # fmt: skip
        pixels = np.moveaxis(sample.inputs[self.name], 0, -1).astype(np.uint8)
        image = Image.fromarray(pixels)
        known: dict[bytes, bool] = {}
        for each in tried:  # the base is the first
            array = each.variant.preprocess.apply(image)
            key = f"{array.shape}".encode() + array.tobytes()
            each.distinct |= bool(known) and key != next(iter(known))
            if key not in known:
                known[key] = self._top(array, sample) == sample.label
            each.right.append(known[key])

    def _top(self, array: Array, sample: Sample) -> int:
        specs = {spec.name: spec for spec in self.component.artifact.inputs}
        problem = specs[self.name].model_copy(update={"shape": specs[self.name].shape[1:]}).problem(array)
        if problem:
            raise DataError("VLX0205", f"input '{self.name}': {problem}", where=sample.id)
        rows = {**sample.inputs, self.name: array}
        batch = {k: np.stack([value] * _rows_of(specs[k])) for k, value in rows.items()}
        scores = self.run(batch)[self.component.artifact.outputs[0].name]
        if scores.ndim != 2:
            raise DataError(
                "VLX0208", "which preprocessing is right is told by one score vector a sample as first output",
                where="--data", hint="diagnose a classifier",
            )  # fmt: skip
        return int(np.argmax(scores[0]))

    def _trial(self, each: _Tried, first: _Tried) -> Trial:
        seen = len(each.right)
        against = first.right[:seen]
        _, low, high = _paired(each.right, against, self.z)
        standing: Standing = "better" if low > 0 else "worse" if high < 0 else "cannot tell"
        standing = standing if each.distinct else "same"
        return Trial(
            what=each.variant.what, axis=each.variant.axis, spec=each.spec, samples=seen, top1=_percent(each.right),
            against=_percent(against), low=low, high=high, standing=standing,
        )  # fmt: skip

    def _is_worse(self, each: _Tried, left: Sequence[_Tried]) -> bool:
        """Whether it is clearly worse than what leads now."""
        leader = max(left, key=lambda other: sum(other.right))
        return _paired(each.right, leader.right, self.z)[2] < 0

    def _differs(self, one: _Tried, other: _Tried) -> bool:
        _, low, high = _paired(one.right, other.right, self.z)
        return low > 0 or high < 0


def _paired(ours: Sequence[bool], theirs: Sequence[bool], z: float) -> tuple[float, float, float]:
    """Ours minus theirs in points, with its interval."""
    only_ours = sum(a and not b for a, b in zip(ours, theirs, strict=True))
    only_theirs = sum(b and not a for a, b in zip(ours, theirs, strict=True))
    low, high = tango(only_ours, only_theirs, len(ours), z=z)
    return 100 * (only_ours - only_theirs) / max(len(ours), 1), 100 * low, 100 * high


def _percent(right: Sequence[bool]) -> float:
    return 100 * sum(right) / max(len(right), 1)


def _rows_of(spec: TensorSpec) -> int:
    return spec.shape[0] if spec.shape and isinstance(spec.shape[0], int) else 1


def _size_of(component: Component, name: str) -> tuple[int, int] | None:
    shape = next(spec.shape for spec in component.artifact.inputs if spec.name == name)
    recorded = component.preprocess[name].output_shape
    sizes = [a if isinstance(a, int) else b for a, b in zip(shape[2:], recorded[1:], strict=False)]
    if len(sizes) == 2 and isinstance(sizes[0], int) and isinstance(sizes[1], int):
        return sizes[0], sizes[1]
    return None
