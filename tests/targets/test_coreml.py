"""The coreml target: what its packages hold. Every package is read back; nothing here can run one."""

from __future__ import annotations

import getpass
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import vlexport
from vlexport.core.artifact import Artifact
from vlexport.core.errors import VlexportError
from vlexport.core.preprocess import Preprocess, preprocess_from_spec
from vlexport.frontends.capture import capture
from vlexport.ir.program import Program
from vlexport.passes.pipeline import run_pipeline
from vlexport.targets.base import Brief
from vlexport.targets.coreml import CoreMLOptions, CoreMLTarget
from vlexport.targets.coreml.check import require_as_planned
from vlexport.targets.coreml.mil import MilSummary, read_package
from vlexport.targets.coreml.names import is_swift_identifier
from vlexport.targets.coreml.plan import plan_of

LABELS = ("cracked", "dirty", "good", "shaded")
HOW = preprocess_from_spec("resize=10:bicubic,crop=8,scale=1/255,mean=imagenet,std=imagenet")


class Net(nn.Module):
    """Pixels to logits; ``end`` is what comes last."""

    def __init__(self, channels: int = 3, end: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(channels, 8, 3, padding=1), nn.Linear(8, 4)
        self.end = end or nn.Identity()

    def forward(self, image: Tensor) -> Tensor:
        return self.end(self.head(torch.relu(self.conv(image)).mean((2, 3))))


def captured(module: nn.Module, *inputs: Tensor, **options: Any) -> Program:
    torch.manual_seed(0)
    return capture(module.eval(), inputs, **{"dynamic": False, **options}).program


def brief(precision: str = "fp16", *, labels: tuple[str, ...] = (), how: Preprocess | None = None, name: str = "main",
          **options: Any) -> Brief:  # fmt: skip
    preprocess = {"image": how} if how is not None else {}
    return Brief(CoreMLOptions(**options), precision=precision, labels=labels, preprocess=preprocess, name=name)


def lowered(program: Program, folder: Path, chosen: Brief) -> tuple[Artifact, MilSummary]:
    artifact = CoreMLTarget().lower(program, folder, chosen)
    return artifact, read_package(folder / artifact.path)


def refused(code: str, call: Any) -> VlexportError:
    with pytest.raises(VlexportError) as caught:
        call()
    assert caught.value.code == code
    return caught.value


@pytest.fixture(scope="module")
def program() -> Program:
    return captured(Net(), torch.rand(1, 3, 8, 8))


PHOTOS = {"labels": LABELS, "how": HOW, "inputs": "image", "name": "solar-cells", "author": "A", "license": "L",
          "version": "1.2", "description": "D", "compute_units": "cpu-and-ne"}  # fmt: skip


@pytest.fixture(scope="module")
def photos(program: Program, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Artifact, MilSummary]:
    folder = tmp_path_factory.mktemp("photos")
    return (folder, *lowered(program, folder, brief(**PHOTOS)))


# -- images ------------------------------------------------------------------------------------------------------------


def test_photo_goes_in_and_label_comes_out_when_it_is_a_classifier(photos: tuple[Path, Artifact, MilSummary]) -> None:
    _, artifact, found = photos
    assert artifact.path == "solar_cells.mlpackage"
    assert [(s.name, s.dtype, s.shape) for s in artifact.inputs] == [("image", "uint8", (1, 3, 8, 8))]
    assert [(s.name, s.dtype, s.shape) for s in artifact.outputs] == [
        ("classLabel", "str", (1,)), ("classLabel_probs", "float32", (1, 4)),
    ]  # fmt: skip
    assert [(f.name, f.kind, f.dtype, f.shape) for f in found.inputs] == [("image", "image", "RGB", (8, 8))]
    assert [(f.name, f.kind) for f in found.outputs] == [("classLabel", "string"), ("classLabel_probs", "dictionary")]
    assert found.predicted == ("classLabel", "classLabel_probs")
    assert (found.before_classify(), found.histogram()["softmax"]) == ("softmax", 1)
    assert artifact.session_options == {"compute_units": "cpu-and-ne"}


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_constants_at_the_image_are_exact_for_every_channel(
    precision: str, program: Program, photos: tuple[Path, Artifact, MilSummary], tmp_path: Path
) -> None:
    found = photos[2] if precision == "fp16" else lowered(program, tmp_path, brief("fp32", **PHOTOS))[1]
    kind = np.float16 if precision == "fp16" else np.float32
    mean = np.array([0.485, 0.456, 0.406])
    ((operator, shift),) = found.affine_at("image")  # the factor went into the convolution, which pads
    assert operator == "add"
    assert (shift.dtype, shift.size) == (kind, 3)
    # factor and offset are rounded to fp32 before the one is divided by the other
    bound = 1e-3 if precision == "fp16" else 2e-7
    assert np.allclose(shift.ravel().astype(np.float64), -mean * 255, rtol=bound, atol=0)
    assert "batch_norm" not in found.histogram(), "coremltools would scale by 1/sqrt(1 + 1e-5) there"


def test_probabilities_sum_to_one_when_a_photo_is_given(program: Program) -> None:
    chosen = brief("fp32", **PHOTOS)
    changed = plan_of(program, chosen, chosen.options).program
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    (found,) = changed.run(torch.from_numpy(pixels).permute(2, 0, 1)[None].float())
    (logits,) = program.run(torch.from_numpy(preprocess_from_spec("crop=8,mean=imagenet,std=imagenet").apply(
        Image.fromarray(pixels)))[None])  # fmt: skip
    assert float(found.sum()) == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(found, logits.softmax(-1), rtol=0, atol=1e-6)  # rounding of two factors in fp32
    assert [spec.name for spec in program.signature.inputs] == ["image"]
    assert len(program.calls()) == len(changed.calls()) - 2, "the program given stays as it was"


@pytest.mark.parametrize(
    ("spec", "colour", "operators"),
    [("color=bgr,crop=8,mean=0.1:0.2:0.3", "BGR", ["add"]), ("color=gray,crop=8", "GRAYSCALE", []),
     ("crop=8,scale=1", "RGB", [])],
)  # fmt: skip
def test_image_has_the_colours_of_the_preprocessing_when_it_is_not_rgb(
    spec: str, colour: str, operators: list[str], tmp_path: Path
) -> None:
    how = preprocess_from_spec(spec)
    net = captured(Net(how.channels), torch.rand(1, how.channels, 8, 8))
    _, found = lowered(net, tmp_path, brief(how=how, inputs="image"))
    assert found.inputs[0].dtype == colour
    assert [operator for operator, _ in found.affine_at("image")] == operators


def test_steps_of_the_app_are_recorded_when_the_input_is_an_image(photos: tuple[Path, Artifact, MilSummary]) -> None:
    about = photos[2].metadata
    assert about["vlexport.before.image"] == "resize=10:bicubic,crop=8"
    assert preprocess_from_spec(about["vlexport.preprocess.image"]) == HOW
    assert [about[k] for k in ("author", "license", "version", "description")] == ["A", "L", "1.2", "D"]
    assert about["vlexport.compute_units"] == "cpu-and-ne"


def test_image_is_refused_in_words_when_it_cannot_be_one(program: Program, tmp_path: Path) -> None:
    def asked(net: Program, how: Preprocess | None, **options: Any) -> Any:
        return lambda: CoreMLTarget().lower(net, tmp_path / "out", brief(how=how, inputs="image", **options))

    assert "--preprocess" in refused("VLX0206", asked(program, None)).hint
    gray = preprocess_from_spec("color=gray,crop=8")
    assert "image of 1 channels" in refused("VLX0503", asked(program, gray)).message
    assert "9×9" in refused("VLX0503", asked(program, preprocess_from_spec("crop=9"))).message
    two = captured(Net(), torch.rand(2, 3, 8, 8))
    assert "2 images at a time" in refused("VLX0703", asked(two, HOW)).message
    assert not (tmp_path / "out").exists()


# -- classifiers -------------------------------------------------------------------------------------------------------


def planned(net: Program, **options: Any) -> Any:
    chosen = brief(labels=LABELS, **options)
    return plan_of(net, chosen, chosen.options)


def softmaxes(net: Program) -> int:
    return len(net.calls("aten.softmax.int"))


def test_softmax_is_added_unless_there_is_one_when_it_is_a_classifier(program: Program) -> None:
    rows = torch.rand(1, 3, 8, 8)
    assert (softmaxes(program), softmaxes(planned(program).program)) == (0, 1)
    assert softmaxes(planned(captured(Net(end=nn.Softmax(-1)), rows)).program) == 1
    assert softmaxes(planned(captured(Net(end=nn.Softmax(1)), rows)).program) == 1
    assert softmaxes(planned(captured(Net(end=nn.Softmax(0)), rows)).program) == 2, "a softmax over the batch is none"


@pytest.mark.parametrize(
    ("end", "batch", "labels", "said"),
    [(nn.Sigmoid(), 1, LABELS, "sigmoid"), (None, 2, LABELS, "one sample at a time"), (None, 1, LABELS[:3], "3 labels"),
     (None, 1, (), "not known")],
    ids=["sigmoid", "batch", "number", "none"],
)  # fmt: skip
def test_classifier_is_left_out_or_refused_when_it_does_not_fit(
    end: nn.Module | None, batch: int, labels: tuple[str, ...], said: str
) -> None:
    net = captured(Net(end=end), torch.rand(batch, 3, 8, 8))
    for choice in ("auto", "off"):
        chosen = brief(labels=labels, classifier=choice)
        plan = plan_of(net, chosen, chosen.options)
        assert (plan.labels, [s.name for s in plan.outputs]) == ((), ["output"])
    chosen = brief(labels=labels, classifier="on")
    assert said in refused("VLX0703", lambda: plan_of(net, chosen, chosen.options)).message


def test_label_is_named_when_it_stands_twice(program: Program) -> None:
    chosen = brief(labels=("crane", "b", "crane", "d"))
    error = refused("VLX0503", lambda: plan_of(program, chosen, chosen.options))
    assert "'crane' stands at 0 and 2" in error.message
    assert "coreml.classifier=off" in error.hint


# -- names -------------------------------------------------------------------------------------------------------------


def test_classes_of_xcode_differ_when_two_models_are_lowered(program: Program, tmp_path: Path) -> None:
    a, _ = lowered(program, tmp_path, brief("fp32", name="left-eye"))
    b, _ = lowered(program, tmp_path, Brief(CoreMLOptions(name="RightEye"), precision="fp32"))
    assert [a.path, b.path] == ["left_eye.mlpackage", "RightEye.mlpackage"]
    assert all(is_swift_identifier(Path(each.path).stem) for each in (a, b))
    ids = [json.loads((tmp_path / each.path / "Manifest.json").read_text())["rootModelIdentifier"] for each in (a, b)]
    assert all(re.fullmatch(r"[0-9A-F]{8}(-[0-9A-F]{4}){3}-[0-9A-F]{12}", each) for each in ids)


class Shared(nn.Module):
    """An input, a value twice, a constant and a value without dims."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("k", torch.arange(3.0))

    def forward(self, x: Tensor, on: Tensor) -> dict[str, Tensor]:
        y = x * 2
        return {"x": x, "y": y, "again": y, "k": self.k, "mean": y.mean(), "on": on}


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_outputs_have_names_of_their_own_when_they_share_a_value(precision: str, tmp_path: Path) -> None:
    artifact, found = lowered(captured(Shared(), torch.rand(3, 2), torch.ones(3).bool()), tmp_path, brief(precision))
    assert [f.name for f in found.outputs] == ["x_out", "y", "again", "k", "mean", "on_out"]
    assert [s.name for s in artifact.outputs] == ["x", "y", "again", "k", "mean", "on"]
    assert [s.shape for s in artifact.outputs] == [(3, 2), (3, 2), (3, 2), (3,), (), (3,)]


# -- precision ---------------------------------------------------------------------------------------------------------


def test_weights_are_in_the_precision_when_lowered(
    program: Program, photos: tuple[Path, Artifact, MilSummary], tmp_path: Path
) -> None:
    half = photos[2]
    assert set(half.weight_bytes) == {"FLOAT16"}
    assert half.histogram()["cast"] == 2, "one at the image, one at the probabilities"
    _, single = lowered(program, tmp_path, brief("fp32", **PHOTOS))
    assert single.weight_bytes == {"FLOAT32": 2 * half.weight_bytes["FLOAT16"]}
    assert "cast" not in single.histogram()


def test_operator_stays_in_fp32_when_it_is_kept(program: Program, tmp_path: Path) -> None:
    _, found = lowered(program, tmp_path, brief(labels=LABELS, keep="softmax, linear"))
    types = {op.type: op.dtypes for op in found.operations}
    assert (types["softmax"], types["linear"], types["conv"]) == (("FLOAT32",), ("FLOAT32",), ("FLOAT16",))
    error = refused("VLX0703", lambda: lowered(program, tmp_path, brief(keep="softmaxx")))
    assert "did you mean 'softmax'" in error.message


def test_features_are_half_when_asked_for(program: Program, tmp_path: Path) -> None:
    artifact, found = lowered(program, tmp_path, brief(io="float16"))
    assert [f.dtype for f in (*found.inputs, *found.outputs)] == ["FLOAT16", "FLOAT16"]
    assert [s.dtype for s in (*artifact.inputs, *artifact.outputs)] == ["float16", "float16"]
    assert "cast" not in found.histogram()
    refused("VLX0703", lambda: lowered(program, tmp_path, brief("fp32", io="float16")))


class HalfTyped(nn.Module):
    """Its linear is to run in fp16, its softmax in fp32."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.linear.weight.half(), self.linear.bias.half()
        return F.linear(x.half(), weight, bias).float().softmax(-1)


def test_types_stay_as_they_are_when_the_program_says_them(tmp_path: Path) -> None:
    net = captured(HalfTyped(), torch.rand(2, 8))
    net, _ = run_pipeline(net, CoreMLTarget().program_passes(brief()), gate=None)
    _, found = lowered(net, tmp_path, brief())
    types = {op.type: op.dtypes for op in found.operations}
    assert (types["linear"], types["softmax"]) == (("FLOAT16",), ("FLOAT32",))
    _, own = lowered(net, tmp_path, brief("fp32"))
    assert own.histogram() == found.histogram(), "fp32 adds nothing to what the program says either"


@pytest.mark.parametrize(
    ("system", "opset", "operator"), [("iOS17", "CoreML7", "softmax"), ("iOS18", "CoreML8", "sdpa")]
)
def test_attention_is_whole_when_the_system_has_it(system: str, opset: str, operator: str, tmp_path: Path) -> None:
    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x)

    _, found = lowered(captured(Attention(), torch.rand(1, 2, 5, 8)), tmp_path, brief(deployment_target=system))
    assert found.opset == opset
    wanted = {"sdpa": "scaled_dot_product_attention"}.get(operator, operator)
    assert found.histogram()[wanted] == 1


