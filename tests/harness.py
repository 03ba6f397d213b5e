"""The harness of pass tests. It believes nothing that a pass says about itself.

:func:`check_pass` runs one pass through the real runner with the gate on, and asserts beside it: a valid program with
true shapes before and after, names and run-time checks kept, the input untouched, ``changes`` true to the last node,
element and MAC, a fixed point, equal outputs in float64 for every prefix of the changes, and that the result can be
lifted for export.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlexport.core.bundle_schema import PassRecord
from vlexport.core.numerics import relative_error
from vlexport.frontends.capture import capture
from vlexport.ir import dialect
from vlexport.ir.cost import cost
from vlexport.ir.exported import exported_from_program, program_from_exported
from vlexport.ir.program import Program
from vlexport.ir.text import fingerprint, tensor_digest, text
from vlexport.passes.base import Change, Match, NearMiss, Pass
from vlexport.passes.gate import NumericGate
from vlexport.passes.pipeline import run_pass, verify
from vlexport.passes.probes import Probe, make_probes

GOLDEN = Path(__file__).parent / "golden"
FLOAT64_TOLERANCE = 1e-9
"""Rewrites that are equal in exact arithmetic differ by some 1e-15 in float64 on these small nets; a weight that was
cast to float32 on the way shows at 1e-8."""


@dataclass(frozen=True)
class Checked:
    """What :func:`check_pass` saw."""

    before: Program
    after: Program
    record: PassRecord
    changes: tuple[Change, ...]
    near_misses: tuple[NearMiss, ...]


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Handing work on tiny nets to a second thread costs more than it saves, much more on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def captured(module: nn.Module, inputs: Any, **options: Any) -> Program:
    """Capture in eval mode, whatever mode the module is in."""
    return capture(module.eval(), inputs, **options).program


def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every norm statistics, scales and shifts, and every bias values, that a trained model would have."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for each in module.modules():
            if isinstance(each, nn.modules.batchnorm._BatchNorm) and each.running_mean is not None:
                each.running_mean.normal_(generator=generator)
                each.running_var.uniform_(0.3, 3.0, generator=generator)
            if isinstance(each, nn.modules.batchnorm._BatchNorm) and each.affine:
                each.weight.uniform_(-2.0, 2.0, generator=generator)
                each.bias.normal_(generator=generator)
        for parameter in module.parameters():
            if parameter.ndim == 1 and not parameter.any():
                parameter.normal_(generator=generator)
    return module.eval()


def check_pass(
    pass_: Pass[Program],
    subject: Program | nn.Module,
    inputs: Any = None,
    *,
    golden: str | None = None,
    expect_changes: int | None = None,
    prefixes: int = 8,
    **capture_options: Any,
) -> Checked:
    """Run ``pass_`` and assert everything that holds for any pass.

    Prefixes of an exact pass's changes are equal in float64; those of an approximate one are valid programs.

    Args:
        pass_: The pass.
        subject: A Program, or a module to capture with ``inputs``.
        inputs: Example inputs of a module.
        golden: Name of the file in ``tests/golden`` that holds the text after the pass; ``UPDATE_GOLDEN=1`` writes it.
        expect_changes: How many changes there must be.
        prefixes: At most so many prefixes of the changes are run, spread evenly.
        capture_options: For :func:`capture`.
    """
    before = subject if isinstance(subject, Program) else captured(subject, inputs, **capture_options)
    verify(before, made_by="nothing")
    probes = make_probes(before, calibration=None, seed=0)
    _require_true_shapes(before, probes)
    text_before, content_before = text(before), content(before)

    gate = NumericGate(before, probes)
    after, record = run_pass(pass_, before, gate=gate)
    changes, misses = pass_.run(before.copy())

    verify(after, made_by=pass_.name)
    _require_true_shapes(after, probes)
    assert (text(before), content(before)) == (text_before, content_before), "the pass altered its input Program"
    assert _names(after) == _names(before)
    assert _checks(after) == _checks(before), "what the program refuses at run time has changed"
    assert (content(after) != content_before) == bool(changes), "changes are reported iff there are any"
    assert sum(s.count for s in record.changes) == len(changes), "the pass does not do the same twice"
    _require_true_savings(before, after, changes)
    _require_fixed_point(pass_, after)
    if pass_.effect == "exact":
        _require_equal_prefixes(pass_, before, len(changes), prefixes, probes)
    else:
        _require_valid_prefixes(pass_, before, len(changes), prefixes, probes)
    _require_liftable(after)
    if expect_changes is not None:
        assert len(changes) == expect_changes, [c.what for c in changes]
    if golden is not None:
        check_golden(golden, text(after))
    return Checked(before, after, record, tuple(changes), tuple(misses))


def near_misses(pass_: Pass[Program], program: Program) -> list[tuple[str, str]]:
    """(operator, reason) of everything that nearly matched, provided that nothing matched."""
    found = list(pass_.find(program))
    assert not [f for f in found if isinstance(f, Match)], "it matches"
    return [(f.node.target.__name__.partition(".")[0], f.reason) for f in found if isinstance(f, NearMiss)]


def check_golden(name: str, found: str) -> None:
    """Compare with ``tests/golden/NAME.txt``."""
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDEN") == "1":
        path.write_text(found, encoding="utf-8")
    assert path.is_file(), f"no golden file {path.name}: run with UPDATE_GOLDEN=1 and review it"
    assert found == path.read_text(encoding="utf-8")


def content(program: Program) -> str:
    """Like a fingerprint, but computed afresh from text and bytes, never from a kept digest."""
    whole = hashlib.sha256(text(program).encode())
    for name, tensor in sorted(program.used_tensors().items()):
        whole.update(f"{name}={tensor_digest(tensor, fresh=True)}".encode())
    return whole.hexdigest()


def worst_error(ours: tuple[torch.Tensor, ...], reference: tuple[torch.Tensor, ...]) -> float:
    """Largest relative error over outputs."""
    return max(relative_error(a.numpy(), b.numpy()) for a, b in zip(ours, reference, strict=True))


def doubled(probe: Probe) -> tuple[torch.Tensor, ...]:
    """The probe's values for a float64 twin."""
    return tuple(v.double() if v.is_floating_point() else v for v in probe.values)


