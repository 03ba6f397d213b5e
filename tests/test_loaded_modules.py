"""What importing loads, and what it must not: frameworks and runtimes are imported where they are used."""

from __future__ import annotations

import ast
import graphlib
import importlib
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
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
    assert loaded(*QUIET) == {step: set() for step in QUIET}


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


# Every module is imported in a fork of a process that holds nothing but what the module needs anyway: of what it
# imports, the one that needs most was imported there last. So each runs as if it were the first, at little cost.
_EACH_ALONE = """
import importlib, json, os, sys, traceback
under = json.loads(sys.argv[1])
for name in sys.argv[2:]:
    importlib.import_module(name)

def descend(name):
    for each in under.get(name, ()):
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            continue
        try:
            importlib.import_module(each)
            os.write(1, f"{each}\\n".encode())
            descend(each)
        except BaseException:
            traceback.print_exc()
        os._exit(0)

descend("")
"""


OTHERS = (
    "torch.export.pt2_archive._package",
    "pydantic.main",
    "typer",
    "rich.console",
    "PIL.Image",
    "jinja2",
    "onnx_ir",
)
"""Other people's modules, which are imported once."""


def modules() -> dict[str, Path]:
    """Dotted name → file, of every module of the package."""
    files = {_dotted(file.relative_to(ROOT)): file for file in (ROOT / "vlexport").rglob("*.py")}
    for part in ("calibration", "passes", "targets"):
        files |= {_dotted("vlexport" / file.relative_to(ROOT)): file for file in (ROOT / part).rglob("*.py")}
    del files["vlexport.__main__"]  # which runs
    return files


def imported(body: list[ast.stmt]) -> Iterator[str]:
    """Dotted names that statements of a module import when it is imported; ``a.b.c`` for ``from a.b import c``."""
    for node in body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If):
            yield from imported(node.orelse if "TYPE_CHECKING" in ast.unparse(node.test) else node.body + node.orelse)
        elif isinstance(node, ast.Try):
            yield from imported(node.body + [s for h in node.handlers for s in h.body] + node.orelse + node.finalbody)
        elif isinstance(node, ast.With | ast.ClassDef):
            yield from imported(node.body)


def needs(files: dict[str, Path]) -> dict[str, set[str]]:
    """Module → those of ours that importing it imports first; a package too, unless that imports the module itself.

    Raises:
        graphlib.CycleError: Where modules import each other in a circle.
    """
    found: dict[str, set[str]] = {}
    for name, file in files.items():
        named = (_known(each, files) for each in imported(ast.parse(file.read_text(encoding="utf-8")).body))
        found[name] = {each for each in named if each and each != name}
    known = closures(found)
    for name in files:
        packages = {name.rsplit(".", count)[0] for count in range(1, name.count(".") + 1)}
        found[name] |= {each for each in packages if name not in known[each]}
    return found


def _known(name: str, files: dict[str, Path]) -> str:
    while name and name not in files:
        name = name.rpartition(".")[0]
    return name


def closures(direct: dict[str, set[str]]) -> dict[str, set[str]]:
    """Module → all that importing it imports."""
    found: dict[str, set[str]] = {}
    for name in graphlib.TopologicalSorter(direct).static_order():
        found[name] = direct[name].union(*(found[each] for each in direct[name]))
    return found


def alone(direct: dict[str, set[str]], others: Sequence[str] = (), **environment: str) -> tuple[set[str], str]:
    """Which modules could be imported as the first, and what the others said."""
    whole = closures(direct)
    under: dict[str, list[str]] = {}
    for name in sorted(direct):
        last = max(direct[name], key=lambda each: (len(whole[each]), each), default="")
        under.setdefault(last, []).append(name)
    done = subprocess.run(
        [sys.executable, "-c", _EACH_ALONE, json.dumps(under), *others], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split()), done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_every_module_imports_alone_when_it_is_the_first() -> None:
    files = modules()
    assert {"vlexport.passes.gate", "vlexport.targets.onnx.lower", "vlexport.core.isolate"} <= set(files)
    found, said = alone(needs(files), OTHERS)
    assert set(files) - found == set(), said


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_module_that_uses_what_only_another_imports_is_seen(tmp_path: Path) -> None:
    texts = {
        "house/__init__.py": "", "house/tool.py": "", "house/first.py": "import house.tool\n",
        "house/second.py": "import house\nhouse.tool\n", "house/third.py": "import house.first\nhouse.tool\n",
    }  # fmt: skip
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    files = {_dotted(Path(name)): tmp_path / name for name in texts}
    found, said = alone(needs(files), PYTHONPATH=str(tmp_path))
    assert set(files) - found == {"house.second"}
    assert "has no attribute 'tool'" in said


def test_circle_of_imports_is_seen(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("from b import x\n", encoding="utf-8")
    (tmp_path / "b.py").write_text("if True:\n    import a\n", encoding="utf-8")
    with pytest.raises(graphlib.CycleError, match=r"'a', 'b', 'a'|'b', 'a', 'b'"):
        needs({"a": tmp_path / "a.py", "b": tmp_path / "b.py"})


def _dotted(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")
