"""Models of the raising zoo: those of the zoo for all targets, more of timm, more of transformers with true depths.

A transformers model is narrower than the published one and has as many layers. Attention is made in one of two ways:
``fused`` calls PyTorch's operator where the library offers to, ``eager`` writes products and a softmax.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

from tests import zoo_target_models as zoo
from tests.zoo_target_models import WORDS, Named, OfBoth, OfPixels, OfWords, ZooModel
from vlexport.frontends import compat

Spelling = Literal["fused", "eager"]
SPELLINGS: tuple[Spelling, ...] = ("fused", "eager")
TIMM = (
    "crossvit_tiny_240", "pvt_v2_b0", "xcit_nano_12_p16_224", "eva02_tiny_patch14_224", "coat_lite_tiny", "pit_s_224",
    "cait_xxs24_224", "deit3_small_patch16_224", "twins_svt_small", "davit_tiny", "mvitv2_tiny", "volo_d1_224",
    "maxvit_tiny_tf_224", "beit_base_patch16_224",
)  # fmt: skip
_SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
_WORDS = {"input_ids": (24,)}
_PIXELS = {"pixel_values": (3, 224, 224)}
_FRAMES = 64
"""Positions of Whisper's encoder, which sees twice as many frames; the published one has 1500."""


class OfMaskedWords(Named):
    """Reads texts and says which words count."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """Outputs by name."""
        return self.call(input_ids=input_ids, attention_mask=attention_mask)


class OfTwoTexts(Named):
    """Reads a text and what was written of its answer."""

    def forward(self, input_ids: torch.Tensor, decoder_input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Outputs by name."""
        return self.call(input_ids=input_ids, decoder_input_ids=decoder_input_ids)


class OfSound(Named):
    """Reads a spectrogram."""

    def forward(self, input_features: torch.Tensor) -> dict[str, torch.Tensor]:
        """Outputs by name."""
        return self.call(input_features=input_features)


class OfWordsAndStates(Named):
    """Reads a text and what an encoder made."""

    def forward(self, input_ids: torch.Tensor, encoder_hidden_states: torch.Tensor) -> dict[str, torch.Tensor]:
        """Outputs by name."""
        return self.call(input_ids=input_ids, encoder_hidden_states=encoder_hidden_states)


def _cvt_13() -> ZooModel:
    from transformers import CvtConfig, CvtForImageClassification

    return ZooModel(OfPixels(CvtForImageClassification(CvtConfig(num_labels=10)), ("logits",)), _PIXELS)


def _bert() -> ZooModel:
    from transformers import BertConfig, BertModel

    config = BertConfig(**_SIZES, num_hidden_layers=12, vocab_size=WORDS, max_position_embeddings=32)
    model = OfMaskedWords(BertModel(config), ("last_hidden_state", "pooler_output"))
    return ZooModel(model, {**_WORDS, "attention_mask": (24,)}, {"input_ids": WORDS, "attention_mask": 3})


def _gpt2() -> ZooModel:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=64, n_layer=12, n_head=4, vocab_size=WORDS, n_positions=32, use_cache=False)
    return ZooModel(OfWords(GPT2LMHeadModel(config), ("logits",)), _WORDS, {"input_ids": WORDS})


def _t5() -> ZooModel:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        d_model=64, d_kv=16, d_ff=128, num_layers=6, num_heads=4, vocab_size=WORDS, use_cache=False, pad_token_id=0,
        decoder_start_token_id=0,
    )  # fmt: skip
    model = OfTwoTexts(T5ForConditionalGeneration(config), ("logits",))
    words = {"input_ids": WORDS, "decoder_input_ids": WORDS}
    return ZooModel(model, {**_WORDS, "decoder_input_ids": (12,)}, words)


def _llama() -> ZooModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **_SIZES, num_hidden_layers=16, num_key_value_heads=2, vocab_size=WORDS, max_position_embeddings=32,
        use_cache=False,
    )  # fmt: skip
    return ZooModel(OfWords(LlamaForCausalLM(config), ("logits",)), _WORDS, {"input_ids": WORDS})


