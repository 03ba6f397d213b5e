"""The numeric gate catches broken passes, names pass and node, and raises no false alarm."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

from tests.harness import captured, randomize
from tests.passes.broken import Rewriting, Whole, again, net_program, with_tensor
from vlexport.core.errors import CapabilityError, GateError
from vlexport.ir.program import Program
from vlexport.passes import gate as gate_module
from vlexport.passes.canonicalize import Canonicalize
from vlexport.passes.gate import FLOAT32_BOUND, NumericGate, one_digit
from vlexport.passes.pipeline import run_pass, run_pipeline
from vlexport.passes.probes import MAX_IMAGES, Probe, make_probes
from vlexport.passes.reparameterize import Reparameterize

aten = torch.ops.aten


def gate_of(program: Program, calibration: list[Tensor] | None = None) -> NumericGate:
    return NumericGate(program, make_probes(program, calibration=calibration, seed=0))


def caught(applied: Any, program: Program, calibration: list[Tensor] | None = None) -> GateError:
    gate = gate_of(program, calibration)
    with pytest.raises(GateError) as error:
        run_pass(applied, program, gate=gate)
    return error.value


def scale_weight(ir: Program, node: Node) -> Node:
    return with_tensor(ir, node, 1, lambda t: t * 1.01)


def one_wrong_weight(ir: Program, node: Node) -> Node:
    def change(tensor: Tensor) -> Tensor:
        changed = tensor.clone()
        changed.view(-1)[5] += 0.01
        return changed

    return with_tensor(ir, node, 1, change)


def transpose_weight(ir: Program, node: Node) -> Node:
    return with_tensor(ir, node, 1, lambda t: t.t().contiguous())


def drop_bias(ir: Program, node: Node) -> Node:
    return again(ir, node, *node.args[:2], None, *node.args[3:])


def swap_operands(ir: Program, node: Node) -> Node:
    return again(ir, node, node.args[1], node.args[0])


def wrong_axis(ir: Program, node: Node) -> Node:
    return again(ir, node, node.args[0], 1)


def make_nan(ir: Program, node: Node) -> Node:
    return again(ir, node, *node.args, target=aten.sqrt.default)


def slice_one_further(ir: Program, node: Node) -> Node:
    x, dim, start, end = node.args[:4]
    return again(ir, node, x, dim, start - 1, end - 1)  # type: ignore[operator]


def only_at_batch_one(ir: Program, node: Node) -> Node:
    same = again(ir, node, *node.args)
    size = ir.add_call(aten.sym_size.int, (node.args[0], 0), before=node, value_of=node)
    one = ir.add_call(operator.floordiv, (1, size), before=node, value_of=node)
    extra = ir.add_call(aten.mul.Tensor, (same, one), before=node, value_of=node)
    return ir.add_call(aten.add.Tensor, (same, extra), before=node, value_of=node)


def only_above(bound: float) -> Callable[[Program, Node], Node]:
    return lambda ir, node: again(ir, node, node.args[0], 0.0, bound, target=aten.clamp.default)


@pytest.mark.parametrize(
    ("operator_name", "rewrite", "where"),
    [
        ("aten.conv2d.default", scale_weight, "aten.conv2d in stem (torch/nn/modules/conv.py:"),
        ("aten.conv2d.default", one_wrong_weight, "aten.conv2d in stem ("),
        ("aten.conv2d.default", drop_bias, "aten.conv2d in stem ("),
        ("aten.sub.Tensor", swap_operands, "aten.sub.Tensor in shift (broken.py:"),
        ("aten.softmax.int", wrong_axis, "aten.softmax.int in mix (broken.py:"),
        ("aten.relu.default", make_nan, "aten.sqrt in act ("),
        ("aten.slice.Tensor", slice_one_further, "aten.slice.Tensor (broken.py:"),
        ("aten.linear.default", transpose_weight, "aten.linear in head ("),
    ],
)
def test_gate_names_pass_and_node_when_values_change(operator_name: str, rewrite: Any, where: str) -> None:
    program = net_program()
    if operator_name == "aten.slice.Tensor":  # the captured graph also slices the batch whole
        assert [n.args[3] for n in program.calls("aten.slice.Tensor")][-1] == 33
        rewrite = _only(lambda n: n.args[3] == 33, slice_one_further)
    error = caught(Rewriting(operator_name, rewrite), program)
    assert error.code == "VLX0401"
    assert error.message.startswith("pass break-something changed what the model computes: ")
    assert where.removesuffix("(torch/nn/modules/conv.py:") in error.where, error.where
    assert error.hint


def _only(wanted: Callable[[Node], bool], rewrite: Any) -> Any:
    return lambda ir, node: rewrite(ir, node) if wanted(node) else again(ir, node, *node.args)


def test_gate_names_the_probe_when_only_batch_one_is_wrong() -> None:
    program = net_program()
    program.example = (torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3)),)
    error = caught(Rewriting("aten.relu.default", only_at_batch_one), program)
    assert "on the draw at the smallest size" in error.message
    assert error.where.startswith("aten.add.Tensor in act")


def test_gate_is_blind_to_real_values_without_a_sample_and_sees_with_one_when_given() -> None:
    """Drawn images are standard normal; a photo that was never normalised is not."""
    program = net_program()
    broken = Rewriting("aten.relu.default", only_above(30.0))
    _, record = run_pass(broken, program, gate=gate_of(program))
    assert record.gate.proof == "identical"
    photo = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 255
    error = caught(broken, program, calibration=[photo])
    assert "on the calibration sample" in error.message
    assert error.where.startswith("aten.clamp in act")


def test_gate_names_the_first_pass_when_ten_drift() -> None:
    program = net_program()
    drift = [
        Rewriting("aten.linear.default", lambda ir, n: with_tensor(ir, n, 1, lambda t: t * 1.001), name=f"drift-{i}")
        for i in range(10)
    ]
    with pytest.raises(GateError) as error:
        run_pipeline(program, drift, gate=gate_of(program))
    assert "pass drift-0 " in error.value.message


def test_gate_names_the_guilty_when_good_passes_stand_around_it() -> None:
    program = net_program()
    passes = [Canonicalize(), Rewriting("aten.linear.default", scale_weight), Reparameterize()]
    with pytest.raises(GateError) as error:
        run_pipeline(program, passes, gate=gate_of(program))
    assert "pass break-something " in error.value.message
    assert error.value.where.startswith("aten.linear in head")


def test_gate_names_the_outputs_when_two_are_swapped() -> None:
    def swap(program: Program) -> None:
        first, second = program.results
        program.output.args = ((second, first),)

    error = caught(Whole(swap), net_program())
    assert error.code == "VLX0401"
    assert error.where == "the order of outputs (logits, doubled)"


def by_method(tensor: Tensor) -> None:
    tensor.mul_(1.01)


def by_data(tensor: Tensor) -> None:
    tensor.data[0] += 0.01


def by_numpy(tensor: Tensor) -> None:
    tensor.numpy()[0] += 0.01


@pytest.mark.parametrize("edit", [by_method, by_data, by_numpy])
@pytest.mark.parametrize("says", [0, 1])
def test_gate_names_pass_and_parameter_when_a_weight_is_edited_in_place(
    edit: Callable[[Tensor], None], says: int
) -> None:
    error = caught(Whole(lambda ir: edit(ir.tensors["head.weight"]), says=says), net_program())
    assert error.code == "VLX0406"
    assert error.message == "pass break-everything edited parameter head.weight in place"
    assert error.where == "head.weight"


def test_gate_names_the_node_when_the_program_does_not_run() -> None:
    def wrong_size(ir: Program, node: Node) -> Node:
        new = again(ir, node, *node.args)
        new.args = (new.args[0], ir.add_tensor("wrong", torch.ones(4, 5), before=new), new.args[2])
        return new

    error = caught(Rewriting("aten.linear.default", wrong_size), net_program())
    assert error.code == "VLX0401"
    assert "after pass break-something the program does not run on the example" in error.message
    assert error.where.startswith("aten.linear in head")


# -- no false alarm, and no excuse ---------------------------------------------------------------------------------


def ill_scaled(offset: float, depth: int = 3) -> Program:
    """Each convolution adds ``offset`` that its batch norm takes away: float32 loses what folding keeps."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(depth):
        conv, norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        layers += [conv, norm, nn.ReLU()]
    model = randomize(nn.Sequential(*layers))
    with torch.no_grad():
        for conv, norm, _ in zip(*[iter(model)] * 3, strict=True):  # type: ignore[call-overload]
            conv.bias.fill_(offset)
            norm.running_mean.fill_(offset)
    return captured(model, torch.randn(1, 4, 6, 6))


