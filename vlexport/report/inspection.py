"""What a model or a bundle is, in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from vlexport.core.artifact import DimRange, TensorSpec
from vlexport.core.bundle_schema import Component, GateRecord, Golden, PassRecord
from vlexport.core.device_profiles import THIS
from vlexport.core.inspection import BundleInspection, ModelInspection, ModelPart, ModulePart, Support
from vlexport.report.figures import (
    accuracy_phrase,
    device_phrase,
    idle_passes,
    latency_phrase,
    macs_phrase,
    parameters_phrase,
    pass_phrase,
    size_phrase,
)
from vlexport.report.near_misses import miss_lines, places_phrase

_LABELS_SHOWN = 5
_NOT_INSTALLED = "VLX0501"


def model_lines(found: ModelInspection) -> list[str]:
    """Lines for the terminal."""
    lines = [f"Model    sha256 {found.source_hash[:16]}…"]
    for name, part in found.components.items():
        if len(found.components) > 1:
            lines.append(f"Part     component {name}")
        lines += _part_lines(part)
    lines += [f"Edge     {source} → {sink}" for source, sink in found.edges]
    if found.device is not None:
        facts = ", ".join(f"{name} {fact.value}" for name, fact in found.device.facts.items())
        lines.append(f"Device   {found.device.id}: {found.device.summary}" + (f"; {facts}" if facts else ""))
    for each in found.support:
        lines += _support_lines(each)
    if found.device is not None:
        lines.append(f"Verdict  {_verdict(found.support)} on {found.device.id}")
    return lines + [f"Note     {note}" for note in found.notes]


def _verdict(support: Sequence[Support]) -> str:
    """What would stop a model on a device, in one line; what this machine lacks stops no device."""
    counts = {each.target: sum(problem.code != _NOT_INSTALLED for problem in each.problems) for each in support}
    free = [target for target, count in counts.items() if not count]
    stopped = [f"{count} problem{'s' * (count != 1)} by {target}" for target, count in counts.items() if count]
    if not stopped:
        return "nothing that is known would stop it"
    return f"{' and '.join(stopped)} would stop it" + (f", none by {', '.join(free)}" if free else "")


def _part_lines(part: ModelPart) -> Iterator[str]:
    yield from _face(part.inputs, part.outputs, part.dims, part.preprocess, part.labels)
    cost = part.cost
    yield (
        f"Cost     {_short(cost.macs, 'MACs')}{_at(part.dims)}, {_short(cost.parameters, 'parameters')}, "
        f"{_short(cost.size_bytes, 'B')}" + (f"; not counted: {', '.join(cost.opaque)}" if cost.opaque else "")
    )
    width = max((len(_named(each)) for each in part.modules), default=0)
    for each in part.modules:
        yield (
            f"Module   {_named(each):{width}}  {each.calls:5} {'call ' if each.calls == 1 else 'calls'}  "
            f"{_short(each.macs, 'MACs'):>12}  {_short(each.parameters, 'parameters'):>18}  "
            f"{_short(each.size_bytes, 'B'):>10}"
        )
    shown = ", ".join(f"{name.removeprefix('aten.')} ×{count}" for name, count in part.operators.items())
    yield f"Ops      {sum(part.operators.values())} calls: {shown}"
    for call in part.opaque:
        yield f"Opaque   {call.where}: nothing is known about it"
    if not part.opaque:
        yield "Opaque   none: every operator is known"


def _named(part: ModulePart) -> str:
    return part.path or "(no module)"


def _short(count: int, unit: str) -> str:
    """A figure with k, M or G before its unit; nothing that is there is shown as zero."""
    gap = " " if len(unit) > len("MACs") else ""
    for prefix, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {prefix}{gap}{unit}"
    return f"{count} {unit}"


def _at(dims: Mapping[str, DimRange]) -> str:
    return f" at {', '.join(f'{name}={each.opt}' for name, each in dims.items())}" if dims else ""


def _face(
    inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], dims: Mapping[str, DimRange],
    preprocess: Mapping[str, str], labels: Sequence[str],
) -> Iterator[str]:  # fmt: skip
    """Inputs, outputs, dims, preprocessing, labels."""
    for spec in inputs:
        how = f"; {preprocess[spec.name]}" if spec.name in preprocess else ""
        yield f"Input    {_spec(spec)}{how}"
    yield from (f"Output   {_spec(spec)}" for spec in outputs)
    for name, each in dims.items():
        yield f"Dim      {name}: {each.min} to {each.max if each.max is not None else 'any size'}, tuned for {each.opt}"
    if labels:
        more = f" … ({len(labels)})" if len(labels) > _LABELS_SHOWN else ""
        yield f"Labels   {', '.join(labels[:_LABELS_SHOWN])}{more}"


def _spec(spec: TensorSpec) -> str:
    return f"{spec.name}: {spec.dtype} {'×'.join(map(str, spec.shape)) or 'scalar'}"


def _support_lines(found: Support) -> Iterator[str]:
    named = "this machine" if found.device_profile == THIS else found.device_profile
    device = f" for {named}" if named else ""
    said = f"{len(found.problems)} {'problem' if len(found.problems) == 1 else 'problems'}"
    taken = f"nothing is known to stop it; {found.calls} calls would be lowered"
    yield f"Target   {found.target}{device}, {found.precision}: {said if found.problems else taken}"
    for each in found.problems:
        where = f" ({each.where})" if each.where else ""
        yield f"         {each.code}: {each.message}{where}" + (f"; {each.hint}" if each.hint else "")


def bundle_lines(found: BundleInspection) -> list[str]:
    """Lines for the terminal."""
    bundle = found.bundle
    main = bundle.main
    preprocess = {name: each.to_spec() for name, each in main.preprocess.items()}
    device = f" for {device_phrase(bundle.device_profile)}"
    lines = [
        f"Bundle   {bundle.target} {bundle.precision}{device}, {bundle.state}, by vlexport {bundle.vlexport}; "
        f"digest {bundle.digest[:16]}…",
        f"Source   sha256 {bundle.source_hash[:16]}…",
        *_face(main.artifact.inputs, main.artifact.outputs, main.dims, preprocess, main.labels),
        f"Cost     {macs_phrase(main.cost.macs, main.cost.opaque, batch=main.artifact.batch(main.dims))}, "
        f"{parameters_phrase(main.cost.parameters)}, "
        f"{size_phrase(main.cost.size_bytes)} of weights",
    ]
    for name, each in bundle.components.items():
        if len(bundle.components) > 1:
            lines.append(f"Part     component {name}: {each.artifact.path}")
        lines += [f"Pass     {_pass_line(record)}" for record in each.passes]
        lines += [f"Fact     {key.replace('_', ' ')}: {value}" for key, value in sorted(each.artifact.facts.items())]
        lines += _golden_lines(each)
    lines += [f"Edge     {source} → {sink}" for source, sink in bundle.edges]
    lines += [f"Needs    {key.replace('_', ' ')}: {value}" for key, value in sorted(bundle.compatibility.items())]
    lines.append(f"Tools    {', '.join(f'{name} {version}' for name, version in sorted(bundle.tools.items()))}")
    lines += [f"File     {path}  {size_phrase(each.size_bytes)}" for path, each in sorted(bundle.files.items())]
    lines.append(f"Intact   {found.altered or f'all {len(bundle.files)} files fit their hashes'}")
    for measured in found.measured:
        report = measured.report
        lines.append(f"Report   {measured.name} ({report.date}, {report.machine.cpu}): {accuracy_phrase(report)}")
        lines.append(f"         {latency_phrase(report)}")
        lines += [f"         gate {verdict}" for verdict in report.verdicts]
    lines += [f"Report   {name} cannot be read" for name in found.unreadable]
    return lines


def _golden_lines(component: Component) -> Iterator[str]:
    for golden in (component.golden, component.golden_smallest):
        if golden is not None:
            yield f"Golden   {_golden(golden)}"


def _golden(golden: Golden) -> str:
    return f"{golden.outputs}: max|a−b| / max|b| within {golden.tolerance:g}"


def _pass_line(record: PassRecord) -> str:
    return f"{pass_phrase(record)}; {gate_phrase(record.gate)}"


def gate_phrase(gate: GateRecord) -> str:
    """What the numeric gate found after a pass."""
    if gate.proof == "statistic":
        value = f"{gate.value:g}" if gate.value is not None else "no floating output"
        return f"{gate.statistic} {value}, bound {gate.bound:g}" if gate.bound is not None else f"{gate.statistic}"
    said = {
        "identical": "no output changed by a bit",
        "float32": f"largest change {gate.worst:.0e}",
        "float64": f"largest change {gate.worst:.0e}, proven rounding in float64",
        "unproved": f"largest change {gate.worst:.0e}, unproved",
        "off": "not gated",
    }
    return said[gate.proof]


def pass_lines(name: str, records: Sequence[PassRecord], *, every: bool = False) -> list[str]:
    """What passes did to a component and what they left, by reason.

    Args:
        name: Of the component; empty where it is the only one.
        records: Its passes.
        every: Every place, and passes that had nothing to do; else the first places, and those passes in one line.
    """
    lines = [f"Part     component {name}"] if name else []
    idle = () if every else idle_passes(records)
    for record in records:
        if not every and not record.changes and not record.near_misses:
            continue
        lines.append(f"Pass     {_pass_line(record)}")
        for change in record.changes:
            saved = ", ".join(
                f"{abs(count)} {'fewer' if count > 0 else 'more'} {what}{'s' * (abs(count) != 1)}"
                for count, what in (
                    (change.saved_nodes, "call"), (change.saved_parameters, "parameter"), (change.saved_macs, "MAC"),
                )
                if count
            )  # fmt: skip
            lines.append(f"         {change.what} ×{change.count}" + (f" ({saved})" if saved else ""))
            places = change.where if every or not change.where else (places_phrase(change.where),)
            lines += [f"           in {path}" for path in places]
        lines += miss_lines([record], every=every)
    return lines + ([f"Idle     nothing to do: {', '.join(idle)}"] if idle else [])
