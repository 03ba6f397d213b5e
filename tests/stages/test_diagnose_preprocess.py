"""The preprocessing doctor on classifiers of one line, whose right preprocessing is known: what is planted is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vlexport.core.artifact import Array, Artifact, TensorSpec
from vlexport.core.bundle_schema import Component, CostRecord, Golden
from vlexport.core.errors import DataError
from vlexport.core.preprocess import Preprocess, preprocess_from_spec
from vlexport.core.preprocess_diagnosis import Diagnosis
from vlexport.core.preprocess_variants import variants
from vlexport.report.preprocess_diagnosis import diagnosis_lines
from vlexport.stages.diagnose_preprocess import diagnose, open_photos, photo_input

SIZE = 16
RIGHT = f"resize={SIZE}:bicubic,crop={SIZE},scale=1/255"
SAMPLES = 120


def component(spec: str, size: int | str = SIZE, batch: int | str = "batch") -> Component:
    image = TensorSpec(name="image", dtype="float32", shape=(batch, 3, size, size))
    scores = TensorSpec(name="scores", dtype="float32", shape=(batch, 3))
    return Component(
        artifact=Artifact(target="onnxruntime", path="main.onnx", inputs=(image,), outputs=(scores,)), dims={},
        preprocess={"image": preprocess_from_spec(spec)}, labels=(), golden=Golden(inputs="", outputs="", tolerance=0),
        passes=(), cost=CostRecord(macs=0, parameters=0, size_bytes=0),
    )  # fmt: skip


def levels(images: Array) -> Array:
    """Dark, middle, bright: bounds that fit 0 to 1 alone."""
    mean = images.mean(axis=(1, 2, 3))[:, None]
    return -np.abs(mean - np.array([[0.2, 0.5, 0.8]]))


def reddest(images: Array) -> Array:
    """The strongest channel."""
    return images.mean(axis=(2, 3))


def rim(images: Array) -> Array:
    """The brightest of the left, middle and right of the border's columns: what lies along the edge decides."""
    columns = images.mean(axis=(1, 2))
    return np.stack([columns[:, :2].mean(1), columns[:, 2:-2].mean(1), columns[:, -2:].mean(1)], axis=1)


def running(scores: Any) -> Any:
    return lambda inputs: {"scores": scores(inputs["image"])}


@pytest.fixture(scope="module")
def gray_levels(tmp_path_factory: pytest.TempPathFactory) -> str:
    return _photos(tmp_path_factory.mktemp("gray"), lambda label, draw: np.full((20, 20, 3), 51 + 77 * label + draw))


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> str:
    def colour(label: int, draw: int) -> Array:
        pixels = np.full((20, 20, 3), 60 + draw)
        pixels[:, :, label] += 90
        return pixels

    return _photos(tmp_path_factory.mktemp("colours"), colour)


