"""QuantScheme: data that holds together, and the choice by device."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from vlexport.core.bundle_schema import Machine
from vlexport.core.device_profiles import device_profiles
from vlexport.core.errors import CapabilityError
from vlexport.core.grids import GRIDS
from vlexport.core.palettes import PALETTES
from vlexport.core.scheme import E4M3, QuantScheme, TensorRule, choose_scheme
from vlexport.ir import dialect
from vlexport.targets import CATALOGUE, open_target


def machine(*flags: str) -> Machine:
    return Machine(cpu="a processor", instruction_set=flags, cores=2, system="Linux x86_64", python="3.11")


def chosen(target: str, device: str, *flags: str, precision: str = "int8", **options: Any) -> QuantScheme:
    return choose_scheme(
        open_target(target).schemes(), precision, device_profiles()[device], machine(*flags), **options
    )


@pytest.mark.parametrize("target", CATALOGUE)
def test_schemes_name_operators_that_exist_and_give_their_sources(target: str) -> None:
    plain = {dialect.plain_name(name) for name in dialect.OPS}
    found = open_target(target).schemes()
    assert found, "every target of ours takes quantized models in some way"
    assert len({each.id for each in found}) == len(found)
    for scheme in found:
        named = {name for layer in scheme.layers for name in layer.operators}
        assert named | set(scheme.shared) | set(scheme.in_float) <= plain
        assert scheme.sources
        assert all(scheme.sources.values())
        assert all(layer.why for layer in scheme.layers)
        for layer in scheme.layers:
            rules = [rule for rule in (layer.activation, layer.weight) if rule is not None]
            assert rules
            assert all(rule.type in (*GRIDS, *PALETTES, E4M3) for rule in rules)
            assert layer.weight is None or layer.weight.symmetric, "no target is faster with zero points of weights"


@pytest.mark.parametrize(
    ("device", "flags", "kind", "found", "weight"),
    [
        ("cpu-x86-avx2", (), "static", "static-u8s7", "int7"),
        ("cpu-x86-vnni", (), "static", "static-u8s8", "int8"),
        ("cpu-x86-avx2", ("avx512_vnni",), "static", "static-u8s7", "int7"),  # it will run elsewhere
        ("this", ("avx2", "fma"), "static", "static-u8s7", "int7"),
        ("this", ("avx2", "avx_vnni"), "static", "static-u8s8", "int8"),
        ("this", ("asimd", "asimddp"), "static", "static-u8s8", "int8"),
        ("cpu-x86-avx2", (), "dynamic", "dynamic-u8s7", "int7"),
        ("cpu-x86-vnni", (), "dynamic", "dynamic-u8s8", "int8"),
        ("cpu-x86-avx2", (), "weights", "weights-s8", "int8"),
    ],
)
def test_weights_have_7_bits_when_the_processor_would_saturate(
    device: str, flags: tuple[str, ...], kind: str, found: str, weight: str
) -> None:
    scheme = chosen("onnxruntime", device, *flags, kind=kind)
    rule = scheme.layer("linear")
    assert rule is not None
    assert rule.weight is not None
    assert (scheme.id, rule.weight.type) == (found, weight)


def test_rules_are_those_that_onnxruntimes_kernels_were_seen_to_want() -> None:
    scheme = chosen("onnxruntime", "cpu-x86-avx2")
    conv, linear = scheme.layer("conv2d"), scheme.layer("linear")
    assert conv is not None
    assert linear is not None
    assert (conv.output, linear.output) == ("quantized", "free")
    assert (conv.bias, linear.bias) == ("int32", "int32")
    assert conv.activation == linear.activation == TensorRule(type="uint8", symmetric=False)
    assert scheme.layer("add") is None
    assert "residual" in scheme.in_float["add"]


@pytest.mark.parametrize(
    ("device", "precision", "kind", "found"),
    [
        ("jetson-orin-jp6", "int8", "static", "static-s8"),
        ("rtx", "int8", "static", "static-s8"),
        ("this", "int8", "static", "static-s8"),
        ("rtx", "fp8", "static", "static-e4m3"),
        ("rtx", "int8", "weights", "weights-s8"),
    ],
)
def test_scheme_follows_the_gpu_when_the_target_is_tensorrt(device: str, precision: str, kind: str, found: str) -> None:
    scheme = chosen("tensorrt", device, precision=precision, kind=kind)
    assert scheme.id == found
    assert {layer.bias for layer in scheme.layers} == {"float"}, "an int32 bias is refused"
    assert all(layer.activation is None or layer.activation.symmetric for layer in scheme.layers)


@pytest.mark.parametrize(
    ("target", "device", "precision", "kind", "reason"),
    [
        ("tensorrt", "jetson-orin-jp6", "fp8", "static", "compute-capability 8.9 is needed, jetson-orin-jp6 has 8.7"),
        ("tensorrt", "this", "fp8", "static", "nothing is known of the compute-capability of this"),
        ("coreml", "ios17", "fp8", "static", "the target has no such scheme"),
        ("coreml", "ios17", "int8", "dynamic", "the target has no such scheme"),
    ],
)
def test_precision_is_refused_with_the_reason_when_no_scheme_fits(
    target: str, device: str, precision: str, kind: str, reason: str
) -> None:
    with pytest.raises(CapabilityError) as error:
        chosen(target, device, precision=precision, kind=kind)
    assert error.value.code == "VLX0502"
    assert reason in error.value.message


def test_scheme_of_core_ml_follows_the_system() -> None:
    assert chosen("coreml", "ios17").id == "w8a8"
    assert chosen("coreml", "ios18", kind="weights").id == "weights-s8"
    with pytest.raises(CapabilityError, match="ios17 runs no int4 weights: weights-s4: deployment-target 18 is needed"):
        chosen("coreml", "ios17", kind="weights", weight="int4")
    four = next(each for each in open_target("coreml").schemes() if each.id == "weights-s4")
    assert "18 is needed, ios17 has iOS17" in four.why_not(device_profiles()["ios17"], machine())
    assert four.why_not(device_profiles()["ios18"], machine()) == ""


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"type": "int9"}, "no type 'int9'"),
        ({"granularity": "block"}, "blocks and groups have a size"),
        ({"block": 16}, "blocks and groups have a size"),
        ({"type": "e4m3", "symmetric": False}, "e4m3 has no zero point"),
        ({"fixed_scale": 0.0}, "greater than 0"),
    ],
)
def test_rule_is_refused_when_it_does_not_hold_together(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        TensorRule.model_validate({"type": "int8", "symmetric": True, **change})


def test_scheme_is_refused_when_an_operator_has_two_places() -> None:
    rule = {"operators": ["linear"], "activation": {"type": "int8", "symmetric": True}, "why": "so"}
    plain = {"id": "x", "precision": "int8", "layers": [rule], "sources": {"a": "b"}}
    QuantScheme.model_validate(plain)
    with pytest.raises(ValidationError, match="an operator has two rules"):
        QuantScheme.model_validate({**plain, "layers": [rule, rule]})
    with pytest.raises(ValidationError, match="is quantized and in float"):
        QuantScheme.model_validate({**plain, "in_float": {"linear": "no"}})
