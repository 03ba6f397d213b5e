"""The table of commands: what the help says is what the functions say, and showing it loads none of them."""

from __future__ import annotations

import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vlexport.cli.commands import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
_NOT_FOR_HELP = ("numpy", "pydantic", "PIL", "jinja2", "rich", "matplotlib", "torch", "onnxruntime")


@pytest.mark.parametrize("name", COMMANDS)
def test_summary_is_the_first_line_of_the_docstring_when_help_lists_it(name: str) -> None:
    place, summary = COMMANDS[name]
    module, _, function = place.partition(":")
    found = getattr(importlib.import_module(module), function)
    assert summary == (inspect.getdoc(found) or "").splitlines()[0]
    assert found.__name__ == name


def test_every_command_of_the_folder_is_listed_when_help_is_shown(cli: Any) -> None:
    code, out, _ = cli("--help")
    assert code == 0
    listed = [line.split()[0] for line in out.partition("Commands:\n")[2].splitlines() if line.startswith("  ")]
    assert [name for name in listed if name in COMMANDS] == list(COMMANDS)


def test_no_command_is_loaded_when_help_is_shown() -> None:
    script = (
        "import json, sys\n"
        "from vlexport.cli.main import main\n"
        f"assert main({['--help']!r}) == 0\n"
        f"heavy = sorted(set({_NOT_FOR_HELP!r}) & set(sys.modules))\n"
        "ours = [name for name in sys.modules if name.startswith(('vlexport.stages', 'vlexport.targets'))]\n"
        "print(json.dumps([heavy, ours]), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stderr.splitlines()[-1]) == [[], []]


def test_nearest_command_is_named_when_one_is_misspelt(
    cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cli.refused(2, "VLX0703", "comparre", said="'compare'")
