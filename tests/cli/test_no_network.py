"""Nothing asks the network: every command runs with sockets that report who tried, and that is nobody.

The interpreter's audit events see every socket that Python makes, in children too; variables that tell libraries to
stay offline are unset, since they are not what this relies on.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

WATCH = """
import os, sys
def _seen(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.bind",
                 "urllib.Request", "http.client.connect", "ftplib.connect", "smtplib.connect"):
        if event == "socket.connect" and isinstance(arguments[1], (str, bytes)):
            return  # a socket of this machine
        with open(os.environ["WATCHED"], "a") as file:
            file.write(f"{event} {arguments[1:]} of {sys.argv[:1]}\\n")
        raise OSError("there is no network here")
sys.addaudithook(_seen)
"""
RUN = """
import json, sys
from vlexport.cli.main import main
from vlexport.core.errors import VlexportError
from vlexport.frontends.architecture import factory_from_text
found = []
for line in json.loads(sys.argv[1]):
    found.append(main(line))
for text in sys.argv[2:]:
    try:
        found.append(type(factory_from_text(text).module).__name__)
    except VlexportError as error:
        found.append(error.code)
print(json.dumps(found))
"""
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK")


def watched(place: Path, code: str, *arguments: str) -> tuple[subprocess.CompletedProcess[str], str]:
    """Run Python in a child that reports network use of its own and of its children."""
    (place / "watch").mkdir(exist_ok=True)
    (place / "watch" / "sitecustomize.py").write_text(WATCH)
    report = place / "watched.txt"
    report.write_text("")
    root = str(Path(__file__).resolve().parents[2])
    environment = {key: value for key, value in os.environ.items() if key not in OFFLINE}
    environment |= {"PYTHONPATH": os.pathsep.join((str(place / "watch"), root)), "WATCHED": str(report)}
    found = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return found, report.read_text()


@pytest.mark.parametrize(
    "attempt",
    [
        "import socket; socket.create_connection(('192.0.2.1', 80), 1)",
        "import urllib.request; urllib.request.urlopen('http://192.0.2.1/', timeout=1)",
        "import socket; socket.getaddrinfo('example.invalid', 80)",
        'import os; os.system(f\'{__import__("sys").executable} -c "import socket; socket.gethostbyname(chr(120))"\')',
    ],
)
def test_use_of_the_network_is_seen_when_it_happens(attempt: str, tmp_path: Path) -> None:
    _, seen = watched(tmp_path, attempt)
    assert "of [" in seen


def test_commands_ask_no_network_when_they_run(model_file: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "x.npz", image=rng.random((4, 3, 8, 8), np.float32), label=np.array([0, 1, 2, 0]))
    lines = [
        ["build", str(model_file), "-o", "made", "--data", "x.npz", "--calib", "x.npz", "--no-profile"],
        ["build", str(model_file), "-o", "rtx", "--target", "tensorrt", "--set", "tensorrt.engine=off", "--plan"],
        ["validate", "made", "--data", "x.npz", "--reference", str(model_file)],
        ["run", "made", "x.npz"],
        ["verify", "made"],
        ["targets", "coreml"],
        ["passes"],
        ["cache"],
        ["build", str(model_file), "-o", "other", "--preprocess", "timm:hf-hub:nobody/nothing"],
    ]
    names = ("timm:resnet10t.c3_in1k", "timm:hf-hub:timm/resnet10t.c3_in1k", "timm:hf_hub:a/b", "timm:local-dir:/etc")
    found, seen = watched(tmp_path, RUN, json.dumps(lines), *names)
    assert seen == ""
    assert found.returncode == 0, found.stderr
    codes = json.loads(found.stdout.splitlines()[-1])
    assert codes == [0] * (len(lines) - 1) + [1, "ResNet", "VLX0110", "VLX0110", "VLX0110"], found.stderr


LOAD = "import vlexport; vlexport.load('made').run({'image': __import__('numpy').zeros((1, 3, 8, 8), 'float32')})"
TELL = "import onnxruntime; onnxruntime.InferenceSession('made/artifact/main.onnx', providers=['CPUExecutionProvider'])"
VERIFY = "from vlexport.cli.main import main; raise SystemExit(main(['verify', 'made']))"


def stored_by(code: str, place: Path) -> list[str]:
    """What Python, with a home folder of its own and no variable that forbids reports, stores there."""
    home = place / "home"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir()
    kept = {k: v for k, v in os.environ.items() if k not in ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME")}
    root = str(Path(__file__).resolve().parents[2])
    subprocess.run(
        [sys.executable, "-c", code], cwd=place, check=True, env={**kept, "HOME": str(home), "PYTHONPATH": root}
    )
    return [each.name for each in home.rglob("*") if each.is_file()]


def test_onnx_runtime_keeps_no_id_in_the_home_folder_when_vlexport_runs_it(built: Path, tmp_path: Path) -> None:
    shutil.copytree(built, tmp_path / "made")
    assert [stored_by(code, tmp_path) for code in (LOAD, VERIFY)] == [[], []]
    if not stored_by(TELL, tmp_path):
        pytest.skip("this ONNX Runtime reports nothing by itself")