def test_gate_proves_a_fold_in_float64_when_float32_rounds_above_the_bound() -> None:
    program = ill_scaled(2000.0)
    after, record = run_pass(Reparameterize(), program, gate=gate_of(program))
    assert not after.calls("aten.batch_norm.default")
    assert record.gate.proof == "float64"
    assert record.gate.worst > FLOAT32_BOUND


def test_gate_still_catches_a_wrong_weight_when_float32_rounds_above_the_bound() -> None:
    program = ill_scaled(2000.0)
    error = caught(
        Rewriting("aten.conv2d.default", lambda ir, n: with_tensor(ir, n, 1, lambda t: t * (1 + 1e-5))), program
    )
    assert error.where.startswith("aten.conv2d in 0")
    assert "bound 1e-09" in error.message


def test_gate_takes_a_small_error_as_unproved_when_the_model_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate_module, "FLOAT64_WEIGHTS_LIMIT", 0)
    program = ill_scaled(500.0)
    _, record = run_pass(Reparameterize(), program, gate=gate_of(program))
    assert record.gate.proof == "unproved"
    assert FLOAT32_BOUND < record.gate.worst <= gate_module.UNPROVED_BOUND


def test_gate_refuses_a_large_error_when_the_model_is_too_large_to_prove(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate_module, "FLOAT64_WEIGHTS_LIMIT", 0)
    error = caught(Rewriting("aten.conv2d.default", scale_weight), ill_scaled(500.0))
    assert "pass break-something " in error.message
    assert error.where.startswith("aten.conv2d in 0")


