"""Wrong data of every kind: refused by the sample, with its stable code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.cli.test_bad_input import BUILD


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