# -- sizes -------------------------------------------------------------------------------------------------------------

DYNAMIC = {"image": {0: "batch", 2: ("height", 4, 64), 3: ("width", 4, 64)}}


@pytest.fixture(scope="module")
def flexible() -> Program:
    return captured(Net(), torch.rand(2, 3, 8, 8), dynamic=DYNAMIC)


@pytest.mark.parametrize("kind", ["tensor", "image"])
def test_sizes_are_listed_when_asked_for(kind: str, flexible: Program, tmp_path: Path) -> None:
    how = preprocess_from_spec("scale=1/255")
    asked = brief(how=how, inputs=kind, shapes="batch=1,height=8:16,width=16:32")
    artifact, found = lowered(flexible, tmp_path, asked)
    assert artifact.inputs[0].shape == (1, 3, "height", "width")
    assert artifact.outputs[0].shape == (1, 4)
    sizes = ((8, 16), (16, 32)) if kind == "image" else ((1,), (3,), (8, 16), (16, 32))
    assert (found.inputs[0].sizes, found.inputs[0].ranged) == (sizes, False)


def test_sizes_are_ranges_when_the_program_has_them(flexible: Program, tmp_path: Path) -> None:
    _, found = lowered(
        flexible, tmp_path, brief(how=preprocess_from_spec("scale=1/255"), inputs="image", shapes="batch=1")
    )
    assert (found.inputs[0].sizes, found.inputs[0].ranged) == (((4, 64), (4, 64)), True)


