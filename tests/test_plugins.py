"""Plugins that are right, clash, are of another version, or are broken: made up as folders of installed metadata."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.harness import captured
from vlexport.cli.main import main
from vlexport.core.config import BuildConfig, read_recipe
from vlexport.core.errors import VlexportError
from vlexport.passes import CATALOGUE as PASSES
from vlexport.passes import offered_passes, pass_class
from vlexport.passes.pipeline import run_pipeline
from vlexport.stages.choices import options_of, passes_of
from vlexport.targets import open_target

ROOT = Path(__file__).resolve().parents[1]

PASS = """
from typing import ClassVar
from vlexport.core.artifact import Frozen
from vlexport.passes.base import Pass

{version}

class Options(Frozen):
    strength: int = 3

class Found(Pass):
    '''Does nothing.'''
    name = "{name}"
    stage = "{stage}"
    Options = Options
    {more}
    def find(self, ir):
        return iter(())
    def apply(self, ir, match):
        raise NotImplementedError
"""
Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Puts a package with one entry point on the path, as installed."""
    monkeypatch.syspath_prepend(str(tmp_path))
    modules: list[str] = []

    def made(name: str, content: str, *, package: str = "a", group: str = "passes", kind: str = "Found") -> None:
        module = f"made_up_{package.replace('-', '_')}"
        modules.append(module)
        (tmp_path / f"{module}.py").write_text(content, encoding="utf-8")
        about = tmp_path / f"{package.replace('-', '_')}-2.1.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 2.1\n")
        (about / "entry_points.txt").write_text(f"[vlexport.{group}]\n{name} = {module}:{kind}\n")

    yield made
    for module in modules:
        sys.modules.pop(module, None)


def a_pass(name: str = "fold-x", stage: str = "normalize", version: str = "API_VERSION = 1", more: str = "") -> str:
    return PASS.format(name=name, stage=stage, version=version, more=more)


def refused(code: str, exit_code: int, call: Callable[[], object]) -> VlexportError:
    with pytest.raises(VlexportError) as caught:
        call()
    assert (caught.value.code, caught.value.exit_code) == (code, exit_code)
    assert caught.value.hint
    return caught.value


def config(*passes: str, **options: str) -> BuildConfig:
    return BuildConfig(model="model.pt", passes=passes, options={k.replace("__", "."): v for k, v in options.items()})


# -- where a plugin's pass runs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["normalize", "raise", "legalize"])
def test_pass_runs_at_the_end_of_its_stage_when_asked_for(stage: str, install: Install) -> None:
    install("fold-x", a_pass(stage=stage))
    names = [each.name for each in passes_of(config("fold-x", "fold-x"))]
    ours = [pass_class(name) for name in PASSES]
    before = [kind.name for kind in ours if stage != "normalize" or kind.stage == "normalize"]
    stages = [kind.stage for kind in ours]
    assert names.count("fold-x") == 1
    assert [name for name in names if name != "fold-x"] == list(PASSES)
    if stage == "normalize":
        assert names.index("fold-x") == len(before)
    elif stages[-1] == "normalize" or stage == "legalize":
        assert names[-1] == "fold-x"


def test_pass_does_not_run_and_is_not_imported_when_not_asked_for(install: Install) -> None:
    install("fold-x", "raise SystemExit('this package must not be imported')")
    assert [each.name for each in passes_of(config())] == list(PASSES)
    assert pass_class("reparameterize").name == "reparameterize"
    assert "fold-x" in offered_passes()
    assert "made_up_a" not in sys.modules


def test_catalogue_pass_runs_once_when_asked_for_by_name() -> None:
    assert [each.name for each in passes_of(config("reparameterize"))] == list(PASSES)


def test_options_reach_the_pass_when_it_runs(install: Install) -> None:
    install("fold-x", a_pass())
    found = next(each for each in passes_of(config("fold-x", **{"fold-x__strength": "7"})) if each.name == "fold-x")
    assert found.options.strength == 7  # type: ignore[attr-defined]
    error = refused("VLX0703", 2, lambda: passes_of(config("fold-x", **{"fold-x__strenth": "7"})))
    assert "did you mean 'strength'" in error.message


