"""Models of the zoo for all targets: timm by name, transformers from small configs, all with random weights.

A transformers model keeps the structure of the published one (every operator of its kind), with fewer layers and
narrower ones. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tests.zoo_models import randomise
from vlexport.frontends import compat
from vlexport.frontends.architecture import factory_from_text

TIMM = (
    "nextvit_small", "fastvit_t8", "mobileone_s0", "repvgg_a0", "repvit_m1_0", "tnt_s_patch16_224",
    "vitamin_small_224", "levit_128s", "efficientformer_l1", "mobilevit_xxs", "swin_tiny_patch4_window7_224",
    "convnext_atto", "efficientnet_lite0", "deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224",
)  # fmt: skip
WORDS = 99
"""Size of the small vocabularies."""


@dataclass(frozen=True)
class ZooModel:
    """A module in eval mode and what draws its inputs.

    Attributes:
        module: Returns tensors, or a dict of them.
        shapes: Argument of forward → shape without the batch.
        words: Arguments that are ids → size of the vocabulary; the others are floats, standard normal.
        ends: Value that closes a row of ids at a drawn place, with padding behind it.
        published: Parameters whose value makes the model what it is → that of the published weights.
        own_weights: Matrices and kernels stay as the constructor made them.
    """

    module: nn.Module
    shapes: Mapping[str, tuple[int, ...]]
    words: Mapping[str, int] = field(default_factory=dict)
    ends: int | None = None
    published: Mapping[str, float] = field(default_factory=dict)
    own_weights: bool = False

    def draw(self, batch: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Inputs of ``batch`` samples."""
        return {name: self._draw(name, (batch, *shape), generator) for name, shape in self.shapes.items()}

    def example(self) -> dict[str, torch.Tensor]:
        """One sample."""
        return self.draw(1, torch.Generator().manual_seed(0))

    @staticmethod
    def named(outputs: torch.Tensor | Mapping[str, torch.Tensor] | tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
        """What the module returned, under the names that it has in a bundle."""
        if isinstance(outputs, Mapping):
            return dict(outputs)
        if isinstance(outputs, torch.Tensor):
            return {"output": outputs}
        return {f"output_{i}" if i else "output": each for i, each in enumerate(outputs)}

    def _draw(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        if name not in self.words:
            return torch.randn(shape, generator=generator)
        ids = torch.randint(1, self.words[name] - 1, shape, generator=generator)
        if self.ends is None:
            return ids
        for row in ids:
            row[int(torch.randint(shape[-1] // 2, shape[-1], (1,), generator=generator)) :] = self.ends
        return ids


class Named(nn.Module):
    """A transformers model that returns some of its outputs by name."""

    def __init__(self, model: nn.Module, outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.outputs = model, outputs

    def call(self, **values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Outputs by name."""
        found = self.model(**values)
        return {name: getattr(found, name) for name in self.outputs}


class OfPixels(Named):
    """Reads pictures."""

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Outputs by name."""
        return self.call(pixel_values=pixel_values)


class OfWords(Named):
    """Reads texts."""

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Outputs by name."""
        return self.call(input_ids=input_ids)


class OfBoth(Named):
    """Reads texts and pictures."""

    def forward(self, input_ids: torch.Tensor, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Outputs by name."""
        return self.call(input_ids=input_ids, pixel_values=pixel_values)


class OfNoise(Named):
    """Reads pictures and the noise that chooses what is masked."""

    def forward(self, pixel_values: torch.Tensor, noise: torch.Tensor) -> dict[str, torch.Tensor]:
        """Outputs by name."""
        return self.call(pixel_values=pixel_values, noise=noise)


def _timm(name: str) -> ZooModel:
    made = factory_from_text(f"timm:{name}")
    return ZooModel(made.module, {"x": tuple(made.inputs.shape[1:])})


_PIXELS = {"pixel_values": (3, 224, 224)}
_DETECTED = {"pixel_values": (3, 256, 256)}
_WORDS = {"input_ids": (24,)}


def _cvt() -> ZooModel:
    from transformers import CvtConfig, CvtForImageClassification

    config = CvtConfig(embed_dim=[32, 64, 128], num_heads=[1, 2, 4], depth=[1, 2, 3], num_labels=10)
    return ZooModel(OfPixels(CvtForImageClassification(config), ("logits",)), _PIXELS)


_SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def _clip_vision() -> ZooModel:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(**_SMALL, image_size=224, patch_size=32, projection_dim=32)
    model = CLIPVisionModelWithProjection(config)
    return ZooModel(OfPixels(model, ("image_embeds", "last_hidden_state")), _PIXELS)


def _clip_text() -> ZooModel:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        **_SMALL, vocab_size=WORDS, max_position_embeddings=24, projection_dim=32, eos_token_id=WORDS - 1,
        pad_token_id=WORDS - 1, bos_token_id=0,
    )  # fmt: skip
    model = OfWords(CLIPTextModelWithProjection(config), ("text_embeds",))
    return ZooModel(model, _WORDS, {"input_ids": WORDS}, ends=WORDS - 1)


def _siglip() -> ZooModel:
    from transformers import SiglipConfig, SiglipModel

    config = SiglipConfig(
        text_config={**_SMALL, "vocab_size": WORDS, "max_position_embeddings": 24, "projection_size": 64},
        vision_config={**_SMALL, "image_size": 224, "patch_size": 32},
    )
    model = OfBoth(SiglipModel(config), ("image_embeds", "text_embeds", "logits_per_image"))
    published = {"model.logit_scale": 4.77, "model.logit_bias": -12.9}
    return ZooModel(model, {**_WORDS, **_PIXELS}, {"input_ids": WORDS}, published=published)


def _vit_mae() -> ZooModel:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    config = ViTMAEConfig(
        **_SMALL, image_size=224, patch_size=16, decoder_hidden_size=48, decoder_intermediate_size=96,
        decoder_num_attention_heads=4, decoder_num_hidden_layers=2,
    )  # fmt: skip
    return ZooModel(OfNoise(ViTMAEForPreTraining(config), ("logits", "mask")), {**_PIXELS, "noise": (196,)})


def _dpt() -> ZooModel:
    from transformers import DPTConfig, DPTForDepthEstimation

    config = DPTConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, image_size=224,
        patch_size=16, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[16, 32, 64, 64], fusion_hidden_size=32,
        is_hybrid=False,
    )  # fmt: skip
    return ZooModel(OfPixels(DPTForDepthEstimation(config), ("predicted_depth",)), _PIXELS)


def _resnet(out: list[str]) -> Any:
    from transformers import ResNetConfig

    return ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1], layer_type="basic", out_features=out
    )


_DETECTION = {
    "use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None, "d_model": 32,
    "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_queries": 20, "num_labels": 7,
}  # fmt: skip


def _detr() -> ZooModel:
    from transformers import DetrConfig, DetrForObjectDetection

    config = DetrConfig(**_DETECTION, backbone_config=_resnet(["stage4"]))
    return ZooModel(OfPixels(DetrForObjectDetection(config), ("logits", "pred_boxes")), _DETECTED)


def _deformable_detr() -> ZooModel:
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection

    config = DeformableDetrConfig(
        **_DETECTION, backbone_config=_resnet(["stage2", "stage3", "stage4"]), two_stage=True, with_box_refine=True,
        two_stage_num_proposals=20,
    )  # fmt: skip
    model = OfPixels(DeformableDetrForObjectDetection(config), ("logits", "pred_boxes"))
    # with larger weights it samples at random places of random features, and rounding decides what it sees
    return ZooModel(model, _DETECTED, own_weights=True)


def _videomae() -> ZooModel:
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification

    config = VideoMAEConfig(**_SMALL, image_size=112, patch_size=16, num_frames=8, tubelet_size=2, num_labels=10)
    model = OfPixels(VideoMAEForVideoClassification(config), ("logits",))
    return ZooModel(model, {"pixel_values": (8, 3, 112, 112)})


TRANSFORMERS: dict[str, Callable[[], ZooModel]] = {
    "cvt": _cvt,
    "clip_vision": _clip_vision,
    "clip_text": _clip_text,
    "siglip": _siglip,
    "vit_mae": _vit_mae,
    "dpt": _dpt,
    "detr": _detr,
    "deformable_detr": _deformable_detr,
    "videomae": _videomae,
}
MODELS = (*TRANSFORMERS, *TIMM)


def zoo_model(name: str, seed: int = 0) -> ZooModel:
    """The model of that name in eval mode, with values in every bias, scale and statistic."""
    if name not in MODELS:
        raise ValueError(f"the zoo has no model {name}")
    return made_model(name, TRANSFORMERS, seed)


def made_model(name: str, makers: Mapping[str, Callable[[], ZooModel]], seed: int = 0) -> ZooModel:
    """A model of ``makers``, or timm's of that name, as :func:`zoo_model` has them."""
    torch.manual_seed(seed)
    compat.declare_torchvision_operators()  # transformers imports torchvision, whose own do not fit this torch
    made = makers[name]() if name in makers else _timm(name)
    made.module.eval()
    _randomise(made, seed)
    return made


def _randomise(made: ZooModel, seed: int) -> None:
    """Values in every bias, scale and statistic, and weights that keep the size of what goes through.

    Without the latter, and without statistics of the batch norms that are true of some data, a deep model of random
    weights hardly sees its input, and comparing outputs shows nothing.
    """
    randomise(made.module, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in () if made.own_weights else made.module.parameters():
            if parameter.ndim >= 2 and parameter[0].numel() > 1:
                parameter.normal_(0, min(1.0, 1.4 * parameter[0].numel() ** -0.5), generator=generator)
        for name, value in made.published.items():
            made.module.get_parameter(name).fill_(value)
        norms = [m for m in made.module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        for norm in norms:
            norm.train()
            norm.momentum = None  # the mean over all batches seen
            norm.reset_running_stats()
        if norms:
            made.module(**made.draw(4, generator))
    made.module.eval()
