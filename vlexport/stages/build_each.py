"""build for several targets: one capture, one calibration, one run of the shared passes; one bundle a target.

A target that refuses (its tools are missing, an operator cannot be expressed, a
dim has no upper bound, a gate of its own pass failed) spoils no
other one's bundle; where none is left, nothing is written.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import vlexport
from vlexport.core.bundle import COMPARE_FILE
from vlexport.core.bundle_schema import canonical_json, plain_json
from vlexport.core.comparison import Compared, Comparison
from vlexport.core.config import BuildConfig
from vlexport.core.errors import CapabilityError, GateError, UsageError, VlexportError
from vlexport.core.progress import Reporter, Silent
from vlexport.stages.build import BuildResult, build_prepared
from vlexport.stages.order import Order, orders_of
from vlexport.stages.prepare import prepare
from vlexport.stages.write_bundle import output_of, require_free, staging
from vlexport.targets import target_names


@dataclass(frozen=True)
class Built:
    """What a build for several targets made.

    Attributes:
        output: The folder; each bundle lies in it under its target's name.
        results: Target → its bundle.
        refused: Target → why there is none.
        comparison: What lies in ``compare.json``.
    """

    output: Path
    results: dict[str, BuildResult]
    refused: dict[str, VlexportError]
    comparison: Comparison


def build_each(config: BuildConfig, *, reporter: Reporter | None = None) -> Built:
    """Build one bundle a target.

    Args:
        config: What to build; ``target`` names several, or one, or ``all``.
        reporter: Where progress goes; silent by default.

    Raises:
        VlexportError: With the code and exit code of what is wrong for all, or for the first target where all refuse;
            then nothing is left behind.
    """
    reporter = reporter or Silent()
    orders, refused = orders_of(config)
    _require_some(orders, refused)
    output = output_of(config)
    require_free(output, force=config.force, several=True)
    prepared = prepare(config, tuple(orders.values()), reporter)
    results: dict[str, BuildResult] = {}
    with staging(output, force=config.force, several=True) as folder:
        for name, order in orders.items():
            (folder / name).mkdir()
            try:
                made = build_prepared(order, prepared, folder / name, reporter)
            except (CapabilityError, GateError, UsageError) as error:
                refused[name] = error
                shutil.rmtree(folder / name)
            else:
                results[name] = made
        _require_some(results, refused)
        comparison = Comparison(
            vlexport=vlexport.__version__,
            rows=tuple(_row(name, results.get(name), refused.get(name)) for name in target_names(config.target)),
        )
        text = canonical_json(plain_json(comparison)) + "\n"
        (folder / COMPARE_FILE).write_text(text, encoding="utf-8", newline="\n")
    standing = {name: made.standing(output / name) for name, made in results.items()}
    return Built(output, standing, refused, comparison)


def _require_some(found: dict[str, Order] | dict[str, BuildResult], refused: dict[str, VlexportError]) -> None:
    if not found:
        raise next(iter(refused.values()))


def _row(name: str, made: BuildResult | None, error: VlexportError | None) -> Compared:
    if made is None:
        assert error is not None
        return Compared(target=name, error=f"{error.code}: {error.message}")
    return Compared(
        target=name,
        digest=made.bundle.digest,
        state=made.bundle.state,
        precision=made.bundle.precision,
        device_profile=made.bundle.device_profile,
        size_bytes=made.report.size_bytes,
        accuracy=made.report.accuracy,
        latency=made.report.latency,
    )
