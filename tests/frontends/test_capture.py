"""Capture: what is refused and how it is said, what is dynamic, how things are named, what is left alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlexport.core.errors import CaptureError
from vlexport.frontends.capture import capture
from vlexport.ir import dialect
from vlexport.ir.program import Program
from vlexport.ir.text import text

TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}
"""The same float32 kernels in the same order; only fused multiply-adds may differ between eager and graph."""


class Base(nn.Module):
    """Convolution, batch norm and dropout of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)
        self.drop, self.drop2 = nn.Dropout(0.5, inplace=True), nn.Dropout2d(0.5)

    def forward(self, image: Tensor) -> Tensor:
        features = self.drop2(F.relu_(self.norm(self.conv(image))))
        return self.head(self.drop(F.dropout(features, 0.3, self.training).mean((2, 3))))


def base() -> nn.Module:
    torch.manual_seed(0)
    return Base().eval()


def image(batch: int = 1) -> Tensor:
    return torch.randn(batch, 3, 6, 6, generator=torch.Generator().manual_seed(batch))


def refused(code: str, model: nn.Module, inputs: Any, **options: Any) -> CaptureError:
    with pytest.raises(CaptureError) as error:
        capture(model, inputs, **options)
    assert error.value.code == code, error.value.message
    return error.value


def operators(program: Program) -> list[str]:
    return [dialect.op_name(n) for n in program.calls()]


def output_names(program: Program) -> list[str]:
    return [s.name for s in program.signature.outputs]


def line_of(function: Callable[..., Any], marker: str) -> str:
    """``test_capture.py:LINE`` of the line of ``function`` that holds ``marker``."""
    lines, start = inspect.getsourcelines(function)
    return f"test_capture.py:{start + next(i for i, line in enumerate(lines) if marker in line)}"


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("training", "named"), [("", "the model"), ("norm", "norm"), ("drop", "drop"), ("drop2", "drop2")]
)
def test_capture_is_refused_naming_the_module_when_in_train_mode(training: str, named: str) -> None:
    model = base()
    model.get_submodule(training).train()
    error = refused("VLX0301", model, image())
    assert error.message == f"{named} is in train mode"
    assert error.where == training
    assert "model.eval()" in error.hint


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


def test_capture_is_refused_naming_the_buffer_when_forward_writes_to_it() -> None:
    model = Counts().eval()
    error = refused("VLX0305", model, image())
    assert error.message == "forward changes calls"
    assert error.where == "calls"
    assert model.calls == 0, "the user's module never ran"


def test_capture_is_refused_naming_the_input_when_forward_writes_to_it() -> None:
    class Writes(nn.Module):
        def forward(self, pixels: Tensor) -> Tensor:
            pixels -= 0.5
            return pixels * 2

    given = image()
    error = refused("VLX0305", Writes().eval(), given)
    assert "pixels" in error.message
    assert torch.equal(given, image())


@pytest.mark.parametrize(
    ("extra", "kind"), [(lambda x: 3, "int"), (lambda x: x.shape[0], "SymInt"), (lambda x: "a", "str")]
)
def test_capture_is_refused_naming_output_and_type_when_it_is_no_tensor(
    extra: Callable[[Tensor], Any], kind: str
) -> None:
    class Returns(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return x * 2, extra(x)

    error = refused("VLX0306", Returns().eval(), image())
    assert f"output 1 of forward is no tensor, but of type {kind}" in error.message


def test_capture_is_refused_naming_the_users_line_when_control_depends_on_data() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 0:  # here
                return x * 2
            return x

    error = refused("VLX0303", Branches().eval(), image())
    assert error.where == line_of(Branches, "# here")
    assert "torch.export refuses the model" in error.message


def test_capture_is_refused_naming_the_users_line_when_forward_fails() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x @ torch.ones(7, 7)  # here

    error = refused("VLX0302", Fails().eval(), image())
    assert error.where == line_of(Fails, "# here")
    assert "RuntimeError" in error.message


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((torch.ones(1), torch.ones(1)), "do not fit forward(image: 'Tensor')"),
        ({"picture": torch.ones(1)}, "do not fit forward(image: 'Tensor')"),
        ([3.0], "input image is a float, not a tensor"),
    ],
)
def test_capture_is_refused_when_example_inputs_do_not_fit(inputs: Any, message: str) -> None:
    assert message in refused("VLX0302", base(), inputs).message


