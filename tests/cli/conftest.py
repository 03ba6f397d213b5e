"""The command line in this process, and the tiny classifier of the tests of stages."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from tests.json_schema_check import problems
from vlexport.cli.main import main
from vlexport.core.artifact import Artifact, Session
from vlexport.core.outputs import schema_named
from vlexport.targets.base import Target

_spec = importlib.util.spec_from_file_location("colours", Path(__file__).parents[1] / "stages" / "conftest.py")
assert _spec is not None
assert _spec.loader is not None
_colours = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_colours)
model_file, other_model, built, other_built = (
    _colours.model_file, _colours.other_model, _colours.built, _colours.other_built
)  # fmt: skip
bundle, other_bundle, make = _colours.bundle, _colours.other_bundle, _colours.make


class Cli:
    """Runs the command line in this process and checks what every failure owes its user."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self._capfd = capfd

    def __call__(self, *arguments: object) -> tuple[int, str, str]:
        self._capfd.readouterr()
        code = main([str(a) for a in arguments])
        found = self._capfd.readouterr()
        return code, found.out, found.err

    def refused(self, exit_code: int, code: str, *arguments: object, said: str = "") -> str:
        """One message with its code, no traceback, and the working directory as it was.

        Asked with ``--json``, so that stdout holds one object that fits the schema of errors and nothing else.
        """
        assert not Path("pyproject.toml").exists(), "a test of its own folder: other tests write to this one"
        before = tree(Path())
        found, out, err = self(arguments[0], "--json", *arguments[1:])
        assert found == exit_code, err
        assert out.count("\n") == 1, out
        printed = json.loads(out)
        assert problems(printed, schema_named("error")) == []
        assert (printed["error"]["code"], printed["exit"]) == (code, exit_code)
        heads = [line for line in err.splitlines() if line.startswith("error ")]
        assert len(heads) == 1, err
        assert heads[0].startswith(f"error {code}: "), err
        assert len(heads[0]) > len(f"error {code}: ") + 10, err
        assert "Traceback" not in err
        assert said in err
        assert tree(Path()) == before
        return err


def tree(root: Path) -> dict[str, str]:
    """Every path below a folder, hidden ones too, with a hash of its content."""
    found = {}
    for path in sorted(root.rglob("*")):
        plain = path.is_file() and not path.is_symlink()
        found[path.as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest() if plain else "-"
    return found


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Cli:
    return Cli(capfd)


@pytest.fixture
def runtime_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions open in this process: for tests of what is said, where a child for each answer proves nothing more."""

    def opened(
        self: Target, folder: Path, artifact: Artifact, *, threads: int = 0, timeout_s: float | None = None
    ) -> Session:
        return self.open_here(folder, artifact, threads=threads)

    monkeypatch.setattr(Target, "open", opened)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_file: Path) -> Path:
    """An empty working directory but for ``model.pt``."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(model_file, tmp_path / "model.pt")
    return tmp_path
