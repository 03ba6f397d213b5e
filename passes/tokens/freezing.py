"""The Program rebuilt with constant token counts: every call by the rule of its operator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node

from vlexport.core.artifact import DimRange, Signature, TensorSpec
from vlexport.ir import compat, dialect
from vlexport.ir.program import Program
from vlexport.passes.tokens import apart_rules, mixing_rules, pick_rules, view_rules
from vlexport.passes.tokens.dense_masks import always_live
from vlexport.passes.tokens.left_out import LeftOut
from vlexport.passes.tokens.narrowing import Narrowing
from vlexport.passes.tokens.rebuild import Rebuild, aten
from vlexport.passes.tokens.survivors import root_of
from vlexport.passes.tokens.values import HIDDEN, CannotFreeze, Flat, Parts, Value

BATCH = "batch"
_TAKES_SIZES = (*view_rules.RULES, "aten.arange.default", "aten.arange.start", "aten.arange.start_step")
"""Whose operands are sizes; those in lists are sizes everywhere."""
TRUNCATED = "truncated_tokens"
"""Name of the output that counts tokens for which there was no place."""


def masks_in(program: Program) -> dict[Node, Node]:
    """Selection whose length the data decides → the call that makes its mask.

    Raises:
        CannotFreeze: For such a length without a mask (``unique``).
    """
    found: dict[Node, Node] = {}
    for node in program.calls():
        if not pick_rules.is_counted(node):
            continue
        masks = pick_rules.masks_of(node)
        if len(masks) == 1:
            found[node] = root_of(masks[0])
        elif dialect.info(node) is None or dialect.op_name(node) not in dialect.OPS or masks or _picks(node):
            raise CannotFreeze(f"the data decides the length of {dialect.plain_name(node)} by more than a mask", node)
    return found


def _picks(node: Node) -> bool:
    row = dialect.info(node)
    return row is not None and row.category == "select"


def is_single(program: Program) -> bool:
    """Whether a Program is captured at batch 1 with fixed sizes."""
    return all(map(_is_one, program.signature.inputs))


def _is_one(spec: TensorSpec) -> bool:
    return bool(spec.shape) and spec.shape[0] == 1 and not any(isinstance(size, str) for size in spec.shape)


def require_single(program: Program) -> None:
    """Refuse a Program that is not captured at batch 1 with fixed sizes.

    Raises:
        CannotFreeze: With what to do.
    """
    for node, spec in zip(program.placeholders, program.signature.inputs, strict=True):
        if not _is_one(spec):
            shape = "×".join(map(str, spec.shape))
            raise CannotFreeze(
                f"input {spec.name} is {shape}: how many tokens stay is decided sample by sample, so the model is "
                "saved at batch 1 with fixed sizes (vlexport.save(…, dynamic=False))",
                next(iter(node.users), node),
            )


def freeze(
    program: Program,
    places: Mapping[Node, int],
    *,
    batch: int | None,
    by_score: bool,
    overflow: bool,
    dense: Sequence[Node] = (),
) -> None:
    """Rebuild a Program in place.

    Args:
        program: With inputs of batch 1.
        places: Call that makes a mask → K.
        batch: Samples at once; None makes it a dynamic dim.
        by_score: Where more than K survive, let the best stay; else the first.
        overflow: Add the output :data:`TRUNCATED`.
        dense: Those of the masks that leave every token in its place.

    Raises:
        CannotFreeze: Where no rule fits. The Program is then of no use any more.
    """
    build = Rebuild(program, places)
    narrowing = Narrowing(build, by_score=by_score)
    left_out = {root: LeftOut(program, root) for root in dense}
    old = list(program.graph.nodes)
    inputs = program.placeholders if batch == 1 else _batched_inputs(program, batch)
    build.inputs = inputs
    for node, new in zip([n for n in old if n.op == "placeholder"], inputs, strict=True):
        spec = node.meta["val"]
        build.values[node] = Value(new, tuple(spec.shape), 0)
    rules = {
        **apart_rules.RULES, **mixing_rules.RULES, **view_rules.RULES, **pick_rules.selecting(by_score=by_score)
    }  # fmt: skip
    for node in old:
        if node.op == "get_attr":
            build.values[node] = Value(node, tuple(node.meta["val"].shape))
        elif node.op == "call_function" and _has_tensors(node):
            build.current = node
            try:
                build.values[node] = _rebuilt(build, node, rules, narrowing, single=batch == 1)
                if node in left_out:
                    build.values[node] = narrowing.begin(node, left_out[node], always_live(program, node))
            except CannotFreeze as error:
                raise CannotFreeze(error.reason, error.node or node) from error
    results = [_result(build, node, narrowing, single=batch == 1) for node in program.results]
    outputs = list(program.signature.outputs)
    if overflow:
        build.current = old[-2]
        results.append(_truncated(build))
        outputs.append(TensorSpec(name=_unused(outputs), dtype="int64", shape=(1,)))
    program.output.args = (tuple(results),)
    _erase(program, [n for n in old if n.op != "output" and not (n.op == "placeholder" and n in inputs)])
    _sign(program, outputs, batch)


def _rebuilt(
    build: Rebuild, node: Node, rules: Mapping[str, view_rules.Rule], narrowing: Narrowing, *, single: bool
) -> Any:
    def known(operand: Any) -> Any:
        if isinstance(operand, Node):
            return build.values[operand] if operand in build.values else operand.meta["val"]
        return operand

    given = tuple(
        [known(e) for e in each] if isinstance(each, (list, tuple)) else known(each) for each in dialect.operands(node)
    )
    if dialect.op_name(node) not in _TAKES_SIZES:
        given = tuple(_as_a_number(build, node, each) for each in given)
    if not narrowing.meets(given):
        return _by_rule(build, node, given, rules, single=single)
    try:
        return _by_rule(build, node, narrowing.conformed(node, given), rules, single=single)
    except CannotFreeze as error:
        try:
            given = narrowing.all_rows(node, given)
        except CannotFreeze:
            raise error from None
    return _by_rule(build, node, given, rules, single=single)


def _by_rule(
    build: Rebuild, node: Node, given: tuple[Any, ...], rules: Mapping[str, view_rules.Rule], *, single: bool
) -> Any:
    values = [v for each in given for v in (each if isinstance(each, list) else [each])]
    held = [v for v in values if isinstance(v, (Value, Parts, Flat))]
    counted = any(isinstance(s, torch.SymInt) for s in _shape(node))
    sized = any(isinstance(v, torch.SymInt) for v in values)
    name = dialect.op_name(node)
    fixed = all(isinstance(v, Value) and v.batch is None and not v.slots for v in held)
    if fixed and not counted and not sized and not isinstance(node.meta["val"], (tuple, list)):
        return apart_rules.constant(build, node, given)
    if name in rules:
        return rules[name](build, node, given)
    touched = counted or any(isinstance(v, Flat) or (isinstance(v, Value) and v.slots) for v in held)
    if not single or touched or isinstance(node.meta["val"], (tuple, list)) or any(isinstance(v, Parts) for v in held):
        raise CannotFreeze(f"no rule is known for {dialect.plain_name(node)}")
    return _as_it_was(build, node, given)


def _as_a_number(build: Rebuild, node: Node, operand: Any) -> Any:
    """An operand that is computed with: a number of tokens is, for every sample, that of its live ones."""
    if not isinstance(operand, (torch.SymInt, torch.SymFloat)):
        return operand
    row = dialect.info(node)
    slots = build.by_size.get(operand.node.expr) if isinstance(operand, torch.SymInt) else None
    arithmetic = row is not None and row.category == "elementwise" and dialect.op_name(node).endswith(".Tensor")
    if slots is None or not arithmetic:
        raise CannotFreeze("it computes with the number of tokens in a way that no rule knows")
    dtype = node.meta["val"].dtype
    live = build.call(aten._to_copy.default, slots.valid, dtype if dtype is not torch.bool else torch.int64)
    return Value(build.call(aten.sum.dim_IntList, live, [1], False, None), (), HIDDEN)


def _as_it_was(build: Rebuild, node: Node, given: Sequence[Any]) -> Value:
    """A call on values without slots, at batch 1: nothing changes."""

    def plain(each: Any) -> Any:
        if isinstance(each, list):
            return [plain(e) for e in each]
        return _plain(build, each) if isinstance(each, Value) else each

    made = build.call(node.target, *map(plain, given))
    shape = _shape(node)
    if shape and shape[0] == 1:
        return Value(made, shape, 0)
    return Value(build.call(aten.unsqueeze.default, made, 0), shape, HIDDEN)


def _plain(build: Rebuild, value: Value) -> Node:
    """A value at batch 1 in the shape that it had."""
    return build.call(aten.squeeze.dim, value.node, 0) if value.batch == HIDDEN else value.node


def _has_tensors(node: Node) -> bool:
    value = node.meta["val"]
    return isinstance(value, torch.Tensor) or (
        isinstance(value, (tuple, list)) and any(isinstance(v, torch.Tensor) for v in value)
    )


def _shape(node: Node) -> tuple[Any, ...]:
    value = node.meta["val"]
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def _result(build: Rebuild, node: Node, narrowing: Narrowing, *, single: bool) -> Node:
    build.current = node
    value = narrowing.result(node, build.values[node])
    if isinstance(value, Flat) or value.slots:
        raise CannotFreeze("an output holds one value a token, and how many there are is decided by the data", node)
    if single:
        return _plain(build, value)
    if value.batch is None and value.rank and value.old[0] == 1:
        sizes = [build.batch_size(), *value.sizes[1:]]
        return build.call(aten.expand.default, value.node, sizes)
    try:
        found = build.front(value)
    except CannotFreeze:
        found = value
    if found.batch != 0:
        raise CannotFreeze("an output has no batch axis in front", node)
    return found.node


def _truncated(build: Rebuild) -> Node:
    """int64[B]: tokens of all selections for which there was no place."""
    total = build.truncated[0]
    for each in build.truncated[1:]:
        total = build.call(aten.add.Tensor, total, each)
    return build.call(aten.squeeze.dim, total, 1)


def _unused(outputs: Sequence[TensorSpec]) -> str:
    taken = {spec.name for spec in outputs}
    return next(name for name in (TRUNCATED, *(f"{TRUNCATED}_{n}" for n in range(1, 99))) if name not in taken)


def _batched_inputs(program: Program, batch: int | None) -> list[Node]:
    """New placeholders with this batch in front, behind the old ones."""
    old = program.placeholders
    mode = compat.fake_mode_of([n.meta["val"] for n in old])
    assert mode is not None
    fakes = compat.batched_fakes(mode, [n.meta["val"] for n in old], batch)
    made = []
    last = old[-1]
    for node, fake in zip(old, fakes, strict=True):
        with program.graph.inserting_after(last):
            last = program.graph.placeholder(str(node.target))
        last.meta["val"] = fake
        made.append(last)
    return made


def _sign(program: Program, outputs: Sequence[TensorSpec], batch: int | None) -> None:
    """The signature, the ranges and the example of the rebuilt Program."""

    def batched(spec: TensorSpec) -> TensorSpec:
        return spec.model_copy(update={"shape": (BATCH if batch is None else batch, *spec.shape[1:])})

    rebatched = (lambda spec: spec) if batch == 1 else batched
    program.signature = Signature(
        inputs=tuple(map(rebatched, program.signature.inputs)),
        outputs=tuple(map(rebatched, outputs)),
        dims={BATCH: DimRange(min=1, max=None, opt=1)} if batch is None else {},
    )
    program.ranges = {symbol: compat.value_range(1, None) for symbol in program.symbol_names()}
    program.example = tuple(torch.cat([value] * (batch or 1)) for value in program.example)


def _erase(program: Program, old: Sequence[Node]) -> None:
    """The old calls, and what the rebuild made and nobody reads."""
    gone: set[Node] = set()
    for node in (*reversed(old), *reversed(list(program.graph.nodes))):
        if node in gone or node.users or node.op == "output" or (node.op == "placeholder" and node not in old):
            continue
        gone.add(node)
        if node.op == "get_attr":
            program.erase_dead(node)
        else:
            program.graph.erase_node(node)
