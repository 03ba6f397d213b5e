"""Low-rank branches beside the linears of a transformers ViT: reparameterized, the graph is that of the plain model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.harness import captured, worst_error
from tests.zoo_target_models import OfPixels
from vlexport.ir import dialect
from vlexport.ir.cost import cost
from vlexport.ir.program import Program
from vlexport.passes import CATALOGUE, pass_class
from vlexport.passes.pipeline import run_pipeline

RANK, ALPHA = 4, 8.0


class LowRank(nn.Module):
    """``x W + b + (alpha / rank) · x A B``, computed as PEFT computes it while it trains (Hu et al. 2021)."""

    def __init__(self, base: nn.Linear, generator: torch.Generator) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.Linear(base.in_features, RANK, bias=False)
        self.lora_B = nn.Linear(RANK, base.out_features, bias=False)
        self.dropout = nn.Dropout(0.1)
        for each in (self.lora_A, self.lora_B):  # zeros, as training begins, would hide a mistake
            nn.init.normal_(each.weight, std=0.2, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """``(…, inputs)`` to ``(…, outputs)``."""
        beside: Tensor = self.lora_B(self.lora_A(self.dropout(x))) * (ALPHA / RANK)
        return self.base_layer(x) + beside  # type: ignore[no-any-return]


def plain() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8,
        num_labels=5,
    )  # fmt: skip
    model = OfPixels(ViTForImageClassification(config), ("logits",))
    for name, each in model.named_parameters():
        if name.endswith("bias"):  # equal ones would be stored once
            nn.init.normal_(each, std=0.1)
    return model.eval()


def adapted(model: nn.Module) -> int:
    """Put a branch beside every linear of the encoder; returns how many there are."""
    generator = torch.Generator().manual_seed(1)
    places = [
        (parent, name)
        for path, parent in model.named_modules()
        if "layer" in path
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear)
    ]
    for parent, name in places:
        setattr(parent, name, LowRank(getattr(parent, name), generator))
    model.eval()
    return len(places)


def optimized(program: Program) -> Program:
    after, _ = run_pipeline(program, [pass_class(each)() for each in CATALOGUE], gate=None)
    return after


def operators(program: Program) -> list[str]:
    return sorted(dialect.op_name(each) for each in program.calls())


@pytest.fixture(scope="module")
def graphs() -> tuple[Program, Program, Program]:
    """The plain model after all passes, the adapted one as captured, and after all passes."""
    picture = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = plain()
    without = optimized(captured(model, {"pixel_values": picture}))
    assert adapted(model) == 6  # query, key, value, output and two of the MLP
    before = captured(model, {"pixel_values": picture})
    return without, before, optimized(before)


def test_operators_are_those_of_the_plain_model_when_branches_are_merged(graphs: tuple[Program, ...]) -> None:
    without, before, after = graphs
    assert len(operators(before)) > len(operators(without)) + 6 * 3
    assert operators(after) == operators(without)
    assert (cost(after).parameters, cost(after).macs) == (cost(without).parameters, cost(without).macs)


def test_outputs_stay_and_differ_from_the_plain_model_when_branches_are_merged(graphs: tuple[Program, ...]) -> None:
    without, before, after = graphs
    pictures = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    wanted = before.run(pictures)
    assert worst_error(after.run(pictures), wanted) <= 1e-5
    assert worst_error(without.run(pictures), wanted) > 1e-2
