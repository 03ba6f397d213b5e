"""Wiring of components: order, public names, joined dims, and everything that does not fit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vlexport.core.artifact import DimRange, Signature, TensorSpec
from vlexport.core.errors import InputError
from vlexport.core.wiring import Wiring, wire

Shapes = dict[str, Any]


def component(inputs: Shapes, outputs: Shapes, dims: dict[str, tuple[int, int | None]] | None = None) -> Signature:
    """From name → shape, or name → (dtype, shape)."""
    made = [
        tuple(
            TensorSpec(name=n, dtype=s[0], shape=s[1]) if isinstance(s[0], str) and isinstance(s[-1], tuple)
            else TensorSpec(name=n, dtype="float32", shape=s)
            for n, s in shapes.items()
        )
        for shapes in (inputs, outputs)
    ]  # fmt: skip
    ranges = {name: DimRange(min=low, max=high, opt=low) for name, (low, high) in (dims or {}).items()}
    return Signature(inputs=made[0], outputs=made[1], dims=ranges)


BATCH = {"batch": (1, None)}
ENCODER = component({"image": ("batch", 3, 8)}, {"mean": ("batch", 4), "peak": ("batch", 4)}, BATCH)
HEAD = component({"features": ("batch", 4)}, {"output": ("batch", 2)}, BATCH)


def refused(components: dict[str, Signature], edges: list[tuple[str, str]]) -> InputError:
    with pytest.raises(InputError) as caught:
        wire(components, edges)
    assert caught.value.code == "VLX1102"
    return caught.value


def test_free_inputs_and_unread_outputs_are_public_when_components_are_wired() -> None:
    wiring = wire({"head": HEAD, "encoder": ENCODER}, [("encoder.mean", "head.features")])
    assert wiring.order == ("encoder", "head")
    assert [spec.name for spec in wiring.signature.inputs] == ["image"]
    assert [(spec.name, spec.shape) for spec in wiring.signature.outputs] == [
        ("peak", ("batch", 4)), ("output", ("batch", 2)),
    ]  # fmt: skip
    assert wiring.signature.dims == {"batch": DimRange()}


def test_signature_is_the_components_own_when_there_is_one() -> None:
    assert wire({"main": ENCODER}, []).signature == ENCODER


def test_names_and_dims_carry_the_component_when_two_share_them() -> None:
    wiring = wire({"left": HEAD, "right": HEAD, "encoder": ENCODER}, [])
    assert list(wiring.inputs) == ["image", "left.features", "right.features"]
    assert list(wiring.outputs) == ["mean", "peak", "left.output", "right.output"]
    assert list(wiring.signature.dims) == ["encoder.batch", "left.batch", "right.batch"]
    assert wiring.signature.inputs[1].shape == ("left.batch", 4)


def test_names_are_all_full_when_a_plain_one_is_spelt_as_a_full_one() -> None:
    dotted = component({"x": (2,)}, {"a.out": (2,)})
    plain = component({"x": (2,)}, {"out": (2,)})
    wiring = wire({"a": plain, "b": plain, "c": dotted}, [])
    assert list(wiring.outputs) == ["a.out", "b.out", "c.a.out"]


def test_output_feeds_two_inputs_when_two_edges_say_so() -> None:
    wiring = wire({"e": ENCODER, "h": HEAD, "k": HEAD}, [("e.mean", "h.features"), ("e.mean", "k.features")])
    runs = {
        "e": lambda given: {"mean": given["image"] + 1, "peak": given["image"]},
        "h": lambda given: {"output": given["features"] * 2},
        "k": lambda given: {"output": given["features"] * 3},
    }
    found = wiring.run({"image": np.ones(1)}, runs)
    assert {name: float(value[0]) for name, value in found.items()} == {"peak": 1, "h.output": 4, "k.output": 6}


def test_only_the_group_is_run_when_inputs_of_others_are_left_out() -> None:
    wiring = wire({"encoder": ENCODER, "head": HEAD, "text": HEAD}, [("encoder.mean", "head.features")])
    assert wiring.needed("image") == ("image",)

    def never(given: object) -> dict[str, Any]:
        raise AssertionError("the text tower is not asked for")

    runs = {
        "encoder": lambda given: {"mean": given["image"], "peak": given["image"]},
        "head": lambda given: {"output": given["features"]},
        "text": never,
    }
    assert list(wiring.run({"image": np.ones(1)}, runs)) == ["peak", "head.output"]


@pytest.mark.parametrize(
    ("produced", "consumed", "expected"),
    [
        ((1, None), (2, 8), DimRange(min=2, max=8, opt=2)),
        ((2, 6), (1, 4), DimRange(min=2, max=4, opt=2)),
        ((1, 8), (1, 8), DimRange(min=1, max=8, opt=1)),
    ],
)
def test_ranges_are_intersected_when_an_edge_joins_dims(
    produced: tuple[int, int | None], consumed: tuple[int, int | None], expected: DimRange
) -> None:
    encoder = component({"x": ("batch", 3)}, {"y": ("batch", 4)}, {"batch": produced})
    head = component({"y": ("rows", 4)}, {"z": ("rows", 2)}, {"rows": consumed})
    signature = wire({"encoder": encoder, "head": head}, [("encoder.y", "head.y")]).signature
    assert signature.dims == {"batch": expected}
    assert signature.outputs[0].shape == ("batch", 2)


def test_dim_is_fixed_for_the_whole_when_one_end_fixes_it() -> None:
    fixed = component({"features": (5, 4)}, {"output": (5, 2)})
    wiring = wire({"encoder": ENCODER, "head": fixed}, [("encoder.mean", "head.features")])
    assert wiring.signature.inputs[0].shape == (5, 3, 8)
    assert wiring.signature.dims == {}
    assert wiring.dims.sizes("encoder", {}) == {"batch": 5}


def test_dim_is_joined_through_a_chain_when_edges_follow_each_other() -> None:
    middle = component({"x": ("n", 4)}, {"y": ("n", 4)}, {"n": (2, None)})
    last = component({"features": ("m", 4), "mask": ("m",)}, {"output": ("m", 2)}, {"m": (1, 9)})
    edges = [("middle.y", "last.features"), ("encoder.mean", "middle.x")]
    wiring = wire({"encoder": ENCODER, "last": last, "middle": middle}, edges)
    assert wiring.order == ("encoder", "middle", "last")
    assert wiring.signature.dims == {"batch": DimRange(min=2, max=9, opt=2)}
    assert {spec.name: spec.shape[0] for spec in wiring.signature.inputs} == {"image": "batch", "mask": "batch"}
    assert wiring.dims.sizes("last", {"batch": 4}) == {"m": 4}


def test_computed_dim_feeds_a_dynamic_one_when_no_free_input_shares_it() -> None:
    doubling = component({"x": ("batch", 3)}, {"y": ("2*batch", 4)}, BATCH)
    wiring = wire({"doubling": doubling, "head": HEAD}, [("doubling.y", "head.features")])
    assert wiring.signature.outputs[0].shape == ("head.batch", 2)
    masked = component({"features": ("n", 4), "mask": ("n",)}, {"output": ("n", 2)}, {"n": (1, None)})
    assert "2*batch" in refused({"doubling": doubling, "head": masked}, [("doubling.y", "head.features")]).message


PAIR = {"encoder": ENCODER, "head": HEAD}
GOOD = ("encoder.mean", "head.features")


@pytest.mark.parametrize(
    ("components", "edges", "said"),
    [
        ({}, [], "no component"),
        ({"a b": HEAD}, [], "'a b'"),
        ({"../x": HEAD}, [], "no name"),
        ({"x" * 65: HEAD}, [], "no name"),
        ({"é": HEAD}, [], "no name"),
        ({"": HEAD}, [], "no name"),
        ({"whole": HEAD}, [], "may be called 'whole'"),
        ({"Head": HEAD, "head": HEAD}, [], "case only"),
        (PAIR, [("encodr.mean", "head.features")], "did you mean 'encoder'"),
        (PAIR, [("encoder.maen", "head.features")], "did you mean 'mean'"),
        (PAIR, [("encoder.mean", "head.feature")], "did you mean 'features'"),
        (PAIR, [("encoder.image", "head.features")], "no output 'image'"),
        (PAIR, [("encoder", "head.features")], "'encoder' is not component.output"),
        (PAIR, [("encoder.", "head.features")], "not component.output"),
        (PAIR, [GOOD, ("encoder.peak", "head.features")], "fed by encoder.mean already"),
        (PAIR, [GOOD, GOOD], "fed by encoder.mean already"),
        ({"a": HEAD, "b": component({"x": ("n", 2)}, {"y": ("n", 4)}, {"n": (1, None)})},
         [("a.output", "b.x"), ("b.y", "a.features")], "circle: none of a, b"),
        ({"a": component({"x": (2,)}, {"y": (2,)})}, [("a.y", "a.x")], "circle"),
        ({**PAIR, "head": component({"features": ("b", 5)}, {"o": ("b",)}, {"b": (1, None)})}, [GOOD], "dim 1 is 4"),
        ({**PAIR, "head": component({"features": ("b", 4, 1)}, {"o": ("b",)}, {"b": (1, None)})}, [GOOD],
         "batch×4 does not fit b×4×1"),
        ({**PAIR, "head": component({"features": ("int64", (1, 4))}, {"o": (1,)})}, [GOOD], "is int64"),
        ({"encoder": component({"i": ("b", 2)}, {"mean": ("b", 4)}, {"b": (4, 8)}),
          "head": component({"features": ("n", 4)}, {"o": ("n",)}, {"n": (1, 3)})}, [GOOD], "4 to 8 and 1 to 3"),
        ({"encoder": component({"i": ("b", 2)}, {"mean": ("b", 4)}, {"b": (2, None)}),
          "head": component({"features": (1, 4)}, {"o": (1,)})}, [GOOD], "2 to any and 1 have no size in common"),
        ({"encoder": component({"i": ("b", 2)}, {"mean": ("2*b", 4)}, {"b": (1, None)}),
          "head": component({"features": (2, 4)}, {"o": (1,)})}, [GOOD], "known only when it runs"),
    ],
)  # fmt: skip
def test_components_are_refused_in_words_when_they_do_not_fit(
    components: dict[str, Signature], edges: list[tuple[str, str]], said: str
) -> None:
    assert said in refused(components, edges).message


def test_wiring_is_the_same_when_components_come_in_another_order() -> None:
    first: Wiring = wire({"encoder": ENCODER, "head": HEAD, "text": HEAD}, [GOOD])
    second = wire({"text": HEAD, "head": HEAD, "encoder": ENCODER}, [GOOD])
    assert (first.order, first.signature, first.inputs) == (second.order, second.signature, second.inputs)
