"""What is asked for one target, checked before any work is done."""

from __future__ import annotations

from dataclasses import dataclass

from vlexport.core.config import BuildConfig
from vlexport.core.device_profiles import device_profiles
from vlexport.core.errors import CapabilityError
from vlexport.core.verdict import Gate
from vlexport.stages.choices import gates_of, options_of, precision_of, profile_of
from vlexport.stages.tune import axes_of
from vlexport.targets import open_target, target_names
from vlexport.targets.base import Brief, Probe, Target


@dataclass(frozen=True)
class Order:
    """One bundle to build.

    Attributes:
        config: Of this target alone.
        target: What it is built for.
        brief: What lowering depends on; labels and preprocessing come with the model.
        reason: Why this precision.
        gates: To judge.
        probe: What the target finds on this machine.
        axes: What a search tries, ``SCOPE.NAME`` → values.
    """

    config: BuildConfig
    target: Target
    brief: Brief
    reason: str
    gates: tuple[Gate, ...]
    probe: Probe
    axes: dict[str, tuple[str, ...]]


def order_of(config: BuildConfig) -> Order:
    """The order of a config that names one target.

    Raises:
        UsageError: VLX070x.
        CapabilityError: VLX0501 when it cannot be built here, VLX0502 when it does not run that precision, VLX0803
            when a gate needs what cannot be measured here.
    """
    target = open_target(config.target)
    precision, reason = precision_of(config, target)
    gates = gates_of(config)
    brief = Brief(options_of(config, target), profile_of(config, target), precision, config.threads)
    target.require_tools(brief)
    probe = target.probe_for(brief)
    for gate in gates:
        if not probe.available and gate.metric != "size_mb":
            raise CapabilityError(
                "VLX0803", f"gate {gate} cannot be judged: {target.id} does not run here: {probe.reason}",
                where="--gate", hint="leave that --gate out, or build where the target runs",
            )  # fmt: skip
    return Order(config, target, brief, reason, gates, probe, axes_of(config, target, brief.options))


def configs_of(config: BuildConfig) -> dict[str, BuildConfig]:
    """One config per target, in order; ``--for`` goes to those that run on that device.

    Raises:
        UsageError: VLX0701, and VLX0703 for a device profile on which none of them runs.
    """
    names = target_names(config.target)
    device = device_profiles().get(config.device_profile or "")
    fits = {name: device is None or not device.targets or name in device.targets for name in names}
    if not any(fits.values()):
        profile_of(config, open_target(names[0]))
    several = len(names) > 1
    return {
        name: config.model_copy(
            update={"target": name, "device_profile": config.device_profile if fits[name] or not several else None}
        )
        for name in names
    }
