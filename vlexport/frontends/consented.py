"""Files that are code, opened because the user consented with ``--allow-code``: pickled modules, TorchScript, ``.pt2``.

This is the only place where a model file may run what it holds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from vlexport.core.config import BuildConfig
from vlexport.core.errors import CaptureError, ModelFileError, UsageError
from vlexport.core.numerics import relative_error
from vlexport.core.user_code import on_path
from vlexport.frontends import compat
from vlexport.frontends.architecture import Architecture
from vlexport.frontends.capture import TOLERANCE
from vlexport.frontends.checkpoint_entries import WEIGHT_KEYS
from vlexport.frontends.example_inputs import input_specs
from vlexport.frontends.module_source import Opened, captured_module, digest_of

_NOTE = "the file's own code was run (--allow-code)"


def open_pickled_module(path: Path, config: BuildConfig) -> Opened | None:
    """A module that was pickled whole, alone or as an entry of a checkpoint; None where there is none.

    Raises:
        ModelFileError: VLX0108 when its code fails.
        UsageError: VLX0703 when no input is known.
        CaptureError: VLX03xx.
    """
    compat.declare_torchvision_operators()  # the pickle may import timm

    def load() -> Any:
        with on_path(Path.cwd(), path.resolve().parent):
            return torch.load(path, weights_only=False, map_location="cpu")

    content = _ran(load, path)
    keys = (config.weights_key,) if config.weights_key is not None else WEIGHT_KEYS
    places = [content, *(content.get(key) for key in keys)] if isinstance(content, Mapping) else [content]
    module = next((each for each in places if isinstance(each, nn.Module)), None)
    if module is None:
        return None
    if isinstance(module, torch.fx.GraphModule):
        module.training = False
    else:
        module.eval()
    made = Architecture(module, getattr(module, "example_inputs", None))
    return captured_module(made, config, digest_of(b"", path), (_NOTE,), own=True)


def open_torchscript(path: Path, config: BuildConfig) -> Opened:
    """A TorchScript program, by torch's own converter; the result is compared with the program on the example.

    Raises:
        ModelFileError: VLX0108 when it cannot be loaded or converted.
        UsageError: VLX0703 without ``--input``.
        CaptureError: VLX03xx.
    """
    script: Any = _ran(lambda: torch.jit.load(str(path), map_location="cpu").eval(), path)
    names = [argument.name for argument in script.forward.schema.arguments][1:]
    given = input_specs(config.input)
    if not given or not set(given) <= set(names):
        raise UsageError(
            "VLX0703", f"TorchScript does not say what its inputs are like; they are called {', '.join(names)}",
            where="--input", hint=f"give them, as --input {names[0] if names else 'image'}=1x3x224x224",
        )  # fmt: skip
    called = [name for name in names if name in given]
    values = tuple(given[name] for name in called)
    if all(value.ndim and value.shape[0] == 1 for value in values):  # torch's converter takes a batch of 1 for fixed
        with contextlib.suppress(ModelFileError, CaptureError):
            return _converted(path, script, called, tuple(torch.cat([v, v.flip(-1)]) for v in values), config)
    return _converted(path, script, called, values, config)


def _converted(
    path: Path, script: Any, names: Sequence[str], values: tuple[torch.Tensor, ...], config: BuildConfig
) -> Opened:
    module: nn.Module = _ran(lambda: compat.module_from_torchscript(script.float(), values), path)
    for each in module.modules():
        each.training = False
    opened = captured_module(
        Architecture(module, values), config.model_copy(update={"input": ()}), digest_of(b"", path), (_NOTE,), own=True
    )
    program = opened.captured.program
    with torch.no_grad():
        wanted = compat.tensor_leaves(script(*values))
    for spec, found, expected in zip(program.signature.outputs, program.run(*values), wanted, strict=True):
        worst = relative_error(found.numpy(), expected.detach().numpy())
        if not worst <= TOLERANCE:
            raise CaptureError(
                "VLX0304", f"output {spec.name} of the converted TorchScript differs from it by {worst:.1e}",
                where=spec.name, hint="save the original module with vlexport.save",
            )  # fmt: skip
    renamed = (spec.model_copy(update={"name": n}) for spec, n in zip(program.signature.inputs, names, strict=True))
    program.signature = program.signature.model_copy(update={"inputs": tuple(renamed)})
    return opened


def load_exported(path: Path) -> ExportedProgram:
    """A ``.pt2`` by torch's own reader, which runs what it holds.

    Raises:
        ModelFileError: VLX0105 when torch cannot.
    """
    found: ExportedProgram = _ran(lambda: torch.export.load(path), path)
    return found


def _ran(load: Callable[[], Any], path: Path) -> Any:
    """Runs the file's own code."""
    try:
        return load()
    except (Exception, SystemExit) as error:  # what a file holds may raise anything
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ModelFileError(
            "VLX0108", f"the file cannot be opened even with its code: {type(error).__name__}: {reason}",
            where=str(path), hint="run where its modules can be imported, or save the model with vlexport.save",
        ) from error  # fmt: skip
