"""calibration.json: the ranges that calibration found, for people to read and to edit.

One line a value::

    {"value": "41", "op": "linear", "module": "blocks.0.attn.qkv", …, "low": -3.2, "high": 4.1, "measured": [-3.2, 4.1]}

``low`` and ``high`` are what is used; whoever changes them leaves ``measured``, so that edits stay visible. A table is
used again while the keys of model, data and method are those it was made with; no edit changes a key.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AllowInfNan, Field, ValidationError, model_validator

from vlexport.calibration.methods import Method, range_of
from vlexport.calibration.observer import Observer
from vlexport.calibration.seen import Collected, SeenValue
from vlexport.core.artifact import Frozen
from vlexport.core.bundle_schema import canonical_json, plain_json
from vlexport.core.errors import DataError

TABLE_SCHEMA = 1
TYPICAL = 0.999
"""The share of values that ``typical`` does not cut off: what lies far beyond it are outliers."""
_LARGEST_BYTES = 256 << 20

Finite = Annotated[float, AllowInfNan(False)]


class ChannelRanges(Frozen):
    """Ranges of the entries of one dim.

    Attributes:
        axis: The dim.
        low: Least value of each entry.
        high: Largest value of each entry.
    """

    axis: int
    low: tuple[Finite, ...]
    high: tuple[Finite, ...]

    @model_validator(mode="after")
    def _ordered(self) -> ChannelRanges:
        if len(self.low) != len(self.high) or any(a > b for a, b in zip(self.low, self.high, strict=True)):
            raise ValueError("channels: as many lows as highs, none above its high")
        return self


class ValueEntry(Frozen):
    """The range of one value.

    Attributes:
        value: Its key: an ordinal of the captured graph, or ``input:NAME``.
        op: Operator that makes it (``linear``), or ``input``.
        module: Module path.
        source: ``file.py:LINE``.
        low: Lower bound that is used.
        high: Upper bound that is used.
        measured: Both as the method gave them.
        extremes: Least and largest value seen.
        typical: The magnitude that 99.9 % of all values do not exceed, to within a bin; None without a histogram.
        channels: Ranges of single channels, where they were asked for.
    """

    value: str
    op: str
    module: str = ""
    source: str = ""
    low: Finite
    high: Finite
    measured: tuple[Finite, Finite]
    extremes: tuple[Finite, Finite]
    typical: Finite | None = None
    channels: ChannelRanges | None = None

    @model_validator(mode="after")
    def _ordered(self) -> ValueEntry:
        if self.low > self.high:
            raise ValueError(f"low {self.low:g} lies above high {self.high:g}")
        return self

    @property
    def edited(self) -> bool:
        """Whether somebody changed the range."""
        return (self.low, self.high) != self.measured

    @property
    def place(self) -> str:
        """What messages call the value."""
        return f"{self.op} in {self.module}" if self.module else f"{self.op} {self.value}"


class TableKey(Frozen):
    """What a table holds for: SHA-256 of the Program, of the samples and of the method."""

    model: str
    data: str
    method: str


class CalibrationTable(Frozen):
    """All ranges of one Program.

    Attributes:
        key: What they hold for.
        method: How they were chosen.
        samples: How many samples were seen.
        values: One entry a value, in the Program's order.
    """

    schema_version: int = TABLE_SCHEMA
    key: TableKey
    method: Method
    samples: int = Field(ge=1)
    values: tuple[ValueEntry, ...]

    @model_validator(mode="after")
    def _distinct(self) -> CalibrationTable:
        keys = [each.value for each in self.values]
        if len(set(keys)) != len(keys):
            raise ValueError("values: one entry a value")
        return self

    def by_value(self) -> dict[str, ValueEntry]:
        """Key → entry."""
        return {each.value: each for each in self.values}

    def edits(self) -> tuple[str, ...]:
        """One phrase for every range that somebody changed, for the receipt."""
        return tuple(
            f"{each.place}: {each.measured[0]:.4g}…{each.measured[1]:.4g} edited to {each.low:.4g}…{each.high:.4g}"
            for each in self.values
            if each.edited
        )


def table_of(collected: Collected, method: Method) -> CalibrationTable:
    """Choose ranges. One collection serves every method, if histograms were asked for where it needs them.

    Args:
        collected: Of at least one sample; a value that was always empty gets no entry.
        method: How.
    """
    key = TableKey(
        model=collected.model,
        data=collected.order if method.in_order else collected.data,
        method=method.digest(batch=collected.batch),
    )
    entries = tuple(_entry(each, method) for each in collected.values if each.observer.runs)
    return CalibrationTable(key=key, method=method, samples=collected.samples, values=entries)


def why_other(table: CalibrationTable, key: TableKey) -> str:
    """Why a table does not hold for what is built, in words; empty where it does."""
    found = table.key
    parts = []
    if found.model != key.model:
        parts.append("it was made for another model, or for this one after other passes")
    if found.data != key.data:
        parts.append(f"it was made with other samples ({table.samples} of them)")
    if found.method != key.method:
        parts.append(f"it was made with method {table.method.name}, or with other options of it")
    return "; ".join(parts)


def require_same(table: CalibrationTable, key: TableKey, *, where: str) -> None:
    """Refuse a table of something else.

    Raises:
        DataError: VLX0215 with the reason.
    """
    why = why_other(table, key)
    if why:
        raise DataError(
            "VLX0215", f"the calibration table cannot be used: {why}", where=where,
            hint="calibrate again, or give the model, samples and options that it was made with",
        )  # fmt: skip


def require_values(table: CalibrationTable, named: Mapping[str, str], *, where: str) -> None:
    """Refuse a table without a range for each of some values.

    Args:
        table: The table.
        named: Key → what messages call the value.
        where: Its file.

    Raises:
        DataError: VLX0215 naming the first that is missing.
    """
    there = table.by_value()
    missing = [each for each in named if each not in there]
    if missing:
        raise DataError(
            "VLX0215",
            f"the calibration table cannot be used: it has no range for value {missing[0]}, {named[missing[0]]}"
            + (f", and {len(missing) - 1} more" if len(missing) > 1 else ""),
            where=where, hint="put the line back, or calibrate again",
        )  # fmt: skip


def table_text(table: CalibrationTable) -> str:
    """The file's content: strict JSON, one line a value, the same bytes for the same table."""
    values: dict[str, Any] = plain_json(table)
    head = {name: canonical_json(value) for name, value in values.items() if name != "values"}
    lines = ",\n".join(f"  {_line(each)}" for each in values["values"])
    top = "".join(f' "{name}": {text},\n' for name, text in head.items())
    return f'{{\n{top} "values": [\n{lines}\n ]\n}}\n'


