"""The runner checks order, contract and facts, and names the pass that breaks them."""

from __future__ import annotations

import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.harness import content
from tests.passes.broken import Rewriting, Whole, again, net_program, with_tensor
from vlexport.core.errors import InternalError
from vlexport.ir.program import Program
from vlexport.ir.text import fingerprint, text
from vlexport.passes.canonicalize import Canonicalize
from vlexport.passes.gate import NumericGate
from vlexport.passes.pipeline import DumpHook, TimingHook, check_order, run_pass, run_pipeline, verify
from vlexport.passes.probes import make_probes
from vlexport.passes.reparameterize import Reparameterize

aten = torch.ops.aten


def nothing(**facts: Any) -> Whole:
    """A pass that does nothing, with other facts or another stage."""
    made = Whole(lambda ir: None, says=0)
    for key, value in facts.items():
        setattr(made, key, frozenset(value) if isinstance(value, set) else value)
    return made


def broken_code(work: Callable[[], object], code: str) -> InternalError:
    with pytest.raises(InternalError) as error:
        work()
    assert error.value.code == code
    return error.value


def test_order_is_accepted_when_facts_are_established_before() -> None:
    check_order([Canonicalize(), Reparameterize(), nothing(requires={"canonical"}, stage="narrow")])


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ([nothing(requires={"canonical"})], "break-everything requires canonical, not established"),
        (
            [Canonicalize(), nothing(breaks={"canonical"}), nothing(requires={"canonical"}, name="reader")],
            "pass reader requires canonical, not established",
        ),
        ([nothing(stage="raise"), Canonicalize()], "canonicalize of stage normalize stands behind a later stage"),
        ([nothing(requires={"no-such-fact"})], "names the fact 'no-such-fact', which has no predicate"),
        ([nothing(breaks={"no-such-fact"})], "names the fact 'no-such-fact', which has no predicate"),
        ([nothing(establishes={"no-such-fact"})], "names the fact 'no-such-fact', which has no predicate"),
    ],
)
def test_order_is_refused_when_it_is_impossible(passes: list[Any], message: str) -> None:
    assert message in broken_code(lambda: check_order(passes), "VLX0405").message


def test_pipeline_refuses_the_order_before_running_anything_when_it_is_impossible() -> None:
    ran: list[Program] = []
    passes = [Whole(ran.append, says=0), nothing(requires={"canonical"})]
    broken_code(lambda: run_pipeline(net_program(), passes, gate=None), "VLX0405")
    assert ran == []


def test_pass_is_refused_when_a_claimed_fact_does_not_hold() -> None:
    lies = nothing(establishes={"canonical"})
    error = broken_code(lambda: run_pass(lies, net_program(), gate=None), "VLX0407")
    assert "break-everything did not establish 'canonical'" in error.message


def test_pass_is_refused_when_it_reports_changes_and_made_none() -> None:
    error = broken_code(lambda: run_pass(Whole(lambda ir: None), net_program(), gate=None), "VLX0403")
    assert "break-everything reports 1 changes, but its program is not different" in error.message


def scaled(program: Program) -> Any:
    node = program.calls("aten.linear.default")[0]
    program.replace(node, with_tensor(program, node, 1, lambda t: t * 1.0001))


def test_pass_is_refused_when_it_changes_and_reports_nothing() -> None:
    error = broken_code(lambda: run_pass(Whole(scaled, says=0), net_program(), gate=None), "VLX0403")
    assert "break-everything reports no change, but its program is different" in error.message


def same_name_other_content(program: Program) -> None:
    program.tensors["head.weight"] = program.tensors["head.weight"] * 1.0001


def test_pass_is_refused_when_it_swaps_a_tensor_under_its_old_name_and_reports_nothing() -> None:
    broken_code(lambda: run_pass(Whole(same_name_other_content, says=0), net_program(), gate=None), "VLX0403")


def in_place(program: Program) -> None:
    node = program.calls("aten.relu.default")[0]
    node.target = aten.relu_.default


def without_origins(program: Program) -> None:
    program.calls("aten.relu.default")[0].meta.pop("custom")


def without_shape(program: Program) -> None:
    program.calls("aten.relu.default")[0].meta.pop("val")


def read_too_early(program: Program) -> None:
    relu, sub = program.calls("aten.relu.default")[0], program.calls("aten.sub.Tensor")[0]
    sub.append(relu)


def unknown_tensor(program: Program) -> None:
    program.tensors.pop("head.weight")


