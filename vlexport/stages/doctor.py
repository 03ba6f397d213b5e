"""doctor: what works on this machine, what to install, and what may surprise. No torch.

It leaves nothing behind but the cache's folder.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlexport.core.cache import OFF, Cache
from vlexport.core.devices import available_cores, this_machine
from vlexport.core.errors import VlexportError
from vlexport.core.health import Health, Symptom
from vlexport.core.huge_pages import ASKED_FOR, REQUEST, VARIABLE
from vlexport.core.import_check import import_failures
from vlexport.core.memory import available_memory_bytes
from vlexport.core.plugins import only_one
from vlexport.core.requirements import Requirement, installed_version, requirements_of
from vlexport.core.system_packages import hidden_package, in_virtualenv, system_folders
from vlexport.targets import offered_targets, open_target

BUILD = "build"
MODULES = {
    "torch": "torch", "onnx": "onnx", "onnx-ir": "onnx_ir", "onnxscript": "onnxscript", "onnxruntime": "onnxruntime",
    "coremltools": "coremltools", "tensorrt-rtx-cu12": "tensorrt_rtx",
}  # fmt: skip
"""Distribution → module, of all whose import is tried: they hold native code."""
SYSTEM_MODULES = ("tensorrt", "tensorrt_rtx")
RUNTIME_VARIANTS = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml")
"""Distributions that overwrite each other's files."""
PYTHONS = ((3, 10), (3, 13))
"""First and last version that is tested or resolved."""
FEW_BYTES = 2 << 30
"""A build writes the model several times over; less free space than this is worth a warning."""
LITTLE_MEMORY = 2 << 30
_FOR_DEVELOPERS = ("all", "dev", "samples")
_EMULATED = " (emulated: right numbers, no times)"
_EXTRAS_OF_WORK = ("", BUILD)


@dataclass(frozen=True)
class Surroundings:
    """What is asked of the machine, so that a test can answer.

    Attributes:
        requirements: Of the installed vlexport.
        import_failures: As :func:`vlexport.core.import_check.import_failures`.
        system_folders: Where the system's Python keeps modules, in a virtualenv that hides them; else nothing.
        free_bytes: Folder → free space.
    """

    requirements: Callable[[], tuple[Requirement, ...]] = lambda: requirements_of("vlexport")
    import_failures: Callable[[Sequence[str]], dict[str, str]] = lambda modules: import_failures(modules)
    system_folders: Callable[[], tuple[Path, ...]] = lambda: system_folders() if in_virtualenv() else ()
    free_bytes: Callable[[Path], int] = lambda folder: shutil.disk_usage(folder).free


def doctor(*, wanted: Sequence[str] = (), around: Surroundings | None = None) -> Health:
    """Look at this machine.

    Args:
        wanted: What must work: ``build``, or ids of targets.
        around: Where the answers come from.
    """
    around = around or Surroundings()
    packages, broken = _packages(around)
    targets, running = _targets()
    works = []
    builds = _lacking_for_build(around, broken)
    if not builds:
        works.append("build models")
    works += [f"run {name}{_EMULATED if how == 'emulated' else ''}" for name, how in running.items()]
    unmet = [f"build: {builds}" for name in wanted if name == BUILD and builds]
    unmet += [name for name in wanted if name != BUILD and name not in running]
    symptoms = (*_python(), *packages, *_variants(), *targets, *_hidden(around), *_folders(around), *_machine())
    return Health(works=tuple(works), symptoms=symptoms, unmet=tuple(unmet))


def _python() -> Iterator[Symptom]:
    version = ".".join(map(str, sys.version_info[:3]))
    where = "in a virtualenv" if sys.prefix != sys.base_prefix else "not in a virtualenv"
    first, last = (".".join(map(str, each)) for each in PYTHONS)
    if PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]:
        yield Symptom(about="Python", state="ok", found=f"{version}, {where}")
    else:
        yield Symptom(
            about="Python", state="warning", found=f"{version}: nobody has run vlexport with it",
            do=f"use Python {first} to {last}",
        )  # fmt: skip


def _packages(around: Surroundings) -> tuple[list[Symptom], dict[str, str]]:
    """What vlexport asks for: whether it is there, of a version that fits, and imports; and what of it is broken."""
    asked = around.requirements()
    if not asked:
        said = Symptom(
            about="vlexport", state="warning", found="is run from source: nothing says which versions it asks for",
            do="pip install -e .",
        )  # fmt: skip
        return [said], {}
    there = {each.name: MODULES[each.name] for each in asked if each.installed and each.name in MODULES}
    failed = around.import_failures(list(there.values()))
    found: list[Symptom] = []
    broken: dict[str, str] = {}
    for each in asked:
        symptom = _package(each, failed.get(there.get(each.name, ""), ""))
        if symptom is not None:
            found.append(symptom)
        if symptom is not None and symptom.state == "broken":
            broken[each.name] = symptom.found
    return found, broken


def _package(asked: Requirement, why: str) -> Symptom | None:
    """One requirement; None where there is nothing to say. ``why`` is what its import said."""
    name, bounds, extra = asked.name, asked.bounds, asked.extra
    if not asked.installed:
        if extra in _FOR_DEVELOPERS:
            return None
        pip = f"pip install 'vlexport{f'[{extra}]' if extra else ''}'"
        found = f"not installed, for {extra}" if extra else "not installed"
        return Symptom(about=name, state="absent" if extra else "broken", found=found, do=pip)
    if not asked.fits:
        found = f"{asked.installed}, and {bounds} is wanted"
        return Symptom(about=name, state="broken", found=found, do=f"pip install '{name}{bounds}'")
    if why:
        pip = f"pip install --force-reinstall '{name}{bounds}'"
        return Symptom(about=name, state="broken", found=f"{asked.installed} does not import: {why}", do=pip)
    return Symptom(about=name, state="ok", found=asked.installed) if name in MODULES else None


