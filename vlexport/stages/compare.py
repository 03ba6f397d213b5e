"""compare: two bundles, and what made them differ. Nothing is run; no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlexport.core.bundle import ARTIFACT_FOLDER, BUNDLE_FILE, COMPARE_FILE, RECIPE_FILE, TABLE_FILE, size_bytes
from vlexport.core.bundle_schema import Bundle, Report
from vlexport.core.config import BuildConfig, flags_of, read_recipe
from vlexport.core.difference import Cause, Difference, DirectDrop, DirectRatio, LayerDifference, PassDifference, Side
from vlexport.core.errors import GateError, UsageError
from vlexport.core.inspection import Measurement
from vlexport.core.layer_record import Layers, read_layers
from vlexport.core.operators import OperatorCount
from vlexport.stages.inspect import inspect_bundle

_JUDGING = frozenset({"gate", "max_drop", "numeric_gate", "seed"})
"""Keys of a recipe that do not decide the artifact."""
_BUNDLE_NAME = 12
"""Hex digits of a digest by which a report names the other bundle."""


def compare(a: Path, b: Path) -> tuple[Difference, ...]:
    """What differs, one entry a pair.

    Args:
        a: A bundle, or the folder of several targets' bundles.
        b: The same. Of a folder and a bundle, the folder's bundle of the same target counts; of two folders, those
            targets that both have.

    Raises:
        BundleError: VLX0601, VLX0603, VLX0605.
        GateError: VLX0602.
        UsageError: VLX0703 when a folder has no bundle of the other's target.
    """
    return tuple(_difference(one, other) for one, other in _pairs(a, b))


def _pairs(a: Path, b: Path) -> list[tuple[Path, Path]]:
    first, second = _targets(a), _targets(b)
    if first is None and second is None:
        return [(a, b)]
    if first is None:
        return [(a, _of_target(second or {}, inspect_bundle(a).bundle.target, b))]
    if second is None:
        return [(_of_target(first, inspect_bundle(b).bundle.target, a), b)]
    both = [name for name in first if name in second]
    if not both:
        raise UsageError(
            "VLX0703", f"{a} holds {', '.join(first)}, {b} holds {', '.join(second)}: no target is in both",
            where="compare", hint="name the two bundles themselves",
        )  # fmt: skip
    return [(first[name], second[name]) for name in both]


def _targets(folder: Path) -> dict[str, Path] | None:
    """Target → bundle, for the folder of several; None for a bundle."""
    try:
        several = (folder / COMPARE_FILE).is_file() and not (folder / BUNDLE_FILE).is_file()
    except (OSError, ValueError):  # a name that the file system cannot hold
        return None
    return {file.parent.name: file.parent for file in sorted(folder.glob(f"*/{BUNDLE_FILE}"))} if several else None


def _of_target(folders: Mapping[str, Path], target: str, where: Path) -> Path:
    if target in folders:
        return folders[target]
    raise UsageError(
        "VLX0703", f"{where} holds no bundle of {target}", where="compare",
        hint=f"it holds {', '.join(folders) or 'none'}; bundles of two targets are compared by naming both folders",
    )  # fmt: skip


def _difference(a: Path, b: Path) -> Difference:
    one, other = inspect_bundle(a), inspect_bundle(b)
    for folder, found in ((a, one), (b, other)):
        if found.altered:
            raise GateError(
                "VLX0602", found.altered, where=str(folder), hint="build it again, or fetch it again from its source"
            )
    causes, judging = _recipes(a, b)
    first, second = one.bundle, other.bundle
    causes = [*_others(first, second), *causes]
    return Difference(
        a=_side(a, first, one.measured),
        b=_side(b, second, other.measured),
        same=_artifact(first) == _artifact(second),
        causes=tuple(causes),
        judging=tuple(judging),
        surroundings=tuple(_surroundings(first, second)),
        passes=tuple(_passes(first, second)),
        layers=tuple(_layers(first, read_layers(a, first), second, read_layers(b, second))),
        operators=tuple(_operators(first, second)),
        ratio=_ratio(first, one.measured, second, other.measured),
        drop=_drop(first, one.measured, second, other.measured),
    )


def _artifact(bundle: Bundle) -> dict[str, str]:
    return {path: each.sha256 for path, each in bundle.files.items() if path.startswith(f"{ARTIFACT_FOLDER}/")}


def _side(folder: Path, bundle: Bundle, measured: Sequence[Measurement]) -> Side:
    reports = [each.report for each in reversed(measured) if each.report.bundle_digest == bundle.digest]
    judged = next((each for each in reports if each.accuracy is not None), None)
    timed = next((each for each in reports if each.latency is not None), None)
    return Side(
        name=str(folder), digest=bundle.digest, vlexport=bundle.vlexport, state=bundle.state, target=bundle.target,
        precision=bundle.precision, device_profile=bundle.device_profile, source_hash=bundle.source_hash,
        size_bytes=size_bytes(bundle), cost=bundle.main.cost,
        batch=bundle.main.artifact.batch(bundle.main.dims),
        reference=judged.reference if judged is not None else "",
        accuracy=judged.accuracy if judged is not None else None,
        accuracy_on=_when(judged),
        latency=timed.latency if timed is not None else None,
        latency_on=_when(timed),
    )  # fmt: skip


def _when(report: Report | None) -> str:
    if report is None:
        return ""
    threads = f", {report.latency.threads} threads" if report.latency is not None else ""
    return f"{report.date}, {report.machine.cpu}{threads}"


def _recipes(a: Path, b: Path) -> tuple[list[Cause], list[Cause]]:
    """Keys of both recipes that differ, ``options`` one by one: those that decide the artifact, and the others."""
    first, second = (dict(read_recipe(each / RECIPE_FILE)) for each in (a, b))
    causes: list[Cause] = []
    judging: list[Cause] = []
    for key in BuildConfig.model_fields:
        if key == "options":
            continue
        left, right = _text(first.get(key)), _text(second.get(key))
        if left != right:
            (judging if key in _JUDGING else causes).append(_cause(key, left, right))
    left_options, right_options = (dict(each.get("options") or {}) for each in (first, second))
    for key in sorted({*left_options, *right_options}):
        left, right = _text(left_options.get(key)), _text(right_options.get(key))
        if left != right:
            causes.append(Cause(flag=f"--set {key}", a=left, b=right))
    return causes, judging


def _cause(key: str, a: str, b: str) -> Cause:
    """A key of the recipe as its flag; one that is on unless ``--no-…`` is given, as that."""
    flag, _, negative = flags_of(key)[0].partition("/")
    if negative and BuildConfig.model_fields[key].default is True:
        return Cause(flag=negative, a="" if a else "on", b="" if b else "on")
    return Cause(flag=flag, a=a, b=b)


def _text(value: Any) -> str:
    """As it would be typed; a list's entries with spaces between, what is off or not given is empty."""
    if value in (None, [], {}, False):
        return ""
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "on" if value is True else str(value)


