"""What is asked for one target, checked before any work is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vlexport.core.config import BuildConfig
from vlexport.core.device_profiles import device_profiles
from vlexport.core.devices import this_machine
from vlexport.core.errors import CapabilityError, UsageError, VlexportError
from vlexport.core.verdict import Gate
from vlexport.stages.choices import (
    INTEGER_PRECISIONS,
    gates_of,
    precision_of,
    profile_of,
    quantize_options_of,
    scopes_of,
    settled_of,
)
from vlexport.stages.quantized import require_calibrated
from vlexport.stages.tune import axes_of
from vlexport.stages.validate import TIMED
from vlexport.stages.write_bundle import model_name_of
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
        notes: What was asked for and is not done for this target.
    """

    config: BuildConfig
    target: Target
    brief: Brief
    reason: str
    gates: tuple[Gate, ...]
    probe: Probe
    axes: dict[str, tuple[str, ...]]
    notes: tuple[str, ...] = ()


def order_of(config: BuildConfig) -> Order:
    """The order of a config that names one target.

    Raises:
        UsageError: VLX070x.
        CapabilityError: VLX0501 when it cannot be built here, VLX0502 when it does not run that precision, VLX0803
            when a gate needs what cannot be measured here.
    """
    target = open_target(config.target)
    config = _with_implied(config, target)
    precision, reason = precision_of(config, target)
    gates = gates_of(config)
    brief = Brief(settled_of(config, target, precision), profile_of(config, target), precision, config.threads)
    if precision in INTEGER_PRECISIONS:
        require_calibrated(config, brief, target)
    elif config.precision == "auto":
        quantize_options_of(config)  # refused at once, whether integers will be tried or not
    target.require_tools(brief)
    probe = target.probe_for(brief)
    require_judged(gates, target, probe)
    axes = axes_of(config, target, brief.options)
    return Order(config, target, brief, reason_of(target, brief, reason), gates, probe, axes)


def reason_of(target: Target, brief: Brief, chosen: str) -> str:
    """Why an artifact has its precision, in words: as it was chosen, unless options let results have another one."""
    computed = target.computes_in(brief)
    return chosen if computed == brief.precision else f"computed in {computed}, as options of {target.id} ask"


def why_unmeasured(order: Order) -> str:
    """Why the latency of this order's artifacts cannot be told on this machine, or an empty string."""
    device = order.brief.device
    if not order.probe.available:
        return f"{order.target.id} does not run here: {order.probe.reason}"
    if order.probe.timing != "real":
        return f"the target's timing is {order.probe.timing} here"
    if not device.is_this(this_machine()):
        return f"this machine is no {device.id}"
    return "" if order.config.profile else "--no-profile forbids measuring"


def _with_implied(config: BuildConfig, target: Target) -> BuildConfig:
    implied = target.implied_options(model_name_of(config)).items()
    options = {**{f"{target.id}.{name}": value for name, value in implied}, **config.options}
    return config.model_copy(update={"options": options}) if options != config.options else config


def require_judged(gates: Sequence[Gate], target: Target, probe: Probe) -> None:
    """Refuse gates that cannot be judged on this machine.

    Raises:
        CapabilityError: VLX0803.
    """
    for gate in gates:
        if not probe.available and gate.metric != "size_mb":
            why = f"{target.id} does not run here: {probe.reason}"
        elif probe.timing != "real" and gate.metric in TIMED:
            why = f"latency is not measured: the target's timing is {probe.timing}"
        else:
            continue
        raise CapabilityError(
            "VLX0803", f"gate {gate} cannot be judged: {why}", where="--gate",
            hint="leave that --gate out, or build where the target runs",
        )  # fmt: skip


def orders_of(config: BuildConfig) -> tuple[dict[str, Order], dict[str, VlexportError]]:
    """Target → its order, and target → why there is none. A search is for those that have something to search here.

    Raises:
        UsageError: VLX070x, and VLX0805 where no target can be searched.
    """
    orders: dict[str, Order] = {}
    refused: dict[str, VlexportError] = {}
    unsearched: dict[str, UsageError] = {}
    configs = configs_of(config)
    for name, each in configs.items():
        try:
            try:
                orders[name] = order_of(each)
            except UsageError as error:
                if error.code != "VLX0805" or not config.autotune or len(configs) == 1:
                    raise
                unsearched[name] = error
                without = each.model_copy(update={"autotune": False, "resume": False, "budget_minutes": None})
                orders[name] = replace(order_of(without), notes=(f"not searched: {error.message}",))
        except CapabilityError as error:  # noqa: PERF203  a handful of targets
            refused[name] = error
    if unsearched and not any(order.axes for order in orders.values()):
        raise next(iter(unsearched.values()))
    return orders, refused


def configs_of(config: BuildConfig) -> dict[str, BuildConfig]:
    """One config per target, in order; ``--for`` goes to those that run on that device, ``--set`` of a pass to those
    that run it.

    Raises:
        UsageError: VLX0701, and VLX0703 for a device profile on which none of them runs.
    """
    names = target_names(config.target)
    device = device_profiles().get(config.device_profile or "")
    fits = {name: device is None or not device.targets or name in device.targets for name in names}
    if not any(fits.values()):
        profile_of(config, open_target(names[0]))
    if len(names) == 1:
        return {names[0]: config.model_copy(update={"target": names[0]})}
    found = {
        name: config.model_copy(
            update={"target": name, "device_profile": config.device_profile if fits[name] else None}
        )
        for name in names
    }
    scopes = {name: scopes_of(each, open_target(name)) for name, each in found.items()}
    somewhere = set().union(*scopes.values())
    for name, each in found.items():
        strange = somewhere - set(scopes[name])  # of a pass that only other targets run
        kept = {key: value for key, value in each.options.items() if key.partition(".")[0] not in strange}
        found[name] = each.model_copy(update={"options": kept})
    return found
