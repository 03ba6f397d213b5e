"""The level of Programs: they run in PyTorch, in any floating dtype, and their nodes carry provenance."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import ClassVar

import torch
from torch.fx import Node

from vlexport.ir import dialect, facts, provenance
from vlexport.ir.program import Program
from vlexport.ir.rounded import holds_half, rounded_twin
from vlexport.ir.text import fingerprint, tensor_digest, text
from vlexport.passes.level import Differs, Failure, Level, Outputs
from vlexport.passes.probes import Probe, as_array


class ProgramLevel(Level[Program]):
    """Programs of torch.fx nodes in the vlexport dialect."""

    runs_float64: ClassVar[bool] = True

    @property
    def facts(self) -> Mapping[str, Callable[[Program], bool]]:
        """Those of ``ir/facts``."""
        return facts.FACTS

    def copy(self, ir: Program) -> Program:
        """Tensors are shared."""
        return ir.copy()

    def text(self, ir: Program) -> str:
        """One line a call."""
        return text(ir)

    def fingerprint(self, ir: Program) -> str:
        """Of text and tensors."""
        return fingerprint(ir)

    def face(self, ir: Program) -> dict[str, object]:
        """What a user of the graph addresses: names and dtypes of inputs and outputs, in order."""
        specs = (*ir.signature.inputs, *ir.signature.outputs)
        return {"the names or dtypes of inputs or outputs": [(spec.name, spec.dtype) for spec in specs]}

    def problems(self, ir: Program) -> Iterator[tuple[str, str]]:
        """Topological order, dialect, shapes, provenance, stored tensors, number of outputs."""
        seen = set()
        for node in ir.graph.nodes:
            found = list(dialect.problems(node))
            found += [
                f"it reads {operand.name} before it is made" for operand in node.all_input_nodes if operand not in seen
            ]
            if node.op == "get_attr" and node.target not in ir.tensors:
                found.append(f"tensor {node.target} is not stored")
            if node.op == "call_function" and not provenance.origins(node):
                found.append("it has no origins")
            yield from ((provenance.describe(node), what) for what in found)
            seen.add(node)
        if len(ir.results) != len(ir.signature.outputs):
            yield "", "the number of outputs has changed"

    def describe(self, node: Node) -> str:
        """Operator, module path and source line."""
        return provenance.describe(node)

    def weights(self, ir: Program) -> list[tuple[str, torch.Tensor]]:
        """Tensors that a node reads."""
        return list(ir.used_tensors().items())

    def digest(self, weight: torch.Tensor, *, fresh: bool = False) -> str:
        """Kept on the tensor."""
        return tensor_digest(weight, fresh=fresh)

    def size_bytes(self, ir: Program) -> int:
        """Bytes of the tensors in use."""
        return ir.size_bytes

    def double(self, ir: Program) -> Program:
        """Every Program has a twin."""
        return ir.double()

    def run(self, ir: Program, probes: Sequence[Probe]) -> Iterator[Outputs | Failure]:
        """In PyTorch, half types by their rounded twin; a failure names the call that was reached."""
        ir = _executed(ir)
        for probe in probes:
            reached: list[Node] = []
            found: Outputs | Failure
            try:
                values, batch = _as_taken(ir, probe.values)
                found = ir.run(*values, observe=lambda node, _: reached.append(node))  # noqa: B023
                if batch:
                    found = tuple(each[:1] if each.ndim and len(each) == batch else each for each in found)
            except (RuntimeError, TypeError, IndexError, ValueError) as error:
                done = set(reached)
                node = next((n for n in ir.calls() if n not in done), None)
                where = provenance.describe(node) if node is not None else ""
                found = Failure(str(error).splitlines()[0] if str(error) else type(error).__name__, where, error)
            yield found

    def first_difference(self, before: Program, after: Program, probe: Probe, differs: Differs) -> str:
        """The first node whose value differs from that of the node it stands for."""
        given = after
        before, after = _executed(before), _executed(after)
        values: dict[int, torch.Tensor] = {}

        def keep(node: Node, value: object) -> None:
            if isinstance(value, torch.Tensor) and provenance.origins(node):
                values[provenance.origins(node)[-1]] = value

        before.run(*probe.values, observe=keep)
        found: list[Node] = []
        last: dict[int, Node] = {}
        for node in after.calls():
            if provenance.origins(node):
                last[provenance.origins(node)[-1]] = node

        def compare(node: Node, value: object) -> None:
            origin = provenance.origins(node)[-1:]
            if found or not origin or not isinstance(value, torch.Tensor) or origin[0] not in values:
                return
            expected = values[origin[0]]
            if value.shape != expected.shape:  # only a part of that value is computed now
                return
            if last[origin[0]] is node and differs(as_array(value), as_array(expected)):
                found.append(node)

        after.run(*probe.values, observe=compare)
        if found:
            rounds = after is not given or dialect.is_cast(found[0])
            return provenance.describe(_known(given, found[0]) if rounds else found[0])
        names = [
            spec.name
            for spec, old, new in zip(before.signature.outputs, before.results, after.results, strict=True)
            if provenance.origins(old)[-1:] != provenance.origins(new)[-1:]
        ]
        return f"the order of outputs ({', '.join(names)})" if names else "an output"


def _as_taken(ir: Program, values: tuple[torch.Tensor, ...]) -> tuple[tuple[torch.Tensor, ...], int]:
    """A probe of one sample, as often as the Program takes at once, and that number; 0 where nothing is repeated.

    A pass may give a Program saved at batch 1 a larger one: the first sample's outputs are compared then.
    """
    sizes = {spec.shape[0] for spec in ir.signature.inputs if spec.shape}
    batch = sizes.pop() if len(sizes) == 1 else 0
    if not isinstance(batch, int) or batch < 2 or any(not each.ndim or len(each) != 1 for each in values):
        return values, 0
    return tuple(torch.cat([each] * batch) for each in values), batch


def _known(ir: Program, found: Node) -> Node:
    """The call that computes the value of a cast, or of a node of the rounded twin: a user knows no other."""
    same = [n for n in ir.calls() if provenance.origins(n)[-1:] == provenance.origins(found)[-1:]]
    return next((n for n in reversed(same) if not dialect.is_cast(n)), found)


def _executed(ir: Program) -> Program:
    return rounded_twin(ir) if holds_half(ir) else ir


PROGRAM = ProgramLevel()
"""The level of every pass unless another is named."""
