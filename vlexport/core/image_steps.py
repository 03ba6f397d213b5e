"""Resizing and cropping of pillow images, pixel for pixel as torchvision, timm and transformers do it."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from vlexport.core.errors import DataError

Edge = Literal["short", "long", "exact"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "box"]

RESAMPLING: dict[str, Image.Resampling] = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
}
"""Our name of an interpolation → pillow's."""

_MAX_RESIZED_PIXELS = 2 * 89_478_485  # twice pillow's own limit: where it too speaks of a decompression bomb


def resized_size(size: tuple[int, int], target: int | tuple[int, int], *, edge: Edge) -> tuple[int, int]:
    """The (height, width) that an image of ``size`` is resized to.

    Args:
        size: (height, width) of the image, pixels.
        target: One edge, or (height, width).
        edge: ``short``: the image covers the target. ``long``: it lies inside. ``exact``: it is the target.

    Source:
        torchvision's Resize for ``short`` with one edge (rounds down), else timm's ResizeKeepRatio (rounds to even).
    """
    height, width = size
    box = (target, target) if isinstance(target, int) else target
    if edge == "exact":
        return box
    if isinstance(target, int) and edge == "short":
        longer = int(target * max(size) / min(size))
        return (target, longer) if height <= width else (longer, target)
    ratios = (height / box[0], width / box[1])
    ratio = min(ratios) if edge == "short" else max(ratios)
    return max(1, round(height / ratio)), max(1, round(width / ratio))


def resized(
    image: Image.Image, target: tuple[int, int], *, interpolation: Interpolation, antialias: bool
) -> Image.Image:
    """Resize to (height, width).

    Args:
        image: An image of mode L or RGB.
        target: (height, width) in pixels.
        interpolation: How pixels are resampled.
        antialias: False samples the nearest 2 or 4 source pixels only (bilinear and bicubic).

    Raises:
        DataError: VLX0203 when the result would take gigabytes (a photo of 1 × 5000 pixels, resized by its short edge).
    """
    height, width = target
    if height * width > _MAX_RESIZED_PIXELS:
        raise DataError(
            "VLX0203",
            f"a photo of {image.width}×{image.height} pixels would be resized to {width}×{height}",
            hint="leave the photo out, or resize by `long` or `exact`",
        )
    if (image.height, image.width) == target:
        return image
    if antialias:
        return image.resize((width, height), RESAMPLING[interpolation])
    pixels = np.asarray(image, dtype=np.float64)
    for axis, size in enumerate(target):
        pixels = _sampled(pixels, axis, size, cubic=interpolation == "bicubic")
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))


def _sampled(pixels: npt.NDArray[np.float64], axis: int, size: int, *, cubic: bool) -> npt.NDArray[np.float64]:
    """Resample one axis from the 2 or 4 nearest source pixels, borders repeated, pixel centres at half integers."""
    have = pixels.shape[axis]
    centre = (np.arange(size) + 0.5) * have / size - 0.5
    first = np.floor(centre).astype(np.int64)
    t = centre - first
    taps = {0: 1 - t, 1: t}
    if cubic:
        taps = {-1: _cubic(1 + t), 0: _cubic(t), 1: _cubic(1 - t), 2: _cubic(2 - t)}
    shape = [1] * pixels.ndim
    shape[axis] = size
    result = np.zeros((*pixels.shape[:axis], size, *pixels.shape[axis + 1 :]))
    for offset, weight in taps.items():
        result += np.take(pixels, np.clip(first + offset, 0, have - 1), axis=axis) * weight.reshape(shape)
    return result


def _cubic(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Keys' cubic kernel at distances 0 to 2, with the constant of torch.nn.functional.interpolate and OpenCV."""
    a = -0.75
    return np.where(x <= 1, (a + 2) * x**3 - (a + 3) * x**2 + 1, a * (x**3 - 5 * x**2 + 8 * x - 4))


def cropped(image: Image.Image, target: tuple[int, int], *, floor: bool, pad: tuple[int, ...]) -> Image.Image:
    """Cut, and pad what is smaller, to (height, width) around the centre. An odd pixel of padding goes to the far end.

    Args:
        image: An image of mode L or RGB.
        target: (height, width) in pixels.
        floor: Half of an odd rest is rounded down (transformers) and not to even (torchvision).
        pad: Colour of padding, one value a band, 0 to 255.

    Source:
        torchvision's CenterCrop, timm's CenterCropOrPad, transformers' center_crop.
    """
    height, width = target
    top, left = (
        -(-rest // 2) if rest < 0 else rest // 2 if floor else round(rest / 2)
        for rest in (image.height - height, image.width - width)
    )
    canvas = Image.new(image.mode, (width, height), pad[0] if len(pad) == 1 else pad)
    canvas.paste(image, (-left, -top))
    return canvas
