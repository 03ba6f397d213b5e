"""Wrong input of every kind: exit code, one message with its stable code, no traceback, nothing left behind."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import vlexport
from vlexport.cli.main import main
from vlexport.core.bundle import bundle_text
from vlexport.core.bundle_schema import Bundle, digest_of
from vlexport.core.errors import VlexportError
from vlexport.frontends.model_file import METADATA_MEMBER

HOSTILE = ("<img src=x onerror=alert(1)>", "[red]x[bold]", "\x1b[31mred\x1b[0m\x07\u202e")
BUILD = ("build", "model.pt", "-o", "made", "--no-profile")


def redigested(bundle: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Edit ``bundle.json`` and give it the digest that fits, as an attacker would."""
    file = bundle / "bundle.json"
    values = json.loads(file.read_text())
    edit(values)
    changed = Bundle.model_validate(values)
    file.write_text(bundle_text(changed.model_copy(update={"digest": digest_of(changed)})))


# The model file


def truncated(path: Path) -> None:
    path.write_bytes(Path("model.pt").read_bytes()[:-200])


def pickled_module(path: Path) -> None:
    torch.save(nn.Sequential(nn.Linear(2, 2)), path)


def torchscript(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(nn.ReLU()).save(str(path))


def later_archive(path: Path) -> None:
    with zipfile.ZipFile("model.pt") as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith(METADATA_MEMBER):
                about = json.loads(content)
                key = next(k for k in about if "schema" in k or "version" in k)
                content = json.dumps({**about, key: 99}).encode()
            new.writestr(name, content)


MODELS: list[tuple[str, str, Callable[[Path], object]]] = [
    ("missing", "VLX0101", lambda path: None),
    ("directory", "VLX0102", lambda path: path.mkdir()),
    ("empty", "VLX0103", lambda path: path.touch()),
    ("junk", "VLX0104", lambda path: path.write_bytes(np.random.default_rng(0).bytes(5000))),
    ("truncated", "VLX0105", truncated),
    ("pickled-module", "VLX0108", pickled_module),
    ("torchscript", "VLX0108", torchscript),
    ("later-archive", "VLX0111", later_archive),
    ("pickle-bomb", "VLX0108", lambda path: path.write_bytes(pickle.dumps(os.getcwd))),
    ("state-dict", "VLX0107", lambda path: torch.save(nn.Linear(2, 2).state_dict(), path)),
]


@pytest.mark.parametrize(("code", "write"), [m[1:] for m in MODELS], ids=[m[0] for m in MODELS])
def test_build_refuses_model_file_when_it_is_wrong(
    code: str, write: Callable[[Path], object], cli: Any, here: Path
) -> None:
    write(Path("bad.pt"))
    cli.refused(1, code, "build", "bad.pt", "-o", "made")


def test_build_refuses_input_when_it_does_not_fit_the_architecture(cli: Any, here: Path) -> None:
    Path("arch.py").write_text("from torch import nn\ndef make():\n    return nn.Sequential(nn.Conv2d(3, 2, 1))\n")
    torch.save(nn.Sequential(nn.Conv2d(3, 2, 1)).state_dict(), "weights.pt")
    base = ("build", "weights.pt", "--arch", "arch.py:make", "-o", "made", "--no-profile")
    sys.dont_write_bytecode, kept = True, sys.dont_write_bytecode
    try:
        cli.refused(1, "VLX0302", *base, "--input", "input=1x4x8x8", said="--input")
        cli.refused(2, "VLX0703", *base, "--input", "input=1xthreex8", said="NAME=SHAPE")
        cli.refused(2, "VLX0703", *base, "--input", "input=1x3x8x8:float33", said="float32")
        cli.refused(2, "VLX0703", *base, said="--input")
        cli.refused(1, "VLX0110", "build", "weights.pt", "--arch", "arch.py:mak", "-o", "made")
        cli.refused(2, "VLX0703", "build", "weights.pt", "--arch", "resnet18", "-o", "made", said="timm:")
        torch.save(nn.Sequential(nn.Conv2d(3, 4, 1)).state_dict(), "weights.pt")
        cli.refused(1, "VLX0109", *base, "--input", "input=1x3x8x8")
    finally:
        sys.dont_write_bytecode = kept


def test_save_refuses_and_writes_nothing_when_model_is_in_train_mode(here: Path) -> None:
    with pytest.raises(VlexportError) as caught:
        vlexport.save(nn.Sequential(nn.BatchNorm2d(3)).train(), "new.pt", inputs=torch.zeros(1, 3, 4, 4))
    assert (caught.value.code, caught.value.exit_code) == ("VLX0301", 1)
    assert "eval()" in caught.value.hint
    assert sorted(os.listdir()) == ["model.pt"]


# Options


OPTIONS: list[tuple[str, int, str, tuple[str, ...], str]] = [
    ("target", 2, "VLX0701", ("--target", "onnxruntim"), "did you mean 'onnxruntime'?"),
    ("flag", 2, "VLX0703", ("--taget", "onnxruntime"), "--target"),
    ("argument", 2, "VLX0703", ("extra",), "extra"),
    ("flag-without-value", 2, "VLX0703", ("--target",), "--target"),
    ("set-scope", 2, "VLX0703", ("--set", "onnxruntim.opset=19"), "did you mean 'onnxruntime'?"),
    ("set-name", 2, "VLX0703", ("--set", "onnxruntime.opse=19"), "did you mean 'opset'?"),
    ("set-text", 2, "VLX0703", ("--set", "opset"), "SCOPE.NAME=VALUE"),
    ("set-value", 2, "VLX0703", ("--set", "onnxruntime.opset=new"), "integer"),
    ("set-range", 2, "VLX0703", ("--set", "onnxruntime.opset=7"), "18"),
    ("gate-text", 2, "VLX0702", ("--gate", "drop=0.5", "--data", "x.npz"), "METRIC OP VALUE"),
    ("gate-metric", 2, "VLX0702", ("--gate", "dorp<=0.5", "--data", "x.npz"), "did you mean 'drop'?"),
    ("gate-value", 2, "VLX0702", ("--gate", "drop<=half", "--data", "x.npz"), "finite number"),
    ("gate-without-data", 2, "VLX0804", ("--gate", "drop<=0.5"), "--data DATA"),
    ("gate-without-profile", 2, "VLX0804", ("--gate", "p50_ms<=5"), "--profile"),
    ("max-drop-without-data", 2, "VLX0804", ("--max-drop", "0.5"), "--data DATA"),
    ("max-drop-negative", 2, "VLX0703", ("--max-drop", "-1"), "--max-drop"),
    ("precision", 2, "VLX0703", ("--precision", "fp23"), "did you mean 'fp32'?"),
    ("precision-not-run", 4, "VLX0502", ("--precision", "fp8"), "fp32"),
    ("device", 2, "VLX0703", ("--for", "cpu-x86-avx"), "did you mean 'cpu-x86-avx2'"),
    ("seed", 2, "VLX0703", ("--seed", "99999999999999999999"), "--seed"),
    ("threads", 2, "VLX0703", ("--threads", "99999999999"), "--threads"),
    ("threads-text", 2, "VLX0703", ("--threads", "many"), "--threads"),
    ("preprocess", 1, "VLX0207", ("--preprocess", "resiz=8"), "resize"),
    ("data-missing", 1, "VLX0201", ("--data", "nowhere"), "nowhere"),
    ("calib-missing", 1, "VLX0201", ("--calib", "nowhere.npz"), "nowhere.npz"),
    ("dump-file", 1, "VLX0607", ("--dump", "model.pt"), "--dump"),
    ("dump-below-file", 1, "VLX0607", ("--dump", "model.pt/x/y"), "--dump"),
    ("recipe-missing", 2, "VLX0705", ("--recipe", "nowhere.toml"), "nowhere.toml"),
]  # fmt: skip


@pytest.mark.parametrize(("exit_code", "code", "flags", "said"), [o[1:] for o in OPTIONS], ids=[o[0] for o in OPTIONS])
def test_build_refuses_option_when_it_is_wrong(
    exit_code: int, code: str, flags: tuple[str, ...], said: str, cli: Any, here: Path
) -> None:
    cli.refused(exit_code, code, *BUILD, *flags, said=said)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("opsett = 3", "no key 'opsett'"),
        ('presision = "fp32"', "did you mean 'precision'?"),
        ('arch = "arch.py:make"', "may not name code"),
        ('arch = "package.module:make"', "may not name code"),
        ('weights_key = "x"\nallow_code = true', "may not consent to running code"),
        ("allow_code = true", "may not consent to running code"),
        ('data = "samples.py:run"', "no key 'data'"),
        ("force = true", "no key 'force'"),
        ("vlexport_recipe = 2", "later version"),
        ("seed = [", "cannot be read"),
    ],
)
def test_build_refuses_recipe_when_a_key_is_unknown_or_would_run_code(
    text: str, said: str, cli: Any, here: Path
) -> None:
    Path("r.toml").write_text(text + "\n")
    cli.refused(2, "VLX0705", *BUILD, "--recipe", "r.toml", said=said)


