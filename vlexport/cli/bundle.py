"""``vlexport verify`` and ``vlexport run``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vlexport.cli.console import make_reporter
from vlexport.cli.formats import FormatOption, OutputFormat
from vlexport.cli.measure import BundleArgument, JsonOption, ThreadsOption
from vlexport.cli.outcome import Check, Outcome


def verify(
    bundle: BundleArgument,
    threads: ThreadsOption = 0,
    output_format: FormatOption = OutputFormat.HUMAN,
    json_output: JsonOption = False,
) -> Outcome:
    """Check that a bundle is intact and computes its golden vectors here."""
    from vlexport.stages.verify import verify as stage

    found = stage(bundle, threads=threads, reporter=make_reporter())
    errors = ", ".join(f"{name} {error:.1e}" for name, error in found.errors.items())
    lines = [f"intact: {len(found.bundle.files)} files fit their hashes; golden vectors: {errors}"]
    if found.emulator:
        lines.append(f"emulated: computed by {found.emulator}, not by {found.bundle.target} itself")
    payload = {"digest": found.bundle.digest, "golden_errors": found.errors, "emulator": found.emulator}
    checks = [Check("files", "pass", f"{len(found.bundle.files)} files fit their hashes")]
    checks += [
        Check(f"golden vectors: {name}", "pass", f"max|a−b|/max|b| {error:.1e}") for name, error in found.errors.items()
    ]
    return Outcome(lines, payload, checks=tuple(checks))


def run(
    bundle: BundleArgument,
    data: Annotated[str, typer.Argument(help="An image, or DATA as for validate.", metavar="DATA", show_default=False)],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the outputs as .npz instead.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    top: Annotated[int, typer.Option("--top", help="Classes to show.", min=1)] = 5,
    threads: ThreadsOption = 0,
    json_output: JsonOption = False,
) -> Outcome:
    """Run a bundle on an image or on DATA."""
    import numpy as np

    from vlexport.core.bundle import read_bundle
    from vlexport.stages.run import ranked, require_place, write_outputs
    from vlexport.stages.run import run as stage

    if output is not None:
        require_place(output, data=data, force=force)
    labels = read_bundle(bundle).main.labels
    found = stage(bundle, data, threads=threads)
    if output is not None:
        write_outputs(output, found)
        return Outcome([f"{len(found)} samples written to {output}"], {"samples": len(found), "output": str(output)})
    lines: list[str] = []
    payload: list[dict[str, Any]] = []
    for name, values in found:
        first = next(iter(values.values()))
        if first.ndim == 1 and first.dtype.kind == "f" and first.size > 1:
            best = ranked(first.astype(np.float64), labels, top=top)
            lines.append(f"{name}: " + ", ".join(f"{label} {share:.3f}" for label, share in best))
            shares = [{"label": label, "share": share if np.isfinite(share) else None} for label, share in best]
            payload.append({"sample": name, "classes": shares})
        else:
            shapes = {key: list(value.shape) for key, value in values.items()}
            lines.append(
                f"{name}: " + ", ".join(f"{key} {value.dtype}{list(value.shape)}" for key, value in values.items())
            )
            payload.append({"sample": name, "shapes": shapes})
    return Outcome(lines, {"results": payload})