def test_gate_is_not_fooled_when_a_pass_spares_the_float64_copy() -> None:
    """A pass that does nothing there proves nothing there."""

    class OnlyFloat32(Rewriting):
        def find(self, ir: Program) -> Any:
            single = all(t.dtype is torch.float32 for t in ir.tensors.values())
            return super().find(ir) if single else iter(())

    error = caught(OnlyFloat32("aten.linear.default", scale_weight), net_program())
    assert error.where.startswith("aten.linear in head")


def test_gate_proves_when_the_graph_makes_its_own_floats() -> None:
    """``eye`` and ``full`` make float32 unless told otherwise; in the float64 copy they must not."""

    class Makes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1, bias=True), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x)) @ torch.eye(4) + torch.full((4,), 0.5) @ torch.ones(4, 4)

    torch.manual_seed(0)
    model = randomize(Makes())
    with torch.no_grad():
        model.conv.bias.fill_(20000.0)  # rounds by more than the bound on every processor
        model.norm.running_mean.fill_(20000.0)
    program = captured(model, torch.randn(1, 3, 4, 4))
    _, record = run_pass(Reparameterize(), program, gate=gate_of(program))
    assert record.gate.proof == "float64"


class Classes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.linear(x)
        return logits.argmax(1), logits > 0, logits


