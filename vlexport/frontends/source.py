"""MODEL, whatever it is, becomes a Source: a Program with its preprocessing, labels and content hash."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.export import ExportedProgram

from vlexport.core.artifact import Array, Signature
from vlexport.core.baked_values import Baked, baked
from vlexport.core.config import BuildConfig
from vlexport.core.errors import ModelFileError, UsageError
from vlexport.core.preprocess import Preprocess
from vlexport.frontends.archive import read_archive
from vlexport.frontends.checkpoint import read_weights
from vlexport.frontends.consented import open_pickled_module, open_torchscript
from vlexport.frontends.exported_file import open_exported_file
from vlexport.frontends.input_preprocess import preprocess_of
from vlexport.frontends.model_file import Kind, kind_of
from vlexport.frontends.model_place import place_of
from vlexport.frontends.module_source import TRANSFORMERS, Opened, from_architecture
from vlexport.frontends.transformers_folder import is_transformers_folder
from vlexport.ir.bake import with_baked
from vlexport.ir.exported import program_from_exported
from vlexport.ir.input_arithmetic import with_arithmetic
from vlexport.ir.outputs import stripped, with_outputs
from vlexport.ir.program import Program


@dataclass(frozen=True)
class Source:
    """A model, ready for passes.

    Attributes:
        program: The captured graph.
        preprocess: Input name → how an image becomes that input.
        labels: Class names of the first output, if known.
        source_hash: SHA-256 of the content of the model file; with --arch, of the weights and of timm's name or the
            factory's file and name. Never of a path.
        notes: What the user should know.
    """

    program: Program
    preprocess: dict[str, Preprocess]
    labels: tuple[str, ...]
    source_hash: str
    notes: tuple[str, ...] = ()

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run in PyTorch on numpy arrays, by public names."""
        signature = self.program.signature
        found = self.program.run(*(torch.from_numpy(inputs[spec.name]) for spec in signature.inputs))
        return {spec.name: value.numpy() for spec, value in zip(signature.outputs, found, strict=True)}

    def with_outputs(self, names: Sequence[str]) -> Source:
        """The same with these outputs alone, in this order, and the inputs that they need.

        Raises:
            UsageError: VLX0703 for an output that the model does not have.
        """
        before = self.program.signature
        program = with_outputs(self.program, names)
        kept = [spec.name for spec in program.signature.inputs]
        unread = [spec.name for spec in before.inputs if spec.name not in kept]
        notes = [f"the chosen outputs do not read {', '.join(unread)}: left out"] if unread else []
        went = stripped(self.program, program)
        if went.calls:
            notes.append(f"left out with the other outputs: {went}")
        labels = self.labels if program.signature.outputs[0].name == before.outputs[0].name else ()
        preprocess = {name: each for name, each in self.preprocess.items() if name in kept}
        return Source(program, preprocess, labels, self.source_hash, (*self.notes, *notes))

    def with_baked(self, given: Sequence[Baked]) -> Source:
        """The same with inputs that are constants.

        Raises:
            UsageError: VLX0703 for an input that the model does not have, VLX0707 for a value that does not fit.
        """
        program, notes = with_baked(self.program, given)
        specs = {spec.name: spec for spec in self.program.signature.inputs}
        said = ", ".join(f"{each.name} ({specs[each.name].dtype})" for each in given)
        preprocess = {k: each for k, each in self.preprocess.items() if k not in {each.name for each in given}}
        return replace(
            self,
            program=program,
            preprocess=preprocess,
            notes=(*self.notes, f"constant in the artifact: {said}", *notes),
        )

    def with_arithmetic(self) -> Source:
        """The same whose graph takes off the mean and divides by std, and whose preprocessing does not.

        The pass fold-preprocess puts both into the first convolution.

        Raises:
            UsageError: VLX0708 without preprocessing, or for an input that it makes no channels of.
        """
        specs = {spec.name: spec for spec in self.program.signature.inputs}
        if not self.preprocess:
            raise UsageError(
                "VLX0708", "the model has no recorded preprocessing", where="--fold-preprocess",
                hint="give --preprocess, or leave --fold-preprocess out",
            )  # fmt: skip
        for name, how in self.preprocess.items():
            shape, dtype = specs[name].shape, specs[name].dtype
            if len(shape) < 3 or shape[1] != how.channels or not dtype.startswith("float"):
                raise UsageError(
                    "VLX0708", f"input {name} is {dtype}[{','.join(map(str, shape))}], not a batch of images of "
                    f"{how.channels} channels", where="--fold-preprocess", hint="leave --fold-preprocess out",
                )  # fmt: skip
        arithmetic = {name: _arithmetic(how) for name, how in self.preprocess.items()}
        program = with_arithmetic(self.program, arithmetic)
        program.example = tuple(
            _before(value, *arithmetic[spec.name]) if spec.name in arithmetic else value
            for value, spec in zip(program.example, program.signature.inputs, strict=True)
        )
        left = {name: how.scale_only for name, how in self.preprocess.items()}
        note = f"mean and std are part of the model: {', '.join(left)} takes pixels times scale"
        return replace(self, program=program, preprocess=left, notes=(*self.notes, note))


def _arithmetic(how: Preprocess) -> tuple[Array, Array]:
    """Factor and offset of every channel: what mean and std do."""
    mean, std = (np.broadcast_to(np.array(each, np.float64), (how.channels,)) for each in (how.mean, how.std))
    return 1.0 / std, -mean / std


