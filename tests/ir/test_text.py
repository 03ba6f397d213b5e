"""The text is stable, and the fingerprint changes with content and nothing else."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from torch import Tensor, nn

from tests.harness import captured, randomize
from tests.strategies import programs
from vlexport.ir.program import Program
from vlexport.ir.text import fingerprint, tensor_digest, text


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Linear(4, 2)
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]).reshape(3, 1, 1))

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        features = torch.nn.functional.gelu(self.conv(image - self.mean), approximate="tanh")
        left, right = features.chunk(2, dim=1)
        pooled = (torch.cat([right, left], 1)).mean((2, 3))
        return {"logits": self.head(pooled), "rows": features.reshape(image.shape[0] * image.shape[2], -1)}


def program() -> Program:
    torch.manual_seed(0)
    return captured(randomize(Net()), torch.randn(2, 3, 8, 8), dynamic={"image": {0: "batch", 2: ("height", 4, 16)}})


EXPECTED = """\
program(image: f32[batch,3,height,8]) where batch=1.. height=4..16
  %0 = sym_size.int(image, 0) -> batch
  %1 = sym_size.int(image, 2) -> height
  %2 = sub.Tensor(image, @mean: f32[3,1,1]) -> f32[batch,3,height,8]
  %3 = conv2d(%2, @conv.weight: f32[4,3,3,3], @conv.bias: f32[4], padding=[1,1]) -> f32[batch,4,height,8]
  %4 = gelu(%3, approximate='tanh') -> f32[batch,4,height,8]
  %5 = chunk(%4, 2, 1) -> (f32[batch,2,height,8], f32[batch,2,height,8])
  %6 = operator.getitem(%5, 0) -> f32[batch,2,height,8]
  %7 = operator.getitem(%5, 1) -> f32[batch,2,height,8]
  %8 = cat([%7,%6], 1) -> f32[batch,4,height,8]
  %9 = mean.dim(%8, [2,3]) -> f32[batch,4]
  %10 = linear(%9, @head.weight: f32[2,4], @head.bias: f32[2]) -> f32[batch,2]
  %11 = operator.mul(%0, %1) -> batch*height
  %12 = reshape(%4, [%11,-1]) -> f32[batch*height,32]
  return logits: %10, rows: %12
"""


def test_text_prints_ops_parameters_symbols_and_no_defaults_when_captured() -> None:
    assert text(program()) == EXPECTED


def test_text_and_fingerprint_are_equal_when_captured_twice() -> None:
    first, second = program(), program()
    assert text(first) == text(second)
    assert fingerprint(first) == fingerprint(second)
    assert all(first.tensors[k] is not second.tensors[k] for k in first.tensors)


def test_fingerprint_is_equal_when_only_order_of_names_and_address_differ() -> None:
    first = program()
    other = first.copy()
    other.tensors = {k: other.tensors[k].clone() for k in reversed(list(other.tensors))}
    assert fingerprint(other) == fingerprint(first)


def test_fingerprint_changes_when_one_value_of_one_weight_does() -> None:
    first = program()
    for name in first.tensors:
        other = first.copy()
        other.tensors[name] = other.tensors[name].clone()
        other.tensors[name].view(-1)[-1] += 1e-6
        assert fingerprint(other) != fingerprint(first), name
        assert text(other) == text(first)


def test_fingerprint_is_equal_when_an_unread_tensor_is_stored() -> None:
    first = program()
    other = first.copy()
    other.tensors["unread"] = torch.ones(3)
    assert fingerprint(other) == fingerprint(first)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (torch.zeros(4), torch.zeros(2, 2)),
        (torch.zeros(4), torch.zeros(4, dtype=torch.int32)),
        (torch.zeros(0, 3), torch.zeros(3, 0)),
        (torch.zeros(1), torch.tensor([-0.0])),
        (torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0])),
    ],
)
def test_digest_differs_when_dtype_shape_or_bits_do(old: Tensor, new: Tensor) -> None:
    assert tensor_digest(old) != tensor_digest(new)


def test_digest_is_of_the_values_when_memory_is_laid_out_otherwise() -> None:
    value = torch.arange(6.0).reshape(2, 3)
    assert tensor_digest(value.t().contiguous().t()) == tensor_digest(value)
    assert tensor_digest(torch.tensor(1.0)) == tensor_digest(torch.ones(2)[0])


def test_digest_follows_when_a_tensor_is_edited_by_a_method() -> None:
    value = torch.zeros(3)
    before = tensor_digest(value)
    value.add_(1)
    assert tensor_digest(value) != before


def test_digest_is_fresh_on_demand_when_a_tensor_was_edited_behind_its_back() -> None:
    value = torch.zeros(3)
    before = tensor_digest(value)
    value.numpy()[0] = 1.0
    assert tensor_digest(value, fresh=True) != before


def test_digest_works_when_a_tensor_was_made_in_inference_mode() -> None:
    with torch.inference_mode():
        value = torch.arange(3.0)
    assert tensor_digest(value) == tensor_digest(torch.arange(3.0))


@settings(
    max_examples=30, derandomize=True, deadline=None, database=None, phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
@given(programs(most=8))
def test_text_has_one_line_an_op_and_tells_ops_apart_when_random(program: Program) -> None:
    lines = text(program).splitlines()
    assert len(lines) == len(program.calls()) + 2
    assert [int(m[1]) for line in lines if (m := re.match(r"  %(\d+) = ", line))] == list(range(len(lines) - 2))
    assert text(program.copy()) == text(program)
    assert "0x" not in text(program)
    assert not re.search(r"\bs\d+\b", text(program)), "symbols are printed by their public names"
