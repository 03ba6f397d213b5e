"""What ``vlexport.save`` writes opens again: names, dims, preprocessing, labels; nothing of the machine or photos."""

from __future__ import annotations

import getpass
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vlexport.core.artifact import DimRange
from vlexport.core.errors import BundleError, CaptureError, DataError, ModelFileError, VlexportError
from vlexport.core.preprocess import preprocess_from_spec
from vlexport.frontends.archive_zip import read_members, write_members
from vlexport.frontends.save import save
from vlexport.frontends.source import open_archive

SPEC = "resize=10:bicubic,crop=8,scale=1/255,mean=0.5,std=0.25"


class Two(nn.Module):
    """Two images and ids in, a dict of scores and features out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.words = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, left: Tensor, right: Tensor, ids: Tensor) -> dict[str, Tensor]:
        features = self.norm(self.conv(left - right)).relu().mean((2, 3)) + self.words(ids).mean(1)
        return {"scores": self.head(features), "features": features}


class One(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Linear(4, 2)

    def forward(self, image: Tensor) -> Tensor:
        scores: Tensor = self.head(self.conv(image).relu().mean((2, 3)))
        return scores


def two() -> Two:
    torch.manual_seed(0)
    return Two().eval()


def one() -> One:
    torch.manual_seed(0)
    return One().eval()


def two_inputs(batch: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(11)
    left, right = (torch.randn(batch, 3, 8, 8, generator=generator) for _ in range(2))
    return {"left": left, "right": right, "ids": torch.randint(0, 5, (batch, 6), generator=generator)}


def image(batch: int = 1, size: int = 8) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(11))


def metadata(path: Path) -> dict[str, object]:
    with zipfile.ZipFile(path) as archive:
        name = next(n for n in archive.namelist() if n.endswith("extra/vlexport.json"))
        found: dict[str, object] = json.loads(archive.read(name))
    return found


def test_all_that_was_said_comes_back_when_opened(tmp_path: Path) -> None:
    model = two()
    path = tmp_path / "two.pt"
    save(
        model,
        path,
        inputs=two_inputs(),
        preprocess={"left": SPEC, "right": "resize=8x8,scale=1/255"},
        labels=["kätzchen", "<b>dog</b>"],
    )
    source = open_archive(path)
    signature = source.program.signature
    assert [(s.name, s.dtype, s.shape) for s in signature.inputs] == [
        ("left", "float32", ("batch", 3, 8, 8)),
        ("right", "float32", ("batch", 3, 8, 8)),
        ("ids", "int64", ("batch", 6)),
    ]
    assert [(s.name, s.shape) for s in signature.outputs] == [("scores", ("batch", 2)), ("features", ("batch", 4))]
    assert signature.dims == {"batch": DimRange(min=1, max=None, opt=1)}
    assert source.preprocess == {
        "left": preprocess_from_spec(SPEC),
        "right": preprocess_from_spec("resize=8x8,scale=1/255"),
    }
    assert source.labels == ("kätzchen", "<b>dog</b>")
    for batch in (1, 3):
        values = two_inputs(batch)
        with torch.no_grad():
            expected = model(**values)
        found = source.run({name: value.numpy() for name, value in values.items()})
        assert list(found) == ["scores", "features"]
        for name, value in found.items():
            np.testing.assert_allclose(value, expected[name].numpy(), rtol=1e-5, atol=1e-6)


def test_names_and_ranges_of_dims_come_back_when_they_were_given(tmp_path: Path) -> None:
    save(
        one(), tmp_path / "a.pt", inputs=image(2), dynamic={"image": {0: ("n", 1, 9), 2: ("height", 4, 32)}}
    )  # fmt: skip
    signature = open_archive(tmp_path / "a.pt").program.signature
    assert signature.inputs[0].shape == ("n", 3, "height", 8)
    assert {n: (r.min, r.max) for n, r in signature.dims.items()} == {"n": (1, 9), "height": (4, 32)}


def test_sizes_are_fixed_when_nothing_is_dynamic(tmp_path: Path) -> None:
    save(one(), tmp_path / "a.pt", inputs=image(2), dynamic=False)
    signature = open_archive(tmp_path / "a.pt").program.signature
    assert signature.inputs[0].shape == (2, 3, 8, 8)
    assert signature.dims == {}


def test_bytes_are_identical_when_saved_twice(tmp_path: Path) -> None:
    for name in ("a.pt", "another name.pt2"):
        save(one(), tmp_path / name, inputs=image(), preprocess=SPEC, labels=["a", "b"])
    first, second = ((tmp_path / name).read_bytes() for name in ("a.pt", "another name.pt2"))
    assert first == second
    assert open_archive(tmp_path / "a.pt").source_hash == open_archive(tmp_path / "another name.pt2").source_hash


def test_hash_stays_when_the_file_is_renamed_and_changes_when_a_weight_does(tmp_path: Path) -> None:
    save(one(), tmp_path / "a.pt", inputs=image())
    before = open_archive(tmp_path / "a.pt").source_hash
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.pt").rename(tmp_path / "sub" / "b.bin")
    assert open_archive(tmp_path / "sub" / "b.bin").source_hash == before
    model = one()
    with torch.no_grad():
        model.head.bias[0] += 1e-3
    save(model, tmp_path / "c.pt", inputs=image())
    assert open_archive(tmp_path / "c.pt").source_hash != before


def test_example_is_a_seeded_draw_when_not_asked_to_keep_it(tmp_path: Path) -> None:
    inputs = two_inputs()
    for name, seed in (("a", 0), ("b", 1)):
        save(two(), tmp_path / f"{name}.pt", inputs=inputs, seed=seed)
    first, second = (open_archive(tmp_path / f"{name}.pt").program.example for name in ("a", "b"))
    assert first[0].shape == (2, 3, 8, 8)
    assert first[2].min() >= 0
    assert first[2].max() < 5, "ids stay inside the vocabulary"
    assert not torch.equal(first[0], second[0])
    for path in (tmp_path / "a.pt", tmp_path / "b.pt"):
        content = path.read_bytes()
        for value in inputs.values():
            assert value.numpy().tobytes()[:64] not in content


def test_example_is_the_given_one_when_asked_to_keep_it(tmp_path: Path) -> None:
    inputs = image(2)
    save(one(), tmp_path / "a.pt", inputs=inputs, keep_example=True)
    assert torch.equal(open_archive(tmp_path / "a.pt").program.example[0], inputs)


class OfTwo(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.zeros(2, 1)


def test_example_is_kept_when_the_batch_turned_out_fixed(tmp_path: Path) -> None:
    inputs = torch.randn(2, 8)
    captured = save(OfTwo().eval(), tmp_path / "a.pt", inputs=inputs, keep_example=True)
    assert "the batch is fixed at 2" in captured.notes[0]
    assert torch.equal(open_archive(tmp_path / "a.pt").program.example[0], inputs)


@pytest.mark.parametrize("labels", [["a"], ["a", "b", "c"]])
def test_labels_are_refused_when_their_number_is_wrong(tmp_path: Path, labels: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        save(one(), tmp_path / "a.pt", inputs=image(), labels=labels)
    assert caught.value.code == "VLX0208"
    assert str(len(labels)) in caught.value.message
    assert not (tmp_path / "a.pt").exists()


def test_nearest_input_is_named_when_preprocess_names_another(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        save(two(), tmp_path / "a.pt", inputs=two_inputs(), preprocess={"lefd": SPEC})
    assert caught.value.code == "VLX0207"
    assert "did you mean 'left'?" in caught.value.message
    assert "left, right" in caught.value.hint
    assert not (tmp_path / "a.pt").exists()


@pytest.mark.parametrize(
    ("preprocess", "part"),
    [
        ({"ids": SPEC}, "takes no image"),
        ("resize=10,crop=9", "makes 3×9×9, input 'left' is 3×8×8"),
        ("color=gray,resize=8x8", "makes 1×8×8"),
        ("resize=10,crup=8", "did you mean 'crop'"),
        ("timm:resnet1", "did you mean 'resnet"),
    ],
    ids=str,
)
def test_preprocess_is_refused_when_it_cannot_be_right(tmp_path: Path, preprocess: object, part: str) -> None:
    with pytest.raises(VlexportError) as caught:
        save(two(), tmp_path / "a.pt", inputs=two_inputs(), preprocess=preprocess)  # type: ignore[arg-type]
    assert caught.value.code in ("VLX0207", "VLX0110")
    assert part in caught.value.message
    assert not (tmp_path / "a.pt").exists()


def test_preprocess_of_any_size_is_taken_when_the_input_is(tmp_path: Path) -> None:
    dims = {"image": {2: ("height", 4, 32), 3: ("width", 4, 32)}}
    save(one(), tmp_path / "a.pt", inputs=image(2), dynamic=dims, preprocess="resize=12")
    assert open_archive(tmp_path / "a.pt").preprocess == {"image": preprocess_from_spec("resize=12")}


def test_folder_is_named_before_any_work_when_it_is_missing(tmp_path: Path) -> None:
    with pytest.raises(BundleError) as caught:
        save(one().train(), tmp_path / "none" / "a.pt", inputs=image())
    assert caught.value.code == "VLX0607"
    assert caught.value.where == str(tmp_path / "none")


def test_folder_is_refused_when_it_stands_where_the_file_should(tmp_path: Path) -> None:
    with pytest.raises(BundleError) as caught:
        save(one(), tmp_path, inputs=image())
    assert caught.value.code == "VLX0607"
    assert list(tmp_path.parent.glob(f".{tmp_path.name}*")) == []


def test_model_is_refused_when_it_trains(tmp_path: Path) -> None:
    with pytest.raises(CaptureError) as caught:
        save(one().train(), tmp_path / "a.pt", inputs=image())
    assert caught.value.code == "VLX0301"
    assert "model.eval()" in caught.value.hint


def test_model_is_unchanged_when_saved(tmp_path: Path) -> None:
    model = two()
    inputs = two_inputs()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules = [id(module) for module in model.modules()]
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    with torch.no_grad():
        outputs = model(**inputs)
        save(model, tmp_path / "a.pt", inputs=inputs)
        again = model(**inputs)
    assert [id(module) for module in model.modules()] == modules
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert not model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    for name in outputs:
        assert torch.equal(outputs[name], again[name])


def test_no_absolute_path_lies_in_the_file_when_saved(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    save(two(), path, inputs=two_inputs(), preprocess={"left": SPEC})
    secrets = [str(tmp_path), str(Path(__file__).parent), str(Path(torch.__file__).parent), str(Path.home()) + "/"]
    if len(getpass.getuser()) > 5:
        secrets.append(getpass.getuser())
    content = path.read_bytes()
    for secret in secrets:
        assert secret.encode() not in content
    assert b"test_save.py" in content, "source lines stay, by the file's own name"


def test_half_precision_model_is_saved_as_float32_when_it_is_said(tmp_path: Path) -> None:
    captured = save(one().half(), tmp_path / "a.pt", inputs=image().half())
    assert any("float32" in note for note in captured.notes)
    source = open_archive(tmp_path / "a.pt")
    assert source.program.signature.inputs[0].dtype == "float32"
    assert {t.dtype for t in source.program.tensors.values() if t.is_floating_point()} == {torch.float32}


def altered(path: Path, **changes: object) -> Path:
    """A copy of an archive with other values in ``vlexport.json``."""
    members = dict(read_members(path.read_bytes()))
    values = json.loads(bytes(members["extra/vlexport.json"]))
    members["extra/vlexport.json"] = json.dumps({**values, **changes}).encode()
    other = path.with_name("altered.pt")
    other.write_bytes(write_members(members))
    return other


def spec(**changes: object) -> dict[str, object]:
    return {"name": "image", "dtype": "float32", "shape": ["batch", 3, 8, 8], **changes}


OUTPUT = {"name": "output", "dtype": "float32", "shape": ["batch", 2]}
BATCH = {"batch": {"min": 1, "max": None, "opt": 1}}


@pytest.mark.parametrize(
    "changes",
    [
        {"signature": {}},
        {"signature": {"inputs": [], "outputs": [OUTPUT], "dims": BATCH}},
        {"signature": {"inputs": [spec(), spec(name="b")], "outputs": [OUTPUT], "dims": BATCH}},
        {"signature": {"inputs": [spec()], "outputs": [], "dims": BATCH}},
        {"signature": {"inputs": [spec(shape=["batch", 3, 8])], "outputs": [OUTPUT], "dims": BATCH}},
        {"signature": {"inputs": [spec(shape=["batch", 3, 8, 9])], "outputs": [OUTPUT], "dims": BATCH}},
        {"signature": {"inputs": [spec(shape=[2, 3, 8, 8])], "outputs": [OUTPUT], "dims": BATCH}},
        {"signature": {"inputs": [spec(shape=["batch", "c", 8, 8])], "outputs": [OUTPUT], "dims": BATCH}},
        {"signature": {"inputs": [spec(dtype="int64")], "outputs": [OUTPUT], "dims": BATCH}},
        {"signature": {"inputs": [spec()], "outputs": [OUTPUT], "dims": {}}},
        {"preprocess": {"other": {}}},
        {"preprocess": {"image": {"resize": -1}}},
        {"preprocess": []},
        {"labels": 3},
    ],
    ids=lambda c: str(c)[:60],
)
def test_file_is_refused_when_its_metadata_does_not_fit_its_graph(tmp_path: Path, changes: dict[str, object]) -> None:
    path = tmp_path / "a.pt"
    save(one(), path, inputs=image())
    assert open_archive(altered(path)).labels == ()
    with pytest.raises(ModelFileError) as caught:
        open_archive(altered(path, **changes))
    assert caught.value.code == "VLX0105"


def test_spec_line_is_recorded_when_preprocessing_is(tmp_path: Path) -> None:
    save(one(), tmp_path / "a.pt", inputs=image(), preprocess=SPEC)
    recorded = metadata(tmp_path / "a.pt")["preprocess_spec"]
    assert isinstance(recorded, dict)
    assert preprocess_from_spec(recorded["image"]) == preprocess_from_spec(SPEC)


class CallsPrivate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch._foreach_abs([x])[0]


def test_operator_is_called_unknown_and_no_danger_when_the_model_is_the_users_own(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="VLX0303") as caught:
        save(CallsPrivate().eval(), tmp_path / "model.pt", inputs=torch.ones(2, 3))
    assert "does not know the operator aten._foreach_abs" in caught.value.message
    assert "test_save.py:" in caught.value.where
    assert "do not open" not in caught.value.hint
    assert list(tmp_path.iterdir()) == []
