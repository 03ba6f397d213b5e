"""How a command ends: one object with ``--json``, no traceback when we break, nothing left behind after Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from vlexport.cli.main import main


@pytest.mark.parametrize(
    ("arguments", "exit_code", "code"),
    [
        (("verify", "nowhere"), 1, "VLX0601"),
        (("build", "nowhere.pt"), 1, "VLX0101"),
        (("build", "model.pt", "--target", "onnxruntim"), 2, "VLX0701"),
        (("build", "model.pt", "--taget", "x"), 2, "VLX0703"),
        (("validate", "nowhere"), 2, "VLX0703"),
    ],
)
def test_json_is_one_object_on_stdout_when_a_command_fails(
    arguments: tuple[str, ...], exit_code: int, code: str, cli: Any, here: Path
) -> None:
    found, out, err = cli(*arguments, "--json")
    assert found == exit_code
    assert out.count("\n") == 1
    value = json.loads(out)
    assert (value["schema"], value["ok"], value["exit"]) == (1, False, exit_code)
    assert set(value) == {"schema", "ok", "exit", "error"}
    assert set(value["error"]) == {"code", "message", "where", "hint"}
    assert value["error"]["code"] == code
    assert value["error"]["message"]
    assert code in err
    assert "Traceback" not in err
    assert cli("--version")[1].startswith("vlexport ")  # stdout is back where it was


def test_json_is_one_object_when_others_print_to_stdout(bundle: Path) -> None:
    Path("d.py").write_text(
        "import os, sys, numpy\nprint('from Python')\nos.write(1, b'from C++')\n"
        "def samples():\n    os.system('echo from a child')\n    yield {'image': numpy.zeros((3, 8, 8), 'float32')}\n"
    )
    command = [sys.executable, "-m", "vlexport", "run", "bundle", "d.py:samples", "--json"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    value = json.loads(found.stdout)
    assert (value["ok"], value["exit"], value["results"][0]["sample"]) == (True, 0, "#0")
    for said in ("from Python", "from C++", "from a child"):
        assert said in found.stderr


def test_crash_is_reported_without_traceback_or_paths_when_we_break(
    cli: Any, bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError(f"boom in {Path.cwd()}/x and {Path.home()}/y")

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr("vlexport.stages.verify.verify", broken)
    code, _, err = cli("verify", "bundle")
    assert code == 70
    assert "error VLX0901: vlexport broke: RuntimeError: boom in ./x" in err
    assert "Traceback" not in err
    crash = next(tmp_path.glob("vlexport-crash-*.txt")).read_text()
    assert "in broken" in crash
    assert str(tmp_path) not in crash
    assert str(Path.home()) + "/" not in crash


SLOW = """
import pathlib, time
calls = 0
def samples():
    global calls
    calls += 1
    if calls > 1:
        pathlib.Path("started").touch()
        time.sleep(60)
    yield {"image": __import__("numpy").zeros((3, 8, 8), "float32"), "label": 0}
"""


BUILD = ("build", "model.pt", "-o", "bundle", "--force", "--no-profile", "--data", "slow.py:samples")


@pytest.mark.parametrize(
    ("arguments", "sent"),
    [
        (BUILD, signal.SIGINT),
        (BUILD, signal.SIGTERM),
        (("validate", "bundle", "--data", "slow.py:samples"), signal.SIGINT),
        (("validate", "bundle", "--data", "slow.py:samples"), signal.SIGHUP),
    ],
    ids=["build", "build-terminated", "validate", "validate-hung-up"],
)
def test_interrupt_exits_130_and_leaves_nothing_when_a_command_is_under_way(
    arguments: tuple[str, ...], sent: signal.Signals, cli: Any, here: Path, bundle: Path
) -> None:
    Path("slow.py").write_text(SLOW)
    before = {str(p) for p in Path().rglob("*")}
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "vlexport", *arguments], stderr=subprocess.PIPE, text=True,
        env=environment, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None and not Path("started").exists():
        time.sleep(0.02)
    os.killpg(process.pid, sent)  # as a terminal does: the children get it too
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert "interrupted" in err
    assert "Traceback" not in err
    assert {str(p) for p in Path().rglob("*")} - {"started"} == before


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="this system has no /dev/full")
def test_output_that_cannot_be_written_is_one_error_when_stdout_is_full(bundle: Path) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "vlexport", "verify", "bundle"]
        found = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert found.returncode == 1
    assert "error VLX0607: the output cannot be written: No space left on device" in found.stderr
    assert "Traceback" not in found.stderr


def test_main_never_raises_when_arguments_are_strange(capfd: pytest.CaptureFixture[str]) -> None:
    for arguments in ([""], ["--"], ["build"], ["build", ""], ["verify", "\0"], ["passes", "no-such-pass"]):
        assert main(arguments) in (1, 2), arguments
    assert "Traceback" not in capfd.readouterr().err
