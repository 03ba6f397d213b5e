"""Whether the numeric gate's probes fit in memory, estimated before anything is drawn or run."""

from __future__ import annotations

from collections.abc import Mapping

from vlexport.core.artifact import DimRange
from vlexport.core.errors import InputError
from vlexport.core.memory import available_memory_bytes
from vlexport.frontends.sources import Sources
from vlexport.ir.run_memory import run_bytes
from vlexport.report.figures import size_phrase


def require_memory(sources: Sources, dims: Mapping[str, DimRange]) -> None:
    """Refuse sizes at which one probe does not fit in what memory is free.

    Args:
        sources: The model, as saved.
        dims: Dims that take fewer sizes.

    Raises:
        InputError: VLX0410.
    """
    free = available_memory_bytes()
    if free is None:
        return
    for name, source in sources.components.items():
        own = {**source.program.signature.dims, **sources.wiring.dims.own(name, dims)}
        smallest = {dim: each.min for dim, each in own.items()}
        wanted = run_bytes(source.program, smallest)
        if wanted > free:
            said = ", ".join(f"{dim}={size}" for dim, size in smallest.items())
            raise InputError(
                "VLX0410",
                f"one run at {said or 'the fixed sizes'} takes {size_phrase(wanted)}, {size_phrase(free)} are free",
                where="--dynamic" if dims else "numeric gate",
                hint="give a smaller least size, as --dynamic NAME=MIN:OPT:MAX, or build on a larger machine",
            )
