"""Architectures by name: timm's, or a factory of the user's own, in a file or in an importable package."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from vlexport.core.code_identity import code_digest
from vlexport.core.errors import CapabilityError, ModelFileError, UsageError, nearest
from vlexport.core.preprocess import Preprocess
from vlexport.core.preprocess_configs import preprocess_from_timm_config
from vlexport.core.user_code import code_folders, import_user_file, import_user_module, on_path
from vlexport.frontends import compat
from vlexport.frontends.named_paths import require_factory_file

WEIGHT_ARGUMENTS = ("pretrained", "checkpoint_path")
"""Arguments of ``timm.create_model`` that make it load or fetch weights, by readers of its own."""

_DOTTED = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*")


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


def factory_from_text(text: str, arguments: Mapping[str, Any] | None = None) -> Architecture:
    """Make the architecture that ``--arch`` names: ``timm:NAME``, ``FILE.py:FACTORY`` or ``package.module:FACTORY``.

    Args:
        text: What to make.
        arguments: Keyword arguments of the factory.

    Raises:
        UsageError: VLX0703 when the text is no known form.
        ModelFileError: VLX0110 when it cannot be made.
        CapabilityError: VLX0501 when timm is not installed.
    """
    if text.startswith("timm:"):
        return _from_timm(text.removeprefix("timm:"), arguments or {})
    place, separator, factory = text.rpartition(":")
    if separator and place.endswith(".py"):
        file = Path(place)
        require_factory_file(text)
        return _from_code(lambda: import_user_file(file), code_folders(file), file.name, factory, arguments or {}, text)
    if separator and _DOTTED.fullmatch(place):
        here = Path.cwd()
        return _from_code(lambda: import_user_module(place, here), (here,), place, factory, arguments or {}, text)
    raise UsageError(
        "VLX0703", f"--arch {text} is none of timm:NAME, transformers:DIR, FILE.py:FACTORY, package.module:FACTORY",
        where="--arch", hint="as --arch timm:deit_small_patch16_224",
    )  # fmt: skip


def architecture_identity(text: str, arguments: Sequence[str] = ()) -> bytes:
    """What ``--arch`` and its arguments name, for a content hash: a name, and the content of the code behind it.

    Call it once the architecture was made: what lies in a package of the current directory is known by then.
    """
    given = b"\0".join(each.encode() for each in sorted(arguments))
    place, separator, factory = text.rpartition(":")
    if text.startswith("timm:") or not separator:
        return text.encode() + b"\0" + given
    return factory.encode() + b"\0" + _code_content(place) + given


def _code_content(place: str) -> bytes:
    """A digest of the file, or of all Python files of the package that it is part of."""
    if not place.endswith(".py"):
        code_digest.cache_clear()
        with on_path(Path.cwd()):
            return (code_digest(place.partition(".")[0]) or place).encode()
    root, *inner = code_folders(Path(place))
    if not inner:
        return hashlib.sha256(Path(place).read_bytes()).digest()
    whole = hashlib.sha256()
    package = root / Path(place).resolve().relative_to(root).parts[0]
    for file in sorted(package.rglob("*.py")):
        whole.update(file.relative_to(root).as_posix().encode() + b"\0")
        whole.update(hashlib.sha256(file.read_bytes()).digest())
    return whole.digest() + Path(place).name.encode()


def arguments_from_text(pairs: Sequence[str]) -> dict[str, Any]:
    """``K=V`` texts as keyword arguments: a Python literal where V is one, else text.

    Raises:
        UsageError: VLX0703.
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key.isidentifier():
            raise UsageError(
                "VLX0703", f"--arch-arg {pair} is not NAME=VALUE", where="--arch-arg", hint="as --arch-arg depth=12"
            )
        if key in found:
            raise UsageError("VLX0703", f"--arch-arg {key} is given twice", where="--arch-arg", hint="give each once")
        found[key] = _literal(value)
    return found


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


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


def _from_timm(name: str, arguments: Mapping[str, Any]) -> Architecture:
    timm = _timm()
    _known(timm, name)
    recorded = _pretrained_config(timm, name)
    if wrong := next((each for each in WEIGHT_ARGUMENTS if each in arguments), None):
        raise UsageError(
            "VLX0703", f"--arch-arg {wrong} would fetch weights, or load others than MODEL's", where="--arch-arg",
            hint="leave it out",
        )  # fmt: skip
    try:
        module = timm.create_model(name, pretrained=False, **arguments)
    except (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ModelFileError(
            "VLX0110", f"timm cannot make '{name}' so: {type(error).__name__}: {error}", where=f"--arch timm:{name}",
            hint="check --arch-arg" if arguments else "",
        ) from error  # fmt: skip
    config = {**recorded, **getattr(module, "pretrained_cfg", {})}
    size = tuple(config.get("input_size") or (3, 224, 224))
    example = torch.randn((1, *size), generator=torch.Generator().manual_seed(0))
    return Architecture(module, example, preprocess_from_timm_config(config))


def _from_code(
    imported: Callable[[], ModuleType],
    folders: tuple[Path, ...],
    what: str,
    factory: str,
    arguments: Mapping[str, Any],
    text: str,
) -> Architecture:
    """Runs the user's own code, named on the command line."""
    where = f"--arch {text}"
    compat.declare_torchvision_operators()  # the code may import timm
    try:
        module = imported()
    except (Exception, SystemExit) as error:  # the user's own code may raise anything
        raise ModelFileError(
            "VLX0110", f"importing {what} fails: {type(error).__name__}: {error}", where=where,
            hint="a file is imported as a script is, or as part of its package; a package from the current directory "
            "or from what is installed",
        ) from error  # fmt: skip
    found = getattr(module, factory, None)
    if not callable(found):
        names = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        raise ModelFileError(
            "VLX0110", f"{what} has no function '{factory}'{nearest(factory, names)}", where=where,
            hint=f"functions: {', '.join(names) or 'none'}",
        )  # fmt: skip
    hint = "the factory is called with the arguments of --arch-arg alone and returns an nn.Module"
    try:
        with on_path(*folders):
            made = found(**arguments)
    except (Exception, SystemExit) as error:  # the user's own code may raise anything
        raise ModelFileError(
            "VLX0110", f"{factory} fails: {type(error).__name__}: {error}", where=where, hint=hint
        ) from error
    if not isinstance(made, nn.Module):
        raise ModelFileError(
            "VLX0110", f"{factory} returns a {type(made).__name__}, not an nn.Module", where=where, hint=hint
        )
    return Architecture(made, getattr(made, "example_inputs", None))
