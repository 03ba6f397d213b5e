"""``vlexport.save``: a trained module becomes a file that opens without running anybody's code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from vlexport.core.errors import BundleError, CaptureError, DataError
from vlexport.core.preprocess import Preprocess
from vlexport.frontends.archive import write_archive
from vlexport.frontends.archive_targets import refusal_of
from vlexport.frontends.capture import Captured, Dynamic, Inputs, capture
from vlexport.frontends.input_preprocess import preprocess_of
from vlexport.ir import dialect, provenance
from vlexport.ir.draw import draw
from vlexport.ir.exported import exported_from_program
from vlexport.ir.program import Program


def save(
    model: nn.Module,
    path: str | Path,
    *,
    inputs: Inputs,
    preprocess: str | Mapping[str, str] | None = None,
    labels: Sequence[str] | None = None,
    dynamic: Dynamic = "auto",
    keep_example: bool = False,
    seed: int = 0,
) -> Captured:
    """Capture ``model`` and write it with its metadata.

    Args:
        model: A module in eval mode; it is not changed.
        path: File to write, usually ``model.pt``.
        inputs: Example inputs: a tensor, tensors in ``forward``'s order, or by argument name. Floating tensors are
            taken as float32; dim 0 is the batch.
        preprocess: How an image becomes the input: a SPEC (``resize=256:bicubic,crop=224,…`` or ``timm:NAME``), or one
            per input name.
        labels: Class names by index of the first output.
        dynamic: See :func:`vlexport.frontends.capture.capture`.
        keep_example: Store ``inputs`` themselves; by default a seeded draw takes their place, since photos may be
            private.
        seed: Seed of that draw.

    Returns:
        What was captured, with notes (for example why the batch is fixed).

    Raises:
        CaptureError: VLX0301 to VLX0306.
        DataError: VLX0207, VLX0208.
        BundleError: VLX0607 when the file cannot be written.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise BundleError("VLX0607", "the folder does not exist", where=str(target.parent), hint="create it first")
    captured = capture(model, inputs, dynamic=dynamic)
    program = captured.program
    _require_known_operators(program)
    steps = _preprocess(preprocess, program)
    _check_labels(labels, program)
    if not keep_example:
        sizes = {name: max(2, r.min) for name, r in program.signature.dims.items()}
        program.example = draw(program, torch.Generator().manual_seed(seed), sizes)
    metadata = {
        "signature": program.signature.model_dump(mode="json"),
        "preprocess": {name: each.model_dump(mode="json") for name, each in steps.items()},
        "preprocess_spec": {name: each.to_spec() for name, each in steps.items()},
        "labels": list(labels or ()),
        "notes": list(captured.notes),
    }
    write_archive(exported_from_program(program), metadata, target)
    return captured


def _require_known_operators(program: Program) -> None:
    """What the reader would refuse in a stranger's file is no danger here, only nothing that it knows."""
    for node in program.calls():
        if isinstance(node.target, torch._ops.OpOverload) and (why := refusal_of(f"torch.ops.{node.target}")):
            raise CaptureError(
                "VLX0303", f"vlexport does not know the operator {dialect.op_name(node)}: {why}",
                where=provenance.describe(node),
                hint="write that line with other operators, or build with --arch, which needs no model file",
            )  # fmt: skip


def _preprocess(given: str | Mapping[str, str] | None, program: Program) -> dict[str, Preprocess]:
    if given is None:
        return {}
    if isinstance(given, str):
        return preprocess_of(given, program.signature)
    return {
        name: only for key, spec in given.items() for name, only in preprocess_of(spec, program.signature, key).items()
    }


def _check_labels(labels: Sequence[str] | None, program: Program) -> None:
    if not labels:
        return
    classes = program.signature.outputs[0].shape[-1] if program.signature.outputs[0].shape else 0
    if classes != len(labels):
        raise DataError(
            "VLX0208", f"{len(labels)} labels were given for an output of {classes}", where="labels",
            hint="give one name per class, in the order of the model's outputs",
        )  # fmt: skip
