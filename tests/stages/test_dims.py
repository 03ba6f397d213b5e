"""Which sizes an artifact takes: ``--dynamic``, what a target fixes by itself, and where both meet golden vectors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vlexport
from vlexport.core.artifact import DimRange, Signature, TensorSpec
from vlexport.core.bundle_schema import Bundle
from vlexport.core.config import BuildConfig
from vlexport.core.errors import DataError, UsageError
from vlexport.stages.build import BuildResult, build
from vlexport.stages.dims import ONE, dims_of
from vlexport.targets import open_target


class Net(nn.Module):
    """The mean over a dynamic height is flattened, so that a size that was baked in would show."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        return torch.relu(self.conv(image)).flatten(2).mean(2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("dims") / "net.pt"
    sizes = {"image": {0: ("batch", 1, 32), 2: ("height", 8, 64)}}
    vlexport.save(Net().eval(), path, inputs=torch.rand(1, 3, 16, 8), dynamic=sizes)
    return path


def signature(**dims: DimRange) -> Signature:
    """One input of batch × 3 × height × 8, with such of the two that ``dims`` names."""
    shape = ("batch" if "batch" in dims else 1, 3, "height" if "height" in dims else 8, 8)
    spec = TensorSpec(name="image", dtype="float32", shape=shape)
    return Signature(inputs=(spec,), outputs=(spec,), dims=dims)


BATCH = DimRange(min=1, max=32, opt=4)
HEIGHT = DimRange(min=8, max=64, opt=16)


def asked(saved: Signature, *texts: str, target: str = "onnxruntime") -> dict[str, DimRange]:
    return dims_of(BuildConfig(model="net.pt", dynamic=texts), open_target(target), saved)


def refused(saved: Signature, *texts: str, target: str = "onnxruntime") -> UsageError:
    with pytest.raises(UsageError) as found:
        asked(saved, *texts, target=target)
    return found.value


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("batch=3", DimRange(min=3, max=3, opt=3)),
        ("batch=2:8", DimRange(min=2, max=8, opt=4)),
        ("batch=6:8", DimRange(min=6, max=8, opt=6)),
        ("batch=1:2", DimRange(min=1, max=2, opt=2)),
        ("batch=2:3:8", DimRange(min=2, max=8, opt=3)),
    ],
)
def test_dynamic_narrows_when_the_sizes_lie_within_the_saved_ones(text: str, wanted: DimRange) -> None:
    assert asked(signature(batch=BATCH, height=HEIGHT), text) == {"batch": wanted}


@pytest.mark.parametrize(
    "text", ["batch", "batch=", "batch=a", "batch=-1", "batch=1:2:3:4", "batch=1.5", "batch=1:", "batch=9999999999"]
)
def test_dynamic_is_refused_when_it_is_spelled_otherwise(text: str) -> None:
    error = refused(signature(batch=BATCH), text)
    assert error.code == "VLX0703"
    assert text in error.message


@pytest.mark.parametrize("text", ["batch=0", "batch=4:2", "batch=1:5:4", "batch=3:2:4", "batch=0:4"])
def test_dynamic_is_refused_when_the_sizes_are_no_range(text: str) -> None:
    assert "1 ≤ MIN ≤ OPT ≤ MAX" in refused(signature(batch=BATCH), text).message


@pytest.mark.parametrize(("text", "line"), [("height=4:64", '("height", 4, 64)'), ("height=70", '("height", 8, 70)')])
def test_widening_is_refused_with_the_line_to_save_by(text: str, line: str) -> None:
    error = refused(signature(batch=BATCH, height=HEIGHT), text)
    assert error.code == "VLX0703"
    assert "from 8 to 64" in error.message
    assert line in error.hint


def test_unknown_dim_is_refused_with_the_nearest() -> None:
    error = refused(signature(batch=BATCH, height=HEIGHT), "hieght=8")
    assert "did you mean 'height'" in error.message
    assert "batch, height" in error.hint


def test_dim_is_refused_when_it_is_given_twice() -> None:
    assert "given twice" in refused(signature(batch=BATCH), "batch=1", "batch=2").message


@pytest.mark.parametrize("target", ["tensorrt", "coreml"])
def test_batch_is_fixed_to_one_when_the_target_wants_it_and_nobody_asks(target: str) -> None:
    assert asked(signature(batch=BATCH, height=HEIGHT), target=target) == {"batch": ONE}
    assert asked(signature(batch=BATCH, height=HEIGHT), "height=8", target=target)["batch"] == ONE
    assert asked(signature(batch=BATCH)) == {}


@pytest.mark.parametrize("sizes", ["1:4:32", "2:4:8"])
def test_batch_stays_dynamic_when_it_is_asked_for_as_saved_or_narrower(sizes: str) -> None:
    """The range as it was saved narrows nothing, but it is a wish all the same."""
    found = asked(signature(batch=BATCH), f"batch={sizes}", target="tensorrt")
    assert found == ({} if sizes == "1:4:32" else {"batch": DimRange(min=2, max=8, opt=4)})


