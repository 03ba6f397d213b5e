from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlexport.core.artifact import TensorSpec
from vlexport.core.errors import DataError
from vlexport.core.preprocess import Preprocess
from vlexport.core.samples import Dataset, Sample, open_data

IMAGE = TensorSpec(name="image", dtype="float32", shape=("batch", 3, 8, 8))
X = TensorSpec(name="x", dtype="float32", shape=("batch", 2))
IDS = TensorSpec(name="ids", dtype="int64", shape=("batch", "tokens"))
PREPROCESS = {"image": Preprocess(resize=(8, 8))}


def save_photo(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (10, 12), (value, value, value)).save(path)


def open_photos(data: str | Path, labels: list[str] | None = None) -> Dataset:
    return open_data(str(data), inputs=[IMAGE], preprocess=PREPROCESS, labels=labels)


def open_function(path: Path, source: str, **options: Any) -> Dataset:
    path.write_text(source)
    return open_data(f"{path}:samples", **{"inputs": [X], "preprocess": {}, **options})


def refused(code: str, *said: str, call: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        call()
    assert caught.value.code == code
    for part in said:
        assert part in f"{caught.value.message} | {caught.value.where} | {caught.value.hint}"
    return caught.value


# Photos


def test_class_folders_map_by_name_when_model_has_labels(tmp_path: Path) -> None:
    for name in ("cat/b.png", "cat/a.png", "dog/deep/c.JPG", "dog/.hidden.png", "dog/notes.txt"):
        save_photo(tmp_path / name) if not name.endswith("txt") else (tmp_path / name).write_text("x")
    data = open_photos(tmp_path, ["dog", "bird", "cat"])
    assert [(s.id, s.label) for s in data] == [("cat/a.png", 2), ("cat/b.png", 2), ("dog/deep/c.JPG", 0)]
    assert (len(data), data.labelled, data.kind, data.classes) == (3, True, "class-folders", ("cat", "dog"))
    sample = next(iter(data))
    assert sample.inputs["image"].shape == (3, 8, 8)
    assert sample.inputs["image"].dtype == np.float32


def test_class_folders_name_the_nearest_label_when_one_is_unknown(tmp_path: Path) -> None:
    save_photo(tmp_path / "cats" / "a.png")
    refused("VLX0208", "cats", "did you mean 'cat'?", call=lambda: open_photos(tmp_path, ["cat", "dog"]))


def test_class_folders_are_refused_when_a_label_name_is_ambiguous(tmp_path: Path) -> None:
    save_photo(tmp_path / "crane" / "a.png")
    refused("VLX0208", "more than once", call=lambda: open_photos(tmp_path, ["crane", "dog", "crane"]))


def test_class_folders_use_their_integers_when_model_has_no_labels(tmp_path: Path) -> None:
    for name in ("2", "10"):
        save_photo(tmp_path / name / "a.png")
    assert [(s.id, s.label) for s in open_photos(tmp_path)] == [("10/a.png", 10), ("2/a.png", 2)]


def test_class_folders_ask_for_labels_when_names_have_nothing_to_match(tmp_path: Path) -> None:
    save_photo(tmp_path / "cat" / "a.png")
    save_photo(tmp_path / "1" / "a.png")
    refused("VLX0208", "labels=", call=lambda: open_photos(tmp_path))


def test_folder_of_photos_is_unlabelled_and_restartable_when_it_has_no_folders(tmp_path: Path) -> None:
    save_photo(tmp_path / "b.png", 20)
    save_photo(tmp_path / "a.bmp", 10)
    data = open_photos(tmp_path)
    first, again = list(data), list(data)
    assert [s.id for s in first] == [s.id for s in again] == ["a.bmp", "b.png"]
    assert [s.label for s in first] == [None, None]
    assert not data.labelled
    assert first[0].inputs["image"][0, 0, 0] == np.float32(10 / 255)


def test_photos_are_read_only_when_asked_for(tmp_path: Path) -> None:
    save_photo(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"broken")
    samples = iter(open_photos(tmp_path))
    assert next(samples).id == "a.png"
    error = refused("VLX0203", "b.png", call=lambda: next(samples))
    assert str(tmp_path) not in str(error) + error.where


def test_photo_is_named_below_the_data_folder_when_it_is_truncated(tmp_path: Path) -> None:
    save_photo(tmp_path / "cat" / "a.png")
    whole = (tmp_path / "cat" / "a.png").read_bytes()
    (tmp_path / "cat" / "a.png").write_bytes(whole[: len(whole) // 2])
    error = refused("VLX0203", "cat/a.png", call=lambda: list(open_photos(tmp_path, ["cat"])))
    assert error.where == "cat/a.png"


def test_photo_is_refused_when_it_is_a_decompression_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_photo(tmp_path / "a.png")  # 120 pixels: a bomb above twice the limit
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    refused("VLX0203", "a.png", "decompression bomb", call=lambda: list(open_photos(tmp_path)))


def test_photo_is_refused_when_its_link_dangles(tmp_path: Path) -> None:
    (tmp_path / "a.png").symlink_to(tmp_path / "nowhere.png")
    refused("VLX0203", "a.png", call=lambda: list(open_photos(tmp_path)))


@pytest.mark.parametrize("target", [".", "..", "../elsewhere"])
def test_links_to_folders_are_refused_when_they_lead_round_or_out(tmp_path: Path, target: str) -> None:
    save_photo(tmp_path / "data" / "cat" / "a.png")
    save_photo(tmp_path / "elsewhere" / "secret.png")
    for at in ("loop", "cat/loop"):
        link = tmp_path / "data" / at
        link.symlink_to(os.path.relpath((tmp_path / "data" / target).resolve(), link.parent))
        refused("VLX0201", at, "not followed", call=lambda: open_photos(tmp_path / "data", ["cat"]))
        if at == "loop":
            refused("VLX0201", at, call=lambda: open_photos(f"{tmp_path}/data/*/**/*.png"))
        link.unlink()
    assert len(open_photos(tmp_path / "data", ["cat"])) == 1


def test_folder_is_refused_when_photos_lie_beside_class_folders(tmp_path: Path) -> None:
    save_photo(tmp_path / "cat" / "a.png")
    save_photo(tmp_path / "b.png")
    refused("VLX0201", "b.png", "cat", call=lambda: open_photos(tmp_path, ["cat"]))
    assert [s.id for s in open_photos(f"{tmp_path}/*")] == ["b.png"]  # the hint's way out


def test_glob_is_unlabelled_and_sorted_when_it_matches(tmp_path: Path) -> None:
    for name in ("x/b.png", "x/a.png", "y/c.png", "y/d.txt", "x/.e.png"):
        save_photo(tmp_path / name) if not name.endswith("txt") else (tmp_path / name).write_text("x")
    data = open_photos(f"{tmp_path}/*/*")
    assert [s.id for s in data] == ["x/a.png", "x/b.png", "y/c.png"]
    assert not data.labelled
    assert [s.id for s in open_photos(f"{tmp_path}/**/[ab].png")] == ["x/a.png", "x/b.png"]
    refused("VLX0202", call=lambda: open_photos(f"{tmp_path}/*.jpg"))


def test_photos_print_the_likeliest_preprocessing_when_none_is_known(tmp_path: Path) -> None:
    save_photo(tmp_path / "a.png")
    spec = TensorSpec(name="image", dtype="float32", shape=("batch", 3, 224, 224))
    refused(
        "VLX0206",
        '--preprocess "resize=256:bicubic,crop=224,scale=1/255,mean=imagenet,std=imagenet"',
        call=lambda: open_data(str(tmp_path), inputs=[spec], preprocess={}),
    )


def test_photos_are_refused_when_model_has_a_second_input(tmp_path: Path) -> None:
    save_photo(tmp_path / "a.png")
    refused("VLX0205", "ids", call=lambda: open_data(str(tmp_path), inputs=[IMAGE, IDS], preprocess=PREPROCESS))


def test_photos_are_refused_when_preprocessing_makes_another_size(tmp_path: Path) -> None:
    save_photo(tmp_path / "a.png")
    data = open_data(str(tmp_path), inputs=[IMAGE], preprocess={"image": Preprocess(resize=9)})
    refused("VLX0205", "a.png", "3×10×9", "3×8×8", "crop", call=lambda: list(data))


def test_open_data_says_which_kinds_there_are_when_data_is_unknown(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("1")
    (tmp_path / "f.py").write_text("")
    (tmp_path / "empty").mkdir()
    refused("VLX0201", "does not exist", call=lambda: open_photos(tmp_path / "missing"))
    refused("VLX0201", "no known kind", call=lambda: open_photos(tmp_path / "a.csv"))
    refused("VLX0201", "f.py:FUNCTION", call=lambda: open_photos(tmp_path / "f.py"))
    refused("VLX0201", "does not exist", call=lambda: open_photos(f"{tmp_path}/none.py:samples"))
    refused("VLX0202", "no photo", call=lambda: open_photos(tmp_path / "empty"))


# .npz


def open_npz(
    path: Path, inputs: list[TensorSpec] | None = None, labels: list[str] | None = None, **arrays: Any
) -> Dataset:
    np.savez(path, **arrays)
    return open_data(str(path), inputs=inputs or [X], preprocess={}, labels=labels)


def test_npz_yields_rows_and_labels_when_arrays_fit(tmp_path: Path) -> None:
    x, ids = np.arange(6, dtype=np.float32).reshape(3, 2), np.ones((3, 5), np.int64)
    data = open_npz(tmp_path / "d.npz", [X, IDS], x=x, ids=ids, label=np.array([2, 0, 1], np.int16), other=np.ones(9))
    samples = list(data)
    assert (len(data), data.labelled, data.kind) == (3, True, "npz")
    assert [(s.id, s.label) for s in samples] == [("#0", 2), ("#1", 0), ("#2", 1)]
    assert np.array_equal(np.stack([s.inputs["x"] for s in samples]), x)
    assert [s.id for s in data] == ["#0", "#1", "#2"]


def test_npz_maps_label_names_when_labels_are_text(tmp_path: Path) -> None:
    x = np.zeros((2, 2), np.float32)
    data = open_npz(tmp_path / "d.npz", labels=["cat", "dog"], x=x, label=np.array(["dog", "cat"]))
    assert [s.label for s in data] == [1, 0]
    assert data.classes == ("cat", "dog")
    wrong = open_npz(tmp_path / "e.npz", labels=["cat", "dog"], x=x, label=np.array(["dog", "catt"]))
    refused("VLX0208", "#1", "did you mean 'cat'?", call=lambda: list(wrong))


@pytest.mark.parametrize(("label", "said"), [(7, "2 labels"), (-1, "from 0")])
def test_npz_is_refused_when_a_label_is_outside_the_models(tmp_path: Path, label: int, said: str) -> None:
    data = open_npz(tmp_path / "d.npz", labels=["a", "b"], x=np.zeros((1, 2), np.float32), label=np.array([label]))
    refused("VLX0208", "#0", said, call=lambda: list(data))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_npz_names_the_sample_when_it_holds_nan_or_infinity(tmp_path: Path, bad: float) -> None:
    x = np.zeros((3, 2), np.float32)
    x[1, 1] = bad
    refused("VLX0204", "#1", "'x'", call=lambda: list(open_npz(tmp_path / "d.npz", x=x)))


def test_npz_names_the_sample_when_dtype_or_shape_is_wrong(tmp_path: Path) -> None:
    refused("VLX0205", "#0", "float64", call=lambda: list(open_npz(tmp_path / "d.npz", x=np.zeros((3, 2)))))
    wide = np.zeros((3, 4), np.float32)
    refused("VLX0205", "#0", "shape is 4, 2 is wanted", call=lambda: list(open_npz(tmp_path / "e.npz", x=wide)))


def test_npz_is_refused_when_arrays_are_missing_or_uneven_or_empty(tmp_path: Path) -> None:
    x = np.zeros((3, 2), np.float32)
    refused("VLX0205", "'x'", "y_", call=lambda: open_npz(tmp_path / "a.npz", y_=x))
    refused("VLX0205", "x 3, label 2", call=lambda: open_npz(tmp_path / "b.npz", x=x, label=np.zeros(2, np.int64)))
    refused("VLX0202", call=lambda: open_npz(tmp_path / "c.npz", x=x[:0]))


def test_npz_is_refused_when_it_is_damaged_or_pickled(tmp_path: Path) -> None:
    refused("VLX0203", call=lambda: open_npz(tmp_path / "a.npz", x=np.array([{"a": 1}], dtype=object)))
    (tmp_path / "b.npz").write_bytes(b"PK\x03\x04 broken")
    refused("VLX0203", call=lambda: open_data(str(tmp_path / "b.npz"), inputs=[X], preprocess={}))
    np.save(tmp_path / "c.npy", np.zeros((1, 2), np.float32))
    (tmp_path / "c.npy").rename(tmp_path / "c.npz")
    refused("VLX0203", call=lambda: open_data(str(tmp_path / "c.npz"), inputs=[X], preprocess={}))


# FILE.py:FUNCTION

HEAD = """import numpy as np
from PIL import Image
from vlexport.core.samples import Sample
ROW = np.ones(2, np.float32)
"""


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        ("return [Sample('a', {'x': ROW}, 3), Sample('b', {'x': ROW}, 4)]", [("a", 3), ("b", 4)]),
        ("yield {'x': ROW, 'label': 1}\n    yield {'x': ROW, 'label': np.int64(0)}", [("#0", 1), ("#1", 0)]),
        ("yield ROW, 5", [("#0", 5)]),
        ("yield {'x': ROW}, 'dog'", [("#0", 1)]),
        ("yield {'x': ROW}", [("#0", None)]),
    ],
)
def test_function_yields_samples_when_it_returns_a_known_form(tmp_path: Path, body: str, wanted: Any) -> None:
    labels = ["cat", "dog"] if "dog" in body else None
    data = open_function(tmp_path / "f.py", f"{HEAD}def samples():\n    {body}\n", labels=labels)
    assert [(s.id, s.label) for s in data] == wanted
    assert [(s.id, s.label) for s in data] == wanted
    assert len(data) == len(wanted)
    assert data.labelled == (wanted[0][1] is not None)


def test_function_may_yield_images_when_preprocessing_is_known(tmp_path: Path) -> None:
    source = f"{HEAD}def samples():\n    yield Image.new('RGB', (20, 20)), 0\n"
    data = open_function(tmp_path / "f.py", source, inputs=[IMAGE], preprocess=PREPROCESS)
    assert next(iter(data)).inputs["image"].shape == (3, 8, 8)
    refused("VLX0206", "--preprocess", call=lambda: open_function(tmp_path / "g.py", source, inputs=[IMAGE]))


def test_function_keeps_label_dicts_and_arrays_when_task_is_not_classification(tmp_path: Path) -> None:
    source = f"{HEAD}def samples():\n    yield ROW, {{'boxes': 1}}\n    yield ROW, np.zeros((4, 4))\n"
    first, second = open_function(tmp_path / "f.py", source)
    assert first.label == {"boxes": 1}
    assert isinstance(second.label, np.ndarray)
    assert second.label.shape == (4, 4)


def test_function_may_import_a_module_beside_it_when_it_lies_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "beside_it.py").write_text("LABEL = 9\n")
    before = list(sys.path)
    data = open_function(tmp_path / "f.py", f"{HEAD}import beside_it\ndef samples():\n    yield ROW, beside_it.LABEL\n")
    assert [s.label for s in data] == [9]
    assert sys.path == before


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import no_such_module_here\n", "f.py:1"),
        ("def samples(:\n", "f.py:1"),
        ("import sys\nsys.exit(3)\n", "f.py:2"),
        ("def helper():\n    raise KeyError('lost')\ndef samples():\n    return helper()\n", "f.py:2"),
        ("def samples():\n    yield from [1 / 0]\n", "f.py:2"),
        ("def samples(path):\n    return []\n", "TypeError"),
        ("def sample():\n    return []\n", "did you mean 'sample'?"),
        ("def samples():\n    return 7\n", "returned a int"),
        ("def samples():\n    return [7]\n", "yields a int"),
        ("IT = iter([([0.0], 1)] * 3)\ndef samples():\n    return IT\n", "same iterator"),
    ],
)
def test_function_error_names_file_and_line_when_user_code_fails(tmp_path: Path, source: str, said: str) -> None:
    error = refused("VLX0209", said, call=lambda: list(open_function(tmp_path / "f.py", source)))
    assert "Traceback" not in str(error)