def test_command_line_refuses_when_there_is_no_such_command(cli: Any, here: Path) -> None:
    cli.refused(2, "VLX0703", "biuld", said="build")
    cli.refused(2, "VLX0703", "run", "bundle", said="see `vlexport run --help`")
    cli.refused(2, "VLX0703", "build", "model.pt", "--format", "junti", said="'markdown'; did you mean 'junit'?")
    code, _, err = cli()
    assert code == 2
    shown, _, last = err.partition("\n\nerror VLX0703: ")
    assert "Usage:" in shown.splitlines()[0], "the help is shown as it is"
    assert "schema" in shown
    assert last.startswith("no command was given\n")


# The output


def test_build_keeps_existing_output_when_force_is_not_given(cli: Any, here: Path, built: Path) -> None:
    Path("made").mkdir()
    (Path("made") / "bundle.json").write_text("mine")
    cli.refused(1, "VLX0604", *BUILD, said="--force")


@pytest.mark.parametrize("kind", ["folder", "other tool", "file", "link"])
def test_build_keeps_existing_output_when_forced_and_it_is_no_bundle(kind: str, cli: Any, here: Path) -> None:
    if kind in ("folder", "other tool"):
        Path("made").mkdir()
        (Path("made") / "thesis.txt").write_text("mine")
        if kind == "other tool":
            (Path("made") / "bundle.json").write_text('{"name": "thesis"}')
    elif kind == "file":
        Path("made").write_text("mine")
    else:
        Path("made").symlink_to("nowhere")
    cli.refused(1, "VLX0604", *BUILD, "--force", said="no bundle")


