"""MODEL, whatever it is, becomes a Source: a Program with its preprocessing, labels and content hash."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from vlexport.core.artifact import Array, Signature, TensorSpec
from vlexport.core.config import BuildConfig
from vlexport.core.errors import DataError, ModelFileError, UsageError, nearest
from vlexport.core.preprocess import Preprocess, guess_spec, preprocess_from_spec
from vlexport.frontends.architecture import architecture_identity, factory_from_text, preprocess_from_timm
from vlexport.frontends.archive import read_archive
from vlexport.frontends.capture import capture, copied
from vlexport.frontends.checkpoint import fit_state_dict, read_state_dict
from vlexport.frontends.model_file import kind_of
from vlexport.ir.exported import program_from_exported
from vlexport.ir.program import Program

_CHUNK = 1 << 20


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


def open_source(config: BuildConfig) -> Source:
    """Open MODEL as the config says.

    Raises:
        ModelFileError: VLX01xx.
        CaptureError: VLX03xx.
        UsageError: VLX0703 for an option that does not fit.
    """
    path = Path(config.model)
    kind = kind_of(path)
    if config.input and config.arch is None:
        raise UsageError(
            "VLX0703",
            "--input goes with --arch; a saved model has its own inputs",
            where="--input",
            hint="leave it out",
        )
    if config.arch is not None:
        source = _from_architecture(path, config)
    elif kind == "vlexport-archive":
        source = open_archive(path)
    elif kind in ("checkpoint", "safetensors"):
        read_state_dict(path, weights_key=config.weights_key)  # a clearer error first, when it is damaged or holds code
        raise ModelFileError(
            "VLX0107", "this file holds weights, not a model", where=path.name,
            hint="name the architecture: --arch timm:NAME or --arch FILE.py:FACTORY",
        )  # fmt: skip
    elif kind == "torchscript":
        raise ModelFileError(
            "VLX0108", "this file is TorchScript, which carries code", where=path.name,
            hint="save the original module with vlexport.save, or its state_dict and give --arch",
        )  # fmt: skip
    else:
        source = open_archive(path)
    if not config.preprocess:
        return source
    chosen = preprocess_of(config.preprocess, source.program.signature)
    return Source(source.program, chosen, source.labels, source.source_hash, source.notes)


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


def preprocess_of(spec: str, signature: Signature, name: str | None = None) -> dict[str, Preprocess]:
    """Preprocessing from ``SPEC`` for the image input ``name``, by default the model's first.

    Raises:
        DataError: VLX0207 when the spec is not understood, does not make what the input takes, or there is no such
            image input.
    """
    images = {s.name: s for s in signature.inputs if len(s.shape) == 4 and s.dtype == "float32"}
    if name is not None and name not in images:
        known = {s.name for s in signature.inputs}
        what = "takes no image (float32, N×C×H×W)" if name in known else f"is no input{nearest(name, known)}"
        raise DataError(
            "VLX0207", f"preprocess names '{name}', which {what}", where="preprocess",
            hint=f"image inputs: {', '.join(images) or 'none'}",
        )  # fmt: skip
    if not images:
        raise DataError(
            "VLX0207", "the model has no image input (float32, N×C×H×W) to preprocess", where="--preprocess"
        )
    made = preprocess_from_timm(spec.removeprefix("timm:")) if spec.startswith("timm:") else preprocess_from_spec(spec)
    chosen = images[name] if name is not None else next(iter(images.values()))
    if problem := _mismatch(made, chosen):
        raise DataError("VLX0207", problem, where=f"--preprocess {spec}", hint=f'perhaps "{guess_spec(chosen)}"')
    return {chosen.name: made}


def _mismatch(made: Preprocess, spec: TensorSpec) -> str:
    """Why what ``made`` gives cannot be this input, or an empty string."""
    pairs = zip(made.output_shape, spec.shape[1:], strict=True)
    if all(a == b for a, b in pairs if isinstance(a, int) and isinstance(b, int)):
        return ""
    gives, takes = ("×".join(map(str, shape)) for shape in (made.output_shape, spec.shape[1:]))
    return f"the preprocessing makes {gives}, input '{spec.name}' is {takes}"


def input_specs(texts: Sequence[str]) -> dict[str, torch.Tensor]:
    """Example inputs from ``NAME=SHAPE[:dtype]`` texts (``image=1x3x224x224``), seeded normal or zero integers.

    Raises:
        UsageError: VLX0703.
    """
    generator = torch.Generator().manual_seed(0)
    found: dict[str, torch.Tensor] = {}
    dtypes: dict[str, Any] = {"float32": torch.float32, "int64": torch.int64, "int32": torch.int32, "bool": torch.bool}
    for text in texts:
        name, _, rest = text.partition("=")
        shape_text, _, dtype_name = rest.partition(":")
        dtype_name = dtype_name or "float32"
        sizes = shape_text.replace(",", "x").split("x")
        if not name or not all(s.isascii() and s.isdecimal() and int(s) > 0 for s in sizes):
            raise UsageError(
                "VLX0703",
                f"--input {text} is not NAME=SHAPE[:dtype]",
                where="--input",
                hint="as --input image=1x3x224x224",
            )
        if dtype_name not in dtypes:
            raise UsageError(
                "VLX0703", f"--input {text}: no dtype '{dtype_name}'{nearest(dtype_name, dtypes)}", where="--input"
            )
        if name in found:
            raise UsageError("VLX0703", f"--input {name} is given twice", where="--input", hint="give each input once")
        shape = tuple(map(int, sizes))
        dtype = dtypes[dtype_name]
        value = torch.randn(shape, generator=generator) if dtype is torch.float32 else torch.zeros(shape, dtype=dtype)
        found[name] = value
    return found


def _from_architecture(path: Path, config: BuildConfig) -> Source:
    assert config.arch is not None
    state = read_state_dict(path, weights_key=config.weights_key)
    made = factory_from_text(config.arch)
    fitted, notes = fit_state_dict(state, made.module.state_dict())
    if any(value.is_floating_point() and value.dtype is not torch.float32 for value in fitted.values()):
        notes += ("half- or double-precision weights were loaded as float32",)
    made.module.float().load_state_dict(fitted)
    made.module.eval()
    del state, fitted  # the module has copies
    given = input_specs(config.input)
    inputs: Any = given or made.inputs
    if inputs is None:
        raise UsageError(
            "VLX0703", "the input's shape is not known", where="--input", hint="give it, as --input image=1x3x224x224"
        )
    steps, labels = made.preprocess, made.labels
    module = copied(made.module)  # a factory may give the same module again
    del made  # if not, it goes before the capture copies it once more
    captured = capture(module, inputs, own=True)
    preprocess: dict[str, Preprocess] = {}
    if steps is not None:
        spec = captured.program.signature.inputs[0]
        if problem := _mismatch(steps, spec):
            notes += (f"{problem}: none is recorded, give --preprocess",)
        else:
            preprocess[spec.name] = steps
    digest = hashlib.sha256(architecture_identity(config.arch))
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return Source(captured.program, preprocess, labels, digest.hexdigest(), (*notes, *captured.notes))