@pytest.mark.parametrize(
    ("operator_name", "target"),
    [("aten.argmax.default", aten.argmin.default), ("aten.gt.Scalar", aten.lt.Scalar)],
)
def test_gate_compares_exactly_when_an_output_is_integer_or_boolean(operator_name: str, target: Any) -> None:
    torch.manual_seed(0)
    program = captured(Classes(), torch.randn(2, 6))
    error = caught(Rewriting(operator_name, lambda ir, n: again(ir, n, *n.args, target=target)), program)
    assert "inf on the example" in error.message
    assert error.where.startswith(str(target).removesuffix(".default"))


def test_gate_sees_one_class_off_when_the_output_is_a_large_integer() -> None:
    """As a share of the largest id, the error is 1e-7: below any bound for floats."""

    class Ids(nn.Module):
        def forward(self, ids: Tensor) -> Tensor:
            return ids + 10_000_000

    program = captured(Ids(), torch.arange(4).reshape(2, 2))
    error = caught(Rewriting("aten.add.Tensor", lambda ir, n: again(ir, n, n.args[0], 10_000_001)), program)
    assert error.code == "VLX0401"


def test_record_is_finite_when_rounding_tips_an_integer_output() -> None:
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return (self.norm(self.conv(x)) * 1e4).round().to(torch.int64)

    torch.manual_seed(0)
    model = randomize(Steps())
    with torch.no_grad():
        model.conv.bias.fill_(20000.0)  # rounds by more than the bound on every processor
        model.norm.running_mean.fill_(20000.0)
    program = captured(model, torch.randn(1, 3, 4, 4))
    _, record = run_pass(Reparameterize(), program, gate=gate_of(program))
    assert record.gate.proof == "float64"
    assert record.gate.worst == 1.0


class Logarithm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.log(self.norm(self.conv(x)))


def test_gate_accepts_nan_where_nan_was_when_a_fold_is_right() -> None:
    torch.manual_seed(0)
    program = captured(randomize(Logarithm()), torch.randn(1, 3, 4, 4))
    assert program.run(*program.example)[0].isnan().any()
    _, record = run_pass(Reparameterize(), program, gate=gate_of(program))
    assert record.gate.proof in ("float32", "float64")


def test_gate_refuses_when_nan_disappears() -> None:
    torch.manual_seed(0)
    program = captured(randomize(Logarithm()), torch.randn(1, 3, 4, 4))
    guarded = Rewriting(
        "aten.log.default", lambda ir, n: again(ir, n, again(ir, n, n.args[0], 1e-3, target=aten.clamp.default))
    )
    assert caught(guarded, program).where.startswith("aten.log")


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_gate_refuses_to_judge_when_no_output_depends_on_the_input(value: float) -> None:
    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * value

    program = captured(Constant(), torch.randn(2, 3), dynamic="auto")
    with pytest.raises(CapabilityError) as error:
        gate_of(program)
    assert error.value.code == "VLX0402"
    assert "--calib" in error.value.hint


def test_gate_accepts_a_constant_output_when_another_depends_on_the_input() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x * 0.0, x * 2.0

    program = captured(Two(), torch.randn(2, 3))
    gate_of(program)


def test_gate_keeps_the_accepted_outputs_when_a_pass_was_good() -> None:
    """The second fold is judged against what the first left, so a repeated run stays silent."""
    program = ill_scaled(0.0)
    gate = gate_of(program)
    folded, _ = run_pass(Reparameterize(), program, gate=gate)
    _, record = run_pass(Canonicalize(), folded, gate=gate)
    assert record.gate.proof == "identical"
    for kept, probe in zip(gate.kept, gate.probes, strict=True):
        assert torch.equal(kept[0], folded.run(*probe.values)[0])


def test_one_digit_rounds_when_figures_differ_from_machine_to_machine() -> None:
    assert [one_digit(v) for v in (0.0, 4.4e-7, 4.6e-7, 1.0)] == [0.0, 4e-7, 5e-7, 1.0]


# -- probes --------------------------------------------------------------------------------------------------------


