"""What single layers of a quantized bundle lose, weakest first, and what to try about it, in words."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator

from vlexport.core.layer_record import LayerRecord, Layers, RangeRecord

OUTLIER = 8.0
"""A largest value so many times the typical one wastes three of the eight bits."""
POOR_DB = 20.0
"""A layer that keeps less of its result is worth a look: the noise is a tenth of the signal."""
_BELOW_DB = 12.0
"""Or one that lies so far below the middle of all layers."""
_LISTED = 20
_BY_EXTREMES = ("min-max", "moving-average")


def layer_lines(found: Layers) -> list[str]:
    """Lines of ``explain BUNDLE --layers``: layers, weakest first, then suggestions."""
    count = len(found.layers)
    lines = [f"Layers   {count} {found.said}"]
    order = sorted(found.layers, key=_weakness)
    for each in order[:_LISTED]:
        own = "       " if each.own_db is None else f"{each.own_db:5.1f} dB"
        arrived = "" if each.sqnr_db is None else f", {each.sqnr_db:.1f} dB with the noise of all before it"
        lines.append(f"         {own} {each.op} {_name(each)}{arrived}")
    if count > _LISTED:
        lines.append(f"         and {count - _LISTED} more, which lose less")
    if all(each.own_db is None for each in found.layers):
        lines.append("Note     what each layer loses was not measured by the build")
    return [*lines, *(f"Try      {each}" for each in suggestions(found))]


def suggestions(found: Layers) -> tuple[str, ...]:
    """What to try about the layers that lose most, as ``--set`` lines with the reason."""
    return tuple(_advice(each, found) for each in poor(found))


def poor(found: Layers) -> tuple[LayerRecord, ...]:
    """Layers that lose more than the others or more than they should, weakest first."""
    measured = [each for each in found.layers if each.own_db is not None]
    if not measured:
        return ()
    middle = statistics.median(_weakness(each) for each in measured)
    bound = max(POOR_DB, middle - _BELOW_DB)
    return tuple(sorted((each for each in measured if _weakness(each) < bound), key=_weakness))


def _advice(layer: LayerRecord, found: Layers) -> str:
    name = _name(layer)
    wide = max(_operands(layer, found), key=lambda each: each.spread, default=None)
    if wide is not None and wide.spread >= OUTLIER and found.method in _BY_EXTREMES:
        return (
            f"percentile instead of {found.method} on {name} input: outliers at {wide.spread:.0f}× the 99.9th "
            f"percentile (--set quantize.method=percentile, or --set quantize.keep={name} where they matter)"
        )
    if wide is not None and wide.spread >= OUTLIER:
        why = f"outliers at {wide.spread:.0f}× the 99.9th percentile, and {found.method} keeps {layer.own_db:.0f} dB"
    elif layer.weight_db is not None and layer.own_db is not None and layer.weight_db < layer.own_db + 3.0:
        why = f"its weights alone lose most of it, {layer.own_db:.0f} dB are left"
    else:
        why = f"{layer.own_db:.0f} dB are left of its result"
    return f"{name} in float: {why} (--set quantize.keep={name})"


def _operands(layer: LayerRecord, found: Layers) -> Iterator[RangeRecord]:
    by_key = {each.value: each for each in found.ranges}
    return (by_key[key] for key in layer.operands if key in by_key)


def _name(layer: LayerRecord) -> str:
    return layer.module or f"#{layer.call}"


def _weakness(layer: LayerRecord) -> float:
    return math.inf if layer.own_db is None else layer.own_db
