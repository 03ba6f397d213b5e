"""What ``vlexport inspect`` tells of a model or a bundle, as typed data. No torch."""

from __future__ import annotations

from vlexport.core.artifact import DimRange, Frozen, TensorSpec
from vlexport.core.bundle_schema import Bundle, CostRecord, Report
from vlexport.core.device_profiles import DeviceProfile


class ModulePart(Frozen):
    """A module's share: calls, multiply-accumulates with dims at their opt, floating elements, bytes."""

    path: str
    calls: int
    macs: int
    parameters: int
    size_bytes: int


class OpaqueCall(Frozen):
    """A call of an operator that nothing is known about: its name, and operator, module path and source line."""

    operator: str
    where: str


class Refusal(Frozen):
    """Why a target would not take the model: an error's code, message, place and remedy."""

    code: str
    message: str
    where: str
    hint: str


class Support(Frozen):
    """What a target makes of a model.

    Attributes:
        target: Its id.
        device_profile: The device that was looked at; empty where it is none of the target's.
        precision: The target would compute in.
        problems: Everything that would stop a build; empty where nothing is known to.
        calls: That would be lowered.
    """

    target: str
    device_profile: str
    precision: str
    problems: tuple[Refusal, ...]
    calls: int


class ModelPart(Frozen):
    """One graph of a model.

    Attributes:
        inputs: In the order of ``forward``'s arguments.
        outputs: Of the graph.
        dims: Ranges of the dynamic dims.
        preprocess: Input → how an image becomes it, as ``--preprocess`` takes it.
        labels: Class names of the first output, if known.
        cost: Of one run.
        modules: Its parts; they add up to ``cost``.
        operators: Name → how often it is called, the commonest first.
        opaque: Calls that nothing is known about.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    dims: dict[str, DimRange]
    preprocess: dict[str, str]
    labels: tuple[str, ...]
    cost: CostRecord
    modules: tuple[ModulePart, ...]
    operators: dict[str, int]
    opaque: tuple[OpaqueCall, ...]


class ModelInspection(Frozen):
    """A model file.

    Attributes:
        source_hash: As bundles record it.
        components: Name → graph; ``main`` alone for most.
        edges: How they are wired.
        support: By target, where targets were asked about.
        device: The device that was named, with what is known of it.
        notes: What opening the model said.
    """

    source_hash: str
    components: dict[str, ModelPart]
    edges: tuple[tuple[str, str], ...]
    support: tuple[Support, ...]
    notes: tuple[str, ...]
    device: DeviceProfile | None = None


class Measurement(Frozen):
    """One report of a bundle: the folder below ``measured/``, and what was measured."""

    name: str
    report: Report


class BundleInspection(Frozen):
    """A bundle.

    Attributes:
        bundle: Its ``bundle.json``.
        altered: What does not fit its hashes; empty where everything does.
        measured: Its reports, in order.
        unreadable: Reports that cannot be read.
    """

    bundle: Bundle
    altered: str
    measured: tuple[Measurement, ...]
    unreadable: tuple[str, ...] = ()
