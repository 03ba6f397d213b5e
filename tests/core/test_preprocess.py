from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlexport.core.artifact import TensorSpec
from vlexport.core.errors import DataError
from vlexport.core.preprocess import Preprocess, guess_spec, preprocess_from_spec
from vlexport.core.preprocess_configs import preprocess_from_timm_config, preprocess_from_transformers_config

STEP = 1 / 255  # one level of an 8-bit pixel: the promised parity
GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "transformers_pixels.json").read_text())
ROUNDING = 1e-6  # float32 arithmetic of the other library, on values of order 1


def smooth_image(height: int, width: int, *, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Noise, enlarged three times: a wrong filter, or a shift by one pixel, shows far above one level."""
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 3 + 2, width // 3 + 2, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    if mode == "RGBA":
        image.putalpha(Image.fromarray(coarse[:, :, 0]).resize((width, height)))
        return image
    return image.convert(mode)


TIMM_CONFIGS = {
    "center": {"input_size": (3, 96, 96), "crop_pct": 0.875, "interpolation": "bicubic"},
    "center-odd": {"input_size": (3, 97, 97), "crop_pct": 0.9, "interpolation": "bilinear"},
    "whole": {"input_size": (3, 64, 64), "crop_pct": 1.0, "interpolation": "lanczos"},
    "oblong": {"input_size": (3, 64, 96), "crop_pct": 0.95, "interpolation": "bicubic"},
    "squash": {"input_size": (3, 80, 80), "crop_pct": 0.9, "crop_mode": "squash", "interpolation": "bicubic"},
    "border": {"input_size": (3, 80, 80), "crop_pct": 1.0, "crop_mode": "border", "interpolation": "bicubic"},
    "border-pct": {"input_size": (3, 80, 96), "crop_pct": 0.9, "crop_mode": "border", "interpolation": "nearest"},
    "defaults": {"input_size": (3, 224, 224), "mean": (0.5, 0.4, 0.3), "std": (0.5, 0.25, 0.125)},
}
SIZES = [(150, 201), (201, 150), (97, 97), (61, 331), (33, 20)]


@pytest.mark.parametrize("name", TIMM_CONFIGS)
def test_preprocess_from_timm_config_matches_timm_when_size_and_crop_mode_vary(name: str) -> None:
    data = pytest.importorskip("timm.data")
    cfg = TIMM_CONFIGS[name]
    theirs = data.create_transform(**data.resolve_data_config(pretrained_cfg=cfg), is_training=False)
    ours = preprocess_from_timm_config(cfg)
    std = np.array(ours.std).reshape(-1, 1, 1)
    for seed, size in enumerate(SIZES):
        image = smooth_image(*size, seed=seed)
        wanted = theirs(image).numpy()
        assert ours.apply(image).shape == wanted.shape
        assert np.abs((ours.apply(image) - wanted) * std).max() <= STEP + ROUNDING, size


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA"])
def test_apply_matches_timm_when_image_is_not_rgb(mode: str) -> None:
    data = pytest.importorskip("timm.data")
    cfg = TIMM_CONFIGS["center"]
    image = smooth_image(130, 171, mode=mode)
    wanted = data.create_transform(**data.resolve_data_config(pretrained_cfg=cfg))(image.convert("RGB")).numpy()
    ours = preprocess_from_timm_config(cfg)
    std = np.array(ours.std).reshape(-1, 1, 1)
    assert np.abs((ours.apply(image) - wanted) * std).max() <= STEP + ROUNDING


def test_apply_saturates_when_image_has_16_bits() -> None:
    pixels = np.array([[0, 100, 255, 256, 65535]], dtype=np.uint16)
    result = Preprocess(scale=1.0).apply(Image.fromarray(pixels))
    assert result[0, 0].tolist() == [0, 100, 255, 255, 255]


def test_apply_leaves_pixels_in_place_when_exif_says_rotate(tmp_path: Path) -> None:
    image = smooth_image(20, 30)
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotate by 90 degrees
    image.save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as saved:
        assert saved.getexif()[0x0112] == 6
        assert np.array_equal(Preprocess().apply(saved), Preprocess().apply(image))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_apply_matches_torch_interpolate_when_antialias_is_off(interpolation: str) -> None:
    torch = pytest.importorskip("torch")
    image = smooth_image(75, 111)
    for size in [(32, 40), (75, 50), (140, 200)]:
        ours = Preprocess(resize=size, interpolation=interpolation, antialias=False, scale=1.0).apply(image)
        pixels = torch.from_numpy(np.array(image).transpose(2, 0, 1)[None].astype(np.float64))
        theirs = torch.nn.functional.interpolate(pixels, size=size, mode=interpolation)[0].numpy()
        # One level apart at most, where the two round an exact half differently.
        assert np.abs(ours - np.clip(np.rint(theirs), 0, 255)).max() <= 1, size
    shrunk = Preprocess(resize=(32, 40), interpolation=interpolation, scale=1.0).apply(image)
    plain = Preprocess(resize=(32, 40), interpolation=interpolation, antialias=False, scale=1.0).apply(image)
    assert np.abs(shrunk - plain).max() > 5  # antialias does change something


def test_apply_reverses_channels_and_statistics_stay_in_order_when_color_is_bgr() -> None:
    image = smooth_image(16, 16)
    rgb = Preprocess(mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 4.0)).apply(image)
    bgr = Preprocess(mean=(0.3, 0.2, 0.1), std=(4.0, 2.0, 1.0), color="bgr").apply(image)
    assert np.array_equal(rgb[::-1], bgr)


def test_apply_gives_one_channel_when_color_is_gray() -> None:
    image = smooth_image(16, 24)
    result = Preprocess(color="gray", resize=8, crop=(8, 8), scale=1.0).apply(image)
    assert result.shape == (1, 8, 8)
    assert result.dtype == np.float32


def test_apply_letterboxes_when_edge_is_long_and_pad_is_given() -> None:
    image = Image.new("RGB", (40, 20), (255, 255, 255))
    result = preprocess_from_spec("resize=20:long,crop=20,pad=1:2:3,color=bgr,scale=1").apply(image)
    assert result[:, 0, 0].tolist() == [1, 2, 3]  # bands of 5 rows, in the order of the result's channels
    assert result[:, 4, 19].tolist() == [1, 2, 3]
    assert result[:, 5, 0].tolist() == [255, 255, 255]
    assert result[:, 15, 0].tolist() == [1, 2, 3]


def test_apply_refuses_when_a_thin_photo_would_become_huge() -> None:
    with pytest.raises(DataError) as caught:
        Preprocess(resize=256).apply(Image.new("RGB", (9000, 1)))
    assert caught.value.code == "VLX0203"
    assert "2304000×256" in caught.value.message


# transformers


def test_preprocess_from_transformers_config_matches_transformers_when_installed() -> None:
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed; see the golden test below"
    )
    cfg = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 64}, "crop_size": 64, "resample": 3}
    cfg |= {"do_resize": True, "do_center_crop": True, "do_rescale": True, "rescale_factor": 1 / 255}
    cfg |= {"do_normalize": True, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    processor = transformers.CLIPImageProcessor.from_dict(cfg)
    ours = preprocess_from_transformers_config(cfg)
    std = np.array(ours.std).reshape(-1, 1, 1)
    for size in SIZES:
        image = smooth_image(*size)
        wanted = np.asarray(processor(image, return_tensors="np")["pixel_values"][0])
        # Two levels: its torchvision backend resamples tensors in 8-bit steps, which ours, pillow's, does not.
        assert np.abs((ours.apply(image) - wanted) * std).max() <= 2 * STEP + ROUNDING, size


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["type"])
def test_preprocess_from_transformers_config_matches_recorded_pixels_when_family_varies(case: dict[str, Any]) -> None:
    ours = preprocess_from_transformers_config(case["config"])
    result = ours.apply(smooth_image(90, 131, seed=7))
    assert list(result.shape) == case["shape"]
    c, h, w = result.shape
    picked = [float(result[i % c, (i * 37) % h, (i * 53) % w]) for i in range(12)]
    # Recorded from transformers 5.24's pillow backend, rounded to 4 digits; tolerance: that rounding.
    assert picked == pytest.approx(case["picked"], abs=6e-5)


def test_preprocess_from_transformers_config_crops_as_transformers_when_rest_is_odd() -> None:
    cfg = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 5}, "do_center_crop": True, "resample": 0}
    image = smooth_image(8, 8)
    result = preprocess_from_transformers_config(cfg).apply(image)
    assert np.array_equal(result, Preprocess().apply(image)[:, :, 1:6])  # torchvision would start at 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"do_pad": True}, "do_pad"),
        ({"size": 224, "image_processor_type": "NewThing"}, "one edge or both"),
        ({"size": {"shortest_edge": 800, "longest_edge": 1333}}, "longest_edge"),
        ({"resample": None, "image_processor_type": "NewThing"}, "resample is missing"),
        ({"resample": 5}, "hamming"),
        ({"image_mean": None}, "image_mean"),
    ],
)
def test_preprocess_from_transformers_config_refuses_when_meaning_is_open(change: dict[str, Any], said: str) -> None:
    cfg = {
        "size": {"height": 8, "width": 8},
        "resample": 3,
        "do_normalize": True,
        "image_mean": [0.5],
        "image_std": [0.5],
    }
    cfg = {k: v for k, v in {**cfg, **change}.items() if v is not None}
    with pytest.raises(DataError) as caught:
        preprocess_from_transformers_config(cfg)
    assert caught.value.code == "VLX0207"
    assert said in caught.value.message


# The written form

preprocesses = st.builds(
    lambda fields: Preprocess.model_validate(fields),
    st.fixed_dictionaries(
        {"crop": st.tuples(st.integers(1, 900), st.integers(1, 900)), "color": st.sampled_from(["rgb", "bgr"])},
        optional={
            "resize": st.integers(1, 900) | st.tuples(st.integers(1, 900), st.integers(1, 900)),
            "crop_floor": st.booleans(),
            "pad": st.sampled_from([(0,), (7,), (1, 2, 255)]),
            "scale": st.floats(1e-9, 1e9),
            "mean": st.lists(st.floats(-1e9, 1e9), min_size=3, max_size=3).map(tuple),
            "std": st.lists(st.floats(1e-9, 1e9), min_size=3, max_size=3).map(tuple),
        },
    ),
)


@settings(derandomize=True, max_examples=200, deadline=None)
@given(preprocesses)
def test_preprocess_from_spec_inverts_to_spec_when_fields_vary(preprocess: Preprocess) -> None:
    text = preprocess.to_spec()
    assert preprocess_from_spec(text) == preprocess
    assert preprocess_from_spec(text).to_spec() == text


@pytest.mark.parametrize("flags", ["", ":nearest", ":bicubic:no-antialias", ":box", ":lanczos:long", ":short:bicubic"])
@pytest.mark.parametrize("size", ["7", "7x9"])
def test_preprocess_from_spec_inverts_to_spec_when_resize_flags_vary(size: str, flags: str) -> None:
    preprocess = preprocess_from_spec(f"resize={size}{flags},color=gray")
    assert preprocess_from_spec(preprocess.to_spec()) == preprocess


def test_to_spec_writes_the_documented_line_when_preprocessing_is_imagenets() -> None:
    line = "resize=256:bicubic,crop=224,scale=1/255,mean=0.485:0.456:0.406,std=0.229:0.224:0.225"
    assert preprocess_from_spec(line).to_spec() == line
    assert preprocess_from_spec("resize=256:bicubic,crop=224,mean=imagenet,std=imagenet").to_spec() == line
    assert preprocess_from_spec(line).output_shape == (3, 224, 224)
    assert preprocess_from_spec("resize=256").output_shape == (3, "height", "width")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is not KEY=VALUE"),
        ("timm:resnet18", "is not KEY=VALUE"),
        ("resise=256", "did you mean 'resize'?"),
        ("resize=256:bicubik", "did you mean 'bicubic'?"),
        ("resize=256:bicubic:bilinear", "two flags"),
        ("resize=big", "resize=224"),
        ("resize=0", "1 to 16384"),
        ("resize=256:exact", "resize=256x256"),
        ("resize=256:box:no-antialias", "no-antialias"),
        ("crop=224:ceil", "crop=224:floor"),
        ("crop=224,crop=224", "given twice"),
        ("color=rbg", "did you mean"),
        ("scale=1/0", "scale=1/255"),
        ("mean=0.5|0.5|0.5", "separated by ':'"),
        ("mean=imagenets", "did you mean 'imagenet'?"),
        ("mean=0.5:0.5", "2 values"),
        ("mean=nan", "finite"),
        ("std=0", "std is 0"),
        ("pad=114", "crop=SIZE"),
        ("crop=8,pad=300", "0 to 255"),
    ],
)
def test_preprocess_from_spec_says_what_to_write_when_text_is_wrong(text: str, said: str) -> None:
    with pytest.raises(DataError) as caught:
        preprocess_from_spec(text)
    assert caught.value.code == "VLX0207"
    assert said in caught.value.message
    assert "resize=256:bicubic" in caught.value.hint


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        (("batch", 3, 224, 224), (3, 224, 224)),
        (("batch", 3, 384, 512), (3, 384, 512)),
        ((1, 1, 64, 64), (1, 64, 64)),
        (("batch", 3, "h", "w"), (3, 224, 224)),
    ],
)
def test_guess_spec_fits_the_input_when_it_looks_like_an_image(
    shape: tuple[int | str, ...], wanted: tuple[int, ...]
) -> None:
    line = guess_spec(TensorSpec(name="x", dtype="float32", shape=shape))
    assert preprocess_from_spec(line).apply(smooth_image(60, 80)).shape == wanted


@pytest.mark.parametrize("shape", [("batch", 77), (1, 224, 224, 3)])
def test_guess_spec_is_empty_when_input_is_no_image(shape: tuple[int | str, ...]) -> None:
    assert guess_spec(TensorSpec(name="x", dtype="float32", shape=shape)) == ""


@pytest.mark.parametrize("change", [{"crop_mode": "centre"}, {"interpolation": "hamming"}, {"input_size": (5, 8, 8)}])
def test_preprocess_from_timm_config_refuses_when_value_is_unknown(change: dict[str, Any]) -> None:
    with pytest.raises(DataError) as caught:
        preprocess_from_timm_config({"input_size": (3, 8, 8), **change})
    assert caught.value.code == "VLX0207"