@pytest.mark.parametrize("own", [False, True])
def test_weights_are_the_programs_only_when_the_caller_gives_the_model_up(own: bool) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3).eval()
    program = capture(model, torch.randn(2, 4), own=own).program
    given = {p.data_ptr() for p in model.parameters()}
    taken = {t.data_ptr() for t in program.tensors.values()}
    assert taken == given if own else not taken & given


def test_capture_is_refused_in_words_when_the_model_cannot_be_copied() -> None:
    model = base()
    model.cache = torch.ones(2, requires_grad=True) * 2  # type: ignore[assignment]
    error = refused("VLX0303", model, image())
    assert "cannot be copied" in error.message
    assert error.where == "Base"


def test_capture_is_refused_or_says_so_when_the_model_is_random() -> None:
    class Noise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand_like(x)

    assert "randomness" in refused("VLX0304", Noise().eval(), image()).hint


# -- sizes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("traced_at", [1, 2, 5])
def test_any_batch_runs_when_captured_at_one(traced_at: int) -> None:
    model = base()
    captured = capture(model, image(traced_at))
    assert captured.notes == ()
    assert captured.program.signature.inputs[0].shape == ("batch", 3, 6, 6)
    assert captured.program.signature.outputs[0].shape == ("batch", 2)
    for batch in (1, 2, 3, 8):
        torch.testing.assert_close(captured.program.run(image(batch))[0], model(image(batch)).detach(), **TOLERANCE)


class BranchesAtOne(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] == 1:  # here
            return x * 2
        return x + 1


