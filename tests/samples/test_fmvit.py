"""The FMViT sample: it trains, and the form merged by hand computes the same with fewer parameters."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from samples.zoo.fmvit.branches import Branches, spatial
from samples.zoo.fmvit.merge import convolution, merged
from samples.zoo.fmvit.model import SMALL, TINY, FMViT
from tests.harness import randomize

README = (Path(__file__).resolve().parents[2] / "samples/zoo/fmvit/README.md").read_text(encoding="utf-8")
SHIFTS_OF_KEYS = re.compile(r"attention\.key\.convolutions\.\d\.1\.bias$")
"""Softmax does not see them."""


@pytest.fixture(scope="module")
def net() -> FMViT:
    torch.manual_seed(0)
    return randomize(FMViT(TINY)).double()


def pictures(count: int, size: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def layers(model: nn.Module, *kinds: type[nn.Module]) -> int:
    return sum(isinstance(each, kinds) for each in model.modules())


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("size", [32, 64])
def test_logits_have_the_shape_that_is_documented_when_pictures_come_in(net: FMViT, size: int) -> None:
    with torch.no_grad():
        logits = net(pictures(3, size))
    assert logits.shape == (3, TINY.classes)
    assert float(logits.std(0).min()) > 1e-3 * float(logits.abs().max()), "it does not look at the picture"


def test_loss_falls_and_all_weights_learn_when_a_step_is_taken(net: FMViT) -> None:
    model = copy.deepcopy(net).train()
    images, labels = pictures(4), torch.tensor([1, 3, 5, 7])
    before = nn.functional.cross_entropy(model(images), labels)
    before.backward()
    idle = {name for name, each in model.named_parameters() if each.grad is None or not float(each.grad.abs().max())}
    assert [name for name in idle if not SHIFTS_OF_KEYS.search(name)] == []
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    with torch.no_grad():
        assert nn.functional.cross_entropy(model(images), labels) < before


def test_outputs_stay_when_the_model_is_merged(net: FMViT) -> None:
    one = merged(net)
    images = pictures(3)
    with torch.no_grad():
        assert difference(one(images), net(images)) <= 1e-12
    assert (layers(one, nn.BatchNorm2d), layers(one, Branches)) == (0, 0)
    assert layers(one, nn.Conv2d) == layers(net, Branches)
    assert sum(p.numel() for p in one.parameters()) < sum(p.numel() for p in net.parameters())


def test_branches_of_every_kind_are_one_grouped_convolution_when_merged() -> None:
    branches = randomize(spatial(12, 5, 4)).double()
    one = convolution(branches)
    assert (one.groups, one.kernel_size, one.padding) == (3, (5, 5), (2, 2))
    x = torch.randn(2, 12, 7, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        assert difference(one(x), branches(x)) <= 1e-12


def test_merging_is_refused_when_the_model_is_in_train_mode(net: FMViT) -> None:
    with pytest.raises(ValueError, match="eval mode"):
        merged(copy.deepcopy(net).train())


def test_input_is_not_added_when_the_shapes_differ() -> None:
    with pytest.raises(ValueError, match="its shape"):
        Branches(4, 8, [(3, 1)], identity=True)


def test_parameters_in_the_readme_are_those_of_the_model_when_it_is_made() -> None:
    with torch.device("meta"):
        small = FMViT(SMALL).eval()
        counts = [sum(p.numel() for p in each.parameters()) for each in (small, merged(small))]
    said = re.search(r"has ([\d.]+) million parameters in training and ([\d.]+) million", README)
    assert said is not None
    assert list(said.groups()) == [f"{count / 1e6:.1f}" for count in counts]