def _clip() -> ZooModel:
    from transformers import CLIPConfig, CLIPModel

    ends = {"eos_token_id": WORDS - 1, "pad_token_id": WORDS - 1, "bos_token_id": 0}
    text = {**_SIZES, **ends, "num_hidden_layers": 12, "vocab_size": WORDS, "max_position_embeddings": 24}
    vision = {**_SIZES, "num_hidden_layers": 12, "image_size": 224, "patch_size": 32}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)
    model = OfBoth(CLIPModel(config), ("image_embeds", "text_embeds"))
    return ZooModel(model, {**_WORDS, **_PIXELS}, {"input_ids": WORDS}, ends=WORDS - 1)


def _siglip_base() -> ZooModel:
    from transformers import SiglipConfig, SiglipModel

    text = {"vocab_size": WORDS, "max_position_embeddings": 24, "projection_size": 64}
    config = SiglipConfig(
        text_config={**_SIZES, "num_hidden_layers": 12, **text},
        vision_config={**_SIZES, "num_hidden_layers": 12, "image_size": 224, "patch_size": 16},
    )
    model = OfBoth(SiglipModel(config), ("image_embeds", "text_embeds"))
    return ZooModel(model, {**_WORDS, **_PIXELS}, {"input_ids": WORDS})


def _whisper() -> Any:
    from transformers import WhisperConfig

    return WhisperConfig(
        vocab_size=WORDS, d_model=64, encoder_layers=4, decoder_layers=4, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128, max_source_positions=_FRAMES,
        max_target_positions=32, use_cache=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def _whisper_encoder() -> ZooModel:
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    return ZooModel(OfSound(WhisperEncoder(_whisper()), ("last_hidden_state",)), {"input_features": (80, 2 * _FRAMES)})


def _whisper_decoder() -> ZooModel:
    from transformers.models.whisper.modeling_whisper import WhisperDecoder

    model = OfWordsAndStates(WhisperDecoder(_whisper()), ("last_hidden_state",))
    return ZooModel(model, {**_WORDS, "encoder_hidden_states": (_FRAMES, 64)}, {"input_ids": WORDS})


def _detr_resnet50() -> ZooModel:
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

    backbone = ResNetConfig(
        embedding_size=16, hidden_sizes=[32, 48, 64, 96], depths=[3, 4, 6, 3], layer_type="bottleneck",
        out_features=["stage4"],
    )  # fmt: skip
    config = DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone, d_model=64,
        encoder_layers=6, decoder_layers=6, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=128,
        decoder_ffn_dim=128, num_queries=100, num_labels=7,
    )  # fmt: skip
    model = OfPixels(DetrForObjectDetection(config), ("logits", "pred_boxes"))
    return ZooModel(model, {"pixel_values": (3, 256, 256)})


TRANSFORMERS: dict[str, Callable[[], ZooModel]] = {
    "bert": _bert,
    "gpt2": _gpt2,
    "t5": _t5,
    "llama": _llama,
    "clip": _clip,
    "siglip_base": _siglip_base,
    "whisper_encoder": _whisper_encoder,
    "whisper_decoder": _whisper_decoder,
    "detr_resnet50": _detr_resnet50,
    "cvt_13": _cvt_13,
}
MODELS = (*zoo.TRANSFORMERS, *TRANSFORMERS, *zoo.TIMM, *TIMM)


def raising_model(name: str, spelling: Spelling, seed: int = 0) -> ZooModel:
    """The model of that name in eval mode with one spelling of attention, and values in every bias and scale."""
    compat.declare_torchvision_operators()
    from timm.layers import set_fused_attn

    if name not in MODELS:
        raise ValueError(f"the zoo has no model {name}")
    set_fused_attn(spelling == "fused")
    try:
        made = zoo.made_model(name, {**zoo.TRANSFORMERS, **TRANSFORMERS}, seed)
    finally:
        set_fused_attn(True)
    if spelling == "eager":
        _spell_out(made.module)
    return made


def _spell_out(module: nn.Module) -> None:
    """Let a transformers model write its attention out; timm decides when a module is made."""
    from transformers import PreTrainedModel

    for each in module.modules():
        if isinstance(each, PreTrainedModel):
            each.set_attn_implementation("eager")
