"""The optimization profile: smallest, best and largest shape of every input with dynamic dims."""

from __future__ import annotations

from vlexport.core.artifact import DimRange, Frozen, Signature


class InputRange(Frozen):
    """Shapes that an engine takes for one input.

    Attributes:
        name: Of the input.
        min: Smallest sizes.
        opt: Sizes that the engine is tuned for.
        max: Largest sizes.
    """

    name: str
    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


def unbounded_dims(signature: Signature) -> tuple[str, ...]:
    """Dynamic dims of inputs without a largest size, which no engine can be compiled for."""
    used = {dim for spec in signature.inputs for dim in spec.shape if isinstance(dim, str)}
    return tuple(name for name, found in signature.dims.items() if name in used and found.max is None)


def profile_of(signature: Signature) -> tuple[InputRange, ...]:
    """One range per input with dynamic dims; a dim without a largest size gets its ``opt`` (or ``min``) there."""
    return tuple(
        InputRange(
            name=spec.name,
            min=_sizes(spec.shape, {name: found.min for name, found in signature.dims.items()}),
            opt=_sizes(spec.shape, {name: _best(found) for name, found in signature.dims.items()}),
            max=_sizes(spec.shape, {name: _largest(found) for name, found in signature.dims.items()}),
        )
        for spec in signature.inputs
        if any(isinstance(dim, str) for dim in spec.shape)
    )


def _best(found: DimRange) -> int:
    """``opt`` within the range: a dim of 2 and more keeps the default ``opt`` of 1."""
    return min(max(found.opt, found.min), _largest(found))


def _largest(found: DimRange) -> int:
    return max(found.opt, found.min) if found.max is None else found.max


def _sizes(shape: tuple[int | str, ...], dims: dict[str, int]) -> tuple[int, ...]:
    return tuple(dims[dim] if isinstance(dim, str) else dim for dim in shape)