class TextAndImage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.more = nn.Embedding(11, 4), nn.Embedding(7, 4)

    def forward(self, image: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        words = (self.words(ids.clone()) + self.more(ids.reshape(ids.shape[0], -1))) * mask.unsqueeze(-1)
        return image.mean((1, 2, 3))[:, None] + words.sum((1, 2))[:, None]


def text_and_image(batch: tuple[str, int, int | None] = ("batch", 1, None), rows: int = 4) -> Program:
    torch.manual_seed(0)
    inputs = (torch.randn(rows, 3, 8, 8), torch.randint(0, 7, (rows, 6)), torch.ones(rows, 6, dtype=torch.bool))
    words = ("tokens", 2, 9)
    dynamic = {"image": {0: batch, 2: ("height", 4, 16)}, "ids": {0: batch, 1: words}, "mask": {0: batch, 1: words}}
    return captured(TextAndImage(), inputs, dynamic=dynamic)


def test_probes_keep_the_limits_when_everything_is_dynamic() -> None:
    program = text_and_image()
    sample = [torch.randn(1, 3, 8, 8), torch.randint(0, 7, (1, 6)), torch.ones(1, 6, dtype=torch.bool)]
    probes = make_probes(program, calibration=sample, seed=0)
    assert [p.name for p in probes] == [
        "example", "calibration sample", "draw at the smallest size", "draw at the largest size",
    ]  # fmt: skip
    assert sum(p.values[0].shape[0] for p in probes) <= MAX_IMAGES
    for probe in probes:
        image, ids, mask = probe.values
        assert int(ids.min()) >= 0
        assert int(ids.max()) < 7, "ids stay inside the smallest table that reads them"
        assert mask[..., 0].all()  # no mask hides everything
        assert len({v.shape[0] for v in probe.values}) == 1
        assert ids.shape == mask.shape
        assert program.run(*probe.values)[0].shape == (image.shape[0], 1)


def test_probes_reach_both_ends_when_dims_are_ranged() -> None:
    _, smallest, largest = make_probes(text_and_image(), calibration=None, seed=0)
    assert (smallest.values[0].shape, smallest.values[1].shape) == ((1, 3, 4, 8), (1, 2))
    assert largest.values[0].shape[2:] == (16, 8)
    assert largest.values[1].shape[1:] == (9,)
    assert largest.values[0].shape[0] == 3, "an unbounded batch is probed above 1, and not at the example's 2"


def test_probes_stay_in_range_when_the_batch_is_ranged() -> None:
    probes = make_probes(text_and_image(("batch", 2, 3), rows=3), calibration=None, seed=0)
    assert [p.values[0].shape[0] for p in probes] == [2, 2, 3]


def test_probes_are_equal_when_the_seed_is_and_differ_otherwise() -> None:
    program = text_and_image()
    first, same, other = (make_probes(program, calibration=None, seed=s)[1].values for s in (1, 1, 2))
    assert all(map(torch.equal, first, same))
    assert not torch.equal(first[0], other[0])


def test_probes_take_one_draw_when_nothing_is_dynamic() -> None:
    program = captured(nn.Linear(3, 2), torch.randn(2, 3), dynamic=False)
    probes = make_probes(program, calibration=None, seed=0)
    assert [(p.name, tuple(p.values[0].shape)) for p in probes] == [("example", (2, 3)), ("draw", (2, 3))]


class Rectified(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.relu()


def first_row_doubled(ir: Program, node: Node) -> Node:
    same = ir.add_call(node.target, node.args, before=node, value_of=node)
    twice = ir.add_tensor("twice", torch.tensor([[2.0], [1.0]]), before=node)
    return ir.add_call(aten.mul.Tensor, (same, twice), before=node, value_of=node)


def test_undecided_rows_are_set_aside_when_they_are_just_half_of_all() -> None:
    x = torch.arange(1.0, 9.0).reshape(2, 4)
    program = captured(Rectified(), x, dynamic=False)
    gate = NumericGate(program, [Probe("example", (x,), undecided=(0,))], sighted=True)
    _, record = run_pass(Rewriting("aten.relu.default", first_row_doubled), program, gate=gate)
    assert record.gate is not None
    assert record.gate.set_aside == 1
