"""What a quantized bundle says of single layers and ranges: the parts of its two tables that people look at. No torch.

``quantization.json`` names the calls that compute with integers, ``calibration.json`` the ranges. Both are written by
the half that builds and may be edited, so that what does not read is left out here and never an error.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import AllowInfNan, BaseModel, ConfigDict, ValidationError

from vlexport.core.bundle import DECISIONS_FILE, TABLE_FILE
from vlexport.core.bundle_schema import Bundle
from vlexport.core.scheme import E4M3

_LARGEST_BYTES = 64 << 20
_Finite = Annotated[float, AllowInfNan(False)]


class _Part(BaseModel):
    """Of each entry only what is shown; other keys are for others."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class LayerRecord(_Part):
    """A call that computes with integers.

    Attributes:
        call: Its key.
        op: Operator (``linear``).
        module: Module path.
        weight: Grid of the stored operand (``s8``), empty where there is none.
        output: Key of the value that is rounded behind it, empty where it stays in float.
        operands: Keys of the values that it reads rounded.
        dynamic: Whether what it reads is rounded by the range of each run.
        sqnr_db: Signal to noise ratio of its output against the float graph's, where a build measured it.
        own_db: The same with everything before it in float.
        weight_db: The same with its stored operand alone rounded.
    """

    call: str
    op: str
    module: str = ""
    weight: str = ""
    output: str = ""
    operands: tuple[str, ...] = ()
    dynamic: bool = False
    sqnr_db: _Finite | None = None
    own_db: _Finite | None = None
    weight_db: _Finite | None = None


class RangeRecord(_Part):
    """A value's range.

    Attributes:
        value: Its key.
        op: Operator that makes it.
        module: Module path.
        low: Lower bound that is used.
        high: Upper bound that is used.
        extremes: Least and largest value seen.
        typical: The magnitude that 99.9 % of all values do not exceed.
        counts: How often values lay in each of equal parts between the least and the largest of a few samples.
    """

    value: str
    op: str
    module: str = ""
    low: _Finite
    high: _Finite
    extremes: tuple[_Finite, _Finite]
    typical: _Finite | None = None
    counts: tuple[int, ...] = ()

    @property
    def spread(self) -> float:
        """How far the largest magnitude lies above the typical one; 1 where nothing sticks out."""
        largest = max(abs(self.extremes[0]), abs(self.extremes[1]))
        return largest / self.typical if self.typical else 1.0


class _Seen(_Part):
    """What a few calibration samples showed of a value."""

    value: str
    typical: _Finite
    counts: tuple[int, ...] = ()


class Layers(_Part):
    """What a bundle knows of its layers; empty for one that is not quantized.

    Attributes:
        scheme: Id of the scheme.
        method: How ranges follow from what was seen.
        layers: Calls that compute with integers.
        ranges: Values that have a range.
    """

    scheme: str = ""
    method: str = ""
    layers: tuple[LayerRecord, ...] = ()
    ranges: tuple[RangeRecord, ...] = ()

    @property
    def said(self) -> str:
        """What is rounded of the layers, by which scheme, and where ranges come from."""
        if any(each.dynamic for each in self.layers):
            return f"compute with integers (scheme {self.scheme}, ranges found at each run)"
        if all(each.weight and not each.operands for each in self.layers):
            return f"have rounded weights and compute in float (scheme {self.scheme})"
        kind = "float8" if any(each.weight == E4M3 for each in self.layers) else "integers"
        return f"compute with {kind} (scheme {self.scheme}, ranges by {self.method or 'none'})"


def read_layers(folder: Path, bundle: Bundle) -> Layers:
    """Both tables of a bundle, as far as they are recorded in it and can be read."""
    decisions = _json(folder / DECISIONS_FILE) if DECISIONS_FILE in bundle.files else {}
    table = _json(folder / TABLE_FILE) if TABLE_FILE in bundle.files else {}
    seen = {each.value: each for each in _parts(_Seen, decisions.get("seen"))}
    method = table.get("method")
    return Layers(
        scheme=_text(decisions.get("scheme")),
        method=_text(method.get("name")) if isinstance(method, dict) else "",
        layers=tuple(_parts(LayerRecord, decisions.get("layers"))),
        ranges=tuple(_with_seen(each, seen.get(each.value)) for each in _parts(RangeRecord, table.get("values"))),
    )


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _with_seen(entry: RangeRecord, seen: _Seen | None) -> RangeRecord:
    """A range with its histogram; a table by min-max has no typical magnitude of its own."""
    if seen is None:
        return entry
    typical = seen.typical if entry.typical is None else entry.typical
    return entry.model_copy(update={"typical": typical, "counts": seen.counts})


def _json(file: Path) -> dict[str, Any]:
    try:
        if file.is_symlink() or file.stat().st_size > _LARGEST_BYTES:
            return {}
        found = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _parts(kind: type[Any], rows: object) -> list[Any]:
    read = (_part(kind, row) for row in (rows if isinstance(rows, list) else ()))
    return [each for each in read if each is not None]


def _part(kind: type[Any], row: object) -> Any:
    try:
        return kind.model_validate(row)
    except ValidationError:
        return None
