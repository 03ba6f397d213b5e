"""How other libraries write preprocessing down: timm's pretrained_cfg, transformers' preprocessor_config.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from vlexport.core.errors import DataError, nearest
from vlexport.core.image_steps import RESAMPLING
from vlexport.core.preprocess import EXAMPLE, IMAGENET_MEAN, IMAGENET_STD, Preprocess


def preprocess_from_timm_config(cfg: Mapping[str, Any]) -> Preprocess:
    """What ``timm.data.create_transform(**resolve_data_config(cfg))`` does when evaluating.

    Args:
        cfg: A model's ``pretrained_cfg``, or a ``config.json`` that holds one. ``input_size`` (C, H, W), ``crop_pct``,
            ``crop_mode``, ``interpolation``, ``mean`` and ``std`` count; what is missing gets timm's default.

    Raises:
        DataError: VLX0207 when a value is one that timm does not know or that cannot be expressed.

    Source:
        timm.data.config.resolve_data_config, timm.data.transforms_factory.transforms_imagenet_eval.
    """
    what = "timm config"
    cfg = cfg.get("pretrained_cfg") or cfg
    size = tuple(cfg.get("input_size") or (3, 224, 224))
    if len(size) != 3 or size[0] not in (1, 3):
        raise _refused(what, f"input_size {size} is not (1 or 3, height, width)")
    crop_pct = cfg.get("crop_pct") or 0.875
    mode = cfg.get("crop_mode") or "center"
    if mode not in ("center", "squash", "border"):
        raise _refused(what, f"no crop_mode is called '{mode}'{nearest(str(mode), ['center', 'squash', 'border'])}")
    mean, std = tuple(cfg.get("mean") or IMAGENET_MEAN), tuple(cfg.get("std") or IMAGENET_STD)
    height, width = (math.floor(edge / crop_pct) for edge in size[1:])
    fields: dict[str, Any] = {
        "color": "gray" if size[0] == 1 else "rgb",
        "resize": height if mode == "center" and height == width else (height, width),
        "edge": {"center": "short", "squash": "exact", "border": "long"}[mode],
        "interpolation": _interpolation(what, cfg.get("interpolation") or "bicubic"),
        "crop": size[1:],
        "mean": mean,
        "std": std,
    }
    if mode == "border":
        fields["pad"] = tuple(round(255 * value) for value in mean)
    return _checked(what, fields)


_SHORT_EDGE = (
    "CLIP",
    "ChineseCLIP",
    "ConvNext",
    "Levit",
    "Bit",
    "MobileNetV1",
    "MobileNetV2",
    "MobileViT",
    "PoolFormer",
)
_EXACT = ("ViT", "DeiT", "Beit", "Blip", "Siglip", "EfficientNet", "Segformer")
_BILINEAR = ("ViT", "MobileNetV1", "MobileNetV2", "Segformer")
_PIL_NUMBERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
_INEXPRESSIBLE = (
    *("do_pad", "do_thumbnail", "do_align_long_axis", "do_image_splitting", "do_crop_margin", "keep_aspect_ratio"),
    *("size_divisor", "min_pixels", "max_pixels"),
)


def preprocess_from_transformers_config(cfg: Mapping[str, Any]) -> Preprocess:
    """What the image processor described by a ``preprocessor_config.json`` does.

    Resizing is pillow's; the torchvision backend of newer processors resamples tensors and may differ by one step of
    256. An odd rest is cropped as transformers crops it.

    Args:
        cfg: The content of the file.

    Raises:
        DataError: VLX0207 when it asks for steps that cannot be expressed (padding to a multiple, splitting, several
            sizes), leaves open what ``size`` or ``resample`` means, or holds a value of another kind.

    Source:
        transformers.image_processing_backends and the processors of CLIP, ConvNeXT, LeViT, PoolFormer, EfficientNet.
    """
    what = "preprocessor_config.json"
    try:
        return _from_transformers(what, cfg)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise _refused(what, f"a value is not of the kind that is expected there ({error!s:.80})") from error


def _from_transformers(what: str, cfg: Mapping[str, Any]) -> Preprocess:
    cfg = cfg.get("image_processor") or cfg
    kind = str(cfg.get("image_processor_type") or cfg.get("feature_extractor_type") or "")
    family = kind.removesuffix("Fast").removesuffix("Pil").removesuffix("ImageProcessor")
    family = family.removesuffix("FeatureExtractor")
    for key in _INEXPRESSIBLE:
        if cfg.get(key):
            raise _refused(what, f"'{key}' of {kind or 'the processor'} cannot be expressed")
    fields: dict[str, Any] = {}
    if cfg.get("do_resize", "size" in cfg):
        fields = _resize_fields(what, cfg, family)
    if cfg.get("do_center_crop") and "crop_size" in cfg:
        fields["crop"] = _height_width(what, "crop_size", cfg["crop_size"])
    if "crop" in fields:
        fields["crop_floor"] = True
    if cfg.get("do_flip_channel_order", family == "MobileViT"):
        fields["color"] = "bgr"
    fields["scale"] = float(cfg.get("rescale_factor", 1 / 255)) if cfg.get("do_rescale", True) else 1.0
    return _checked(what, {**fields, **_normalize_fields(what, cfg, family)})


def _resize_fields(what: str, cfg: Mapping[str, Any], family: str) -> dict[str, Any]:
    size = cfg.get("size")
    short: int | None = None
    if isinstance(size, int) and family in _SHORT_EDGE:
        short = size
    elif isinstance(size, Mapping) and set(size) == {"shortest_edge"}:
        short = int(size["shortest_edge"])
    elif isinstance(size, int) and family not in _EXACT:
        raise _refused(what, f"size {size} of {family or 'an unnamed'} processor may mean one edge or both")
    fields: dict[str, Any] = {"resize": short, "edge": "short"}
    if short is None:
        fields = {"resize": _height_width(what, "size", size), "edge": "exact"}
    fields["interpolation"] = _interpolation(what, _resample(what, cfg, family))
    if family == "ConvNext" and short is not None:
        crop_pct = cfg.get("crop_pct") or 224 / 256
        # Below 384 it resizes by the short edge and crops; from there on it squashes.
        squash = {"resize": (short, short), "edge": "exact"}
        return {**fields, **({"resize": int(short / crop_pct), "crop": (short, short)} if short < 384 else squash)}
    if family == "Levit" and short is not None:
        return {**fields, "resize": int(256 / 224 * short)}
    if family == "PoolFormer" and cfg.get("crop_pct") is not None:
        height, width = (
            int(edge / cfg["crop_pct"]) for edge in (fields["resize"] if short is None else (short, short))
        )
        return (
            {**fields, "resize": height, "edge": "short"} if height == width else {**fields, "resize": (height, width)}
        )
    return fields


def _normalize_fields(what: str, cfg: Mapping[str, Any], family: str) -> dict[str, Any]:
    mean, std = [0.0], [1.0]
    if cfg.get("do_normalize", "image_mean" in cfg and family != "MobileViT"):
        if "image_mean" not in cfg or "image_std" not in cfg:
            raise _refused(what, "do_normalize is set, image_mean or image_std is missing")
        mean, std = ([v] if isinstance(v, (int, float)) else list(v) for v in (cfg["image_mean"], cfg["image_std"]))
    if family == "EfficientNet" and cfg.get("include_top", True):
        std = [value * value for value in std]  # it divides by std a second time
    if cfg.get("rescale_offset"):
        mean = [value + 1 for value in mean]  # it takes 1 off after scale
    return {"mean": tuple(mean), "std": tuple(std)}


def _resample(what: str, cfg: Mapping[str, Any], family: str) -> str:
    number = cfg.get("resample")
    if number is not None:
        return _PIL_NUMBERS.get(number, str(number))
    if family not in (*_SHORT_EDGE, *_EXACT):
        raise _refused(what, f"resample is missing, and {family or 'an unnamed'} processor's own is not known")
    return "bilinear" if family in _BILINEAR else "bicubic"


def _height_width(what: str, key: str, size: object) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    if isinstance(size, Mapping) and set(size) == {"height", "width"}:
        return int(size["height"]), int(size["width"])
    raise _refused(what, f"{key} {size!r} is neither one edge nor height and width")


def _interpolation(what: str, name: str) -> str:
    if name not in RESAMPLING:
        raise _refused(what, f"interpolation '{name}' cannot be expressed{nearest(name, RESAMPLING)}")
    return name


def _refused(what: str, message: str) -> DataError:
    return DataError("VLX0207", message, where=what, hint=f'write it yourself, for example --preprocess "{EXAMPLE}"')


def _checked(what: str, fields: dict[str, Any]) -> Preprocess:
    try:
        return Preprocess.model_validate(fields)
    except ValidationError as error:
        raise _refused(what, str(error.errors()[0]["msg"]).removeprefix("Value error, ")) from error
