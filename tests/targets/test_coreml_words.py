"""Names, sizes and options of the coreml target: what is typed, and what it means. Nothing is converted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from vlexport.core.artifact import DimRange
from vlexport.core.device_profiles import device_profiles
from vlexport.core.errors import UsageError
from vlexport.targets.base import Brief
from vlexport.targets.coreml import CoreMLOptions, CoreMLTarget, deployment_target
from vlexport.targets.coreml.names import feature_names, is_swift_identifier, swift_identifier
from vlexport.targets.coreml.shapes import Sizes, enumerated_shapes, parse_shapes, sizes_of_dims

# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("SolarCells", "SolarCells"),
        ("solar-cells 2", "solar_cells_2"),
        ("2x", "_2x"),
        ("", "_"),
        ("class", "class_"),
        ("nested.mean", "nested_mean"),
        ("../../etc", "_etc"),
        ("größe", "gr_e"),
    ],
)
def test_name_becomes_an_identifier_when_it_is_none(name: str, wanted: str) -> None:
    assert swift_identifier(name) == wanted
    assert is_swift_identifier(wanted)
    assert is_swift_identifier(name) == (name == wanted)


def test_names_are_used_once_when_inputs_and_outputs_share_them() -> None:
    assert feature_names(["image", "in"], ["image", "a.b", "a_b", "in"]) == (
        ["image", "in_"],
        ["image_out", "a_b", "a_b_out", "in__out"],
    )
    assert feature_names(["classLabel"], ["y"], taken=["classLabel"])[0] == ["classLabel_2"]


# -- sizes -------------------------------------------------------------------------------------------------------------


def test_sizes_are_read_when_written() -> None:
    assert parse_shapes("batch=1, height=224:320:224,width=160-640") == {
        "batch": Sizes(listed=(1,), default=1),
        "height": Sizes(listed=(224, 320), default=224),
        "width": Sizes(low=160, high=640, default=160),
    }
    assert parse_shapes("") == {}
    assert parse_shapes("batch=2-2")["batch"].fixed


@pytest.mark.parametrize(
    ("text", "said"),
    [("batch", "write batch=1"), ("batch=x", "write batch=1"), ("b=1,b=2", "twice"), ("b=0", "1 or more"),
     ("b=9-2", "9 is above 2"), (f"b={':'.join(map(str, range(1, 130)))}", "at most 128")],
)  # fmt: skip
def test_sizes_are_refused_in_words_when_not_understood(text: str, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        CoreMLOptions(shapes=text)


def refused_sizes(dims: dict[str, DimRange], text: str) -> UsageError:
    with pytest.raises(UsageError) as caught:
        sizes_of_dims(dims, parse_shapes(text), {})
    assert caught.value.code == "VLX0703"
    return caught.value


def test_dim_is_what_the_program_allows_when_nothing_is_asked() -> None:
    dims = {"batch": DimRange(min=1, max=4, opt=2), "height": DimRange(), "one": DimRange(min=3, max=3, opt=3)}
    found = sizes_of_dims(dims, {}, {"height": 224})
    assert found["batch"] == Sizes(low=1, high=4, default=2)
    assert found["height"].listed == (224,)
    assert found["one"].fixed
    assert sizes_of_dims(dims, parse_shapes("height=64"), {"height": 224})["height"].default == 64


def test_dim_is_refused_when_it_does_not_fit_the_program() -> None:
    assert "coreml.shapes=batch=1" in refused_sizes({"batch": DimRange()}, "").hint
    assert "did you mean 'batch'" in refused_sizes({"batch": DimRange()}, "bach=1").message
    bounded = {"batch": DimRange(min=2, max=4)}
    assert "from 2 to 4, not 1" in refused_sizes(bounded, "batch=1").message
    assert "not 2-5" in refused_sizes(bounded, "batch=2-5").message
    assert "not 2:8" in refused_sizes(bounded, "batch=2:8").message


def test_lists_go_side_by_side_when_an_input_has_two() -> None:
    sizes = parse_shapes("n=1,h=2:3,w=4:5")
    assert enumerated_shapes(("n", 3, "h", "w"), sizes) == [(1, 3, 2, 4), (1, 3, 3, 5)]
    for text, said in (("h=2:3,w=4:5:6", "equally long"), ("h=2:3,w=4-6", "range beside a list")):
        with pytest.raises(UsageError, match=said):
            enumerated_shapes(("h", "w"), parse_shapes(text))


# -- options -----------------------------------------------------------------------------------------------------------


def test_deployment_target_is_that_of_the_profile_when_not_asked_for() -> None:
    profiles = device_profiles()
    for name, wanted in (("this", "iOS17"), ("ios17", "iOS17"), ("ios18", "iOS18")):
        assert deployment_target(Brief(CoreMLOptions(), device=profiles[name])) == wanted
    asked = Brief(CoreMLOptions(deployment_target="iOS16", compute_units="cpu-and-ne"), device=profiles["ios18"])
    assert CoreMLTarget().compatibility(asked) == {
        "deployment-target": "iOS16", "specification-version": "7", "compute-units": "cpu-and-ne",
    }  # fmt: skip


def test_precision_is_fp16_when_none_is_asked_for() -> None:
    assert CoreMLTarget().choose_precision(None) == ("fp16", "the Neural Engine computes in fp16 only")
    assert CoreMLTarget().fixed_batch


def test_name_is_refused_with_a_better_one_when_no_identifier() -> None:
    with pytest.raises(ValidationError, match="write for example my_model"):
        CoreMLOptions(name="my-model")


def test_tools_are_said_to_be_missing_when_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "coremltools" else object())
    missing = CoreMLTarget().missing_tools(Brief(CoreMLOptions()))
    assert missing == "coremltools not installed: pip install 'vlexport[build,coreml]'"
    probe = CoreMLTarget().probe()
    assert (probe.available, probe.version) == (False, "")


def test_nothing_is_imported_when_the_target_is_asked(tmp_path: Path) -> None:
    script = (
        "import sys, json; from vlexport.targets import open_target; from vlexport.targets.base import Brief; "
        "t = open_target('coreml'); t.probe(); t.missing_tools(Brief(t.Options())); t.tools(); "
        "import vlexport.targets.coreml.session; print(json.dumps(sorted({'torch', 'coremltools'} & set(sys.modules))))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
    assert done.stderr == ""
