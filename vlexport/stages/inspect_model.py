"""inspect, of a model file: its face, cost by module, operators, and what each target would refuse. Needs torch."""

from __future__ import annotations

from collections import Counter

from vlexport.core.config import BuildConfig
from vlexport.core.device_profiles import device_profile, device_profiles
from vlexport.core.errors import UsageError, VlexportError
from vlexport.core.inspection import ModelInspection, ModelPart, ModulePart, OpaqueCall, Refusal, Support
from vlexport.core.progress import Reporter, Silent
from vlexport.frontends.source import Source
from vlexport.frontends.sources import Sources, open_sources
from vlexport.ir import dialect, provenance
from vlexport.ir.module_cost import cost_by_module
from vlexport.stages.choices import precision_of, profile_of, unjudged
from vlexport.stages.component import cost_record
from vlexport.stages.order import configs_of
from vlexport.stages.plan import plan
from vlexport.targets import open_target

_OF_THE_OUTPUT = ("VLX0604", "VLX0607")
"""Problems of a plan that are about where a bundle would be written, and nothing is written here."""


def inspect_model(
    config: BuildConfig, *, targets: bool, depth: int = 1, reporter: Reporter | None = None
) -> ModelInspection:
    """Look at a model as a build would meet it.

    Args:
        config: How to open it, and which targets, devices and options to ask about.
        targets: Whether targets are asked at all.
        depth: Names of a module path by which cost is summed.
        reporter: Where progress goes; silent by default.

    Raises:
        VlexportError: When the model cannot be opened, or a target or device is unknown.
    """
    reporter = reporter or Silent()
    if config.device_profile and config.device_profile not in device_profiles():
        device_profile(config.device_profile, target=config.target)
    configs = configs_of(unjudged(config)) if targets else {}
    with reporter.stage("open the model"):
        sources = open_sources(config)
    return ModelInspection(
        source_hash=sources.source_hash,
        components={name: _part(source, depth) for name, source in sources.components.items()},
        edges=sources.edges,
        support=tuple(_support(each, sources, reporter) for each in configs.values()),
        notes=sources.notes,
        device=device_profiles().get(config.device_profile or ""),
    )


def _part(source: Source, depth: int) -> ModelPart:
    program, signature = source.program, source.program.signature
    calls = program.calls()
    counted = Counter(dialect.op_name(node) for node in calls)
    return ModelPart(
        inputs=signature.inputs,
        outputs=signature.outputs,
        dims=signature.dims,
        preprocess={name: each.to_spec() for name, each in source.preprocess.items()},
        labels=source.labels,
        cost=cost_record(program),
        modules=tuple(
            ModulePart(
                path=path, calls=each.calls, macs=each.macs, parameters=each.parameters, size_bytes=each.size_bytes
            )
            for path, each in cost_by_module(program, depth=depth).items()
        ),
        operators=dict(counted.most_common()),
        opaque=tuple(
            OpaqueCall(operator=dialect.op_name(node), where=provenance.describe(node))
            for node in calls
            if dialect.is_opaque(node)
        ),
    )


def _support(config: BuildConfig, sources: Sources, reporter: Reporter) -> Support:
    target = open_target(config.target)
    try:
        precision, _ = precision_of(config, target)
    except VlexportError:  # the plan lists it
        precision = str(config.precision)
    try:
        device = profile_of(config, target).id
    except UsageError:
        device = ""
    found = plan(config, sources=sources, reporter=reporter)
    problems = tuple(Refusal(**each.as_dict()) for each in found.problems if each.code not in _OF_THE_OUTPUT)
    return Support(
        target=target.id, device_profile=device, precision=precision, problems=problems, calls=found.calls_after
    )