class BranchesAtFour(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return helper(x)


def helper(x: Tensor) -> Tensor:
    return x * 2 if x.shape[0] > 4 else x + 1


class Reshapes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        return y.reshape(2, -1)  # here


@pytest.mark.parametrize(
    ("model", "batch", "line"),
    [
        (BranchesAtOne, 1, line_of(BranchesAtOne, "# here")),
        (BranchesAtOne, 3, line_of(BranchesAtOne, "# here")),
        (BranchesAtFour, 2, line_of(helper, "> 4")),
        (Reshapes, 2, line_of(Reshapes, "# here")),
    ],
)
def test_batch_is_fixed_and_the_line_named_when_the_model_depends_on_it(
    model: type[nn.Module], batch: int, line: str
) -> None:
    captured = capture(model().eval(), image(batch))
    assert captured.notes == (f"the batch is fixed at {batch}: {line} depends on it",)
    assert captured.program.signature.inputs[0].shape == (batch, 3, 6, 6)
    assert captured.program.signature.dims == {}
    torch.testing.assert_close(captured.program.run(image(batch))[0], model()(image(batch)), **TOLERANCE)


def test_capture_fails_in_place_of_fixing_the_batch_when_it_must_be_dynamic() -> None:
    refused("VLX0303", Reshapes().eval(), image(2), dynamic=True)
    assert capture(base(), image(), dynamic=True).program.signature.dims


def test_all_sizes_stay_when_nothing_is_to_be_dynamic() -> None:
    captured = capture(base(), image(3), dynamic=False)
    assert captured.program.signature.inputs[0].shape == (3, 3, 6, 6)
    assert captured.notes == ()


def test_sizes_are_fixed_and_it_is_said_when_inputs_share_no_batch() -> None:
    class Compare(nn.Module):
        def forward(self, image: Tensor, texts: Tensor) -> Tensor:
            return image @ texts.t()

    captured = capture(Compare().eval(), (torch.randn(1, 4), torch.randn(5, 4)))
    assert captured.program.signature.dims == {}
    assert captured.notes == ("all sizes are fixed: the inputs do not share their first size",)


def test_named_dims_have_their_ranges_when_asked_for() -> None:
    dynamic = {"image": {0: ("batch", 1, 16), 2: ("height", 4, 32), 3: ("width", 4, None)}}
    program = capture(base(), image(), dynamic=dynamic).program
    assert program.signature.inputs[0].shape == ("batch", 3, "height", "width")
    ranges = {n: (r.min, r.max) for n, r in program.signature.dims.items()}
    assert ranges == {"batch": (1, 16), "height": (4, 32), "width": (4, None)}
    for shape in ((1, 3, 4, 7), (16, 3, 32, 5)):
        value = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        expected = base()(value).detach()
        torch.testing.assert_close(program.run(value)[0], expected, **TOLERANCE)


def test_range_is_suggested_when_the_model_cannot_take_the_wished_one() -> None:
    error = refused("VLX0303", base(), image(), dynamic={"image": {0: "batch", 3: "width"}})
    assert "width = Dim('width', min=4)" in error.hint


def test_batch_is_compared_within_its_range_when_it_has_one() -> None:
    class NeedsTwo(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - x[1]

    program = capture(NeedsTwo().eval(), torch.randn(4, 3), dynamic={"x": {0: ("batch", 2, 8)}}).program
    assert program.signature.dims["batch"].min == 2


@pytest.mark.parametrize(
    ("dynamic", "message"),
    [
        ({"imge": {0: "batch"}}, "dynamic= names 'imge', which is no input; did you mean 'image'?"),
        ({"image": {4: "batch"}}, "dynamic= names axis 4 of image, which has 4"),
        ({"image": {-1: "width"}}, "dynamic= names axis -1 of image, which has 4"),
    ],
)
def test_capture_is_refused_when_dynamic_names_what_is_not_there(dynamic: Any, message: str) -> None:
    assert refused("VLX0302", base(), image(), dynamic=dynamic).message == message


# -- inputs and outputs --------------------------------------------------------------------------------------------


class Many(nn.Module):
    """Every way to take a tensor."""

    def forward(self, a: Tensor, b: Tensor | None = None, *rest: Tensor, scale: Tensor, **more: Tensor) -> Tensor:
        total = a * scale
        total = total - b if b is not None else total
        for i, each in enumerate(rest):
            total = total + (i + 2) * each
        for name in sorted(more):
            total = total * more[name] if name == "last" else total / more[name]
        return total


def numbers(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(2, 3, generator=generator) + 0.5 for _ in range(count)]


def test_inputs_are_named_and_ordered_when_given_by_keyword_in_any_order() -> None:
    a, b, scale, last, first = numbers(5)
    inputs = {"last": last, "scale": scale, "b": b, "first": first, "a": a}
    program = capture(Many().eval(), inputs).program
    assert [s.name for s in program.signature.inputs] == ["a", "b", "scale", "last", "first"]
    torch.testing.assert_close(program.run(a, b, scale, last, first)[0], Many()(**inputs), **TOLERANCE)


def test_optional_argument_stays_absent_when_a_dict_leaves_it_out() -> None:
    class Optional(nn.Module):
        def forward(self, a: Tensor, b: Tensor | None = None, c: Tensor | None = None) -> Tensor:
            total = a if b is None else a + b
            return total if c is None else total * c

    a, c = numbers(2)
    program = capture(Optional().eval(), {"a": a, "c": c}).program
    assert [s.name for s in program.signature.inputs] == ["a", "c"]
    torch.testing.assert_close(program.run(a, c)[0], a * c, **TOLERANCE)


def test_starred_inputs_are_numbered_and_dynamic_when_forward_takes_args() -> None:
    class Starred(nn.Module):
        def forward(self, *views: Tensor) -> Tensor:
            return torch.stack([(i + 1) * v for i, v in enumerate(views)]).sum(0)

    a, b, c = numbers(3)
    program = capture(Starred().eval(), (a, b, c)).program
    assert [(s.name, s.shape[0]) for s in program.signature.inputs] == [(f"views_{i}", "batch") for i in range(3)]
    torch.testing.assert_close(program.run(a, b, c)[0], a + 2 * b + 3 * c, **TOLERANCE)


def test_keyword_only_inputs_work_when_given_by_name() -> None:
    class KeywordOnly(nn.Module):
        def forward(self, *, left: Tensor, right: Tensor) -> Tensor:
            return left - right

    left, right = numbers(2)
    program = capture(KeywordOnly().eval(), {"right": right, "left": left}).program
    assert [s.name for s in program.signature.inputs] == ["left", "right"]
    torch.testing.assert_close(program.run(left, right)[0], left - right, **TOLERANCE)


@pytest.mark.parametrize(
    ("structure", "names"),
    [
        (lambda x: x * 2, ["output"]),
        (lambda x: (x * 2,), ["output"]),
        (lambda x: [x * 2, x * 3], ["output", "output_1"]),
        (lambda x: (x * 2, None, x * 3), ["output", "output_1"]),
        (lambda x: ((x * 2, x * 3), x * 4), ["output", "output_1", "output_2"]),
        (lambda x: {"logits": x * 2, "aux": x * 3}, ["logits", "aux"]),
        (lambda x: {"out": {"low": x * 2, "high": [x * 3, x * 4]}}, ["out.low", "out.high.0", "out.high.1"]),
        (lambda x: (x * 2, x * 2, x), ["output", "output_1", "output_2"]),
    ],
)
def test_outputs_are_named_by_keys_or_numbered_when_nested(
    structure: Callable[[Tensor], Any], names: list[str]
) -> None:
    class Structure(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return structure(x)

    program = capture(Structure().eval(), numbers(1)[0]).program
    assert output_names(program) == names
    value = torch.randn(3, 3)
    expected = [t for t in torch.utils._pytree.tree_leaves(structure(value)) if t is not None]
    for found, want in zip(program.run(value), expected, strict=True):
        torch.testing.assert_close(found, want, **TOLERANCE)


def test_outputs_may_be_parameters_bfloat16_or_integers_when_returned() -> None:
    class Returns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor([2.0]))

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"scale": self.scale, "half": (x * 2).bfloat16(), "best": x.argmax(1), "positive": x > 0}

    program = capture(Returns().eval(), numbers(1)[0]).program
    assert [s.dtype for s in program.signature.outputs] == ["float32", "bfloat16", "int64", "bool"]


def test_dropout_and_notes_of_the_tracer_are_gone_when_captured() -> None:
    program = capture(base(), image()).program
    assert operators(program) == [
        "aten.conv2d.default", "aten.batch_norm.default", "aten.relu.default", "aten.mean.dim", "aten.linear.default",
    ]  # fmt: skip


# -- the user's model, and the machine -----------------------------------------------------------------------------


def test_users_model_is_unchanged_when_captured() -> None:
    model = base()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    before = model(image(2))
    program = capture(model, image()).program
    program.double()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(model(image(2)), before)
    assert not model.training
    assert set(vars(model)) == set(vars(base()))
    assert all(p.requires_grad for p in model.parameters())


def test_program_is_unchanged_when_the_user_trains_on() -> None:
    model = base()
    program = capture(model, image()).program
    before = program.run(image())[0].clone()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert torch.equal(program.run(image())[0], before)


def test_users_attributes_are_unchanged_when_forward_caches_something() -> None:
    class Caches(nn.Module):
        last: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            self.last = x
            return x * 2

    model = Caches().eval()
    capture(model, image())
    assert model.last is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_become_float32_and_it_is_said_when_of_another_precision(dtype: torch.dtype) -> None:
    model = base().to(dtype)
    captured = capture(model, image().to(dtype))
    assert captured.notes == ("half- or double-precision weights were loaded as float32",)
    assert {t.dtype for t in captured.program.tensors.values()} == {torch.float32}
    assert captured.program.signature.inputs[0].dtype == "float32"
    assert next(model.parameters()).dtype is dtype
    expected = base().to(dtype).float()(image(3)).detach()
    torch.testing.assert_close(captured.program.run(image(3))[0], expected, **TOLERANCE)


def test_complex_buffers_stay_complex_when_weights_become_float32() -> None:
    class Rotates(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("turn", torch.polar(torch.ones(3), torch.arange(3.0)))

        def forward(self, x: Tensor) -> Tensor:
            return torch.view_as_real(torch.view_as_complex(x) * self.turn)

    model, value = Rotates().eval(), torch.randn(2, 3, 2)
    torch.testing.assert_close(capture(model, value).program.run(value)[0], model(value), **TOLERANCE)


def test_no_metadata_names_a_folder_when_captured() -> None:
    program = capture(base(), image()).program
    assert "test_capture.py:" in repr([n.meta.get("custom") for n in program.calls()])
    for node in program.graph.nodes:
        assert set(node.meta) <= {"val", "nn_module_stack", "custom"}
        shown = repr({k: v for k, v in node.meta.items() if k != "val"})
        assert "/" not in shown.replace("torch/nn/", "")
        assert "\\" not in shown


def test_logging_of_torch_is_as_before_when_a_capture_failed() -> None:
    import logging

    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    before = (logger.level, list(logger.handlers), logger.propagate)
    capture(Reshapes().eval(), image(2))
    assert (logger.level, list(logger.handlers), logger.propagate) == before


def test_capture_gives_equal_text_when_done_twice() -> None:
    assert text(capture(base(), image()).program) == text(capture(base(), image(2)).program)
