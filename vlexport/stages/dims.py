"""Which sizes an artifact takes: the saved model's own, narrowed by ``--dynamic`` and by what the target wants."""

from __future__ import annotations

import re
from collections.abc import Sequence

from vlexport.core.artifact import DimRange, Signature
from vlexport.core.config import BuildConfig
from vlexport.core.errors import UsageError, nearest
from vlexport.targets.base import Target

_FORM = re.compile(r"\d{1,9}(?::\d{1,9}){0,2}")
ONE = DimRange(min=1, max=1, opt=1)


def dims_of(config: BuildConfig, target: Target, signature: Signature) -> dict[str, DimRange]:
    """Dims that take fewer sizes than the saved model's, by name.

    Raises:
        UsageError: VLX0703 for a dim that does not exist, a range that is none, or one wider than what was saved;
            VLX0706 for a dim without upper bound on a target that wants one.
    """
    asked = _asked(config.dynamic, signature)
    found = dict(asked)
    for name in batch_dims(signature) if target.fixed_batch else ():
        if signature.dims[name].min <= 1:
            found.setdefault(name, ONE)
    for name, saved in signature.dims.items():
        if target.fixed_batch and found.get(name, saved).max is None:
            raise UsageError(
                "VLX0706",
                f"{target.id} wants an upper bound for dim '{name}'",
                where="--dynamic",
                hint=f"give its sizes, as --dynamic {name}={saved.min}:{max(saved.opt, saved.min)}:{saved.opt * 4}, "
                f"or one, as --dynamic {name}={saved.opt}",
            )
    return {name: each for name, each in found.items() if each != signature.dims[name]}


def batch_dims(signature: Signature) -> list[str]:
    """Names of dynamic dims that stand first in an input."""
    return list(dict.fromkeys(s.shape[0] for s in signature.inputs if s.shape and isinstance(s.shape[0], str)))


def _asked(texts: Sequence[str], signature: Signature) -> dict[str, DimRange]:
    found: dict[str, DimRange] = {}
    for text in texts:
        name, _, sizes = text.partition("=")
        if not _FORM.fullmatch(sizes):
            raise UsageError(
                "VLX0703",
                f"--dynamic {text} is not NAME=SIZE, NAME=MIN:MAX or NAME=MIN:OPT:MAX",
                where="--dynamic",
                hint="as --dynamic batch=1:4:16",
            )
        if name not in signature.dims:
            raise UsageError(
                "VLX0703", f"the model has no dynamic dim '{name}'{nearest(name, signature.dims)}", where="--dynamic",
                hint=f"it has: {', '.join(signature.dims) or 'none'}; vlexport.save(…, dynamic=…) makes dims dynamic",
            )  # fmt: skip
        if name in found:
            raise UsageError("VLX0703", f"--dynamic {name} is given twice", where="--dynamic", hint="give it once")
        numbers = [int(n) for n in sizes.split(":")]
        low, high = numbers[0], numbers[-1]
        saved = signature.dims[name]
        opt = numbers[1] if len(numbers) == 3 else min(max(saved.opt, low), high)
        if not 1 <= low <= opt <= high:
            raise UsageError(
                "VLX0703", f"--dynamic {text}: sizes must be 1 ≤ MIN ≤ OPT ≤ MAX", where="--dynamic",
                hint="as --dynamic batch=1:4:16",
            )  # fmt: skip
        if low < saved.min or (saved.max is not None and high > saved.max):
            upper = "up" if saved.max is None else f"to {saved.max}"
            raise UsageError(
                "VLX0703", f"--dynamic {text}: the model was saved for {name} from {saved.min} {upper}",
                where="--dynamic",
                hint="widening needs another capture: vlexport.save(model, …, dynamic={INPUT: {AXIS: "
                f'("{name}", {min(low, saved.min)}, {high})}}}})',
            )  # fmt: skip
        found[name] = DimRange(min=low, max=high, opt=opt)
    return found
