"""What ``forward`` returns: data classes and nests are named by their fields and keys, and some may be chosen."""

from __future__ import annotations

import dataclasses
import types
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from vlexport.core.errors import CaptureError, UsageError
from vlexport.frontends.capture import capture
from vlexport.frontends.source import Source
from vlexport.ir.outputs import stripped, with_outputs
from vlexport.ir.program import Program


@dataclasses.dataclass
class Inner:
    features: Tensor
    mask: Tensor | None = None


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


@dataclasses.dataclass
class Answer:
    logits: Tensor
    inner: Inner
    rest: Any = None


class Net(nn.Module):
    """Two inputs; the second one is read for its values by ``right`` alone, and for its batch by ``ones``."""

    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.wrap = wrap

    def forward(self, x: Tensor, y: Tensor) -> Any:
        logits = self.head(x)
        ones = torch.ones(y.shape[0], 1)
        return self.wrap(logits, ones + logits, y * 2)


def answer(logits: Tensor, features: Tensor, twice: Tensor) -> Answer:
    return Answer(logits, Inner(features), (Pair(twice, logits + 1), {"deep": [features - 1]}))


def captured(wrap: Any) -> Program:
    torch.manual_seed(0)
    x, y = (torch.randn(2, 4, generator=torch.Generator().manual_seed(i)) for i in range(2))
    return capture(Net(wrap).eval(), (x, y)).program


@pytest.fixture(scope="module")
def program() -> Program:
    return captured(answer)


def test_outputs_are_named_by_fields_and_keys_when_data_classes_are_nested(program: Program) -> None:
    names = [spec.name for spec in program.signature.outputs]
    assert names[:2] == ["logits", "inner.features"], "a field that is None is no output"
    assert names[2:] == ["rest.0.left", "rest.0.right", "rest.1.deep.0"]
    assert {spec.shape[0] for spec in program.signature.outputs} == {"batch"}


def test_object_is_refused_by_its_name_when_it_is_no_container() -> None:
    with pytest.raises(CaptureError) as caught:
        captured(lambda *values: types.SimpleNamespace(logits=values[0]))
    assert caught.value.code == "VLX0306"
    assert "SimpleNamespace" in caught.value.message


@pytest.mark.parametrize(
    ("names", "inputs"),
    [
        (("inner.features",), ["x"]),
        (("rest.0.left",), ["y"]),
        (("rest.0.left", "logits"), ["x", "y"]),
        (("logits", "inner.features", "rest.0.left", "rest.0.right", "rest.1.deep.0"), ["x", "y"]),
    ],
)
def test_chosen_outputs_compute_the_same_when_the_rest_goes(
    program: Program, names: tuple[str, ...], inputs: list[str]
) -> None:
    chosen = with_outputs(program, names)
    assert [spec.name for spec in chosen.signature.outputs] == list(names)
    assert [spec.name for spec in chosen.signature.inputs] == inputs
    values = {"x": torch.randn(3, 4), "y": torch.randn(3, 4)}
    every = dict(zip([spec.name for spec in program.signature.outputs], program.run(*values.values()), strict=True))
    for name, found in zip(names, chosen.run(*(values[each] for each in inputs)), strict=True):
        assert torch.equal(found, every[name])
    assert len(chosen.calls()) <= len(program.calls())
    assert len(program.signature.outputs) == 5, "the Program itself stays as it is"


@pytest.mark.parametrize(("names", "part"), [(("logit",), "did you mean 'logits'?"), (("logits", "logits"), "twice")])
def test_choice_is_refused_when_it_cannot_be_made(program: Program, names: tuple[str, ...], part: str) -> None:
    with pytest.raises(UsageError) as caught:
        with_outputs(program, names)
    assert (caught.value.code, caught.value.where) == ("VLX0703", "--output")
    assert part in caught.value.message
    assert "inner.features" in caught.value.hint


class Training(nn.Module):
    """A trunk with its head, an auxiliary branch and a decoder that only training reads."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head = nn.Linear(4, 8), nn.Linear(8, 2)
        self.aux = nn.ModuleDict({"norm": nn.LayerNorm(8), "head": nn.Linear(8, 2, bias=False)})
        self.decoder = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.trunk(x)
        aux = self.aux["head"](self.aux["norm"](hidden))
        return {"logits": self.head(hidden), "aux": aux, "image": self.decoder(hidden)}


def test_account_names_modules_parameters_and_macs_when_outputs_are_left_out() -> None:
    whole = capture(Training().eval(), torch.randn(2, 4)).program
    chosen = with_outputs(whole, ["logits"])
    went = stripped(whole, chosen)
    assert went.modules == ("aux", "decoder"), "the outermost modules of which nothing is left"
    assert (went.calls, went.parameters) == (5, 2 * 8 + 2 * 8 + (8 * 16 + 16) + (16 * 4 + 4))
    assert went.macs == 2 * 8 + 8 * 16 + 16 * 4
    assert str(went) == "aux, decoder; 244 parameters, 208 multiply-accumulates"
    partly = stripped(whole, with_outputs(whole, ["logits", "aux"]))
    assert partly.modules == ("decoder",)
    assert stripped(whole, with_outputs(whole, ["logits", "aux", "image"])).calls == 0
    assert str(stripped(chosen, chosen)).startswith("no whole module; 0 parameters")


def test_source_says_what_went_when_outputs_are_chosen() -> None:
    source = Source(capture(Training().eval(), torch.randn(2, 4)).program, {}, (), "hash")
    (note,) = source.with_outputs(["image"]).notes
    assert note == "left out with the other outputs: aux, head; 50 parameters, 32 multiply-accumulates"