def test_build_refuses_output_when_its_place_is_impossible(cli: Any, here: Path) -> None:
    cli.refused(1, "VLX0607", "build", "model.pt", "-o", "no/such/made", said="does not exist")
    cli.refused(1, "VLX0607", "build", "model.pt", "-o", "model.pt/made", said="does not exist")
    cli.refused(1, "VLX0607", "build", "model.pt", "-o", "a" * 300)


def test_build_keeps_the_bundles_of_several_targets_when_forced_for_one(cli: Any, here: Path, built: Path) -> None:
    output = here / "out"
    for name in ("coreml", "onnxruntime"):
        shutil.copytree(built, output / name)
    (output / "compare.json").write_text("{}", encoding="utf-8")
    err = cli.refused(1, "VLX0604", "build", "model.pt", "-o", "out", "--force", said="bundles of coreml, onnxruntime")
    assert "-o out/coreml, or all: --target coreml,onnxruntime" in err
    code, out, _ = cli("build", "model.pt", "-o", "out", "--force", "--plan")
    assert code == 1
    assert "VLX0604" in out
    planned = cli("build", "model.pt", "-o", "out", "--force", "--plan", "--target", "onnxruntime,coreml")
    assert "VLX0604" not in planned[1], "several replace several"


def test_build_replaces_bundle_when_forced(cli: Any, here: Path) -> None:
    Path("made").mkdir()
    assert cli(*BUILD, "--force")[0] == 0
    (Path("made") / "old.txt").touch()
    assert cli(*BUILD, "--force")[0] == 0
    assert not (Path("made") / "old.txt").exists()
    assert sorted(os.listdir()) == ["made", "model.pt"]