def test_image_has_the_size_of_the_preprocessing_when_the_model_takes_any(flexible: Program, tmp_path: Path) -> None:
    artifact, found = lowered(flexible, tmp_path, brief(how=HOW, inputs="image", shapes="batch=1"))
    assert (found.inputs[0].shape, found.inputs[0].sizes) == ((8, 8), ())
    assert artifact.inputs[0].shape == (1, 3, 8, 8)


# -- the same bytes ----------------------------------------------------------------------------------------------------

AGAIN = """
import datetime, sys
import coremltools.converters._converters_entry as entry
class Later(datetime.date):
    @classmethod
    def today(cls):
        return cls(2031, 5, 17)
entry.date = Later
from pathlib import Path
from tests.targets.test_coreml import CoreMLTarget, Net, PHOTOS, brief, captured, torch
CoreMLTarget().lower(captured(Net(), torch.rand(1, 3, 8, 8)), Path("elsewhere"), brief(**PHOTOS))
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_package_is_the_same_when_made_elsewhere_on_another_day(
    photos: tuple[Path, Artifact, MilSummary], tmp_path: Path
) -> None:
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "PYTHONHASHSEED": "7", "TZ": "Pacific/Auckland"}
    quiet = "from vlexport.targets.coreml import compat; compat.coremltools()\n"
    done = subprocess.run(
        [sys.executable, "-c", quiet + AGAIN], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == ("", ""), "coremltools reports on its own affairs"
    found, wanted = contents(tmp_path / "elsewhere"), contents(photos[0])
    assert sorted(found) == [
        f"solar_cells.mlpackage/{name}"
        for name in ("Data/com.apple.CoreML/model.mlmodel", "Data/com.apple.CoreML/weights/weight.bin", "Manifest.json")
    ]
    assert found == wanted


def test_package_holds_no_machine_and_no_day_when_written(photos: tuple[Path, Artifact, MilSummary]) -> None:
    words = (str(Path.cwd()), str(Path.home()) + "/", str(photos[0]), socket.gethostname(), getpass.getuser() + "@",
             "site-packages", str(Path(vlexport.__file__).parent), ".py", "conversion_date", "+cpu", "debug_handle",
             "stack_trace", "buildInfo")  # fmt: skip
    for name, data in contents(photos[0]).items():
        assert [word for word in words if word.encode() in data] == [], name


# -- what is checked and refused ---------------------------------------------------------------------------------------


def test_package_is_refused_when_it_is_not_what_was_planned(program: Program, photos: Any) -> None:
    chosen = brief(**PHOTOS)
    plan, found = plan_of(program, chosen, chosen.options), photos[2]
    require_as_planned(found, plan, "fp16")
    wide = tuple(s.model_copy(update={"shape": (1, 3, 8, 9)}) for s in plan.inputs)
    wrong = {
        "inputs: ['image'], ['photo']": (found, replace(plan, input_names=("photo",))),
        "sizes of image": (found, replace(plan, inputs=wide)),
        "fp32 weights in an fp16 package": (replace(found, weight_bytes={"FLOAT32": 8}), plan),
        "what is classified": (replace(found, operations=found.operations[-1:]), plan),
    }
    for said, (summary, wanted) in wrong.items():
        error = refused("VLX0504", lambda s=summary, w=wanted: require_as_planned(s, w, "fp16"))
        assert said in error.message
    error = refused("VLX0504", lambda: require_as_planned(found, replace(plan, half=False), "fp32"))
    assert "fp16 of an fp32 package" in error.message


def test_package_is_refused_when_it_is_damaged(photos: tuple[Path, Artifact, MilSummary], tmp_path: Path) -> None:
    copy = shutil.copytree(photos[0], tmp_path / "copy") / photos[1].path
    (copy / "Data/com.apple.CoreML/model.mlmodel").write_bytes(b"\xff" * 100)
    error = refused("VLX0505", lambda: read_package(copy))
    assert str(tmp_path) not in error.message + error.where
    refused("VLX0505", lambda: read_package(tmp_path / "none.mlpackage"))


class Strange(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x) * 2


def test_operator_is_named_with_module_and_line_when_nodes_were_added_before_it(tmp_path: Path) -> None:
    net = captured(Net(end=Strange()), torch.rand(1, 3, 8, 8))
    error = refused("VLX0503", lambda: lowered(net, tmp_path / "out", brief(**PHOTOS)))
    assert (
        error.message == "Core ML cannot express aten.special_bessel_j0.default: coremltools has no conversion for it"
    )
    assert re.fullmatch(r"aten\.special_bessel_j0 in end \(test_coreml\.py:\d+\)", error.where)
    assert not (tmp_path / "out").exists()


def test_reason_is_that_of_coremltools_when_it_has_one(tmp_path: Path) -> None:
    class Cut(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.pad(x * 2, (-1, 0))

    error = refused("VLX0503", lambda: lowered(captured(Cut(), torch.rand(2, 4)), tmp_path / "out", brief()))
    assert "aten.pad.default" in error.message
    assert "non-negative" in error.message
    assert "test_coreml.py:" in error.where


@pytest.mark.parametrize("antialiased", [False, True])
def test_operator_is_refused_when_coremltools_would_take_it_for_another(antialiased: bool, tmp_path: Path) -> None:
    class Misread(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if antialiased:
                return F.interpolate(x, scale_factor=0.5, mode="bilinear", antialias=True)
            return torch.add(x, x.exp(), alpha=3)

    sizes: Any = {"x": {2: ("height", 4, 64)}}
    net = captured(Misread(), torch.rand(1, 3, 8, 8), dynamic=sizes)
    error = refused("VLX0503", lambda: lowered(net, tmp_path / "out", brief(shapes="height=8")))
    assert "something else" in error.message
    legal, _ = run_pipeline(net, CoreMLTarget().program_passes(brief()), gate=None)
    if antialiased:
        refused("VLX0503", lambda: lowered(legal, tmp_path / "out", brief(shapes="height=8")))
    else:
        assert lowered(legal, tmp_path / "out", brief(shapes="height=8"))[1].histogram()["add"] == 1


def test_scalar_input_is_refused_when_there_is_one(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor, s: Tensor) -> Tensor:
            return x * s

    net = captured(Scaled(), torch.rand(2, 4), torch.tensor(2.0))
    assert "scalar" in refused("VLX0503", lambda: lowered(net, tmp_path, brief())).message


def test_input_of_bytes_is_refused_by_name_when_there_is_one(tmp_path: Path) -> None:
    class Pixels(nn.Module):
        def forward(self, picture: Tensor) -> Tensor:
            return picture.float() / 255

    net = captured(Pixels(), torch.ones(2, 4, dtype=torch.uint8))
    error = refused("VLX0503", lambda: lowered(net, tmp_path, brief()))
    assert (error.where, "input picture is uint8" in error.message) == ("picture", True)
    assert "float32 or int32" in error.hint
    assert error.message in [each.message for each in CoreMLTarget().problems(net, brief())]