def test_options_of_a_pass_are_refused_when_it_is_not_asked_for(install: Install) -> None:
    install("fold-x", a_pass())
    error = refused("VLX0703", 2, lambda: options_of(config(**{"fold-x__strength": "7"}), open_target("onnxruntime")))
    assert error.hint == "add --pass fold-x"


def test_unknown_pass_is_refused_with_the_nearest_name(install: Install) -> None:
    install("fold-x", a_pass())
    assert "did you mean 'fold-x'" in refused("VLX0703", 2, lambda: passes_of(config("fold-xx"))).message


def test_passes_are_recorded_when_the_recipe_is_resolved(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(config("fold-x").recipe(), encoding="utf-8")
    assert read_recipe(tmp_path / "recipe.toml")["passes"] == ["fold-x"]


@pytest.mark.parametrize("fact", ["no-such-fact", "no-dead-calls-at-all"])
def test_requirement_is_refused_in_words_when_nothing_establishes_it(fact: str, install: Install) -> None:
    install("fold-x", a_pass(more=f"requires = frozenset({{'{fact}'}})"))
    error = refused("VLX0405", 2, lambda: passes_of(config("fold-x")))
    assert fact in error.message
    assert error.where == "--pass"


# -- plugins that cannot be used ---------------------------------------------------------------------------------------


def test_both_packages_are_named_when_they_offer_one_id(install: Install) -> None:
    install("fold-x", a_pass(), package="first")
    install("fold-x", a_pass(), package="second-one")
    error = refused("VLX1001", 4, lambda: passes_of(config("fold-x")))
    assert "first 2.1 and second-one 2.1" in error.message
    assert "made_up_first" not in sys.modules
    assert [each.name for each in passes_of(config())] == list(PASSES)


@pytest.mark.parametrize(("group", "name"), [("passes", "reparameterize"), ("targets", "onnxruntime")])
def test_package_is_named_when_it_offers_an_id_of_ours(group: str, name: str, install: Install) -> None:
    install(name, a_pass(name), group=group, package="thief")
    call = (lambda: passes_of(config())) if group == "passes" else (lambda: open_target(name))
    assert f"'{name}' is offered by vlexport and thief 2.1" in refused("VLX1001", 4, call).message


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("API_VERSION = 2", "version 2 of vlexport's interface, this vlexport has version 1"),
        ("API_VERSION = 0", "was written for version 0"),
        ("API_VERSION = '1'", "was written for version 1"),
        ("", "does not say which version"),
    ],
)
def test_plugin_is_refused_in_words_when_of_another_version(version: str, said: str, install: Install) -> None:
    install("fold-x", a_pass(version=version), package="old-one")
    error = refused("VLX1002", 4, lambda: pass_class("fold-x"))
    assert said in error.message
    assert "old-one 2.1" in error.message


def test_version_counts_when_the_class_declares_it(install: Install) -> None:
    install("fold-x", a_pass(version="", more="API_VERSION = 1"))
    assert pass_class("fold-x").name == "fold-x"


TARGET = "from vlexport.targets.base import Target\nAPI_VERSION = 1\nclass Found(Target):\n    id = 'x'\n"


