"""Architectures by name: ``timm:NAME``, or a factory in the user's own file (``FILE.py:FACTORY``)."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlexport.core.errors import CapabilityError, ModelFileError, UsageError, nearest
from vlexport.core.preprocess import Preprocess
from vlexport.core.preprocess_configs import preprocess_from_timm_config
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


def preprocess_from_timm(name: str) -> Preprocess:
    """Preprocessing recorded in timm for a model."""
    timm = _timm()
    _known(timm, name)
    return preprocess_from_timm_config(timm.get_pretrained_cfg(name).to_dict())


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


def _from_timm(name: str) -> Architecture:
    timm = _timm()
    _known(timm, name)
    module = timm.create_model(name, pretrained=False)
    config = {**timm.get_pretrained_cfg(name).to_dict(), **getattr(module, "pretrained_cfg", {})}
    size = tuple(config.get("input_size") or (3, 224, 224))
    example = torch.randn((1, *size), generator=torch.Generator().manual_seed(0))
    return Architecture(module, example, preprocess_from_timm_config(config))


def _from_file(file: Path, factory: str) -> Architecture:
    """Runs the user's own file, named on the command line."""
    where = f"--arch {file}:{factory}"
    if not file.is_file():
        raise ModelFileError("VLX0110", "the architecture's file does not exist", where=where, hint="check the path")
    spec = importlib.util.spec_from_file_location(f"vlexport_architecture_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    namespace = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(namespace)
        made = getattr(namespace, factory)()
    except AttributeError as error:
        names = [n for n in vars(namespace) if not n.startswith("_")]
        raise ModelFileError(
            "VLX0110", f"{file.name} has no '{factory}'{nearest(factory, names)}", where=where
        ) from error
    except Exception as error:  # the user's own code may raise anything
        raise ModelFileError(
            "VLX0110", f"{factory} fails: {type(error).__name__}: {error}", where=where,
            hint="the factory is called without arguments and returns an nn.Module",
        ) from error  # fmt: skip
    if not isinstance(made, nn.Module):
        raise ModelFileError("VLX0110", f"{factory} returns a {type(made).__name__}, not an nn.Module", where=where)
    return Architecture(made, getattr(made, "example_inputs", None))