def test_function_is_refused_when_it_yields_nothing_or_drops_labels_or_inputs(tmp_path: Path) -> None:
    refused("VLX0202", call=lambda: open_function(tmp_path / "a.py", "def samples():\n    return []\n"))
    partly = f"{HEAD}def samples():\n    yield ROW, 1\n    yield ROW, None\n"
    refused("VLX0210", "#1", call=lambda: list(open_function(tmp_path / "b.py", partly)))
    other = f"{HEAD}def samples():\n    yield {{'y': ROW}}\n"
    refused("VLX0205", "no input 'y'", call=lambda: list(open_function(tmp_path / "c.py", other)))
    none = f"{HEAD}def samples():\n    yield {{}}\n"
    refused("VLX0205", "'x' is missing", call=lambda: list(open_function(tmp_path / "d.py", none)))


# Bad samples


def test_bad_photos_and_nan_are_skipped_and_listed_when_asked(tmp_path: Path) -> None:
    save_photo(tmp_path / "cat" / "b.png")
    (tmp_path / "cat" / "a.png").write_bytes(b"broken")
    data = open_data(str(tmp_path), inputs=[IMAGE], preprocess=PREPROCESS, labels=["cat"], skip_bad=True)
    for _ in range(2):  # counted once however often the data are read
        assert [s.id for s in data] == ["cat/b.png"]
        assert {name: error.code for name, error in data.skipped.items()} == {"cat/a.png": "VLX0203"}
    x = np.zeros((3, 2), np.float32)
    x[1, 1] = np.nan
    np.savez(tmp_path / "d.npz", x=x)
    rows = open_data(str(tmp_path / "d.npz"), inputs=[X], preprocess={}, skip_bad=True)
    assert [s.id for s in rows] == ["#0", "#2"]
    assert {name: error.code for name, error in rows.skipped.items()} == {"#1": "VLX0204"}


