"""Who may import whom: core ← ir ← frontends, calibration ← passes ← targets; core ← report; all ← stages ← cli.

Imports under ``TYPE_CHECKING``, inside functions, and module names in strings (``"vlexport.passes.gate:NumericGate"``)
count as well.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_LOWER = frozenset({"core", "ir"})
_ALL_BELOW_STAGES = _LOWER | {"frontends", "calibration", "passes", "targets", "report"}
MAY_IMPORT: dict[str, frozenset[str]] = {
    "core": frozenset({"core"}),
    "ir": _LOWER,
    "frontends": _LOWER | {"frontends"},
    "calibration": _LOWER | {"calibration"},
    "passes": _LOWER | {"frontends", "calibration", "passes"},
    "targets": _LOWER | {"frontends", "calibration", "passes", "targets"},
    "report": frozenset({"core", "report"}),
    "stages": _ALL_BELOW_STAGES | {"stages"},
    "cli": _ALL_BELOW_STAGES | {"stages", "cli"},
}
SHARED_BY_TARGETS = {"base", "onnx"}
"""What every folder of ``targets`` may import beside itself."""

EXCEPTIONS: dict[tuple[str, str], str] = {}
"""(importing module, imported module) → why the law does not hold there."""

HEAVY = {"torch", "torchvision", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "timm", "coremltools", "tensorrt"}
_MODULE_TEXT = re.compile(r"vlexport(\.[a-z_]\w*)+(:\w+)?")


def modules() -> dict[str, Path]:
    """Dotted name → file, for every module of the package, each once."""
    found = {}
    for file in sorted((ROOT / "vlexport").rglob("*.py")):
        if not (ROOT / "vlexport" / file.relative_to(ROOT / "vlexport").parts[0]).is_symlink():
            found[_dotted(file.relative_to(ROOT))] = file
    for name in ("calibration", "passes", "targets"):
        for file in sorted((ROOT / name).rglob("*.py")):
            found[_dotted("vlexport" / file.relative_to(ROOT))] = file
    return found


def _dotted(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def imports(name: str, file: Path) -> Iterator[str]:
    """Dotted names that a module imports or names in a string; ``a.b.c`` for ``from a.b import c``."""
    docstrings = set()
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            docstrings.add(id(node.value))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively: write vlexport.…"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield from [node.value.partition(":")[0]] if _MODULE_TEXT.fullmatch(node.value) else []


def layer(name: str) -> str:
    """``core`` of ``vlexport.core.errors``; empty for the package itself and for what is no layer."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in MAY_IMPORT else ""


def violations(found: dict[str, Path]) -> dict[tuple[str, str], str]:
    wrong = {}
    for name, file in found.items():
        own = layer(name)
        if not own:
            continue
        for imported in imports(name, file):
            other = layer(imported)
            if other and other not in MAY_IMPORT[own]:
                wrong[name, imported] = (
                    f"{name} imports {imported}: {own} may import {', '.join(sorted(MAY_IMPORT[own]))}"
                )
    return wrong


def test_imports_point_down_when_any_module_is_read() -> None:
    wrong = violations(modules())
    assert [text for key, text in wrong.items() if key not in EXCEPTIONS] == []
    assert [key for key in EXCEPTIONS if key not in wrong] == [], "these exceptions are no longer needed"


def test_every_folder_has_a_place_in_the_law_when_it_is_a_package() -> None:
    places = {name.split(".")[1] for name, file in modules().items() if file.name == "__init__.py" and "." in name}
    assert places == set(MAY_IMPORT)


def test_violation_is_seen_when_it_hides_in_a_function_or_a_string(tmp_path: Path) -> None:
    hidden = tmp_path / "hidden.py"
    hidden.write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from vlexport.stages.build import build\n"
        "def f():\n    import vlexport.targets\n"
        "ENTRY = 'vlexport.passes.gate:NumericGate'\n",
        encoding="utf-8",
    )
    found = {imported for _, imported in violations({"vlexport.core.hidden": hidden})}
    assert found == {"vlexport.stages.build.build", "vlexport.targets", "vlexport.passes.gate"}


def test_targets_do_not_know_each_other_when_they_import() -> None:
    wrong = []
    for name, file in modules().items():
        if not name.startswith("vlexport.targets."):
            continue  # the catalogue in targets/__init__ names all of them
        own = name.split(".")[2]
        for imported in imports(name, file):
            parts = imported.split(".")
            if parts[:2] == ["vlexport", "targets"] and len(parts) > 2 and parts[2] not in {own, *SHARED_BY_TARGETS}:
                wrong.append(f"{name} imports {imported}")
    assert wrong == []


def test_core_imports_no_framework_when_read() -> None:
    wrong = [
        f"{name} imports {imported}"
        for name, file in modules().items()
        if layer(name) == "core"
        for imported in imports(name, file)
        if imported.partition(".")[0] in HEAVY
    ]
    assert wrong == []


def test_package_itself_imports_nothing_of_ours_when_it_is_imported() -> None:
    tree = ast.parse((ROOT / "vlexport" / "__init__.py").read_text(encoding="utf-8"))
    at_import = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {getattr(node, "module", None) or node.names[0].name for node in at_import}
    assert names <= {"__future__", "importlib", "os", "typing"}


def test_package_itself_is_imported_only_for_its_version_when_by_a_layer() -> None:
    uses = {}
    for name, file in modules().items():
        tree = ast.parse(file.read_text(encoding="utf-8"))
        plain = [n for n in ast.walk(tree) if isinstance(n, ast.Import) and any(a.name == "vlexport" for a in n.names)]
        if layer(name) and plain:
            attributes = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)]
            uses[name] = {n.attr for n in attributes if n.value.id == "vlexport"}  # type: ignore[attr-defined]
    assert {layer(name) for name in uses} <= {"report", "stages", "cli"}
    assert {name: used for name, used in uses.items() if not used <= {"__version__", *MAY_IMPORT}} == {}
