"""Architectures by name: ``timm:NAME``, or a factory in the user's own file (``FILE.py:FACTORY``)."""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlexport.core.errors import CapabilityError, ModelFileError, UsageError, nearest
from vlexport.core.preprocess import Preprocess
from vlexport.core.preprocess_configs import preprocess_from_timm_config
from vlexport.core.user_code import import_user_file
from vlexport.frontends import compat


@dataclass(frozen=True)
class Architecture:
    """A module with fresh weights and what is known about its input.

    Attributes:
        module: The module, in whatever mode the factory left it.
        inputs: Example inputs, or None when they must be given.
        preprocess: How an image becomes the input, if known.
        labels: Class names, if known.
    """

    module: nn.Module
    inputs: Any = None
    preprocess: Preprocess | None = None
    labels: tuple[str, ...] = ()


def factory_from_text(text: str) -> Architecture:
    """Make the architecture that ``--arch`` names.

    Raises:
        UsageError: VLX0703 when the text is no known form.
        ModelFileError: VLX0110 when it cannot be made.
        CapabilityError: VLX0501 when timm is not installed.
    """
    if text.startswith("timm:"):
        return _from_timm(text.removeprefix("timm:"))
    file, separator, factory = text.rpartition(":")
    if separator and file.endswith(".py"):
        return _from_file(Path(file), factory)
    raise UsageError(
        "VLX0703", f"--arch {text} is neither timm:NAME nor FILE.py:FACTORY", where="--arch",
        hint="as --arch timm:deit_small_patch16_224",
    )  # fmt: skip


def architecture_identity(text: str) -> bytes:
    """What ``--arch`` names, for a content hash: timm's name, or the factory's name and its file's content."""
    file, separator, factory = text.rpartition(":")
    if separator and file.endswith(".py"):
        return factory.encode() + b"\0" + hashlib.sha256(Path(file).read_bytes()).digest()
    return text.encode() + b"\0"


def preprocess_from_timm(name: str) -> Preprocess:
    """Preprocessing recorded in timm for a model."""
    timm = _timm()
    _known(timm, name)
    return preprocess_from_timm_config(_pretrained_config(timm, name))


def _timm() -> Any:
    compat.declare_torchvision_operators()
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise CapabilityError("VLX0501", "timm is not installed", where="--arch", hint="pip install timm") from error


def _known(timm: Any, name: str) -> None:
    base = name.partition(".")[0]
    if not timm.is_model(base):
        raise ModelFileError(
            "VLX0110", f"timm has no model '{base}'{nearest(base, timm.list_models())}", where=f"--arch timm:{name}",
            hint="timm.list_models() lists them",
        )  # fmt: skip


def _pretrained_config(timm: Any, name: str) -> dict[str, Any]:
    """What timm records about a model, empty when it records nothing."""
    try:
        found = timm.get_pretrained_cfg(name)
    except RuntimeError as error:  # timm's answer to an unknown tag
        base, _, tag = name.partition(".")
        known = [each.partition(".")[2] for each in timm.list_pretrained(f"{base}.*")]
        raise ModelFileError(
            "VLX0110", f"timm has no weights '{tag}' for '{base}'{nearest(tag, known)}", where=f"--arch timm:{name}",
            hint=f"known: {', '.join(known) or 'none'}",
        ) from error  # fmt: skip
    return dict(found.to_dict()) if found is not None else {}


def _from_timm(name: str) -> Architecture:
    timm = _timm()
    _known(timm, name)
    recorded = _pretrained_config(timm, name)
    module = timm.create_model(name, pretrained=False)
    config = {**recorded, **getattr(module, "pretrained_cfg", {})}
    size = tuple(config.get("input_size") or (3, 224, 224))
    example = torch.randn((1, *size), generator=torch.Generator().manual_seed(0))
    return Architecture(module, example, preprocess_from_timm_config(config))


def _from_file(file: Path, factory: str) -> Architecture:
    """Runs the user's own file, named on the command line."""
    where = f"--arch {file}:{factory}"
    if not file.is_file():
        raise ModelFileError("VLX0110", "the architecture's file does not exist", where=where, hint="check the path")
    compat.declare_torchvision_operators()  # the file may import timm
    try:
        module = import_user_file(file)
    except (Exception, SystemExit) as error:  # the user's own code may raise anything
        raise ModelFileError(
            "VLX0110", f"importing {file.name} fails: {type(error).__name__}: {error}", where=where,
            hint="the file is imported as a script is: modules beside it can be imported by it",
        ) from error  # fmt: skip
    found = getattr(module, factory, None)
    if not callable(found):
        names = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        raise ModelFileError(
            "VLX0110", f"{file.name} has no function '{factory}'{nearest(factory, names)}", where=where,
            hint=f"functions: {', '.join(names) or 'none'}",
        )  # fmt: skip
    try:
        made = found()
    except (Exception, SystemExit) as error:  # the user's own code may raise anything
        raise ModelFileError(
            "VLX0110", f"{factory} fails: {type(error).__name__}: {error}", where=where,
            hint="the factory is called without arguments and returns an nn.Module",
        ) from error  # fmt: skip
    if not isinstance(made, nn.Module):
        raise ModelFileError(
            "VLX0110", f"{factory} returns a {type(made).__name__}, not an nn.Module", where=where,
            hint="the factory is called without arguments and returns an nn.Module",
        )  # fmt: skip
    return Architecture(made, getattr(made, "example_inputs", None))
