"""From a photo to a model's input: one implementation, with pillow and numpy only.

A preprocessing is written on one line, items in any order, each at most once::

    resize=256:bicubic,crop=224,scale=1/255,mean=0.485:0.456:0.406,std=0.229:0.224:0.225

    item                     default     meaning
    resize=SIZE[:FLAG…]      none        SIZE is one edge (256) or HEIGHTxWIDTH (224x320). Flags: an interpolation
                                         (nearest, bilinear, bicubic, lanczos, box; default bilinear), a rule
                                         (short: the image covers SIZE, its shorter edge fits; long: the image lies
                                         inside SIZE; exact: both edges, proportions lost; default short for one
                                         edge, exact for two), no-antialias (bilinear and bicubic only)
    crop=SIZE[:floor]        none        cut or pad to SIZE around the centre; an odd rest goes as torchvision has it,
                                         or with `floor` as transformers has it
    pad=V[:V…]               0           colour of what `crop` adds, 0 to 255, one value or one a channel (letterbox:
                                         resize=640:long,crop=640,pad=114)
    color=rgb|bgr|gray       rgb         channels of the model's input
    scale=X or X/Y           1/255       factor on pixel values 0 to 255
    mean=X[:X…]              0           taken off after scale, one value or one a channel, in the order of `color`
    std=X[:X…]               1           divides after mean; `mean=imagenet,std=imagenet` name ImageNet's

Numbers of several channels are separated by `:`, since `|` and `;` mean something to a shell.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import ValidationError, model_validator

from vlexport.core.artifact import Array, Frozen, TensorSpec
from vlexport.core.errors import DataError, nearest
from vlexport.core.image_steps import RESAMPLING, Edge, Interpolation, cropped, resized, resized_size

Color = Literal["rgb", "bgr", "gray"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
EXAMPLE = "resize=256:bicubic,crop=224,scale=1/255,mean=imagenet,std=imagenet"


class Preprocess(Frozen):
    """How a photo becomes an input. Steps in order: colour, resize, crop, scale, mean, std.

    Attributes:
        color: Channels of the result.
        resize: One edge in pixels, or (height, width), or None.
        edge: What must fit ``resize``: ``short`` covers it, ``long`` lies inside it, ``exact`` meets both edges. Not
            given, it becomes short for one edge and exact for two; None without ``resize``.
        interpolation: How pixels are resampled.
        antialias: Whether shrinking averages over all source pixels, as pillow does. Off, it samples as OpenCV and
            ``torch.nn.functional.interpolate`` do by default.
        crop: (height, width) around the centre, or None. A smaller image is padded.
        crop_floor: Cut an odd rest as transformers does (half of it rounded down) and not as torchvision does (half of
            it rounded to even).
        pad: Colour of padding, 0 to 255, one value or one a channel.
        scale: Factor on pixel values 0 to 255.
        mean: Taken off after ``scale``, one value or one a channel.
        std: Divides after ``mean``, one value or one a channel.

    Source:
        torchvision.transforms (Resize, CenterCrop) and timm.data.transforms (ResizeKeepRatio, CenterCropOrPad).
    """

    color: Color = "rgb"
    resize: int | tuple[int, int] | None = None
    edge: Edge | None = None
    interpolation: Interpolation = "bilinear"
    antialias: bool = True
    crop: tuple[int, int] | None = None
    crop_floor: bool = False
    pad: tuple[int, ...] = (0,)
    scale: float = 1 / 255
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    @model_validator(mode="before")
    @classmethod
    def _edge_is_said(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("resize") is not None and values.get("edge") is None:
            return {**values, "edge": _default_edge(values["resize"])}
        return values

    @model_validator(mode="after")
    def _fits(self) -> Preprocess:
        sizes = (*(() if self.resize is None else _pair(self.resize)), *(self.crop or (1, 1)))
        if min(sizes) < 1 or max(sizes) > 16_384:
            raise ValueError(f"sizes are 1 to 16384 pixels, not {min(sizes) if min(sizes) < 1 else max(sizes)}")
        if self.edge == "exact" and isinstance(self.resize, int):
            raise ValueError(f"exact needs height and width: write resize={self.resize}x{self.resize}")
        if not self.antialias and self.interpolation not in ("bilinear", "bicubic"):
            raise ValueError(f"no-antialias goes with bilinear and bicubic, not with {self.interpolation}")
        if self.resize is None and (self.edge, self.interpolation, self.antialias) != (None, "bilinear", True):
            raise ValueError("edge, interpolation and antialias say how to resize: give resize too")
        if self.crop is None and (self.pad != (0,) or self.crop_floor):
            raise ValueError("pad and floor say how to crop: write crop=SIZE too")
        for name, values in (("mean", self.mean), ("std", self.std), ("pad", self.pad)):
            if len(values) not in (1, self.channels):
                raise ValueError(f"{name} has {len(values)} values, {self.color} has {self.channels} channels")
        if not all(math.isfinite(v) for v in (self.scale, *self.mean, *self.std)) or not all((self.scale, *self.std)):
            raise ValueError("scale, mean and std are finite, and neither scale nor std is 0")
        if min(self.pad) < 0 or max(self.pad) > 255:
            raise ValueError(f"pad values are 0 to 255, not {self.pad}")
        return self

    @property
    def scale_only(self) -> Preprocess:
        """The same without mean and std."""
        return self.model_copy(update={"mean": (0.0,), "std": (1.0,)})

    @property
    def channels(self) -> int:
        """1 for gray, else 3."""
        return 1 if self.color == "gray" else 3

    @property
    def output_shape(self) -> tuple[int | str, int | str, int | str]:
        """(C, H, W) of the result; ``"height"`` and ``"width"`` stand where the photo decides."""
        if self.crop is not None:
            return (self.channels, *self.crop)
        if isinstance(self.resize, tuple) and self.edge == "exact":
            return (self.channels, *self.resize)
        return (self.channels, "height", "width")

    def apply(self, image: Image.Image) -> npt.NDArray[np.float32]:
        """Preprocess one photo.

        As torchvision's users have it, the photo is brought to 8 bits by pillow's ``convert``: transparency is dropped,
        palettes are looked up, values above 255 of 16-bit, integer and float images saturate, and the EXIF orientation
        is left alone.

        Args:
            image: A photo of any mode and size.

        Returns:
            float32 array of shape (C, H, W), see :attr:`output_shape`.

        Raises:
            DataError: VLX0203 when the photo is empty or so thin that resizing it would take gigabytes.
            OSError: Pillow cannot read the file behind ``image``.
            ValueError: Pillow cannot convert its mode.
        """
        if min(image.size) < 1:
            raise DataError("VLX0203", f"the photo is empty ({image.width}×{image.height} pixels)")
        if image.mode.startswith(("I", "F")):
            image = image.convert("L")  # saturates; straight to RGB it is refused by older pillows
        image = image.convert("L" if self.color == "gray" else "RGB")
        if self.resize is not None and self.edge is not None:
            target = resized_size((image.height, image.width), self.resize, edge=self.edge)
            image = resized(image, target, interpolation=self.interpolation, antialias=self.antialias)
        if self.crop is not None:
            image = cropped(image, self.crop, floor=self.crop_floor, pad=self._canvas_pad)
        return self._normalized(np.asarray(image).reshape(image.height, image.width, self.channels))

    @property
    def _canvas_pad(self) -> tuple[int, ...]:
        values = self.pad if len(self.pad) == self.channels else self.pad * self.channels
        return values[::-1] if self.color == "bgr" else values  # the channels are reversed last

    def _normalized(self, pixels: Array) -> npt.NDArray[np.float32]:
        # A pixel has one of 256 values: a table gives each the float32 nearest to the exact result.
        mean, std = (np.broadcast_to(np.array(v, np.float64), (self.channels,)) for v in (self.mean, self.std))
        table = ((np.arange(256)[None, :] * self.scale - mean[:, None]) / std[:, None]).astype(np.float32)
        if self.color == "bgr":
            pixels = pixels[:, :, ::-1]
        return np.stack([table[c][pixels[:, :, c]] for c in range(self.channels)])

    def to_spec(self) -> str:
        """The line that :func:`preprocess_from_spec` reads back into an equal object; most defaults are left out."""
        items = []
        if self.color != "rgb":
            items.append(f"color={self.color}")
        if self.resize is not None:
            size = str(self.resize) if isinstance(self.resize, int) else "x".join(map(str, self.resize))
            rule = [] if self.edge in (None, _default_edge(self.resize)) else [str(self.edge)]
            items.append(":".join([f"resize={size}", self.interpolation, *rule, *([] if self.antialias else [_PLAIN])]))
        if self.crop is not None:
            height, width = self.crop
            items.append(f"crop={height if height == width else f'{height}x{width}'}" + ":floor" * self.crop_floor)
        if self.pad != (0,):
            items.append("pad=" + ":".join(map(str, self.pad)))
        items.append("scale=1/255" if self.scale == 1 / 255 else f"scale={self.scale!r}")
        for key, values, default in (("mean", self.mean, (0.0,)), ("std", self.std, (1.0,))):
            if values != default:
                items.append(f"{key}=" + ":".join(map(repr, values)))
        return ",".join(items)


_PLAIN = "no-antialias"


def _default_edge(resize: object) -> Edge:
    return "short" if isinstance(resize, int) else "exact"


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def preprocess_from_spec(text: str) -> Preprocess:
    """Read the one-line form described at the top of this module.

    Args:
        text: For example ``resize=256:bicubic,crop=224,scale=1/255,mean=imagenet,std=imagenet``.

    Raises:
        DataError: VLX0207, saying what is not understood and what to write.
    """
    values: dict[str, Any] = {}
    seen: set[str] = set()
    for item in text.split(","):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not value:
            raise _misread(text, f"'{item.strip()}' is not KEY=VALUE{nearest(key, _READERS)}")
        if key not in _READERS:
            raise _misread(text, f"no item is called '{key}'{nearest(key, _READERS)}")
        if key in seen:
            raise _misread(text, f"'{key}' is given twice")
        seen.add(key)
        try:
            values.update(_READERS[key](key, value))
        except ValueError as error:
            raise _misread(text, str(error)) from error
    try:
        return Preprocess.model_validate(values)
    except ValidationError as error:
        raise _misread(text, str(error.errors()[0]["msg"]).removeprefix("Value error, ")) from error


def _misread(text: str, message: str) -> DataError:
    return DataError("VLX0207", message, where=f"--preprocess {text}", hint=f'write for example "{EXAMPLE}"')


def _size(key: str, text: str) -> tuple[int, ...]:
    numbers = text.lower().split("x")
    if len(numbers) > 2 or not all(n.isascii() and n.isdecimal() for n in numbers):
        raise ValueError(f"'{text}' is no size: write {key}=224 or {key}=224x320 (height x width)")
    return tuple(int(n) for n in numbers)


def _number(key: str, text: str) -> float:
    top, slash, bottom = text.partition("/")
    try:
        return float(top) / float(bottom) if slash else float(text)
    except (ValueError, ZeroDivisionError) as error:
        wanted = "scale=1/255" if key == "scale" else f"{key}=0.485:0.456:0.406, numbers separated by ':'"
        raise ValueError(f"'{text}' is no number: write for example {wanted}") from error


def _read_resize(key: str, text: str) -> dict[str, Any]:
    first, *flags = (part.strip() for part in text.split(":"))
    size = _size(key, first)
    read: dict[str, Any] = {"resize": size[0] if len(size) == 1 else size}
    rules = ("short", "long", "exact")
    for flag in flags:
        if flag in RESAMPLING:
            name, value = "interpolation", flag
        elif flag in rules:
            name, value = "edge", flag
        elif flag == _PLAIN:
            name, value = "antialias", ""
        else:
            known = [*RESAMPLING, *rules, _PLAIN]
            raise ValueError(f"resize knows no '{flag}'{nearest(flag, known) or '; it knows ' + ', '.join(known)}")
        if name in read:
            raise ValueError(f"resize has two flags for {name}: '{text}'")
        read[name] = value if value else False
    return read


def _read_crop(key: str, text: str) -> dict[str, Any]:
    first, colon, flag = text.partition(":")
    if colon and flag.strip() != "floor":
        raise ValueError(f"crop knows no '{flag.strip()}': write crop=224 or crop=224:floor")
    size = _size(key, first.strip())
    return {"crop": size * 2 if len(size) == 1 else size, "crop_floor": bool(colon)}


def _read_color(key: str, text: str) -> dict[str, Any]:
    known = ("rgb", "bgr", "gray")
    if text not in known:
        raise ValueError(f"no color is called '{text}'{nearest(text, known) or '; write color=rgb, bgr or gray'}")
    return {key: text}


def _read_channels(key: str, text: str) -> dict[str, Any]:
    if text == "imagenet":
        return {key: IMAGENET_MEAN if key == "mean" else IMAGENET_STD}
    if text[0].isalpha() and text not in ("nan", "inf"):
        raise ValueError(f"{key} knows no '{text}'{nearest(text, ['imagenet']) or '; write numbers or imagenet'}")
    return {key: tuple(_number(key, part.strip()) for part in text.split(":"))}


def _read_pad(key: str, text: str) -> dict[str, Any]:
    parts = [part.strip() for part in text.split(":")]
    if not all(part.isascii() and part.isdecimal() for part in parts):
        raise ValueError(f"'{text}' is no colour: write pad=114 or pad=124:116:104")
    return {key: tuple(int(part) for part in parts)}


def _read_scale(key: str, text: str) -> dict[str, Any]:
    return {key: _number(key, text)}


_READERS = {
    "resize": _read_resize,
    "crop": _read_crop,
    "pad": _read_pad,
    "color": _read_color,
    "scale": _read_scale,
    "mean": _read_channels,
    "std": _read_channels,
}


def guess_spec(spec: TensorSpec) -> str:
    """The likeliest line for an image input, to be pasted and checked; empty when it does not look like images.

    Args:
        spec: Input of shape (N, 3, H, W) or (N, 1, H, W); a named H or W is taken for 224.
    """
    if len(spec.shape) != 4 or spec.shape[1] not in (1, 3):
        return ""
    height, width = (size if isinstance(size, int) else 224 for size in spec.shape[2:])
    size = f"resize={height}x{width}:bicubic"
    if height == width:
        size = f"resize={math.floor(height / 0.875)}:bicubic,crop={height}"
    if spec.shape[1] == 1:
        return f"color=gray,{size},scale=1/255"
    return f"{size},scale=1/255,mean=imagenet,std=imagenet"
