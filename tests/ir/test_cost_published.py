"""MACs against timm's published table.

Source: timm, results/benchmark-infer-amp-nchw-pt113-cu117-rtx3090.csv, column infer_gmacs at 224 × 224 (two decimals).
That counter takes in norms as well (two operations an element for batch norm), hence the up to 1.1 % above ours.
"""

from __future__ import annotations

import pytest
import timm
import torch

from tests.harness import captured
from vlexport.ir.cost import cost

SMALL = {"mixer_s32_224": 1.0, "resnet10t": 1.1}
OTHERS = {
    "deit_small_patch16_224": 4.61,
    "dla34": 3.07,
    "levit_256": 1.13,
    "pit_s_224": 2.88,
    "poolformer_s12": 1.82,
    "regnety_016": 1.63,
    "repvgg_b0": 3.41,
    "resnet50": 4.11,
    "visformer_tiny": 1.27,
    "xcit_tiny_12_p16_224": 1.24,
}
GMACS = [*SMALL.items(), *(pytest.param(*each, marks=pytest.mark.zoo) for each in OTHERS.items())]


@pytest.mark.parametrize(("name", "gmacs"), GMACS)
def test_macs_are_within_two_percent_of_the_published_ones_when_a_timm_model(name: str, gmacs: float) -> None:
    found = cost(captured(timm.create_model(name, pretrained=False), torch.randn(1, 3, 224, 224)))
    assert found.macs / 1e9 == pytest.approx(gmacs, rel=0.02)
    assert found.opaque == ()