def _lacking_for_build(around: Surroundings, broken: dict[str, str]) -> str:
    """Why nothing can be built here; empty where it can."""
    asked = [each for each in around.requirements() if each.extra in _EXTRAS_OF_WORK]
    for each in asked:
        if each.name in broken:
            return f"{each.name} {broken[each.name]}"
        if not each.installed and each.name in MODULES:
            return f"{each.name} is not installed"
    lacking = [name for name in ("torch", "onnx", "onnxscript", "onnx_ir") if importlib.util.find_spec(name) is None]
    return f"{lacking[0]} is not installed" if lacking else ""


def _variants() -> Iterator[Symptom]:
    """Packages that bring the same module: the last one installed has overwritten the others."""
    there = [name for name in RUNTIME_VARIANTS if installed_version(name)]
    if len(there) > 1:
        yield Symptom(
            about="onnxruntime", state="warning", found=f"{' and '.join(there)} are installed over each other",
            do=f"pip uninstall {' '.join(there)}; pip install {there[-1]}",
        )  # fmt: skip


def _targets() -> tuple[list[Symptom], dict[str, str]]:
    """Every target, and those that run here with the worth of their times."""
    found: list[Symptom] = []
    running: dict[str, str] = {}
    for name, claims in offered_targets().items():
        try:
            offer = only_one(claims)
            probe = open_target(offer.name).probe()
        except VlexportError as error:
            found.append(Symptom(about=f"target {name}", state="broken", found=error.message, do=error.hint))
            continue
        if probe.available:
            running[name] = probe.timing
            found.append(
                Symptom(about=f"target {name}", state="ok", found=", ".join((probe.version, *probe.providers)))
            )
        else:
            found.append(Symptom(about=f"target {name}", state="absent", found="does not run here", do=probe.reason))
    return found, running


def _hidden(around: Surroundings) -> Iterator[Symptom]:
    """A TensorRT of the system that this virtualenv does not see."""
    folders = around.system_folders()
    for name in SYSTEM_MODULES:
        hidden = None if importlib.util.find_spec(name) is not None else hidden_package(name, folders)
        if hidden is None:
            continue
        shown = f"{name} {hidden.version}".strip()
        if hidden.fits:
            yield Symptom(
                about=name, state="warning",
                found=f"the system has {shown} in {hidden.folder}, and this virtualenv hides it",
                do="python3 -m venv --system-site-packages --clear .venv, then install vlexport into it again",
            )  # fmt: skip
        else:
            yield Symptom(
                about=name, state="warning",
                found=f"the system has {shown} in {hidden.folder}, for another version of Python than this one",
                do="make the virtualenv with the system's own Python: "
                "/usr/bin/python3 -m venv --system-site-packages .venv",
            )  # fmt: skip


def _folders(around: Surroundings) -> Iterator[Symptom]:
    """The cache and the folder for temporary files: can they be written, and is there room?"""
    if os.environ.get("VLEXPORT_CACHE") == OFF:
        yield Symptom(about="cache", state="ok", found="off: VLEXPORT_CACHE=off")
    else:
        try:
            yield _room("cache", Cache().folder, around, "set VLEXPORT_CACHE to a folder with more room, or to off")
        except VlexportError as error:
            yield Symptom(about="cache", state="broken", found=f"{error.message} ({error.where})", do=error.hint)
    yield _room("temporary files", Path(tempfile.gettempdir()), around, "set TMPDIR to a folder with more room")


def _room(about: str, folder: Path, around: Surroundings, do: str) -> Symptom:
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return Symptom(about=about, state="broken", found=f"{folder} cannot be written: {error.strerror}", do=do)
    free = around.free_bytes(folder)
    said = f"{folder}, {free / 1e9:.1f} GB free"
    if free < FEW_BYTES:
        return Symptom(about=about, state="warning", found=f"{said}: a build of a large model may not fit", do=do)
    return Symptom(about=about, state="ok", found=said)


def _machine() -> Iterator[Symptom]:
    """Processor, cores and memory."""
    machine = this_machine()
    flags = ", ".join(machine.instruction_set) or "no instruction set is known"
    yield Symptom(about="processor", state="ok", found=f"{machine.cpu}: {flags}")
    cores, quota = available_cores(), _quota()
    given = os.environ.get("OMP_NUM_THREADS")
    said = f"{cores} cores" + (f", OMP_NUM_THREADS={given}" if given else "")
    if quota is not None and quota < cores:
        yield Symptom(
            about="threads", state="warning", found=f"{said}, and this container may use {quota:g} of them at a time",
            do=f"--threads {max(1, int(quota))}",
        )  # fmt: skip
    else:
        yield Symptom(about="threads", state="ok", found=said)
    if machine.memory_pages:
        asked = machine.memory_pages == ASKED_FOR
        yield Symptom(
            about="memory pages", state="ok",
            found="huge for those who ask, as sessions of vlexport do" if asked else machine.memory_pages,
            do=f"set {VARIABLE}={REQUEST} where your model runs: CPUs run it faster so" if asked else "",
        )  # fmt: skip
    memory = available_memory_bytes()
    if memory is not None:
        few = memory < LITTLE_MEMORY
        yield Symptom(
            about="memory", state="warning" if few else "ok", found=f"{memory / 1e9:.1f} GB can still be had",
            do="a build holds the model several times over: close something" if few else "",
        )  # fmt: skip


def _quota() -> float | None:
    """Cores' worth of time that the control group allows; None where there is no limit or no group."""
    try:
        allowed, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return int(allowed) / int(period)
    except (OSError, ValueError):
        return None