def _others(a: Bundle, b: Bundle) -> Iterator[Cause]:
    """What decides an artifact and is no flag of the recipe."""
    if a.source_hash != b.source_hash:
        yield Cause(flag="the model file", a=f"sha256 {a.source_hash[:12]}", b=f"sha256 {b.source_hash[:12]}")
    tables = [bundle.files.get(TABLE_FILE) for bundle in (a, b)]
    if None not in tables and tables[0] != tables[1]:
        hashes = [each.sha256[:12] for each in tables if each is not None]
        yield Cause(flag="calibration (--calib, or the ranges it gave)", a=hashes[0], b=hashes[1])


def _surroundings(a: Bundle, b: Bundle) -> Iterator[Cause]:
    if a.vlexport != b.vlexport:
        yield Cause(flag="vlexport", a=a.vlexport, b=b.vlexport)
    for name in sorted({*a.tools, *b.tools}):
        left, right = a.tools.get(name, ""), b.tools.get(name, "")
        if left != right:
            yield Cause(flag=name, a=left, b=right)
    if a.instruction_set != b.instruction_set:
        yield Cause(
            flag="instruction set of the building machine", a=" ".join(a.instruction_set), b=" ".join(b.instruction_set)
        )


def _passes(a: Bundle, b: Bundle) -> Iterator[PassDifference]:
    counts = [_changes(each) for each in (a, b)]
    for name in dict.fromkeys([*counts[0], *counts[1]]):
        left, right = counts[0].get(name), counts[1].get(name)
        if left != right and (left or right):
            yield PassDifference(name=name, a=left, b=right)


