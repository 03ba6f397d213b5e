"""Packages of the system's Python that a virtualenv hides: TensorRT on a Jetson comes with the system. No torch."""

from __future__ import annotations

import re
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_PYTHON = re.compile(r"python(\d+\.\d+)$")


@dataclass(frozen=True)
class HiddenPackage:
    """A package that stands beside the virtualenv.

    Attributes:
        name: Of the module.
        version: From its metadata; empty where there is none.
        folder: Where it lies.
        fits: Whether it was installed for this version of Python.
    """

    name: str
    version: str
    folder: Path
    fits: bool


def in_virtualenv() -> bool:
    """Whether this interpreter is a virtualenv's that does not see the system's packages."""
    if sys.prefix == sys.base_prefix:
        return False
    try:
        text = (Path(sys.prefix) / "pyvenv.cfg").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return True
    return re.search(r"(?im)^\s*include-system-site-packages\s*=\s*true", text) is None


def system_folders() -> tuple[Path, ...]:
    """Where the Python behind the virtualenv, and the distribution's packages, keep their modules."""
    base = Path(sys.base_prefix)
    own = sysconfig.get_path("purelib", vars={"base": str(base), "platbase": str(base)})
    roots = sorted({base / "lib", Path("/usr/lib"), Path("/usr/local/lib")})
    found = [Path(own)] if own else []
    for root in roots:
        for python in sorted(root.glob("python3*")):
            found += [python / "dist-packages", python / "site-packages"]
    return tuple(dict.fromkeys(each for each in found if each.is_dir()))


def hidden_package(name: str, folders: Sequence[Path]) -> HiddenPackage | None:
    """A module of that name in one of some folders, or None. What lies in this interpreter's own path is not hidden."""
    for folder in folders:
        if str(folder) in sys.path or not any((folder / each).exists() for each in (name, f"{name}.py")):
            continue
        versions = [
            match[1]
            for each in sorted(folder.iterdir())
            if (match := re.fullmatch(rf"{re.escape(name)}-([\w.+]+?)(?:-py[\d.]+)?\.(?:dist|egg)-info", each.name))
        ]
        python = _PYTHON.search(folder.parent.name)
        fits = python is None or python[1] == ".".join(map(str, sys.version_info[:2]))
        return HiddenPackage(name, versions[0] if versions else "", folder, fits)
    return None
