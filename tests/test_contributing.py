"""CONTRIBUTING.md to the letter: its blocks are applied to a copy of the tree, its commands are run there."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("vlexport", "passes", "targets", "calibration", "tests")
MADE = {".pt", ".pyc"}
"""What commands leave behind; nobody commits it."""
_BLOCK = re.compile(
    r"(?:^`(?P<file>[^`\n]+)`(?:, behind the line with `(?P<anchor>[^`\n]+)`|:)\n\n)?"
    r"^```(?P<language>\w+)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A fenced block: a file, an insertion into one, or commands."""

    file: str
    anchor: str
    language: str
    text: str


def section(title: str) -> str:
    """The text below a heading."""
    whole = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", whole, re.MULTILINE | re.DOTALL)
    assert found, title
    return found.group(1)


def blocks(title: str) -> list[Block]:
    """Every fenced block of a section; none may be overlooked."""
    text = section(title)
    found = [Block(m["file"] or "", m["anchor"] or "", m["language"], m["text"]) for m in _BLOCK.finditer(text)]
    assert len(found) == text.count("\n```") // 2
    assert all(bool(each.file) != (each.language == "bash") for each in found), "every block is a file or commands"
    return found


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a contributor checks out."""
    copy = tmp_path_factory.mktemp("tree")
    for name in FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__", "*.pt")
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "CONTRIBUTING.md", "README.md"):
        shutil.copy2(ROOT / name, copy / name)
    return copy


def contents(folder: Path) -> dict[str, str]:
    """Path → hash of what would be committed."""
    ignored = ("__pycache__", ".pytest_cache", ".hypothesis", "tiny.bundle")
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file() and file.suffix not in MADE and not set(ignored) & set(file.parts)
    }


def apply(block: Block, folder: Path) -> None:
    """Write a new file, or put lines behind the one line that holds the anchor."""
    file = folder / block.file
    if not block.anchor:
        assert not file.exists(), block.file
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(block.text, encoding="utf-8")
        return
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    places = [i for i, line in enumerate(lines) if block.anchor in line]
    assert len(places) == 1, f"{block.file} holds {block.anchor} {len(places)} times"
    lines.insert(places[0] + 1, block.text)
    file.write_text("".join(lines), encoding="utf-8")


def run(line: str, folder: Path, root: Path) -> str:
    """Run a command as a shell does, with this interpreter for ``python`` and this tree's ``vlexport``."""
    python = f'"{sys.executable}"'
    line = re.sub(r"(?<!\S)vlexport(?=\s)", f"{python} -m vlexport", line)
    line = re.sub(r"(?<!\S)python(?=\s)", python, line)
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    environment.pop("UPDATE_GOLDEN", None)
    done = subprocess.run(
        line, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )  # fmt: skip
    assert done.returncode == 0, f"{line}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def lint(folder: Path, root: Path, files: list[str]) -> None:
    """The example is as `make lint` wants it."""
    for command in (["check"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--no-cache", "--config", str(root / "pyproject.toml")]
        python = [file for file in files if file.endswith(".py")]
        done = subprocess.run([*ruff, *python], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def follow(title: str, folder: Path, root: Path) -> str:
    """Apply all files of a section, run its commands, count what was touched; what the commands printed."""
    before = contents(folder)
    found = blocks(title)
    for block in found:
        if block.file:
            apply(block, folder)
    lint(folder, root, [block.file for block in found if block.file])
    commands = [line for block in found if block.language == "bash" for line in block.text.splitlines()]
    assert commands
    printed = "".join(run(line, folder, root) for line in commands)
    after = contents(folder)
    touched = {path for path in after.keys() | before.keys() if after.get(path) != before.get(path)}
    said = re.search(r"^Files touched: (\d+)\.$", section(title), re.MULTILINE)
    assert said, title
    assert len(touched) == int(said[1]), sorted(touched)
    return printed


def test_pass_is_added_when_the_example_is_followed(tree: Path) -> None:
    printed = follow("Adding a pass", tree, tree)
    assert "failed" not in printed
    golden = (tree / "tests" / "golden" / "eliminate_double_relu.txt").read_text(encoding="utf-8")
    assert golden.count("relu") == 1


def test_target_is_added_when_the_example_is_followed(tree: Path) -> None:
    printed = follow("Adding a target", tree, tree)
    assert "failed" not in printed
    assert "onnxreference: ONNX model for ONNX's own reference implementation" in printed


def test_architecture_is_added_when_the_example_is_followed(tree: Path, tmp_path: Path) -> None:
    printed = follow("Adding an architecture", tmp_path, tree)
    assert "intact" in printed
    assert (tmp_path / "tiny.bundle" / "bundle.json").is_file()
