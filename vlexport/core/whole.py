"""The components of a bundle as one: what reports, validate, profile and run look at. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from vlexport.core.account import whole_account
from vlexport.core.bundle_schema import Bundle, Component, CostRecord, PassRecord
from vlexport.core.errors import BundleError
from vlexport.core.operators import whole_operators
from vlexport.core.pipeline import pipeline_of, signatures
from vlexport.core.wiring import Wiring, wire

_Of = TypeVar("_Of")


def whole_component(bundle: Bundle) -> Component:
    """The single component itself, or one that stands for all: public names, joined dims, summed cost.

    Raises:
        InputError: VLX1102 when components and edges do not fit together.
        BundleError: VLX0601 when several components have no golden vectors of the whole.
    """
    components = bundle.components
    artifact = pipeline_of(
        {name: each.artifact for name, each in components.items()},
        {name: each.dims for name, each in components.items()},
        bundle.edges,
    )
    if len(components) == 1:
        return next(iter(components.values()))
    if bundle.golden is None:
        raise BundleError(
            "VLX0601", "bundle.json is wrong at golden: several components, and no vectors of the whole",
            hint="build it again",
        )  # fmt: skip
    wiring = wiring_of(bundle)
    return Component(
        artifact=artifact,
        dims=wiring.signature.dims,
        preprocess=by_public_name(wiring, {name: each.preprocess for name, each in components.items()}),
        labels=whole_labels(wiring, {name: each.labels for name, each in components.items()}),
        golden=bundle.golden,
        golden_smallest=bundle.golden_smallest,
        passes=whole_passes({name: components[name].passes for name in wiring.order}),
        cost=summed_cost({name: each.cost for name, each in components.items()}),
        account=whole_account({name: components[name].account for name in wiring.order}),
        operators=whole_operators({name: components[name].operators for name in wiring.order}),
    )


def wiring_of(bundle: Bundle) -> Wiring:
    """How a bundle's components are wired.

    Raises:
        InputError: VLX1102.
    """
    parts = {name: each.artifact for name, each in bundle.components.items()}
    return wire(signatures(parts, {name: each.dims for name, each in bundle.components.items()}), bundle.edges)


def by_public_name(wiring: Wiring, values: Mapping[str, Mapping[str, _Of]]) -> dict[str, _Of]:
    """What is known of components' inputs, for those of the whole."""
    return {
        public: values[port.component][port.name]
        for public, port in wiring.inputs.items()
        if port.name in values[port.component]
    }


def whole_labels(wiring: Wiring, labels: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Labels of the whole's first output, where it is the first of its component: only that has any."""
    port = next(iter(wiring.outputs.values()))
    first = wiring.components[port.component].outputs[0]
    return labels[port.component] if port.name == first.name else ()


def whole_passes(records: Mapping[str, tuple[PassRecord, ...]]) -> tuple[PassRecord, ...]:
    """All passes, ``component.pass``; a single component's as they are."""
    if len(records) == 1:
        return next(iter(records.values()))
    return tuple(
        record.model_copy(update={"name": f"{name}.{record.name}"}) for name, each in records.items() for record in each
    )


def summed_cost(costs: Mapping[str, CostRecord]) -> CostRecord:
    """What one run of all components costs."""
    each = list(costs.values())
    return CostRecord(
        macs=sum(cost.macs for cost in each),
        parameters=sum(cost.parameters for cost in each),
        size_bytes=sum(cost.size_bytes for cost in each),
        opaque=tuple(sorted({op for cost in each for op in cost.opaque})) if len(each) > 1 else each[0].opaque,
    )
