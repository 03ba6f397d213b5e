"""Device profiles are data with sources, chosen by name."""

from __future__ import annotations

import pytest

from vlexport.core.bundle_schema import Machine
from vlexport.core.device_profiles import device_profile, device_profiles
from vlexport.core.devices import this_machine
from vlexport.core.errors import UsageError


def machine(*flags: str) -> Machine:
    return Machine(cpu="a processor", instruction_set=flags, cores=2, system="Linux x86_64", python="3.11.7")


def test_every_fact_names_its_source_when_profiles_are_read() -> None:
    assert {"this", "cpu-x86-avx2", "cpu-x86-vnni"} <= set(device_profiles())
    for profile in device_profiles().values():
        assert profile.summary
        for fact in profile.facts.values():
            assert fact.value
            assert len(fact.source) > 10


def test_machine_is_the_device_when_it_has_the_instruction_set() -> None:
    vnni = device_profile("cpu-x86-vnni", target="onnxruntime")
    assert vnni.is_this(machine("avx2", "fma", "avx512f", "avx512_vnni"))
    assert not vnni.is_this(machine("avx2", "fma", "avx512f"))
    assert device_profile("this", target="onnxruntime").is_this(this_machine())
    assert device_profile("this", target="onnxruntime").is_this(machine())


def test_nearest_name_is_given_when_the_profile_is_unknown() -> None:
    with pytest.raises(UsageError) as caught:
        device_profile("cpu-x86-avx", target="onnxruntime")
    assert caught.value.code == "VLX0703"
    assert "did you mean 'cpu-x86-avx2'?" in caught.value.message
    assert "cpu-x86-vnni" in caught.value.hint


def test_profile_is_refused_when_the_target_does_not_run_there() -> None:
    with pytest.raises(UsageError) as caught:
        device_profile("cpu-x86-avx2", target="elsewhere")
    assert "elsewhere does not run on cpu-x86-avx2" in caught.value.message
    assert caught.value.hint == "it runs on: this"