def python_call(program: Program) -> None:
    program.calls("aten.relu.default")[0].target = Path  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("work", "message", "where"),
    [
        (in_place, "aten.relu_.default writes to its argument", "aten.relu_ in act"),
        (without_origins, "it has no origins", "aten.relu"),
        (without_shape, "aten.relu.default has no recorded shape", "aten.relu in act"),
        (read_too_early, "it reads relu before it is made", "aten.sub.Tensor in shift"),
        (unknown_tensor, "tensor head.weight is not stored", "get_attr"),
        (python_call, "is neither an ATen overload nor arithmetic on sizes", "in act"),
    ],
)
def test_verify_names_the_node_when_the_program_is_invalid(work: Any, message: str, where: str) -> None:
    program = net_program()
    verify(program, made_by="capture")
    work(program)
    error = broken_code(lambda: verify(program, made_by="some-pass"), "VLX0403")
    assert "pass some-pass left an invalid program" in error.message
    assert message in error.message
    assert where in error.where


def lose_an_output(program: Program) -> None:
    program.output.args = (program.output.args[0][:1],)  # type: ignore[index]


def rename_an_output(program: Program) -> None:
    first, second = program.signature.outputs
    outputs = (first.model_copy(update={"name": "scores"}), second)
    program.signature = program.signature.model_copy(update={"outputs": outputs})


@pytest.mark.parametrize("work", [lose_an_output, rename_an_output])
def test_pass_is_refused_when_it_changes_the_signature(work: Any) -> None:
    program = net_program()
    broken_code(lambda: run_pass(Whole(work), program, gate=None), "VLX0403")


def test_source_is_untouched_and_records_are_complete_when_a_pipeline_ran() -> None:
    program = net_program()
    before = content(program)
    gate = NumericGate(program, make_probes(program, calibration=None, seed=0))
    after, records = run_pipeline(program, [Canonicalize(), Reparameterize()], gate=gate)
    assert content(program) == before
    assert fingerprint(after) != fingerprint(program)
    assert [r.name for r in records] == ["canonicalize", "reparameterize"]
    assert records[0].gate.proof == "identical"
    assert records[0].gate.probes == 3
    assert [(c.what, c.count) for c in records[0].changes] == [
        ("flatten spelled as reshape", 1),
        ("transpose spelled as permute", 2),
    ]
    assert records[1].changes == ()
    assert records[1].gate.probes == 0, "an unchanged program is not run again"


def test_gate_is_recorded_as_off_when_there_is_none() -> None:
    _, records = run_pipeline(net_program(), [Canonicalize()], gate=None)
    assert records[0].gate.proof == "off"


def test_timing_hook_adds_up_when_a_pass_runs_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([1.0, 3.0, 10.0, 10.5])
    monkeypatch.setattr("vlexport.passes.pipeline.time.perf_counter", lambda: next(ticks))
    hook = TimingHook()
    run_pipeline(net_program(), [Canonicalize(), Canonicalize()], gate=None, hooks=[hook])
    assert hook.seconds == {"canonicalize": 2.5}


def test_dump_hook_writes_source_and_every_step_when_given_a_folder(tmp_path: Path) -> None:
    program = net_program()
    after, _ = run_pipeline(program, [Canonicalize(), Reparameterize()], gate=None, hooks=[DumpHook(tmp_path / "dump")])
    files = {p.name: p.read_text(encoding="utf-8") for p in (tmp_path / "dump").iterdir()}
    assert sorted(files) == ["00-source.txt", "01-canonicalize.txt", "02-reparameterize.txt"]
    assert files["00-source.txt"] == text(program)
    assert files["02-reparameterize.txt"] == text(after)


def test_hook_is_not_told_of_a_pass_when_it_was_refused() -> None:
    told: list[str] = []

    class Listener:
        def before_pass(self, applied: Any, program: Program) -> None:
            told.append(f"before {applied.name}")

        def after_pass(self, applied: Any, program: Program, record: Any) -> None:
            told.append(f"after {applied.name}")

    with pytest.raises(InternalError):
        run_pipeline(net_program(), [Canonicalize(), Whole(lambda ir: None)], gate=None, hooks=[Listener()])
    assert told == ["before canonicalize", "after canonicalize", "before break-everything"]


def test_python_arithmetic_on_sizes_is_valid_when_a_pass_adds_it() -> None:
    def by_batch(ir: Program, node: Any) -> Any:
        size = ir.add_call(aten.sym_size.int, (node.args[0], 0), before=node, value_of=node)
        one = ir.add_call(operator.floordiv, (size, size), before=node, value_of=node)
        same = again(ir, node, *node.args)
        return ir.add_call(aten.mul.Tensor, (same, one), before=node, value_of=node)

    program = net_program()
    gate = NumericGate(program, make_probes(program, calibration=None, seed=0))
    _, record = run_pass(Rewriting("aten.relu.default", by_batch), program, gate=gate)
    assert record.gate.proof == "identical"
