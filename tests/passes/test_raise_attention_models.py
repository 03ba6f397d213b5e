"""Models of transformers, written eagerly and with the fused operator, are the same text once attention is raised."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.harness import captured
from vlexport.ir.program import Program
from vlexport.ir.text import text
from vlexport.passes.canonicalize import Canonicalize
from vlexport.passes.eliminate_dead import EliminateDead
from vlexport.passes.fold_constants import FoldConstants
from vlexport.passes.pipeline import run_pipeline
from vlexport.passes.raise_attention import RaiseAttention

transformers = pytest.importorskip("transformers")

ATTENTION = "aten.scaled_dot_product_attention.default"
SIZES: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 16,
}  # fmt: skip
SPEECH: dict[str, Any] = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16, "decoder_ffn_dim": 16,
}  # fmt: skip
IDS = torch.randint(0, 50, (1, 7), generator=torch.Generator().manual_seed(0))
PHOTO = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))


class First(nn.Module):
    """The first output alone, of inputs by name."""

    def __init__(self, model: Any, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *given: Tensor) -> Tensor:
        found: Tensor = self.model(**dict(zip(self.names, given, strict=True)))[0]
        return found


def bert() -> Any:
    return transformers.BertModel(transformers.BertConfig(vocab_size=50, **SIZES))


def gpt2() -> Any:
    config = transformers.GPT2Config(
        vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=8, use_cache=False, bos_token_id=0, eos_token_id=1
    )
    return transformers.GPT2Model(config)


def t5() -> Any:
    return transformers.T5EncoderModel(
        transformers.T5Config(vocab_size=50, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    )


def llama() -> Any:
    return transformers.LlamaModel(
        transformers.LlamaConfig(vocab_size=50, num_key_value_heads=2, use_cache=False, **SIZES)
    )


def vit() -> Any:
    return transformers.ViTModel(transformers.ViTConfig(image_size=16, patch_size=8, **SIZES))


def clip() -> Any:
    words = {"vocab_size": 50, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1, **SIZES}
    photos = {"image_size": 16, "patch_size": 8, **SIZES}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=words, vision_config=photos, projection_dim=8))


def whisper() -> Any:
    config = transformers.WhisperConfig(
        vocab_size=50, max_source_positions=10, max_target_positions=8, num_mel_bins=4, use_cache=False, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, **SPEECH,
    )  # fmt: skip
    return transformers.WhisperModel(config)


def detr() -> Any:
    backbone = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 4], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    config = transformers.DetrConfig(
        use_timm_backbone=False, backbone=None, backbone_config=backbone, num_queries=3, **SPEECH
    )
    return transformers.DetrModel(config)


MODELS: dict[str, tuple[Callable[[], Any], dict[str, Tensor], int]] = {
    "bert": (bert, {"input_ids": IDS}, 1),
    "gpt2": (gpt2, {"input_ids": IDS}, 1),
    "t5": (t5, {"input_ids": IDS}, 1),
    "llama": (llama, {"input_ids": IDS}, 1),
    "vit": (vit, {"pixel_values": PHOTO}, 1),
    "clip": (clip, {"input_ids": IDS, "pixel_values": PHOTO}, 2),
    "whisper": (whisper, {"input_features": torch.rand(1, 4, 20), "decoder_input_ids": IDS}, 3),
}
"""Name → model, inputs, attentions."""


DECODERS = ("gpt2", "llama", "whisper")
"""Their masks are made for a batch of any size."""


def raised(make: Callable[[], Any], given: dict[str, Tensor], spelling: str, *, dynamic: Any = False) -> Program:
    torch.manual_seed(0)
    model = make().eval()
    model.set_attn_implementation(spelling)
    source = captured(First(model, tuple(given)), tuple(given.values()), dynamic=dynamic)
    normal, _ = run_pipeline(source, [Canonicalize(), FoldConstants(), EliminateDead()], gate=None)
    made = normal.copy()
    _, misses = RaiseAttention().run(made)
    assert not misses
    twins = [each.double() for each in (normal, made)]
    wanted, found = (each.run(*each.example)[0] for each in twins)
    assert (found - wanted).abs().max() <= 1e-12 * wanted.abs().max()
    assert not made.calls("aten.softmax.int")
    return made


def anonymous(program: Program) -> str:
    """Without the names of stored tensors, which the passes before have numbered."""
    return re.sub(r"@[\w.]+", "@", text(program))


@pytest.mark.parametrize("name", MODELS)
def test_eager_and_fused_are_the_same_when_raised(name: str) -> None:
    make, given, count = MODELS[name]
    dynamic = "auto" if name in DECODERS else False
    eager, fused = (raised(make, given, spelling, dynamic=dynamic) for spelling in ("eager", "sdpa"))
    assert len(eager.calls(ATTENTION)) == count
    assert anonymous(eager) == anonymous(fused)
    causal = text(eager).count("is_causal=True")
    assert causal == {"gpt2": 1, "llama": 1, "clip": 1, "whisper": 1}.get(name, 0), (
        "its mask is computed, for every batch"
    )


def test_detector_is_raised_when_it_attends_to_itself_and_to_the_picture() -> None:
    made = raised(detr, {"pixel_values": PHOTO}, "eager", dynamic="auto")  # else the queries meet as constants
    assert len(made.calls(ATTENTION)) == 3
