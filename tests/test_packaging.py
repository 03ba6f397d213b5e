"""What is installed is the package and nothing else, on machines with and without symbolic links."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("calibration", "passes", "targets")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
NOT_CONSTRAINED = {"pip", "setuptools", "wheel", "vlexport"}
"""The installer's own tools, whose versions come with the interpreter, and ourselves."""

_BUILD = """
import sys, setuptools.build_meta as backend
out = sys.argv[1]  # setuptools rewrites sys.argv
backend.build_sdist(out)
backend.build_wheel(out)
"""


def real_folders() -> dict[str, Path]:
    """Package name → the folder on disk, symbolic links left out."""
    folders = {"vlexport": ROOT / "vlexport", **{f"vlexport.{name}": ROOT / name for name in LINKED}}
    found = {}
    for name, folder in folders.items():
        for init in sorted(folder.rglob("__init__.py")):
            inner = init.parent.relative_to(folder).parts
            if not (name == "vlexport" and inner[:1] and inner[0] in LINKED):
                found[".".join((name, *inner))] = init.parent
    return found


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist of a copy of this tree."""
    copy, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.pt", "*.pt2")
    for path in ROOT.iterdir():
        if path.is_dir() and path.name in ("vlexport", "docs", "samples", "tests", *LINKED):
            shutil.copytree(path, copy / path.name, symlinks=True, ignore=ignore)
        elif path.is_file() and not path.name.startswith("."):
            shutil.copy2(path, copy / path.name)
    done = subprocess.run([sys.executable, "-c", _BUILD, str(out)], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def wheel(built: Path) -> dict[str, bytes]:
    """Path in the wheel → content."""
    with zipfile.ZipFile(next(built.glob("*.whl"))) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_wheel_holds_only_the_package_when_built(wheel: dict[str, bytes]) -> None:
    strangers = [n for n in wheel if not re.match(r"vlexport/|vlexport-[\w.]+\.dist-info/", n)]
    assert strangers == []
    data = {n for n in wheel if n.startswith("vlexport/") and not n.endswith(".py")}
    assert data == {
        "vlexport/py.typed", "vlexport/report/report.css", "vlexport/report/report.html.j2",
        "vlexport/core/device_profiles.json", "vlexport/core/explanations.json",
        "vlexport/targets/coreml/op_support.json", "vlexport/targets/tensorrt/op_support.json",
        *(f"vlexport/targets/{name}/schemes.json" for name in ("coreml", "onnxruntime", "tensorrt")),
        "vlexport/targets/onnxruntime/fusion_costs.json",
    }  # fmt: skip
    assert any(n.endswith(".dist-info/licenses/LICENSE") for n in wheel)


def test_wheel_holds_every_module_when_it_is_on_disk(wheel: dict[str, bytes]) -> None:
    on_disk = {
        f"{package.replace('.', '/')}/{file.name}"
        for package, path in real_folders().items()
        for file in path.glob("*.py")
    }
    assert {name for name in wheel if name.endswith(".py")} == on_disk
    assert {"vlexport/passes/__init__.py", "vlexport/targets/onnxruntime/session.py"} <= on_disk


def test_wheel_names_no_machine_when_built(wheel: dict[str, bytes], built: Path) -> None:
    for name, content in wheel.items():
        for place in (str(ROOT), str(built), str(Path.home()) + "/"):
            assert place.encode() not in content, f"{name} holds {place}"


def test_sdist_holds_each_file_once_when_the_tree_has_links(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        members = archive.getmembers()
    names = [m.name.partition("/")[2] for m in members if m.isfile()]
    assert not [m.name for m in members if m.issym() or m.islnk()]
    assert not [n for n in names if n.startswith(tuple(f"vlexport/{each}/" for each in LINKED))]
    assert {"LICENSE", "README.md", "constraints.txt", "Makefile", "MANIFEST.in"} <= set(names)
    assert {"passes/__init__.py", "targets/onnxruntime/session.py", "calibration/__init__.py"} <= set(names)
    assert {"tests/test_packaging.py", "samples/solar_cells/head.npz", "vlexport/report/report.html.j2"} <= set(names)
    assert len(names) == len(set(names))


def test_unpacked_wheel_imports_when_there_are_no_links(built: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as archive:
        archive.extractall(tmp_path)
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); "
        "import vlexport.passes, vlexport.calibration, vlexport.targets.onnxruntime as last; "
        "print(vlexport.passes.__file__); print(last.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", script, str(tmp_path)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert all(line.startswith(str(tmp_path)) for line in done.stdout.split()), done.stdout


def test_packages_equal_the_folders_when_listed_in_pyproject() -> None:
    tool = PROJECT["tool"]["setuptools"]
    assert sorted(tool["packages"]) == sorted(real_folders())
    assert tool["package-dir"] == {"vlexport": "vlexport", **{f"vlexport.{name}": name for name in LINKED}}


def test_links_lead_to_the_real_folders_when_checked_out() -> None:
    for name in LINKED:
        link = ROOT / "vlexport" / name
        assert link.is_symlink()
        assert link.readlink() == Path("..", name)


def test_bare_import_is_refused_in_words_when_at_the_root() -> None:
    script = (
        "import importlib\n"
        "for name in ('passes', 'targets', 'calibration', 'targets.onnxruntime'):\n"
        "    try: importlib.import_module(name)\n"
        "    except ImportError as error: print(name, '|', error)\n"
        "    else: print(name, '| imported')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    said = dict(line.split(" | ") for line in done.stdout.splitlines())
    assert said.keys() == {"passes", "targets", "calibration", "targets.onnxruntime"}
    for name, sentence in said.items():
        assert sentence.startswith(f"import vlexport.{name.partition('.')[0]}, not "), (name, sentence)


def requirements(texts: list[str]) -> dict[str, Requirement]:
    return {canonicalize_name(r.name): r for r in map(Requirement, texts)}


def test_extras_are_the_documented_ones_when_read() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    assert set(extras) == {"build", "onnxruntime", "tensorrt", "coreml", "report", "samples", "dev", "all"}
    everything = requirements(extras["all"])["vlexport"]
    assert everything.extras == set(extras) - {"all"}
    assert {"torch", "onnx", "onnxscript"} <= set(requirements(extras["build"]))
    assert {"pytest", "ruff", "mypy", "setuptools"} <= set(requirements(extras["dev"]))


def test_runtime_half_needs_no_torch_and_only_lower_bounds_when_installed() -> None:
    found = requirements(PROJECT["project"]["dependencies"])
    assert not {"torch", "onnx", "onnxscript", "timm", "transformers"} & set(found)
    for name, requirement in found.items():
        assert {each.operator for each in requirement.specifier} == {">="}, f"{name}: {requirement.specifier}"


_DISTRIBUTION = {"PIL": "pillow", "tomli_w": "tomli-w", "onnx_ir": "onnx-ir"}
_BROUGHT = {"markupsafe": "jinja2", "pydantic_core": "pydantic", "sympy": "torch"}
"""Modules that come with another requirement, which depends on them for good."""


def outside_imports(file: Path) -> set[str]:
    """Top-level names of other people's modules that importing this file imports."""
    found: set[str] = set()
    pending: list[ast.AST] = [ast.parse(file.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            pending += ast.iter_child_nodes(node)
    return found - set(sys.stdlib_module_names) - {"vlexport"}


def test_every_import_is_declared_when_it_is_of_another_package() -> None:
    project = PROJECT["project"]
    device = set(requirements(project["dependencies"]))
    build = device | set(requirements(project["optional-dependencies"]["build"]))
    undeclared = []
    for package, folder in real_folders().items():
        part = package.split(".")[1] if "." in package else ""
        for file in sorted(folder.glob("*.py")):
            builds = part in ("ir", "frontends", "passes")
            builds = builds or package in ("vlexport.targets.onnx", "vlexport.targets.coreml")
            builds = builds or (part == "calibration" and file.stem in ("calibrate", "collect", "keys"))
            stages = (
                "account", "build", "choices", "component", "layer_figures", "layer_search", "lowering_cache",
                "quantized", "smoothed", "tokens",
            )  # fmt: skip
            builds = builds or (part == "stages" and file.stem in stages)
            lowers = file.stem in ("emit_quant", "lower", "op_limits", "op_support", "quantize_softmax")
            builds = builds or (package == "vlexport.targets.tensorrt" and lowers)
            fused = (
                "attention_operator", "emit_quant", "gather_rows", "integer_linear", "norm_biases", "part_norms",
                "projections", "score_bias", "small_weights",
            )  # fmt: skip
            spells = file.stem.startswith("fuse_") or file.stem in fused
            builds = builds or (package == "vlexport.targets.onnxruntime" and spells)
            declared = build if builds else device
            shared = package == "vlexport.targets.onnx" and file.stem == "session"  # runs on a device
            if (package == "vlexport.targets.onnxruntime" and not builds) or shared:
                declared = device | {"onnxruntime"}
            for name in outside_imports(file):
                wanted = canonicalize_name(_DISTRIBUTION.get(name, _BROUGHT.get(name, name)))
                undeclared += [] if wanted in declared else [f"{file.relative_to(ROOT)} imports {name}"]
    assert undeclared == []


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    wrong = [line for line in pins if not re.fullmatch(r"[A-Za-z0-9][\w.-]*==[0-9][0-9a-z.]*", line)]
    assert wrong == [], "exact versions only: no hash (it makes `pip install -e .` refuse), no local version"
    return {str(canonicalize_name(line.partition("==")[0])): line.partition("==")[2] for line in pins}


def test_constraints_cover_what_is_installed_when_pinned() -> None:
    pinned = constraints()
    problems = []
    for each in importlib.metadata.distributions():
        name = canonicalize_name(each.metadata["Name"])
        if name not in NOT_CONSTRAINED and pinned.get(name) != each.version.partition("+")[0]:
            problems.append(f"{name} {each.version} is installed, constraints.txt has {pinned.get(name)}")
    assert problems == []


def test_constraints_satisfy_every_requirement_when_declared() -> None:
    pinned = constraints()
    project = PROJECT["project"]
    texts = [*project["dependencies"], *(t for extra in project["optional-dependencies"].values() for t in extra)]
    for text in texts:
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        if name in NOT_CONSTRAINED or (requirement.marker is not None and not requirement.marker.evaluate()):
            continue
        assert name in pinned, f"{name} is not pinned"
        assert requirement.specifier.contains(pinned[name]), f"{text} excludes the pinned {pinned[name]}"
