"""The models of ``tests/token_models.py`` compute what the authors' code computed from the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from samples.zoo.self_slimmed.model import SelfSlimmedViT  # noqa: E402
from tests.record_token_models import weights_hash  # noqa: E402
from tests.token_models import MODELS, EViT, ToMe, complement, drawn, images, side_of  # noqa: E402

GOLDEN = Path(__file__).parent / "golden"
FACTS: dict[str, Any] = json.loads((GOLDEN / "token_models.json").read_text(encoding="utf-8"))
TOLERANCE = 1e-4
"""Of outputs, as a share of the largest: the same steps in another order of float32."""
TIED = 0.05
"""The same where tokens are equal, and a processor's way of rounding decides which of them is taken."""
RECORDED = {**MODELS, "self_slimmed": SelfSlimmedViT}


@pytest.fixture(scope="module")
def outputs() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "token_models.npz") as file:
        return dict(file)


@pytest.mark.parametrize("kind", ["diffuse", "concentrated", "ties"])
@pytest.mark.parametrize("name", list(RECORDED))
def test_outputs_are_those_of_the_authors_when_weights_are_equal(
    name: str, kind: str, outputs: dict[str, np.ndarray]
) -> None:
    model = RECORDED[name]().eval()
    needed = {k: v.shape for k, v in model.state_dict().items() if not k.startswith("rtsm")}
    weights = drawn(needed, kind)
    assert weights_hash(weights) == FACTS["models"][name]["weights"][kind], "these are not the recorded weights"
    assert not model.load_state_dict(weights, strict=False).unexpected_keys
    recorded = outputs[f"{name}/{kind}"]
    shown = images(kind, FACTS["batch"], *side_of(name))
    with torch.inference_mode():
        found = model(shown).numpy()
        moved = np.max([np.abs(model(each).numpy() - found).max(1) for each in _other_digits(shown)], 0)
    distance, largest = np.abs(found - recorded).max(1), np.abs(recorded).max()
    open_rows = moved > TOLERANCE * largest
    assert kind == "ties" or not open_rows.any()
    assert distance[~open_rows].max(initial=0.0) <= TOLERANCE * largest
    assert distance.max() <= TIED * largest


def _other_digits(shown: torch.Tensor) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [shown * (1 + 1e-7 * torch.randn(shown.shape, generator=generator)) for _ in range(8)]


def test_recorded_outputs_differ_between_images_and_kinds(outputs: dict[str, np.ndarray]) -> None:
    assert set(outputs) == {f"{name}/{kind}" for name in RECORDED for kind in ("diffuse", "concentrated", "ties")}
    for name, found in outputs.items():
        assert found.shape == (FACTS["batch"], 10)
        assert np.abs(found[1:] - found[:1]).max(1).min() > 0.01 * np.abs(found).max(), name
    assert np.abs(outputs["evit/diffuse"] - outputs["evit_fused/diffuse"]).max() > 1e-3


def test_concentrated_attention_is_concentrated() -> None:
    shares = {}
    for kind in ("diffuse", "concentrated"):
        model = EViT().eval()
        model.load_state_dict(drawn({k: v.shape for k, v in model.state_dict().items()}, kind))
        x = model.blocks[0].norm1(model.embed(images(kind, 4, 32, 4)))
        q, k, _ = model.blocks[0].attn.parts(x)
        shares[kind] = float(model.blocks[0].attn.weights(q, k).amax(-1).mean().detach())
    assert shares["diffuse"] < 0.15
    assert shares["concentrated"] > 0.5


def test_ties_are_exact() -> None:
    model = EViT().eval()
    model.load_state_dict(drawn({k: v.shape for k, v in model.state_dict().items()}, "ties"))
    x = model.embed(images("ties", 4, 32, 4))
    assert torch.equal(x[:, 1::2], x[:, 2::2])
    assert not torch.equal(x[:, 1], x[:, 3])


def test_complement_is_what_is_left() -> None:
    index = torch.tensor([[3, 0], [1, 4]])
    assert complement(index, 5).tolist() == [[1, 2, 4], [0, 2, 3]]


def test_half_of_the_tokens_is_the_most_a_block_merges() -> None:
    model = ToMe(merged=(1000, 0, 0, 0)).eval()
    seen = []
    model.blocks[1].norm1.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    model(images("diffuse", 1, 32, 4))
    assert seen == [65 - 32]
