"""Wrong model files, options and outputs: exit code, one message with its stable code, nothing left behind."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
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
from vlexport.core.errors import VlexportError
from vlexport.frontends.model_file import METADATA_MEMBER

BUILD = ("build", "model.pt", "-o", "made", "--no-profile")


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