def test_batch_is_left_alone_when_one_is_no_size_that_was_saved() -> None:
    assert asked(signature(batch=DimRange(min=2, max=8, opt=2)), target="tensorrt") == {}


def test_unbounded_dim_is_refused_when_the_target_wants_a_bound() -> None:
    free = DimRange(min=8, max=None, opt=16)
    error = refused(signature(batch=DimRange(), height=free), target="coreml")
    assert error.code == "VLX0706"
    assert "--dynamic height=8:16:64" in error.hint
    assert "--dynamic height=16" in error.hint
    assert asked(signature(batch=DimRange(), height=free), "height=8:32", target="coreml") == {
        "height": DimRange(min=8, max=32, opt=16), "batch": ONE,
    }  # fmt: skip
    assert asked(signature(batch=DimRange(), height=free)) == {}


def made(model: Path, output: Path, target: str = "onnxruntime", dynamic: Sequence[str] = ()) -> BuildResult:
    config = BuildConfig(
        model=str(model), target=target, output=str(output), dynamic=tuple(dynamic), profile=False, precision="fp32",
        options={"tensorrt.engine": "off"} if target == "tensorrt" else {},
    )  # fmt: skip
    return build(config)


def shapes(folder: Path, bundle: Bundle) -> list[tuple[int, ...]]:
    """Of the input in the golden vectors and in those at the smallest sizes."""
    kinds = (bundle.main.golden, bundle.main.golden_smallest)
    return [np.load(folder / each.inputs)["image"].shape for each in kinds if each is not None]


def test_sizes_reach_signature_and_golden_vectors_when_a_range_is_narrowed(model: Path, tmp_path: Path) -> None:
    found = made(model, tmp_path / "b", dynamic=["batch=2:5:6", "height=16:24"]).bundle
    assert found.main.dims == {"batch": DimRange(min=2, max=6, opt=5), "height": DimRange(min=16, max=24, opt=16)}
    assert found.main.artifact.inputs[0].shape == ("batch", 3, "height", 8)
    assert shapes(tmp_path / "b", found) == [(4, 3, 18, 8), (2, 3, 16, 8)]
    assert vlexport.verify(tmp_path / "b").errors


def test_artifact_computes_what_the_model_does_when_a_dim_becomes_one_size(model: Path, tmp_path: Path) -> None:
    found = made(model, tmp_path / "b", dynamic=["height=24"]).bundle
    assert found.main.artifact.inputs[0].shape == ("batch", 3, 24, 8)
    assert list(found.main.dims) == ["batch"]
    image = np.random.default_rng(0).random((3, 3, 24, 8), dtype=np.float32)
    torch.manual_seed(0)
    wanted = Net().eval()(torch.from_numpy(image)).detach().numpy()
    (output,) = vlexport.load(tmp_path / "b").run({"image": image}).values()
    np.testing.assert_allclose(output, wanted, atol=1e-5)  # kernels of two runtimes sum in another order


def test_another_range_is_no_cache_hit_when_only_opt_differs(model: Path, tmp_path: Path) -> None:
    opts = []
    for number, opt in enumerate((2, 3)):
        found = made(model, tmp_path / str(number), dynamic=[f"batch=1:{opt}:4", "height=16"]).bundle
        opts.append(found.main.dims["batch"].opt)
    assert opts == [2, 3]


def test_note_tells_of_the_fixed_batch_when_and_only_when_nobody_asked(model: Path, tmp_path: Path) -> None:
    notes = made(model, tmp_path / "a", "tensorrt").report.notes
    assert notes[0] == "batch is fixed to 1; --dynamic batch=MIN:OPT:MAX keeps it dynamic"
    notes = made(model, tmp_path / "b", "tensorrt", ["batch=1"]).report.notes
    assert not any("is fixed" in note for note in notes)


def test_nothing_is_written_when_no_target_takes_the_sizes(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="from 8 to 64"):
        made(model, tmp_path / "none", dynamic=["height=100"])
    assert list(tmp_path.iterdir()) == []


def test_calibration_samples_are_refused_when_narrowed_dims_do_not_take_them(model: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "calib.npz", image=np.zeros((2, 3, 48, 8), np.float32))
    for dynamic, fits in (("height=48", True), ("height=32", False), ("height=8:32", False)):
        config = BuildConfig(
            model=str(model), output=str(tmp_path / dynamic.replace(":", "-")), dynamic=(dynamic,), profile=False,
            calib=str(tmp_path / "calib.npz"),
        )  # fmt: skip
        if fits:
            build(config)
            continue
        with pytest.raises(DataError) as error:
            build(config)
        assert error.value.code == "VLX0205"
        assert not Path(str(config.output)).exists()