@pytest.mark.parametrize(
    ("group", "content", "said"),
    [
        ("passes", "import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("passes", "raise SystemExit(3)", "SystemExit: 3"),
        ("passes", "this is no Python", "SyntaxError"),
        ("passes", "API_VERSION = 1", "AttributeError"),
        ("passes", "API_VERSION = 1\nclass Found: pass", "no class derived from vlexport.passes.base.Pass"),
        ("passes", a_pass(name="fold-y"), "calls itself 'fold-y'"),
        ("passes", a_pass(stage="rase"), "no stage 'rase'; did you mean 'raise'?"),
        ("passes", a_pass().replace("def apply", "def other"), "does not say how to apply"),
        ("passes", a_pass().replace("stage =", "stag ="), "does not set stage"),
        ("targets", TARGET, "does not say how to lower, lower_naive, probe"),
        ("targets", a_pass(), "no class derived from vlexport.targets.base.Target"),
    ],
)
def test_plugin_is_refused_with_its_package_and_reason_when_it_is_broken(
    group: str, content: str, said: str, install: Install
) -> None:
    install("fold-x", content, group=group, package="bad-one")
    error = refused("VLX1003", 4, lambda: pass_class("fold-x") if group == "passes" else open_target("fold-x"))
    assert "'fold-x' of bad-one 2.1 cannot be used" in error.message
    assert said in error.message


@pytest.mark.parametrize("group", ["passes", "targets"])
def test_listing_shows_a_plugin_as_broken_when_it_is(
    group: str, install: Install, capfd: pytest.CaptureFixture[str]
) -> None:
    install("fold-x", "raise ValueError('no licence\\nfound')", group=group, package="bad-one")
    assert main([group]) == 0
    out = capfd.readouterr().out
    assert "fold-x: broken: 'fold-x' of bad-one 2.1 cannot be used: importing made_up_bad_one:Found fails" in out
    assert "ValueError: no licence" in out
    assert ("canonicalize" if group == "passes" else "onnxruntime") in out
    assert main([group, "fold-x"]) == 4


# -- passes that break the contract ------------------------------------------------------------------------------------

FOUND = "    def find(self, ir):\n        return iter(())"
CLAIMS = """
    def run(self, ir, *, limit=None):
        return [Change(what='nothing at all')], []"""
BREAKING = [
    (FOUND.replace("return iter(())", "raise KeyError('missing piece\\nsecond line')"), "KeyError: 'missing piece"),
    (f"{FOUND}{CLAIMS}", "reports 1 changes, but its program is not different"),
    (FOUND.replace("return iter(())", "ir.graph.erase_node(ir.output); return iter(())"), "cannot be used"),
]


def broken(body: str) -> str:
    return a_pass().replace(FOUND, body).replace("import Pass", "import Change, Pass")


@pytest.mark.parametrize(("body", "said"), BREAKING, ids=["raises", "claims a change", "ruins the graph"])
def test_package_is_named_when_its_pass_breaks_the_contract(body: str, said: str, install: Install) -> None:
    install("fold-x", broken(body), package="bad-one")
    source = captured(nn.ReLU(), torch.zeros(2, 3))
    error = refused("VLX1003", 4, lambda: run_pipeline(source, passes_of(config("fold-x")), gate=None))
    assert "'fold-x' of bad-one 2.1 cannot be used: " in error.message
    assert said in error.message
    assert "bad-one" in error.hint


def test_error_stays_what_it_is_when_a_pass_of_ours_raises(monkeypatch: pytest.MonkeyPatch, install: Install) -> None:
    """A broken plugin that does not run is not to blame."""
    install("fold-x", broken(BREAKING[0][0]), package="bad-one")
    kind = pass_class("canonicalize")

    def fail(*_: object) -> None:
        raise KeyError("ours")

    monkeypatch.setattr(kind, "find", fail)
    with pytest.raises(KeyError, match="ours"):
        run_pipeline(captured(nn.ReLU(), torch.zeros(2, 3)), [kind()], gate=None)


def test_error_for_the_user_passes_through_when_a_plugins_pass_raises_it(install: Install) -> None:
    body = FOUND.replace("return iter(())", "raise CapabilityError('VLX0408', 'no', hint='leave it out')")
    content = broken(body).replace("from typing", "from vlexport.core.errors import CapabilityError\nfrom typing")
    install("fold-x", content, package="bad-one")
    source = captured(nn.ReLU(), torch.zeros(2, 3))
    refused("VLX0408", 4, lambda: run_pipeline(source, passes_of(config("fold-x")), gate=None))


# -- one place ---------------------------------------------------------------------------------------------------------


def test_entry_points_are_read_in_one_place_when_the_source_is_searched() -> None:
    readers = set()
    for part in ("vlexport", "passes", "targets", "calibration"):
        for file in (ROOT / part).rglob("*.py"):
            path = file.relative_to(ROOT).as_posix()
            linked = path.startswith(("vlexport/passes/", "vlexport/targets/", "vlexport/calibration/"))
            names = {n.attr for n in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(n, ast.Attribute)}
            if not linked and "entry_points" in names:
                readers.add(path)
    assert readers == {"vlexport/core/plugins.py"}
