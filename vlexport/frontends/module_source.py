"""Weights and the architecture that they belong to become a captured model."""

from __future__ import annotations

import hashlib
import inspect
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from vlexport.core.config import BuildConfig
from vlexport.core.errors import UsageError
from vlexport.core.preprocess import Preprocess
from vlexport.frontends.architecture import (
    Architecture,
    architecture_identity,
    arguments_from_text,
    factory_from_text,
)
from vlexport.frontends.capture import Captured, capture, copied
from vlexport.frontends.checkpoint import read_weights
from vlexport.frontends.example_inputs import input_specs
from vlexport.frontends.fit_weights import fit_state_dict
from vlexport.frontends.input_preprocess import mismatch
from vlexport.frontends.model_file import kind_of
from vlexport.frontends.model_place import place_of
from vlexport.frontends.safetensors_file import weight_files
from vlexport.frontends.transformers_folder import weights_in
from vlexport.frontends.transformers_model import transformers_identity, transformers_model

TRANSFORMERS = "transformers:"
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Opened:
    """A captured module.

    Attributes:
        captured: Its Program.
        preprocess: Input name → how an image becomes that input.
        labels: Class names of the first output, if known.
        source_hash: SHA-256 of the content behind it.
        notes: What the user should know.
    """

    captured: Captured
    preprocess: dict[str, Preprocess]
    labels: tuple[str, ...]
    source_hash: str
    notes: tuple[str, ...]


def from_architecture(path: Path, arch: str, config: BuildConfig) -> Opened:
    """Weights of ``path`` in the architecture ``arch``.

    Args:
        path: A checkpoint, or a folder that holds one.
        arch: As ``--arch`` takes it.
        config: Arguments, entry of the checkpoint, inputs and consent.

    Raises:
        ModelFileError: VLX01xx.
        CaptureError: VLX03xx.
        UsageError: VLX0703 for an option that does not fit.
    """
    if arch.startswith(TRANSFORMERS):
        place = place_of(arch.removeprefix(TRANSFORMERS))
        opened = _from_transformers(path, place.path, config)
        return replace(opened, notes=(*place.notes, *opened.notes))
    file = weights_in(path) if path.is_dir() else path
    arguments = arguments_from_text(config.arch_arg)
    kind_of(file)  # what is no file is told before anybody's code runs
    made = factory_from_text(arch, arguments)
    expected = made.module.state_dict()
    weights = read_weights(file, weights_key=config.weights_key, expected=expected)
    fitted, notes = fit_state_dict(weights.tensors, expected)
    notes = (*weights.notes, *notes)
    del weights, expected
    if any(value.is_floating_point() and value.dtype.itemsize != 4 for value in fitted.values()):
        notes += ("half- or double-precision weights were loaded as float32",)
    made.module.float().load_state_dict(fitted)
    made.module.eval()
    del fitted  # the module has copies
    digest = digest_of(architecture_identity(arch, config.arch_arg), file)
    return captured_module(made, config, digest, notes, own=False)


def _from_transformers(path: Path, folder: Path, config: BuildConfig) -> Opened:
    if config.arch_arg:
        raise UsageError(
            "VLX0703", "--arch-arg goes with a factory; a transformers folder has its config.json", where="--arch-arg",
            hint="edit config.json",
        )  # fmt: skip
    file = weights_in(path) if path.is_dir() else path
    weights = read_weights(file, weights_key=config.weights_key)
    made, notes = transformers_model(folder, weights.tensors, allow_code=config.allow_code)
    digest = digest_of(transformers_identity(folder), file)
    return captured_module(made, config, digest, (*weights.notes, *notes), own=True)


def captured_module(
    made: Architecture, config: BuildConfig, source_hash: str, notes: tuple[str, ...], *, own: bool
) -> Opened:
    """Capture a module that has its weights.

    Args:
        made: The module in eval mode, and what is known about its input.
        config: ``--input`` wins over what is known.
        source_hash: Of the content behind it.
        notes: So far.
        own: The module may be given up; otherwise a copy is, since a factory may give the same module again.

    Raises:
        UsageError: VLX0703 when no input is known.
        CaptureError: VLX03xx.
    """
    inputs: Any = input_specs(config.input) or made.inputs
    if inputs is None:
        raise UsageError(
            "VLX0703", "the input's shape is not known", where="--input",
            hint=f"give it, as --input {_input_of(made.module)}=1x3x224x224",
        )  # fmt: skip
    steps, labels = made.preprocess, made.labels
    module: nn.Module = made.module if own else copied(made.module)
    del made  # if not its own, it goes before the capture copies it once more
    captured = capture(module, inputs, own=True)
    signature = captured.program.signature
    preprocess: dict[str, Preprocess] = {}
    images = [spec for spec in signature.inputs if len(spec.shape) == 4 and spec.dtype == "float32"]
    if steps is not None and images:
        if problem := mismatch(steps, images[0]):
            notes += (f"{problem}: none is recorded, give --preprocess",)
        else:
            preprocess[images[0].name] = steps
    first = signature.outputs[0].shape
    if labels and (len(first) != 2 or first[-1] != len(labels)):
        notes += (f"{len(labels)} labels do not belong to the first output, {signature.outputs[0].name}",)
        labels = ()
    return Opened(captured, preprocess, labels, source_hash, (*notes, *captured.notes))


def _input_of(module: nn.Module) -> str:
    """What ``forward`` calls its main input, as a model of transformers says, or its first one."""
    taken = inspect.signature(module.forward).parameters
    main = getattr(module, "main_input_name", None)
    named = (each.name for each in taken.values() if each.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return main if isinstance(main, str) and main in taken else next(named, "image")


def digest_of(identity: bytes, file: Path) -> str:
    """SHA-256 over what is known of the architecture and the content of a weights file and its shards."""
    digest = hashlib.sha256(identity)
    for each in weight_files(file):
        with each.open("rb") as content:
            while chunk := content.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()