def _changes(bundle: Bundle) -> dict[str, int]:
    found: dict[str, int] = {}
    for record in (record for each in bundle.components.values() for record in each.passes):
        found[record.name] = found.get(record.name, 0) + sum(change.count for change in record.changes)
    return found


def _layers(a: Bundle, left: Layers, b: Bundle, right: Layers) -> Iterator[LayerDifference]:
    """Calls that compute with integers in one of the two, or with other integers."""
    first, second = _precisions(left), _precisions(right)
    float_a, float_b = (_float_type(each.precision) for each in (a, b))
    for key in dict.fromkeys([*first, *second]):
        one, other = first.get(key, float_a), second.get(key, float_b)
        if one != other:
            yield LayerDifference(op=key[0], module=key[1], a=one, b=other)


def _float_type(precision: str) -> str:
    """What calls that are not quantized compute in."""
    return precision if precision in ("fp16", "bf16", "fp32") else "float"


def _precisions(layers: Layers) -> dict[tuple[str, str], str]:
    found: dict[tuple[str, str], str] = {}
    for each in layers.layers:
        found[each.op, each.module or each.call] = f"{each.weight} weight" if each.weight else "integers"
    return found


def _operators(a: Bundle, b: Bundle) -> Iterator[OperatorCount]:
    first, second = a.main.operators, b.main.operators
    if first is None or second is None:
        return
    counts = [{row.name: row for row in each.counts} for each in (first, second)]
    for name in dict.fromkeys([*counts[0], *counts[1]]):
        left, right = counts[0].get(name), counts[1].get(name)
        row = OperatorCount(
            name=name, before=left.after if left else 0, after=right.after if right else 0,
            macs_before=left.macs_after if left else 0, macs_after=right.macs_after if right else 0,
        )  # fmt: skip
        if (row.before, row.macs_before) != (row.after, row.macs_after):
            yield row


def _ratio(
    a: Bundle, a_measured: Sequence[Measurement], b: Bundle, b_measured: Sequence[Measurement]
) -> DirectRatio | None:
    """The newest run in which one was measured against the other; a ratio of A's report is turned round."""
    for measured, baseline, turned in ((b_measured, a, False), (a_measured, b, True)):
        for each in reversed(measured):
            found = each.report.latency
            if found is None or found.baseline != f"bundle {baseline.digest[:_BUNDLE_NAME]}" or found.ratio is None:
                continue
            values = (found.ratio, found.ratio_low or found.ratio, found.ratio_high or found.ratio)
            ratio, low, high = (1 / values[0], 1 / values[2], 1 / values[1]) if turned else values
            verdict = {"faster": "slower", "slower": "faster"}.get(found.verdict, found.verdict)
            return DirectRatio(
                ratio=ratio, low=low, high=high, verdict=verdict if turned else found.verdict, on=_when(each.report)
            )
    return None


def _drop(
    a: Bundle, a_measured: Sequence[Measurement], b: Bundle, b_measured: Sequence[Measurement]
) -> DirectDrop | None:
    """The newest run in which one was validated against the other."""
    for measured, reference, sign in ((b_measured, a, 1.0), (a_measured, b, -1.0)):
        for each in reversed(measured):
            found = each.report.accuracy
            if found is None or not _names(each.report.reference, reference):
                continue
            if found.drop is None or found.drop_low is None or found.drop_high is None:
                continue
            ends = sorted((sign * found.drop_low, sign * found.drop_high))
            return DirectDrop(
                drop=sign * found.drop, low=ends[0], high=ends[1], samples=found.samples, on=_when(each.report)
            )
    return None


def _names(reference: str, bundle: Bundle) -> bool:
    return reference.removeprefix("bundle ") in (bundle.digest, bundle.digest[:_BUNDLE_NAME])