def _before(value: torch.Tensor, factor: Array, offset: Array) -> torch.Tensor:
    """What an example was before ``factor · x + offset``."""
    shape = (1, -1, *[1] * (value.ndim - 2))
    return ((value.double() - torch.from_numpy(offset).reshape(shape)) / torch.from_numpy(factor).reshape(shape)).to(
        value.dtype
    )


def open_source(config: BuildConfig) -> Source:
    """Open MODEL as the config says.

    Raises:
        ModelFileError: VLX01xx.
        CaptureError: VLX03xx.
        UsageError: VLX0703 for an option that does not fit.
    """
    place = place_of(config.model)
    source = _opened(place.path, config)
    source = replace(source, notes=(*place.notes, *source.notes))
    if config.outputs:
        source = source.with_outputs(config.outputs)
    if config.bake:
        source = source.with_baked([baked(text) for text in config.bake])
    if config.preprocess:
        source = replace(source, preprocess=preprocess_of(config.preprocess, source.program.signature))
    return source.with_arithmetic() if config.fold_preprocess else source


def _opened(path: Path, config: BuildConfig) -> Source:
    arch = config.arch
    if arch is None and is_transformers_folder(path):
        arch = f"{TRANSFORMERS}{path}"
    if arch is not None:
        if not is_transformers_folder(path):
            kind_of(path)  # refuses what is no file; a folder is one of transformers' or none
        return _from_opened(from_architecture(path, arch, config))
    kind = kind_of(path)
    if config.arch_arg:
        raise UsageError("VLX0703", "--arch-arg goes with --arch", where="--arch-arg", hint="leave it out")
    if kind in ("checkpoint", "torchscript"):
        return _from_code(path, config, kind)
    if config.input:
        raise UsageError(
            "VLX0703",
            "--input goes with --arch; a saved model has its own inputs",
            where="--input",
            hint="leave it out",
        )
    if kind in ("safetensors", "shards"):
        raise _needs_architecture(path)
    if kind == "foreign-pt2":
        found = open_exported_file(path, allow_code=config.allow_code)
        return Source(found.program, {}, (), found.source_hash, found.notes)
    return open_archive(path)


def _from_code(path: Path, config: BuildConfig, kind: Kind) -> Source:
    """Pickles and TorchScript without ``--arch``: weights want an architecture, whole models consent."""
    if kind == "torchscript":
        if config.allow_code:
            return _from_opened(open_torchscript(path, config))
        raise ModelFileError(
            "VLX0108", "this file is TorchScript, which carries code", where=path.name,
            hint="save the original module with vlexport.save, or its state_dict and give --arch; "
            "--allow-code converts a file that you trust",
        )  # fmt: skip
    try:
        read_weights(path, weights_key=config.weights_key)  # a clearer error first, when it is damaged or holds code
    except ModelFileError as error:
        made = open_pickled_module(path, config) if config.allow_code and error.code == "VLX0108" else None
        if made is None:
            raise
        return _from_opened(made)
    raise _needs_architecture(path)


def _needs_architecture(path: Path) -> ModelFileError:
    return ModelFileError(
        "VLX0107", "this file holds weights, not a model", where=path.name,
        hint="name the architecture: --arch timm:NAME, FILE.py:FACTORY, package.module:FACTORY or transformers:DIR",
    )  # fmt: skip


def _from_opened(made: Opened) -> Source:
    return Source(made.captured.program, made.preprocess, made.labels, made.source_hash, made.notes)


def open_archive(path: Path) -> Source:
    """Open a file that ``vlexport.save`` wrote."""
    archive = read_archive(path)
    try:
        signature = Signature.model_validate(archive.metadata["signature"])
        preprocess = {k: Preprocess.model_validate(v) for k, v in archive.metadata["preprocess"].items()}
        labels = tuple(map(str, archive.metadata["labels"]))
        notes = tuple(map(str, archive.metadata["notes"]))
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ModelFileError(
            "VLX0105", f"vlexport.json inside the file is wrong: {str(error).splitlines()[0]}", where=path.name,
            hint="save the model again",
        ) from error  # fmt: skip
    exported = archive.exported_program()
    if not _fits(exported, signature) or not set(preprocess) <= {spec.name for spec in signature.inputs}:
        raise ModelFileError(
            "VLX0105",
            "vlexport.json inside the file does not fit its graph",
            where=path.name,
            hint="save the model again",
        )
    return Source(program_from_exported(exported, signature), preprocess, labels, archive.source_hash, notes)


def _fits(exported: ExportedProgram, signature: Signature) -> bool:
    """Whether names, dtypes and shapes that ``vlexport.json`` claims are those of the graph beside it."""
    names, results = exported.graph_signature.user_inputs, exported.graph_signature.user_outputs
    if len(names) != len(signature.inputs) or len(results) != len(signature.outputs):
        return False
    values = {node.name: node.meta.get("val") for node in exported.graph.nodes}
    for spec, name in zip(signature.outputs, results, strict=True):
        value = values.get(str(name))
        if not isinstance(value, torch.Tensor) or str(value.dtype) != f"torch.{spec.dtype}":
            return False
        if value.ndim != len(spec.shape) or any(
            isinstance(claimed, int) and claimed != size for size, claimed in zip(value.shape, spec.shape, strict=True)
        ):
            return False
    for spec, name in zip(signature.inputs, names, strict=True):
        value = values[str(name)]
        if str(value.dtype) != f"torch.{spec.dtype}" or value.ndim != len(spec.shape):
            return False
        for size, claimed in zip(value.shape, spec.shape, strict=True):
            dynamic = isinstance(size, torch.SymInt)
            if dynamic != isinstance(claimed, str) or (claimed not in signature.dims if dynamic else claimed != size):
                return False
    return True
