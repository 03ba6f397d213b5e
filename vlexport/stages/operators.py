"""operators: what a captured graph and the lowered one consist of, counted for the bundle. Needs torch."""

from __future__ import annotations

from vlexport.core.operators import HeavyCall, Operators, operators_from_counts
from vlexport.ir import dialect, provenance
from vlexport.ir.cost import node_macs
from vlexport.ir.program import Program


def operators_of(source: Program, optimized: Program) -> Operators:
    """Calls and multiply-accumulates by operator, and the calls that cost most.

    Args:
        source: As captured, with the dims of the artifact.
        optimized: As lowered.
    """
    calls = [(node, node_macs(optimized, node, {})) for node in optimized.calls()]
    heavy = [HeavyCall(operator=dialect.plain_name(n), module=provenance.module_path(n), macs=m) for n, m in calls if m]
    return operators_from_counts(_counts(source), _counts(optimized), tuple(heavy))


def _counts(program: Program) -> dict[str, tuple[int, int]]:
    """Plain name → calls and multiply-accumulates."""
    found: dict[str, tuple[int, int]] = {}
    for node in program.calls():
        name = dialect.plain_name(node)
        calls, macs = found.get(name, (0, 0))
        found[name] = (calls + 1, macs + node_macs(program, node, {}))
    return found