def _names(program: Program) -> tuple[list[str], list[str]]:
    assert [str(n.target) for n in program.placeholders] == [s.name for s in program.signature.inputs]
    return [s.name for s in program.signature.inputs], [s.name for s in program.signature.outputs]


def _checks(program: Program) -> list[str]:
    return sorted(dialect.op_name(n) for n in program.calls() if dialect.checks_at_run_time(n))


def _require_true_shapes(program: Program, probes: list[Probe]) -> None:
    """Every recorded shape and dtype is that of the value that the node really computes."""
    for probe in probes:
        dims = {
            dim: value.shape[axis]
            for value, spec in zip(probe.values, program.signature.inputs, strict=True)
            for axis, dim in enumerate(spec.shape)
            if isinstance(dim, str)
        }

        def look(node: torch.fx.Node, value: Any, dims: dict[str, int] = dims) -> None:
            recorded = node.meta["val"]
            pairs = zip(recorded, value, strict=True) if isinstance(value, (tuple, list)) else [(recorded, value)]
            for said, real in pairs:
                if isinstance(real, torch.Tensor):
                    assert program.sizes(said.shape, dims) == tuple(real.shape), node.format_node()
                    assert said.dtype == real.dtype, node.format_node()

        program.run(*probe.values, observe=look)


def _require_true_savings(before: Program, after: Program, changes: list[Change]) -> None:
    was, now = cost(before), cost(after)
    assert sum(c.saved_nodes for c in changes) == len(before.calls()) - len(after.calls()), "saved_nodes is wrong"
    assert sum(c.saved_parameters for c in changes) == was.parameters - now.parameters, "saved_parameters is wrong"
    assert sum(c.saved_macs for c in changes) == was.macs - now.macs, "saved_macs is wrong"


def _require_fixed_point(pass_: Pass[Program], after: Program) -> None:
    again = after.copy()
    more, _ = pass_.run(again)
    assert not more, f"applied twice, it changes more: {more}"
    assert fingerprint(again) == fingerprint(after)


def _counts(total: int, most: int) -> list[int]:
    return sorted({round(i * total / most) for i in range(most + 1)}) if total > most else list(range(total + 1))


def _require_valid_prefixes(pass_: Pass[Program], before: Program, total: int, most: int, probes: list[Probe]) -> None:
    for count in _counts(total, most):
        part = before.copy()
        changes, _ = pass_.run(part, limit=count)
        assert len(changes) == count
        verify(part, made_by=pass_.name)
        _require_true_shapes(part, probes[:1])
        _require_true_savings(before, part, changes)


def _require_equal_prefixes(pass_: Pass[Program], before: Program, total: int, most: int, probes: list[Probe]) -> None:
    twin = before.double()
    expected = [twin.run(*doubled(probe)) for probe in probes]
    for count in _counts(total, most):
        part = twin.copy()
        changes, _ = pass_.run(part, limit=count)
        assert len(changes) == count
        verify(part, made_by=pass_.name)
        for probe, want in zip(probes, expected, strict=True):
            error = worst_error(part.run(*doubled(probe)), want)
            assert error <= FLOAT64_TOLERANCE, f"after {count} changes, on the {probe.name}: {error:.1e}"


def _require_liftable(program: Program) -> None:
    assert text(program_from_exported(exported_from_program(program), program.signature)) == text(program)
