"""calibrate: the table of a Program, made once: found again while model, samples, method and code are the same."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.fx import Node

from vlexport.calibration.collect import Want, Wanted, asked, collect
from vlexport.calibration.data_key import data_key
from vlexport.calibration.keys import model_key, value_keys
from vlexport.calibration.methods import Method
from vlexport.calibration.table import (
    CalibrationTable,
    TableKey,
    read_table,
    require_same,
    require_values,
    table_of,
    write_table,
)
from vlexport.core.bundle import TABLE_FILE
from vlexport.core.cache import Cache
from vlexport.core.code_identity import code_digest
from vlexport.core.dataset import Dataset
from vlexport.core.errors import DataError
from vlexport.core.progress import Reporter, Silent
from vlexport.ir import provenance
from vlexport.ir.program import Program

_TAKING_PART = ("vlexport.core", "vlexport.ir", "vlexport.calibration")


def calibrate(
    program: Program,
    samples: Dataset,
    wanted: Wanted,
    method: Method,
    *,
    batch: int = 1,
    at_least: int = 1,
    cache: Cache | None = None,
    reporter: Reporter | None = None,
) -> CalibrationTable:
    """Ranges of all values that are wanted.

    With a cache the samples are read twice, the first time for their key alone, and nothing is run on a hit.

    Args:
        program: As for :func:`vlexport.calibration.collect.collect`, and so for the others that are not named here.
        samples: Samples.
        wanted: Which values; counts are kept only where the method needs them.
        method: How ranges are chosen.
        batch: Samples a run.
        at_least: Different samples that are needed.
        cache: Where tables are kept; None makes them anew.
        reporter: Told of a hit.

    Raises:
        DataError: VLX0213, VLX0214, VLX02xx.
    """
    reporter = reporter or Silent()

    def needed(node: Node) -> Want | None:
        want = wanted(node)
        return want and Want(histogram=want.histogram and method.needs_histogram, channel_axis=want.channel_axis)

    key = _cache_key(program, samples, needed, method, batch, at_least) if cache is not None else None
    if cache is not None and key is not None:
        found = _kept(cache, key)
        if found is not None:
            reporter.note("the calibration table is from the cache")
            return found
    collected = collect(program, samples, needed, batch=batch, at_least=at_least, reporter=reporter)
    table = table_of(collected, method)
    if cache is not None and key is not None:
        _keep(cache, key, table, reporter)
    return table


def use_table(
    file: Path, program: Program, samples: Dataset | None, wanted: Wanted, method: Method, *, batch: int = 1
) -> CalibrationTable:
    """A table that somebody gives, edited or not, instead of calibrating.

    Args:
        file: What a build wrote.
        program: What it must have been made for.
        samples: What it must have been made with; None asks nothing of them, for whoever has the table alone.
        wanted: The values that need a range.
        method: How its ranges must have been chosen.
        batch: Samples a run.

    Raises:
        DataError: VLX0215 with the reason where it does not hold, or lacks a value.
    """
    table = read_table(file)
    data = table.key.data if samples is None else data_key(samples, in_order=method.in_order).digest()
    require_same(
        table, TableKey(model=model_key(program), data=data, method=method.digest(batch=batch)), where=str(file)
    )
    keys = value_keys(program)
    named = {keys[node]: provenance.describe(node) for node in asked(program, wanted)}
    require_values(table, named, where=str(file))
    return table


def _cache_key(
    program: Program, samples: Dataset, wanted: Wanted, method: Method, batch: int, at_least: int
) -> dict[str, Any] | None:
    """Everything that decides a table; None where the code that runs cannot be identified.

    Raises:
        DataError: VLX0214, before anything runs.
    """
    code = {part: code_digest(part) for part in _TAKING_PART}
    if None in code.values():
        return None
    data = data_key(samples, in_order=True, needed=at_least)
    data.require_enough()
    keys = value_keys(program)
    return {
        "what": "calibration",
        "model": model_key(program),
        "data": data.digest(),
        "method": method.digest(batch=batch),
        "values": {
            keys[node]: [each.with_histogram, each.channel_axis] for node, each in asked(program, wanted).items()
        },
        "batch": batch,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "code": code,
    }


def _kept(cache: Cache, key: dict[str, Any]) -> CalibrationTable | None:
    with tempfile.TemporaryDirectory(prefix="vlexport-") as scratch:
        folder = Path(scratch) / "entry"
        if cache.take(key, folder) is None:
            return None
        try:
            return read_table(folder / TABLE_FILE)
        except DataError:
            return None


def _keep(cache: Cache, key: dict[str, Any], table: CalibrationTable, reporter: Reporter) -> None:
    with tempfile.TemporaryDirectory(prefix="vlexport-") as scratch:
        write_table(table, Path(scratch) / TABLE_FILE)
        try:
            cache.keep(key, Path(scratch), {})
        except OSError as error:
            reporter.note(f"the calibration table could not be kept in the cache: {error.strerror or error}")
