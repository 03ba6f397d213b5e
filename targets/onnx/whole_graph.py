"""Passes whose rewriting is done by somebody else's optimizer, on the whole graph at once."""

from __future__ import annotations

import abc
from collections import Counter
from collections.abc import Iterator
from typing import Any, ClassVar

import onnx_ir

from vlexport.core.errors import CapabilityError, InternalError
from vlexport.passes.base import Change, Effect, Match, NearMiss, Pass, Stage
from vlexport.targets.onnx.model import OnnxModel, has_origin, inherit
from vlexport.targets.onnx.text import tensor_digest

GROWTH_LIMIT_BYTES = 1 << 20
"""A folder that turns computed values into stored ones may make the weights so much larger, not more."""
_MAX_ROUNDS = 5


class WholeGraphPass(Pass[OnnxModel]):
    """An outside optimizer under the contract of a pass.

    It has no matches that could be applied one by one, so it overrides ``run``: the optimizer is repeated until it
    changes nothing, which is what makes applying it twice equal to applying it once, and all it did is one change. What
    such optimizers are known to destroy is checked, and module paths, which they drop, are put back.
    """

    stage: ClassVar[Stage] = "legalize"
    effect: ClassVar[Effect] = "exact"
    establishes: ClassVar[frozenset[str]] = frozenset({"no-unread-nodes"})

    @abc.abstractmethod
    def rewrite(self, ir: OnnxModel) -> bool:
        """Let the optimizer work on the graph, replacing ``ir.model`` or editing it.

        Returns:
            Whether another round may change more.
        """

    def find(self, ir: OnnxModel) -> Iterator[Match[onnx_ir.Node] | NearMiss[onnx_ir.Node]]:
        return iter(())

    def apply(self, ir: OnnxModel, match: Match[Any]) -> Change:
        raise InternalError("VLX0901", f"pass {self.name} has no matches to apply")

    def run(self, ir: OnnxModel, *, limit: int | None = None) -> tuple[list[Change], list[NearMiss[Any]]]:
        misses: list[NearMiss[Any]] = [found for found in self.find(ir) if isinstance(found, NearMiss)]
        if limit == 0:
            return [], misses
        before = ir.copy()
        reached = first = ir.fingerprint()
        for _ in range(_MAX_ROUNDS):
            unsettled = self.rewrite(ir)
            _restore(before, ir)
            last, reached = reached, ir.fingerprint()
            if reached == last or not unsettled:
                break
        else:
            raise InternalError("VLX0404", f"pass {self.name} still changes the graph after {_MAX_ROUNDS} rounds")
        if reached == first:
            return [], misses
        require_undamaged(self.name, before, ir)
        return [_change(before, ir)], misses


def require_undamaged(name: str, before: OnnxModel, after: OnnxModel) -> None:
    """Refuse what outside optimizers are known to do to a model.

    Raises:
        CapabilityError: VLX0408 when quantize or dequantize nodes were lost, or weights grew by more than 1 MiB.
    """
    damage = ""
    if after.quantizing != before.quantizing:
        damage = f"{before.quantizing} quantize and dequantize nodes became {after.quantizing}"
    elif after.size_bytes > before.size_bytes + GROWTH_LIMIT_BYTES:
        damage = f"{before.size_bytes / 1e6:.1f} MB of weights became {after.size_bytes / 1e6:.1f} MB"
    if damage:
        raise CapabilityError(
            "VLX0408", f"pass {name}: its optimizer damaged the graph: {damage}", where=name,
            hint="leave this pass out for this model",
        )  # fmt: skip


def _restore(before: OnnxModel, after: OnnxModel) -> None:
    """Put back what a round trip loses: header, tensors that are shared, and the module path of every node."""
    old, new = before.model, after.model
    new.producer_name, new.producer_version, new.doc_string = old.producer_name, old.producer_version, old.doc_string
    new.domain, new.model_version = old.domain, old.model_version
    new.graph.name, new.graph.doc_string = old.graph.name, old.graph.doc_string
    new.metadata_props.clear()
    weights = before.weights()
    for name, value in new.graph.initializers.items():
        kept = weights.get(name)
        if kept is None or value.const_value is None or value.const_value is kept:
            continue
        if tensor_digest(value.const_value) == before.digest(kept):
            value.const_value = kept
    made = {str(value.name): node for node in before.nodes() for value in node.outputs}
    for node in after.nodes():
        origin = next((made[str(v.name)] for v in node.outputs if str(v.name) in made), None)
        if origin is not None and not has_origin(node):
            inherit(node, origin)
    for node in reversed(after.nodes()):  # what is new belongs to the value that it was made for
        reader = next((r for v in node.outputs for r in v.consumers() if has_origin(r)), None)
        if reader is not None and not has_origin(node):
            inherit(node, reader)


def _change(before: OnnxModel, after: OnnxModel) -> Change:
    was, now = (Counter(node.op_type for node in model.nodes()) for model in (before, after))
    moved = [f"{name} {was[name]} → {now[name]}" for name in sorted({*was, *now}) if was[name] != now[name]]
    elements = [sum(tensor.size for tensor in model.weights().values()) for model in (before, after)]
    return Change(
        what=f"graph rewritten ({', '.join(moved) or 'same operators'})",
        saved_nodes=was.total() - now.total(),
        saved_parameters=elements[0] - elements[1],
    )
