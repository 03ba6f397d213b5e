"""The preprocessings that are usual, as changes of a recorded one: ranges, colour order, resize and crop. No torch.

======  ====================================================================================================
axis    what is tried
======  ====================================================================================================
range   ImageNet's mean and std, CLIP's, 0 to 1, -1 to 1, 0 to 255, 0 to 255 less ImageNet's mean; each as RGB and BGR
size    both edges to the input's size, the short edge to it, to 1/0.95, 1/0.9 and 1/0.875 of it and cropped, the long
        edge to it and padded, cropped without resizing
======  ====================================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from vlexport.core.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from vlexport.core.preprocess_diagnosis import Axis

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_RANGES: tuple[tuple[str, float, tuple[float, ...], tuple[float, ...]], ...] = (
    ("ImageNet's mean and std", 1 / 255, IMAGENET_MEAN, IMAGENET_STD),
    ("0 to 1", 1 / 255, (0.0,), (1.0,)),
    ("-1 to 1", 1 / 255, (0.5,), (0.5,)),
    ("0 to 255", 1.0, (0.0,), (1.0,)),
    ("CLIP's mean and std", 1 / 255, CLIP_MEAN, CLIP_STD),
    ("0 to 255 less ImageNet's mean", 1.0, (123.675, 116.28, 103.53), (1.0,)),
)
_GRAY_RANGES: tuple[tuple[str, float, tuple[float, ...], tuple[float, ...]], ...] = (
    ("0 to 1", 1 / 255, (0.0,), (1.0,)),
    ("-1 to 1", 1 / 255, (0.5,), (0.5,)),
    ("0 to 255", 1.0, (0.0,), (1.0,)),
    ("MNIST's mean and std", 1 / 255, (0.1307,), (0.3081,)),
)
_SHORT_RATIOS = (1.0, 0.95, 0.9, 0.875)


@dataclass(frozen=True)
class Variant:
    """A preprocessing, and in words what it changes."""

    what: str
    axis: Axis
    preprocess: Preprocess


def variants(recorded: Preprocess, axis: Axis, size: tuple[int, int] | None) -> tuple[Variant, ...]:
    """All usual ones on an axis that differ from a recorded one.

    Args:
        recorded: What the others keep where the axis says nothing.
        axis: ``range`` or ``size``.
        size: (height, width) that the model takes; None where it takes any, and then there is nothing to try.
    """
    made = _ranges(recorded) if axis == "range" else _sizes(recorded, size) if size is not None else ()
    found: dict[str, Variant] = {}
    for each in made:
        if each.preprocess != recorded:
            found.setdefault(each.preprocess.to_spec(), each)
    return tuple(found.values())


def _ranges(recorded: Preprocess) -> Iterator[Variant]:
    gray = recorded.color == "gray"
    orders = ("gray",) if gray else (recorded.color, "bgr" if recorded.color == "rgb" else "rgb")
    own = ("as recorded", recorded.scale, _in_rgb(recorded, recorded.mean), _in_rgb(recorded, recorded.std))
    for order in orders:
        for what, scale, mean, std in (own, *(_GRAY_RANGES if gray else _RANGES)):
            turned = order == "bgr"
            values = {"scale": scale, "mean": mean[::-1] if turned else mean, "std": std[::-1] if turned else std}
            named = what if order == recorded.color else f"{order.upper()}, {what}"
            axis: Axis = "color" if order != recorded.color else "range"
            yield Variant(named, axis, recorded.model_copy(update={"color": order, **values}))


def _in_rgb(recorded: Preprocess, values: tuple[float, ...]) -> tuple[float, ...]:
    return values[::-1] if recorded.color == "bgr" else values


def _sizes(recorded: Preprocess, size: tuple[int, int]) -> Iterator[Variant]:
    height, width = size
    kept: dict[str, Any] = recorded.model_dump(exclude={"resize", "edge", "crop", "crop_floor", "pad"})
    if recorded.resize is None:
        kept |= {"interpolation": "bicubic", "antialias": True}
    shown = f"{height}" if height == width else f"{height}×{width}"
    for ratio in _SHORT_RATIOS:
        edges = (math.floor(height / ratio), math.floor(width / ratio))
        resize = edges[0] if height == width else edges
        longer = f"{edges[0]}" if height == width else f"{edges[0]}×{edges[1]}"
        yield from _made(
            f"short edge {longer}, crop {shown}", {**kept, "resize": resize, "edge": "short", "crop": size}
        )
    yield from _made(f"both edges {shown}", {**kept, "resize": size, "edge": "exact"})
    yield from _made(f"long edge {shown}, padded", {**kept, "resize": size, "edge": "long", "crop": size})
    plain = {**kept, "interpolation": "bilinear", "antialias": True}
    yield from _made(f"crop {shown}, not resized", {**plain, "crop": size})


def _made(what: str, values: dict[str, Any]) -> Iterator[Variant]:
    try:
        yield Variant(what, "size", Preprocess.model_validate(values))
    except ValidationError:  # a size beyond what a preprocessing may have
        return
