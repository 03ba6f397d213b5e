"""Every raise has a code, every code a page: docs/errors.md is made from the registry and from explanations.json.

``UPDATE_GOLDEN=1 python -m pytest tests/test_error_pages.py`` writes it anew.
"""

from __future__ import annotations

import ast
import inspect
import os
import re
from collections.abc import Iterator
from pathlib import Path

import vlexport.core.errors as errors
from vlexport.core.errors import CODES, VlexportError
from vlexport.core.explanations import explanations

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "errors.md"
TREE = {name: kind for name, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, VlexportError)}
FAMILIES = {
    "01": "Model files", "02": "Samples, labels and preprocessing", "03": "Capture",
    "04": "Passes and the numeric gate", "05": "Targets", "06": "Bundles", "07": "Command line and recipes",
    "08": "Judging and measuring", "09": "Bugs of vlexport", "10": "Plugins", "11": "Models of several components",
}  # fmt: skip
PASSED_ON = {
    "code": "a function whose caller names the code",
    "self._code": "a context manager whose maker names the code",
    "error.code": "an error from a child process, with the code it had there",
}
"""First argument of a raise that is no code as written → why."""
FACING_USERS = ("vlexport/cli", "vlexport/stages", "vlexport/frontends", "vlexport/report", "targets")
WITHOUT_CODE = {
    "vlexport/stages/inspect.py": "reads reports, and catches it itself",
    "vlexport/frontends/archive_rules.py": "rules of the guarded reader, which names the member and gives the code",
    "vlexport/frontends/safetensors_file.py": "its reader catches it, and gives the code",
    "targets/onnx/guard.py": "rules of the guarded reader, which gives the code",
    "targets/coreml/shapes.py": "no error: what a caller asks to go on without",
    "targets/coreml/compat.py": "coremltools expects it",
    "targets/coreml/__init__.py": "a validator: pydantic's error becomes one with a code",
    "targets/tensorrt/engine_ledger.py": "the handler a few lines below gives the code",
    "targets/__init__.py": "a wrong import of the package's source",
}
"""Module that faces users and raises something without a code → where that ends."""


def modules() -> Iterator[tuple[str, ast.Module]]:
    """(path, tree) of the package's modules."""
    for folder in ("vlexport", "passes", "targets", "calibration"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            path = file.relative_to(ROOT).as_posix()
            if not re.match(r"vlexport/(calibration|passes|targets)/", path):
                yield path, ast.parse(file.read_text(encoding="utf-8"))


def raised() -> Iterator[tuple[str, str, str]]:
    """(path, class, first argument) of every call that makes an error of ours or is raised."""
    for path, tree in modules():
        made = {id(node.exc): node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and node.exc}
        made |= {
            id(node): node
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and ast.unparse(node.func) in TREE and path != "vlexport/core/errors.py"
        }
        for node in made.values():
            if isinstance(node, ast.Call):
                yield path, ast.unparse(node.func), ast.unparse(node.args[0]) if node.args else ""


def test_every_error_has_a_code_when_it_is_raised() -> None:
    ours = [(path, kind, first) for path, kind, first in raised() if kind in TREE]
    assert len(ours) > 300
    odd = {first: f"{path}: {kind}({first})" for path, kind, first in ours if first.strip("'\"") not in CODES}
    assert {first: place for first, place in odd.items() if first not in PASSED_ON} == {}
    assert set(PASSED_ON) <= set(odd), "a reason that is no longer needed"


def test_what_faces_users_raises_errors_with_codes_only() -> None:
    plain = (
        "ValueError",
        "TypeError",
        "KeyError",
        "RuntimeError",
        "Exception",
        "ImportError",
        "OSError",
        "LookupError",
    )
    found = {path: kind for path, kind, _ in raised() if kind in plain and path.startswith(FACING_USERS)}
    assert {path: kind for path, kind in found.items() if path not in WITHOUT_CODE} == {}
    assert set(WITHOUT_CODE) <= set(found), "a reason that is no longer needed"


def rendered(head: str) -> str:
    """The page: what stands above its first code, the table, and a section a code."""
    lines = [head.rstrip(), "", "| code | kind of problem |", "|---|---|"]
    lines += [f"| `{code}` | {kind} |" for code, kind in CODES.items()]
    lines += ["", "`vlexport explain VLX0503` shows the same in a terminal."]
    family = ""
    for code, found in ((code, explanations()[code]) for code in CODES):
        if code[3:5] != family:
            family = code[3:5]
            lines += ["", f"## {FAMILIES[family]}"]
        lines += ["", f"### {code}: {found.kind}", "", found.cause, "", f"- Example: {_code(found.example)}"]
        lines.append(f"- What to do: {found.fix}")
    return "\n".join(lines) + "\n"


def _code(text: str) -> str:
    return f"`{text}`" if text.startswith(("vlexport ", "python ", "--")) and "`" not in text else text


def test_every_code_has_its_page_and_the_table_is_made_from_the_registry() -> None:
    assert set(explanations()) == set(CODES)
    text = PAGE.read_text(encoding="utf-8")
    wanted = rendered(text.partition("| code |")[0])
    if os.environ.get("UPDATE_GOLDEN"):
        PAGE.write_text(wanted, encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == wanted, "UPDATE_GOLDEN=1 writes docs/errors.md anew"


def test_exit_codes_of_the_page_are_those_of_the_tree() -> None:
    text = PAGE.read_text(encoding="utf-8")
    listed = {int(number) for number in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)}
    constants = {value for name, value in vars(errors).items() if name.startswith("EXIT_")}
    assert listed == constants
    assert {kind.exit_code for kind in TREE.values()} <= listed