@pytest.fixture(scope="module")
def rims(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A bright bar at the left, in the middle or at the right; the middle of the photo says nothing of its sides."""

    def bar(label: int, draw: int) -> Array:
        pixels = np.full((40, 40, 3), 60 + draw)
        pixels[:, [slice(0, 4), slice(18, 22), slice(36, 40)][label]] = 220
        return pixels

    return _photos(tmp_path_factory.mktemp("rims"), bar)


def _photos(root: Path, drawn: Any) -> str:
    random = np.random.default_rng(0)
    for i in range(SAMPLES):
        label = i % 3
        (root / str(label)).mkdir(exist_ok=True)
        Image.fromarray(drawn(label, int(random.integers(-20, 20))).astype(np.uint8)).save(root / f"{label}/{i}.png")
    return str(root)


def diagnosed(data: str, scores: Any, spec: str, samples: int = 1000, **how: Any) -> Diagnosis:
    made = component(spec, **how)
    photos = open_photos(data, made, "image", samples)
    return diagnose(running(scores), photos, made, "image", runner="the artifact")


def test_range_is_named_when_pixels_were_left_at_0_to_255(gray_levels: str) -> None:
    found = diagnosed(gray_levels, levels, f"resize={SIZE}:bicubic,crop={SIZE},scale=1")
    assert (found.verdict, found.line, found.exit_code) == ("named", RIGHT, 0)
    assert (found.samples, found.top1) == (SAMPLES, 100.0)
    assert found.recorded_top1 < 40
    assert 0 < found.gain_low <= found.gain <= found.gain_high
    first, *_ = lines = diagnosis_lines(found)
    assert first.startswith("Named    0 to 1: 100.0 against ")
    assert f'Paste    --preprocess "{RIGHT}"' in lines


def test_channel_order_is_named_when_it_was_turned(colours: str) -> None:
    found = diagnosed(colours, reddest, f"{RIGHT},color=bgr")
    assert (found.verdict, found.line) == ("named", RIGHT)
    assert found.rounds[0].took == RIGHT
    assert next(t for t in found.rounds[0].trials if t.spec == RIGHT).axis == "color"
    assert "RGB, as recorded" in diagnosis_lines(found)[0]


def test_crop_is_named_when_the_edges_were_cut_off(rims: str) -> None:
    found = diagnosed(rims, rim, f"resize=32:bicubic,crop={SIZE},scale=1/255")
    assert (found.verdict, found.line) == ("named", RIGHT)
    assert len(found.rounds) == 3, "behind another size, ranges are tried again"
    assert found.rounds[1].took == RIGHT


def test_two_faults_are_named_one_behind_the_other(rims: str) -> None:
    def strict(images: Array) -> Array:
        return rim(np.clip(images, 0.0, 1.0))

    found = diagnosed(rims, strict, f"resize=32:bicubic,crop={SIZE},scale=1")
    assert found.verdict == "named"
    assert preprocess_from_spec(found.line).crop == (SIZE, SIZE)
    assert found.top1 == 100.0


def test_it_cannot_be_told_when_the_model_does_not_care(colours: str) -> None:
    found = diagnosed(colours, reddest, RIGHT)
    assert (found.verdict, found.line, found.exit_code) == ("cannot tell", RIGHT, 5)
    assert (found.gain, found.recorded_top1) == (0.0, 100.0)
    assert "-1 to 1" in found.rounds[0].alike
    first = diagnosis_lines(found)[0]
    assert "cannot tell: 100.0 against 100.0 on 120" in first
    standing = {trial.what: trial.standing for trial in found.rounds[0].trials}
    assert standing["BGR, as recorded"] == "worse"
    given_up = next(trial for trial in found.rounds[0].trials if trial.what == "BGR, as recorded")
    assert given_up.samples < SAMPLES / 2, "what is clearly worse is given up early"
    assert given_up.against == 100.0
    assert 0 < given_up.top1 < 100, "the first photos are of several classes"


def test_same_inputs_are_no_other_way_when_photos_are_gray(gray_levels: str) -> None:
    found = diagnosed(gray_levels, levels, RIGHT)
    standing = {trial.what: trial.standing for trial in found.rounds[0].trials}
    assert standing["BGR, as recorded"] == "same"
    assert "BGR, as recorded" not in found.rounds[0].alike
    assert not any("BGR, as recorded" in line for line in diagnosis_lines(found))


def test_few_samples_name_nothing_when_chance_could_have_made_them(gray_levels: str) -> None:
    found = diagnosed(gray_levels, levels, f"resize={SIZE}:bicubic,crop={SIZE},scale=1", samples=5)
    assert found.samples < 15
    assert found.verdict in ("cannot tell", "named")
    if found.verdict == "named":
        assert found.gain_low > 0


def test_samples_are_drawn_by_their_ids_and_the_rest_is_not_read(
    gray_levels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = open_photos(gray_levels, component(RIGHT), "image", 40)
    names = [sample.id for sample in photos]
    assert 20 <= len(names) <= 60
    assert {name.partition("/")[0] for name in names} == {"0", "1", "2"}
    assert names == [sample.id for sample in photos]
    opened: list[str] = []
    monkeypatch.setattr(
        "vlexport.core.photo_samples.read_photo",
        lambda file, name, how: opened.append(name) or np.zeros((3, 4, 4), "f"),
    )
    list(open_photos(gray_levels, component(RIGHT), "image", 40))
    assert set(opened) - set(names) == {sorted(opened)[0]} - set(names), "but for the first, to see that it is a photo"


def test_fixed_batch_is_filled_when_the_artifact_wants_one(colours: str) -> None:
    shapes = set()

    def scores(images: Array) -> Array:
        shapes.add(images.shape)
        return reddest(images)

    found = diagnosed(colours, scores, f"{RIGHT},color=bgr", batch=4, samples=60)
    assert shapes == {(4, 3, SIZE, SIZE)}
    assert found.line == RIGHT


def test_equal_inputs_are_computed_once(gray_levels: str) -> None:
    calls = 0

    def scores(images: Array) -> Array:
        nonlocal calls
        calls += 1
        return levels(images)

    diagnosed(gray_levels, scores, RIGHT, samples=20)
    ways = sum(len(variants(preprocess_from_spec(RIGHT), axis, (SIZE, SIZE))) + 1 for axis in ("range", "size"))
    assert calls < ways * 20 * 0.7


def test_arrays_are_refused_because_nothing_can_be_varied(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", image=np.ones((4, 3, SIZE, SIZE), np.float32), label=np.arange(4) % 3)
    with pytest.raises(DataError) as caught:
        open_photos(str(tmp_path / "x.npz"), component(RIGHT), "image", 10)
    assert caught.value.code == "VLX0716"
    assert "arrays" in caught.value.message


def test_photos_without_labels_are_refused(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(DataError) as caught:
        open_photos(str(tmp_path), component(RIGHT), "image", 10)
    assert caught.value.code == "VLX0210"


def test_bundle_is_refused_when_its_preprocessing_is_in_the_graph_or_unknown() -> None:
    made = component(RIGHT)
    assert photo_input(made, folded=False) == "image"
    for other, folded in ((made, True), (made.model_copy(update={"preprocess": {}}), False)):
        with pytest.raises(DataError) as caught:
            photo_input(other, folded=folded)
        assert caught.value.code == "VLX0716"
        assert "--" in caught.value.hint


def test_models_of_other_kinds_are_refused(colours: str) -> None:
    with pytest.raises(DataError) as caught:
        diagnosed(colours, lambda images: images, RIGHT, samples=20)
    assert caught.value.code == "VLX0208"


SPECS = st.builds(
    Preprocess,
    color=st.sampled_from(["rgb", "bgr", "gray"]), scale=st.sampled_from([1.0, 1 / 255]),
    resize=st.sampled_from([None, SIZE, 40, (SIZE, SIZE)]), crop=st.sampled_from([None, (SIZE, SIZE), (SIZE, 20)]),
)  # fmt: skip


@given(SPECS, st.sampled_from(["range", "size"]), st.sampled_from([(SIZE, SIZE), (SIZE, 20), None]))
def test_variants_are_usual_ones_that_can_be_pasted(
    recorded: Preprocess, axis: Any, size: tuple[int, int] | None
) -> None:
    found = variants(recorded, axis, size)
    assert len({each.preprocess.to_spec() for each in found}) == len(found)
    for each in found:
        assert each.preprocess != recorded
        assert preprocess_from_spec(each.preprocess.to_spec()) == each.preprocess
        if axis == "size":
            assert each.preprocess.output_shape[1:] == size
            assert each.preprocess.mean == recorded.mean
        else:
            assert (each.preprocess.resize, each.preprocess.crop) == (recorded.resize, recorded.crop)
    assert found or axis == "size"


def test_turned_order_gives_each_channel_the_values_it_had() -> None:
    spec = preprocess_from_spec("scale=1/255,mean=imagenet,std=imagenet")
    turned = next(each for each in variants(spec, "range", None) if each.what == "BGR, as recorded").preprocess
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8))
    assert np.array_equal(turned.apply(image)[::-1], spec.apply(image))