def test_wrong_labels_and_shapes_are_errors_when_bad_samples_are_skipped(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((1, 2), np.float32), label=np.array([7]))
    np.savez(tmp_path / "b.npz", x=np.zeros((1, 3), np.float32))
    for name, code in (("a.npz", "VLX0208"), ("b.npz", "VLX0205")):
        data = open_data(str(tmp_path / name), inputs=[X], preprocess={}, labels=["cat"], skip_bad=True)
        refused(code, "#0", call=lambda data=data: list(data))
        assert data.skipped == {}


def test_function_with_a_truncated_image_names_the_sample_when_read(tmp_path: Path) -> None:
    save_photo(tmp_path / "a.bmp")
    whole = (tmp_path / "a.bmp").read_bytes()
    (tmp_path / "b.bmp").write_bytes(whole[: len(whole) // 2])  # pillow opens it, and stumbles when it reads it
    source = (
        f"{HEAD}def samples():\n    for name in 'ba':\n        yield Image.open(f'{{__file__[:-4]}}{{name}}.bmp'), 0\n"
    )
    options: dict[str, Any] = {"inputs": [IMAGE], "preprocess": PREPROCESS}
    data = open_function(tmp_path / "f.py", source, **options)
    assert data.labelled
    refused("VLX0203", "#0", call=lambda: list(data))
    data = open_function(tmp_path / "f.py", source, skip_bad=True, **options)
    assert ([s.id for s in data], list(data.skipped)) == (["#1"], ["#0"])


def test_content_hash_is_of_the_inputs_when_samples_are_compared() -> None:
    x = np.arange(4, dtype=np.float32)
    one = Sample("a", {"x": x, "y": x}, 1).content_hash()
    assert Sample("b", {"y": x.copy(), "x": x[:]}, 2).content_hash() == one
    others = [{"x": x, "y": x + 1}, {"x": x, "z": x}, {"x": x.reshape(2, 2), "y": x}, {"x": x.view(np.int32), "y": x}]
    assert len({one, *(Sample("a", inputs).content_hash() for inputs in others)}) == 5
    strided = np.stack([x, x])[:, ::2]
    assert Sample("a", {"x": strided}).content_hash() == Sample("a", {"x": strided.copy()}).content_hash()