def test_build_restores_old_bundle_when_the_rename_fails(cli: Any, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli(*BUILD)[0] == 0
    (Path("made") / "old.txt").write_text("mine")
    real = os.rename

    def rename(source: Any, target: Any) -> None:
        if Path(target).name == "made" and Path(source).name != "old":
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr("vlexport.stages.replace_folder.exchanged", lambda one, other: False)
    monkeypatch.setattr(os, "rename", rename)
    assert cli(*BUILD, "--force")[0] == 130
    assert (Path("made") / "old.txt").read_text() == "mine"
    assert sorted(os.listdir()) == ["made", "model.pt"]


# Data


def _npz(**arrays: Any) -> Callable[[], str]:
    def write() -> str:
        np.savez("x.npz", **arrays)
        return "x.npz"

    return write


def _folder(**files: bytes) -> Callable[[], str]:
    def write() -> str:
        Path("photos").mkdir()
        for name, content in files.items():
            file = Path("photos", *name.split("__")).with_suffix(".png")
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(content)
        return "photos"

    return write


def _function(source: str) -> Callable[[], str]:
    def write() -> str:
        Path("d.py").write_text(source)
        return "d.py:samples"

    return write


GOOD = np.zeros((4, 3, 8, 8), np.float32)
NAN = np.where(np.arange(4)[:, None, None, None] == 2, np.float32(np.nan), GOOD)
LABELS = np.array([0, 1, 2, 0])
DATA: list[tuple[str, str, Callable[[], str], str]] = [
    ("shape", "VLX0205", _npz(image=GOOD[:, :, :7], label=LABELS), "3×7×8"),
    ("dtype", "VLX0205", _npz(image=GOOD.astype(np.float64), label=LABELS), "float64"),
    ("name", "VLX0205", _npz(imgae=GOOD, label=LABELS), "did you mean 'imgae'?"),
    ("rows", "VLX0205", _npz(image=GOOD, label=LABELS[:3]), "numbers of rows differ"),
    ("no-rows", "VLX0202", _npz(image=GOOD[:0], label=LABELS[:0]), "no rows"),
    ("nan", "VLX0204", _npz(image=NAN, label=LABELS), "#2"),
    ("label-range", "VLX0208", _npz(image=GOOD, label=LABELS + 1), "label 3"),
    ("label-name", "VLX0208", _npz(image=GOOD, label=np.array(["red", "grene", "blue", "red"])), "did you mean"),
    ("object", "VLX0203", _npz(image=GOOD, label=np.array([{}, 1, 2, 3], object)), "numbers only"),
    ("empty-folder", "VLX0202", _folder(), "holds no photo"),
    ("unreadable", "VLX0203", _folder(red__a=b"no photo"), "red/a.png"),
    ("class", "VLX0208", _folder(rde__a=b""), "did you mean 'red'?"),
    ("unlabelled-gate", "VLX0804", _npz(image=GOOD), "labelled"),
    ("function", "VLX0209", _function("def samples():\n    return 1 / 0\n"), "ZeroDivisionError"),
    ("function-nothing", "VLX0202", _function("def samples():\n    return []\n"), "no sample"),
]


@pytest.mark.parametrize(("code", "write", "said"), [d[1:] for d in DATA], ids=[d[0] for d in DATA])
def test_build_and_validate_refuse_data_when_it_is_wrong(
    code: str, write: Callable[[], str], said: str, cli: Any, here: Path, bundle: Path
) -> None:
    data = write()
    exit_code = 2 if code == "VLX0804" else 1
    if code in ("VLX0204", "VLX0203", "VLX0804"):  # the same reader: a few are enough
        cli.refused(exit_code, code, *BUILD, "--data", data, "--gate", "top1>=1", said=said)
    cli.refused(exit_code, code, "validate", "bundle", "--data", data, "--gate", "top1>=1", said=said)


def test_gate_is_refused_before_measuring_when_the_command_does_not_measure_it(
    cli: Any, bundle: Path, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make.npz(Path("x.npz"), [0, 1])

    def opened(*_: object, **__: object) -> None:
        raise AssertionError("a session was opened")

    monkeypatch.setattr("vlexport.targets.base.Target.open", opened)
    cli.refused(2, "VLX0804", "validate", "bundle", "--data", data, "--gate", "p50_ms<=5", said="profile")
    cli.refused(2, "VLX0804", "validate", "bundle", "--data", data, "--max-drop", "1", said="--reference")
    cli.refused(2, "VLX0804", "profile", "bundle", "--gate", "top1>=5", said="validate")


# Bundles that were tampered with


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


def test_commands_refuse_bundle_when_the_path_is_none(cli: Any, here: Path) -> None:
    for path in ("nowhere", "model.pt", ".", "a" * 300):
        cli.refused(1, "VLX0601", "verify", path)


# Python lying in the working directory


def test_commands_run_no_python_of_the_working_directory(bundle: Path) -> None:
    for name in ("json.py", "numpy.py", "struct.py", "sitecustomize.py"):
        (bundle / name).write_text("open('/'.join(__file__.split('/')[:-1]) + '/canary', 'w')\n")
    command = [str(Path(sys.executable).with_name("vlexport")), "verify", "."]
    found = subprocess.run(command, cwd=bundle, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert not (bundle / "canary").exists()


# --json


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


# Ctrl-C

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


@pytest.mark.parametrize(
    "arguments",
    [
        ("build", "model.pt", "-o", "bundle", "--force", "--no-profile", "--data", "slow.py:samples"),
        ("validate", "bundle", "--data", "slow.py:samples"),
    ],
    ids=["build", "validate"],
)
def test_interrupt_exits_130_and_leaves_nothing_when_a_command_is_under_way(
    arguments: tuple[str, ...], cli: Any, here: Path, bundle: Path
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
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the children get it too
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert "interrupted" in err
    assert "Traceback" not in err
    assert {str(p) for p in Path().rglob("*")} - {"started"} == before


# Hostile names


def test_names_are_inert_in_terminal_and_report_when_labels_and_files_are_hostile(
    cli: Any, here: Path, make: Any, model_file: Path
) -> None:
    class Swapped(nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(scale))

        def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
            return {HOSTILE[0]: image.mean(dim=(2, 3)) * self.scale, HOSTILE[2]: image.amax(dim=(1, 2, 3))}

    for name, scale in (("a", 1.0), ("b", -1.0)):
        vlexport.save(
            Swapped(scale).eval(), f"{name}.pt", inputs=torch.rand(1, 3, 8, 8),
            preprocess="resize=8,crop=8,scale=1/255", labels=HOSTILE,
        )  # fmt: skip
        code, _, err = cli("build", f"{name}.pt", "-o", f"{name}.bundle", "--no-profile")
        assert code == 0, err
    for label, colour in zip(HOSTILE, range(3), strict=True):
        for file in HOSTILE:
            make.photo(Path("photos") / label / f"{file}.png", colour)
    runs = [
        cli("validate", "a.bundle", "--data", "photos", "--reference", "b.bundle"),
        cli("run", "a.bundle", f"photos/{HOSTILE[2]}/{HOSTILE[0]}.png"),
        cli("verify", f"nowhere {HOSTILE[2]}\nerror VLX0000: forged"),
    ]
    assert [code for code, _, _ in runs] == [0, 0, 1], runs
    shown = "".join(out + err for _, out, err in runs)
    assert not {c for c in shown if (ord(c) < 32 and c != "\n") or c == "\u202e"}
    assert "\\x1b[31mred" in shown  # shown in a way that nothing obeys
    assert "[red]x[bold]" in shown  # and markup is text
    assert "\nerror VLX0000" not in shown
    page = Path("a.bundle/measured/local-2/report.html").read_text()
    assert "&lt;img src=x onerror=alert(1)&gt;" in page
    assert "<img" not in page


def test_interface_survives_when_a_file_name_is_no_unicode(
    cli: Any, bundle: Path, other_bundle: Path, make: Any
) -> None:
    name = os.fsencode("photos/red/") + b"a\xff.png"
    make.photo(Path("photos/red/a.png"), 0).rename(os.fsdecode(name))
    code, out, err = cli("validate", "bundle", "--data", "photos", "--reference", "other")
    assert code == 0, err
    assert "differs: red/a" in out


def test_progress_reads_markup_as_text_when_a_stage_has_a_hostile_name(capfd: pytest.CaptureFixture[str]) -> None:
    from vlexport.cli.console import RichReporter

    with RichReporter().steps(HOSTILE[1] + HOSTILE[2], 2) as advance:
        advance()
    with RichReporter().stage(HOSTILE[1] + HOSTILE[2]):
        pass
    assert "\x07" not in capfd.readouterr().err


def test_main_never_raises_when_arguments_are_strange(capfd: pytest.CaptureFixture[str]) -> None:
    for arguments in ([""], ["--"], ["build"], ["build", ""], ["verify", "\0"], ["passes", "no-such-pass"]):
        assert main(arguments) in (1, 2), arguments
    assert "Traceback" not in capfd.readouterr().err
