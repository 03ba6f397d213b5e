"""The coreml target holds what every target owes its users, but for what needs a Mac to run."""

from __future__ import annotations

from typing import Any, ClassVar

from tests.target_conformance import Case, LoweringConformance, refused
from vlexport.targets.base import Target
from vlexport.targets.coreml.mil import read_package


class TestCoreML(LoweringConformance):
    """Its batch is a range: a Core ML dim has a largest size."""

    target_name = "coreml"
    options: ClassVar[dict[str, Any]] = {"shapes": "batch=1-8"}

    def test_features_are_the_specs_when_the_package_is_loaded(self, several: Case) -> None:
        found = read_package(several.folder / several.artifact.path)
        assert [(f.name, f.dtype, f.sizes, f.ranged) for f in found.inputs] == [
            ("image", "FLOAT32", ((1, 8), (4, 4)), True),
            ("ids", "INT32", ((1, 8),), True),
        ]
        assert [(f.name, f.dtype) for f in found.outputs] == [
            ("scores", "FLOAT32"), ("count", "INT32"), ("large", "INT32"), ("image_out", "FLOAT32"),
            ("nested_mean", "FLOAT32"),
        ]  # fmt: skip
        assert found.metadata["vlexport.output.nested.mean"] == "nested_mean"
        assert found.metadata["vlexport.output.image"] == "image_out"

    def test_session_is_refused_in_words_when_asked_for(self, target: Target, one: Case) -> None:
        probe = target.probe()
        assert (probe.available, probe.timing) == (False, "none")
        assert probe.version
        assert target.missing_tools(self.brief(target)) == ""
        for opener in (target.open, target.open_here):
            error = refused("VLX0501", lambda opener=opener: opener(one.folder, one.artifact))
            assert "cannot run here: Core ML runs on Apple systems" in error.message
            assert error.exit_code == 4
