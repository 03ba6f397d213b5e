"""What importing loads, and what it must not: frameworks and runtimes are imported where they are used."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import vlexport

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "torchvision", "onnx", "onnxscript", "onnxruntime", "tensorrt", "tensorrt_rtx", "coremltools", "timm")


QUIET = (
    "import vlexport",
    "from vlexport import BuildConfig, VlexportError",
    "from vlexport import ProfileConfig, ValidateConfig, load, profile, validate, verify",
    "from vlexport.cli.main import main",
    *(f"assert main({arguments!r}) == 0" for arguments in (
        ["--help"], ["--version"], ["build", "--help"], ["verify", "--help"],
    )),
    "assert main(['build', 'x', '--nope']) == 2",
)  # fmt: skip
"""What may be asked of vlexport on a machine where nothing heavy is installed."""


def loaded(*steps: str) -> dict[str, set[str]]:
    """Each step → top-level names of the heavy modules that are loaded behind it; all in one new interpreter."""
    seen = f"found.append(sorted(set({HEAVY!r}) & set(sys.modules)))"
    lines = ["import json, sys", "found = []", *(line for step in steps for line in (step, seen))]
    script = "\n".join([*lines, "print(json.dumps(found), file=sys.stderr)"])
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stderr.splitlines()[-1])
    return {step: set(names) for step, names in zip(steps, found, strict=True)}


def test_nothing_heavy_is_loaded_when_imported_asked_for_help_or_used_wrongly() -> None:
    assert loaded(*QUIET) == dict.fromkeys(QUIET, set())


def test_heavy_modules_are_seen_when_they_are_loaded() -> None:
    assert loaded("import json", "import onnxruntime") == {"import json": set(), "import onnxruntime": {"onnxruntime"}}


def test_public_functions_stay_functions_when_their_modules_are_imported() -> None:
    for name in ("build", "load", "profile", "save", "validate", "verify"):
        for _ in range(2):
            importlib.import_module("vlexport.stages.build")
            importlib.import_module("vlexport.cli.build")
            space: dict[str, object] = {}
            exec(f"from vlexport import {name} as found", space)
            assert inspect.isfunction(space["found"]), name


def test_every_public_name_resolves_when_asked_for() -> None:
    assert set(vlexport.__all__) == set(dir(vlexport))
    assert {"build", "save", "validate", "profile", "load"} <= set(vlexport.__all__)
    for name in vlexport.__all__:
        assert getattr(vlexport, name) is not None


def test_unknown_name_is_refused_when_asked_for() -> None:
    with pytest.raises(AttributeError) as caught:
        vlexport.bild  # noqa: B018
    assert "bild" in str(caught.value)


def test_no_module_shadows_a_public_name_when_it_lies_in_the_package() -> None:
    modules = {path.stem for path in (ROOT / "vlexport").iterdir()}
    assert modules & set(vlexport.__all__) == set()


# Other people's modules are imported once. A package comes before what lies in it, whoever asks first: it is imported
# in a child of its own, and each of its modules in a child of that.
_EACH_ALONE = """
import importlib, itertools, json, os, sys, traceback
others = "torch.export.pt2_archive._package pydantic.main typer rich.console PIL.Image jinja2 onnx_ir"
for name in others.split():
    importlib.import_module(name)

def alone(work):
    child = os.fork()
    if child == 0:
        try:
            os._exit(1 if work() else 0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitpid(child, 0)[1] != 0

def package(name, modules):
    importlib.import_module(name)
    left = [each for each in modules if each not in sys.modules]  # the others came with their package
    failed = [each for each in left if alone(lambda: importlib.import_module(each) is None)]
    for each in failed:
        print(each, "fails", file=sys.stderr)
    return failed

found = itertools.groupby(json.loads(sys.argv[1]), key=lambda name: name.rpartition(".")[0])
print(json.dumps([name for name, modules in found if alone(lambda: package(name, list(modules)))]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_every_module_imports_alone_when_it_is_the_first() -> None:
    files = [*(ROOT / "vlexport").rglob("*.py")]
    names = {_dotted(file.relative_to(ROOT)) for file in files if "vlexport" in file.parts}
    for part in ("calibration", "passes", "targets"):
        names |= {_dotted("vlexport" / file.relative_to(ROOT)) for file in (ROOT / part).rglob("*.py")}
    names -= {"vlexport", "vlexport.__main__"}
    assert {"vlexport.passes.gate", "vlexport.targets.onnx.lower", "vlexport.core.isolate"} <= names
    ordered = sorted(names, key=lambda name: (name.rpartition(".")[0], name))
    done = subprocess.run(
        [sys.executable, "-c", _EACH_ALONE, json.dumps(ordered)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [], done.stderr


def _dotted(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")
