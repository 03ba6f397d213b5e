"""Bundles that were tampered with: refused by every command, and nothing of them is run."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vlexport
from vlexport.core.bundle import bundle_text
from vlexport.core.bundle_schema import Bundle, digest_of
from vlexport.core.errors import VlexportError


def redigested(bundle: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Edit ``bundle.json`` and give it the digest that fits, as an attacker would."""
    file = bundle / "bundle.json"
    values = json.loads(file.read_text())
    edit(values)
    changed = Bundle.model_validate(values)
    file.write_text(bundle_text(changed.model_copy(update={"digest": digest_of(changed)})))


def _flip(bundle: Path, name: str) -> None:
    content = bytearray((bundle / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / name).write_bytes(content)


def _edit(bundle: Path, **changes: Any) -> None:
    values = json.loads((bundle / "bundle.json").read_text())
    (bundle / "bundle.json").write_text(json.dumps({**values, **changes}))


def _with_nan(bundle: Path) -> dict[str, Any]:
    components: dict[str, Any] = json.loads((bundle / "bundle.json").read_text())["components"]
    components["main"]["golden"]["tolerance"] = math.nan
    return components


def _point(bundle: Path, path: str) -> None:
    redigested(bundle, lambda values: values["components"]["main"]["artifact"].update(path=path))


def _golden_elsewhere(values: dict[str, Any]) -> None:
    values["components"]["main"]["golden"]["inputs"] = "/etc/hostname"


def _file_above(values: dict[str, Any]) -> None:
    values["files"]["../x"] = values["files"]["recipe.toml"]


def _swap_golden(bundle: Path) -> None:
    """Other golden outputs with hashes that fit."""
    name = "golden/main/outputs.npz"
    np.savez(bundle / name, output=np.ones((2, 3), np.float32))
    content = (bundle / name).read_bytes()
    record = {"sha256": hashlib.sha256(content).hexdigest(), "size_bytes": len(content)}
    redigested(bundle, lambda values: values["files"].update({name: record}))


def _linked(bundle: Path) -> None:
    (bundle.parent / "elsewhere").mkdir()
    (bundle / "artifact").rename(bundle.parent / "elsewhere" / "artifact")
    (bundle / "artifact").symlink_to(bundle.parent / "elsewhere" / "artifact")


TAMPERED: list[tuple[str, int, str, Callable[[Path], object]]] = [
    ("artifact", 3, "VLX0602", lambda b: _flip(b, "artifact/main.onnx")),
    ("golden", 3, "VLX0602", lambda b: _flip(b, "golden/main/outputs.npz")),
    ("recipe", 3, "VLX0602", lambda b: _flip(b, "recipe.toml")),
    ("removed", 3, "VLX0602", lambda b: (b / "artifact/main.onnx").unlink()),
    ("json-edited", 3, "VLX0602", lambda b: _edit(b, precision="int8")),
    ("json-unknown-key", 1, "VLX0601", lambda b: _edit(b, motto="hello")),
    ("json-cut", 1, "VLX0601", lambda b: (b / "bundle.json").write_bytes((b / "bundle.json").read_bytes()[:-9])),
    ("json-digest", 3, "VLX0602", lambda b: _edit(b, digest="0" * 64)),
    ("json-nan", 3, "VLX0602", lambda b: _edit(b, components=_with_nan(b))),
    ("json-list", 1, "VLX0601", lambda b: (b / "bundle.json").write_text("[1]")),
    ("json-deep", 1, "VLX0601", lambda b: (b / "bundle.json").write_text("[" * 100_000)),
    ("json-surrogate", 1, "VLX0601", lambda b: _edit(b, vlexport="\ud800")),
    ("no-component", 1, "VLX0601", lambda b: redigested(b, lambda values: values.update(components={}))),
    ("json-missing", 1, "VLX0601", lambda b: (b / "bundle.json").unlink()),
    ("later", 1, "VLX0603", lambda b: _edit(b, schema_version=99)),
    ("extra-file", 3, "VLX0602", lambda b: (b / "artifact/extra.bin").touch()),
    ("extra-link", 3, "VLX0602", lambda b: (b / "artifact/extra").symlink_to("/etc/hostname")),
    ("extra-folder-link", 3, "VLX0602", lambda b: (b / "artifact/extra").symlink_to("/etc")),
    ("artifact-link", 1, "VLX0605", _linked),
    ("path-up", 1, "VLX0605", lambda b: _point(b, "../../model.onnx")),
    ("path-absolute", 1, "VLX0605", lambda b: redigested(b, _golden_elsewhere)),
    ("path-file", 1, "VLX0605", lambda b: redigested(b, _file_above)),
]


@pytest.mark.parametrize(("exit_code", "code", "tamper"), [t[1:] for t in TAMPERED], ids=[t[0] for t in TAMPERED])
def test_bundle_is_refused_everywhere_when_it_was_tampered_with(
    exit_code: int, code: str, tamper: Callable[[Path], object], cli: Any, bundle: Path, make: Any
) -> None:
    data = make.npz(Path("x.npz"), [0, 1, 2])
    tamper(bundle)
    cli.refused(exit_code, code, "verify", "bundle")
    cli.refused(exit_code, code, "run", "bundle", data)
    cli.refused(exit_code, code, "validate", "bundle", "--data", data)
    cli.refused(exit_code, code, "profile", "bundle", "--quick")
    with pytest.raises(VlexportError) as caught:
        vlexport.load("bundle")
    assert (caught.value.code, caught.value.exit_code) == (code, exit_code)


def test_verify_fails_when_golden_vectors_are_other_ones_with_fitting_hashes(cli: Any, bundle: Path) -> None:
    _swap_golden(bundle)
    cli.refused(3, "VLX0606", "verify", "bundle", said="output")


def test_verify_refuses_golden_vectors_when_they_are_no_arrays(cli: Any, bundle: Path) -> None:
    name = "golden/main/inputs.npz"
    (bundle / name).write_bytes(b"junk")
    record = {"sha256": hashlib.sha256(b"junk").hexdigest(), "size_bytes": 4}
    redigested(bundle, lambda values: values["files"].update({name: record}))
    cli.refused(1, "VLX0601", "verify", "bundle", said=name)


@pytest.mark.parametrize("link", ["measured", "measured/index.json"])
def test_validate_writes_nothing_outside_when_measured_is_a_link(link: str, cli: Any, bundle: Path, make: Any) -> None:
    data = make.npz(Path("x.npz"), [0, 1, 2])
    Path("victim").mkdir()
    Path("victim/index.json").write_text("mine")
    if link == "measured":
        for path in sorted((bundle / link).rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        (bundle / link).rmdir()
        (bundle / link).symlink_to(Path("victim").resolve())
    else:
        (bundle / link).unlink()
        (bundle / link).symlink_to(Path("victim/index.json").resolve())
    cli.refused(1, "VLX0605", "validate", "bundle", "--data", data)


def test_validate_says_so_when_no_report_can_be_added(cli: Any, bundle: Path, make: Any) -> None:
    data = make.npz(Path("x.npz"), [0, 1, 2])
    (bundle / "measured").rename("gone")
    (bundle / "measured").write_text("a file")
    cli.refused(1, "VLX0607", "validate", "bundle", "--data", data)


def test_run_refuses_output_when_it_cannot_be_written(cli: Any, bundle: Path, make: Any) -> None:
    data = make.npz(Path("x.npz"), [0, 1, 2])
    cli.refused(1, "VLX0607", "run", "bundle", data, "-o", "no/out.npz")
    cli.refused(1, "VLX0607", "run", "bundle", data, "-o", "bundle")
    os.mkfifo("pipe")
    cli.refused(1, "VLX0607", "run", "bundle", data, "-o", "pipe", "--force", said="no plain file")


def test_run_keeps_what_stands_at_its_output_unless_forced(cli: Any, bundle: Path, make: Any) -> None:
    data = make.npz(Path("x.npz"), [0, 1, 2])
    Path("out.npz").write_text("mine")
    cli.refused(1, "VLX0604", "run", "bundle", data, "-o", "out.npz", said="--force")
    assert Path("out.npz").read_text() == "mine"
    assert cli("run", "bundle", data, "-o", "out.npz", "--force")[0] == 0
    with np.load("out.npz") as found:
        assert found["output"].shape[0] == 3
    before = Path(data).read_bytes()
    cli.refused(1, "VLX0604", "run", "bundle", data, "-o", data, "--force", said="the data that is run on")
    assert Path(data).read_bytes() == before


def test_commands_refuse_bundle_when_the_path_is_none(cli: Any, here: Path) -> None:
    for path in ("nowhere", "model.pt", ".", "a" * 300):
        cli.refused(1, "VLX0601", "verify", path)


def test_commands_run_no_python_of_the_working_directory(bundle: Path) -> None:
    for name in ("json.py", "numpy.py", "struct.py", "sitecustomize.py"):
        (bundle / name).write_text("open('/'.join(__file__.split('/')[:-1]) + '/canary', 'w')\n")
    command = [str(Path(sys.executable).with_name("vlexport")), "verify", "."]
    found = subprocess.run(command, cwd=bundle, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert not (bundle / "canary").exists()
