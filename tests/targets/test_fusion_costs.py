"""Which fusions a build writes: what was measured on such a processor decides, and the user before it."""

from __future__ import annotations

import pytest

from vlexport.core.bundle_schema import Machine
from vlexport.core.device_profiles import device_profiles
from vlexport.targets import onnxruntime as target
from vlexport.targets.onnxruntime import OnnxRuntimeOptions, OnnxRuntimeTarget, fusions
from vlexport.targets.onnxruntime.fusions import FusionCost, fusion_costs, is_worth_it


def cost(fusion: str, precision: str, flag: str, low: float) -> FusionCost:
    return FusionCost(
        fusion=fusion, precision=precision, instruction_set=flag, processor="one", model="net",
        source="planted",
        ratio=low + 0.02, low=low, high=low + 0.04,
    )  # fmt: skip


PLANTED = (
    cost("fuse-attention", "fp32", "avx512_vnni", 0.99),
    cost("fuse-attention", "fp32", "avx2", 1.01),
    cost("fuse-qattention", "int8", "avx512_vnni", 1.05),
    cost("fuse-biased-attention", "fp32", "avx2", 0.99),
    cost("fuse-biased-attention", "fp32", "avx2", 1.01),
    cost("fuse-biased-attention", "fp32", "asimd", 1.01),
    cost("fuse-biased-attention", "fp32", "asimd", 0.95),
)


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusions, "fusion_costs", lambda: PLANTED)


@pytest.mark.parametrize(
    ("fusion", "precision", "flags", "wanted"),
    [
        ("fuse-attention", "fp32", ("avx2", "fma"), True),
        ("fuse-attention", "fp32", ("avx2", "avx512_vnni"), False),  # the newer kind speaks, and is within its noise
        ("fuse-qattention", "int8", ("avx2", "avx512_vnni"), True),
        ("fuse-qattention", "int8", ("avx2",), False),  # nothing is known
        ("fuse-qattention", "fp32", ("avx512_vnni",), False),
        ("fuse-attention", "fp32", (), False),
        ("fuse-biased-attention", "fp32", ("avx2",), True),  # one model is faster, none slower
        ("fuse-biased-attention", "fp32", ("asimd",), False),  # one is slower
    ],
)
@pytest.mark.usefixtures("planted")
def test_fusion_is_on_where_the_interval_on_such_a_processor_lies_above_1(
    fusion: str, precision: str, flags: tuple[str, ...], wanted: bool
) -> None:
    assert is_worth_it(fusion, precision, flags) is wanted


def settled(precision: str, device: str = "cpu-x86-vnni", **given: object) -> tuple[bool | None, ...]:
    options = OnnxRuntimeOptions.model_validate(given)
    made = OnnxRuntimeTarget().settled(options, precision=precision, device=device_profiles()[device])
    assert isinstance(made, OnnxRuntimeOptions)
    return made.fuse_attention, made.fuse_qattention, made.fuse_dynamic_linear


@pytest.mark.usefixtures("planted")
def test_what_the_user_leaves_open_is_settled_by_device_and_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settled("int8") == (False, True, True)
    assert settled("fp32", "cpu-x86-avx2") == (True, False, False)
    assert settled("fp16") == (False, False, False)
    assert settled("int8", fuse_attention="true", fuse_qattention="false") == (True, False, True)
    assert settled("int8", provider="openvino") == (False, False, False), "another provider has no such operators"
    here = Machine(cpu="", instruction_set=("avx2",), cores=1, system="", python="")
    monkeypatch.setattr(target, "this_machine", lambda: here)
    assert settled("fp32", "this") == (True, False, False), "this machine is looked at where it is the device"


def test_shipped_table_holds_measured_rows_of_fusions_that_exist() -> None:
    names = {each.name for each in OnnxRuntimeTarget.lowered}
    kinds = [each.instruction_set for each in fusion_costs()]
    for each in fusion_costs():
        assert each.fusion in names
        assert 0 < each.low <= each.ratio <= each.high
        assert "python -m tests.benchmarks.onnxruntime_fusions" in each.source
    order = ["avx512_vnni", "avx2", "asimddp", "asimd"]
    assert kinds == sorted(kinds, key=order.index), "the newest kind speaks first"
