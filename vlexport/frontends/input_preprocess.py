"""Which input a preprocessing belongs to, and whether what it makes fits there."""

from __future__ import annotations

from pathlib import Path

from vlexport.core.artifact import Signature, TensorSpec
from vlexport.core.errors import DataError, nearest
from vlexport.core.preprocess import Preprocess, guess_spec, preprocess_from_spec
from vlexport.frontends.architecture import preprocess_from_timm
from vlexport.frontends.transformers_folder import preprocess_in


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
    made = _made(spec)
    chosen = images[name] if name is not None else next(iter(images.values()))
    if problem := mismatch(made, chosen):
        raise DataError("VLX0207", problem, where=f"--preprocess {spec}", hint=f'perhaps "{guess_spec(chosen)}"')
    return {chosen.name: made}


def _made(spec: str) -> Preprocess:
    if spec.startswith("timm:"):
        return preprocess_from_timm(spec.removeprefix("timm:"))
    if spec.startswith("transformers:"):
        found = preprocess_in(Path(spec.removeprefix("transformers:")))
        if found is None:
            raise DataError(
                "VLX0207", "the folder has no preprocessor_config.json", where=f"--preprocess {spec}",
                hint="name the folder that transformers' save_pretrained wrote",
            )  # fmt: skip
        return found
    return preprocess_from_spec(spec)


def mismatch(made: Preprocess, spec: TensorSpec) -> str:
    """Why what ``made`` gives cannot be this input, or an empty string."""
    pairs = zip(made.output_shape, spec.shape[1:], strict=True)
    if all(a == b for a, b in pairs if isinstance(a, int) and isinstance(b, int)):
        return ""
    gives, takes = ("×".join(map(str, shape)) for shape in (made.output_shape, spec.shape[1:]))
    return f"the preprocessing makes {gives}, input '{spec.name}' is {takes}"