def write_table(table: CalibrationTable, file: Path) -> None:
    """Write a table.

    Raises:
        OSError: The file cannot be written.
    """
    file.write_text(table_text(table), encoding="utf-8")


def read_table(file: Path) -> CalibrationTable:
    """Read a table that a build wrote, and that somebody may have edited.

    Raises:
        DataError: VLX0215 naming the line or the field that is wrong.
    """
    try:
        if file.stat().st_size > _LARGEST_BYTES:
            raise _unusable(file, f"it has more than {_LARGEST_BYTES >> 20} MiB")
        found = json.loads(file.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise _unusable(file, f"line {error.lineno}, column {error.colno}: {error.msg}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise _unusable(file, str(getattr(error, "strerror", None) or error)) from error
    version = found.get("schema_version") if isinstance(found, dict) else None
    if isinstance(version, int) and version > TABLE_SCHEMA:
        raise _unusable(file, f"it has schema {version}, this vlexport knows {TABLE_SCHEMA}: update vlexport")
    try:
        return CalibrationTable.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise _unusable(file, f"{place}: {first['msg']}" if place else first["msg"]) from error


def _entry(seen: SeenValue, method: Method) -> ValueEntry:
    observer = seen.observer
    low, high = range_of(observer, method)
    channels = None
    if observer.channel_axis is not None:
        lows, highs = observer.channel_low.tolist(), observer.channel_high.tolist()
        channels = ChannelRanges(axis=observer.channel_axis, low=tuple(lows), high=tuple(highs))
    return ValueEntry(
        value=seen.key, op=seen.op, module=seen.module, source=seen.source, low=low, high=high, measured=(low, high),
        extremes=(observer.minimum, observer.maximum),
        typical=_typical(observer) if observer.with_histogram else None, channels=channels,
    )  # fmt: skip


def _typical(observer: Observer) -> float:
    return min(observer.histogram.magnitude(TYPICAL), max(-observer.minimum, observer.maximum))


def _line(entry: dict[str, Any]) -> str:
    kept = {name: value for name, value in entry.items() if value is not None}
    return json.dumps(kept, ensure_ascii=False, allow_nan=False)


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is no number of strict JSON")


def _unusable(file: Path, why: str) -> DataError:
    return DataError(
        "VLX0215", f"the calibration table cannot be used: {why}", where=str(file),
        hint="repair the file, or calibrate again",
    )  # fmt: skip
