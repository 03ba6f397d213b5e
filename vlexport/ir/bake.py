"""Baking an input: it leaves the signature, and what it would be given is stored in its place.

Before → after::

    program(image, task)                            program(image)
      %0 = embedding(@table, task)             →      %0 = embedding(@table, @task_baked)

fold-constants then computes what follows from it. Along a dynamic dim that another input has too, a value of size 1 is
repeated, as the user would have given it once for each sample; a dim that only this input has becomes a constant.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from vlexport.core.artifact import Array, DimRange, Signature, TensorSpec
from vlexport.core.baked_values import Baked
from vlexport.core.errors import UsageError, VlexportError, nearest
from vlexport.ir import dialect
from vlexport.ir.narrow import narrowed
from vlexport.ir.program import Program

aten = torch.ops.aten
_SIZE = "aten.sym_size.int"


def with_baked(program: Program, given: Sequence[Baked]) -> tuple[Program, tuple[str, ...]]:
    """A Program whose named inputs are constants.

    Args:
        program: Left as it is; tensors are shared.
        given: Values by input.

    Returns:
        The Program, and notes on dims that became constants.

    Raises:
        UsageError: VLX0703 for a name that it does not have, or that is given twice; VLX0707 for a value that does not
            fit its input, or that the model fails on.
    """
    specs = {spec.name: spec for spec in program.signature.inputs}
    names = [each.name for each in given]
    for name in names:
        if name not in specs or names.count(name) > 1:
            what = "is given twice" if name in specs else f"is no input{nearest(name, specs)}"
            raise UsageError(
                "VLX0703", f"--bake {name} {what}", where="--bake", hint=f"inputs: {', '.join(specs)}"
            )  # fmt: skip
    if len(names) == len(specs):
        raise _wrong(names[-1], "no input would be left", "leave one input to the artifact")
    values = {each.name: _fitting(each, specs[each.name]) for each in given}
    others = {
        d for spec in program.signature.inputs if spec.name not in values for d in spec.shape if isinstance(d, str)
    }
    fixed = _fixed(values, program.signature, others)
    found = narrowed(program, fixed) if fixed else program.copy()
    for name, value in values.items():
        _replace(found, name, value, values)
    kept = [i for i, spec in enumerate(found.signature.inputs) if spec.name not in values]
    found.example = tuple(found.example[i] for i in kept)
    inputs = tuple(found.signature.inputs[i] for i in kept)
    used = {dim for spec in inputs for dim in spec.shape if isinstance(dim, str)}
    dims = {name: each for name, each in found.signature.dims.items() if name in used}
    found.signature = Signature(inputs=inputs, outputs=found.signature.outputs, dims=dims)
    _require_running(found, names)
    notes = [f"{name} is {each.min}: the baked value has this size" for name, each in fixed.items() if name in others]
    return found, tuple(notes)


def _fitting(given: Baked, spec: TensorSpec) -> Tensor:
    """The value in the input's dtype and rank.

    Raises:
        UsageError: VLX0707.
    """
    value = _typed(given, spec)
    if value.ndim == 0:
        sizes = [1 if isinstance(size, str) else size for size in spec.shape]
        return torch.from_numpy(np.full(sizes, value))
    if value.ndim == len(spec.shape) - 1 and isinstance(spec.shape[0], str):
        value = value[None]
    wanted = f"{spec.name} is {spec.dtype}[{','.join(map(str, spec.shape))}]"
    if value.ndim != len(spec.shape):
        raise _wrong(spec.name, f"the value has {value.ndim} axes; {wanted}", "give one value of that shape")
    for size, dim in zip(value.shape, spec.shape, strict=True):
        if isinstance(dim, int) and size != dim:
            shape = ",".join(map(str, value.shape))
            raise _wrong(spec.name, f"the value has shape [{shape}]; {wanted}", "give one value of that shape")
    return torch.from_numpy(np.ascontiguousarray(value))


def _typed(given: Baked, spec: TensorSpec) -> Array:
    """The value in the input's dtype, if that is no other value.

    A file says its dtype, which has to be of the input's kind; numbers that were typed are what the input wants, if it
    holds them.
    """
    if spec.dtype == "bfloat16":
        raise _wrong(spec.name, f"{spec.name} is bfloat16, which numpy does not have", "save the model in float32")
    value, wanted = given.value, np.dtype(spec.dtype)
    kinds = (value.dtype.kind, wanted.kind)
    fits = kinds[0] == kinds[1] or set(kinds) <= set("iu") or (kinds[0] in "iu" and kinds[1] == "f")
    if given.typed and not fits:
        raise _wrong(spec.name, f"the value is {value.dtype.name}, {spec.name} is {spec.dtype}", f"give {spec.dtype}")
    with np.errstate(over="ignore", invalid="ignore"):
        made = value.astype(wanted)
    rounds = kinds == ("f", "f")
    if not rounds and not np.array_equal(made, value):
        raise _wrong(spec.name, f"{spec.name} is {spec.dtype}, which does not hold the value", f"give {spec.dtype}")
    if rounds and not bool(np.isfinite(made).all()):
        raise _wrong(spec.name, f"the value is infinite in {spec.dtype}", f"give what {spec.dtype} holds")
    return made


def _fixed(values: Mapping[str, Tensor], signature: Signature, others: set[str]) -> dict[str, DimRange]:
    """Dims that the values make constants.

    Raises:
        UsageError: VLX0707 for a size that a dim does not take, or that differs between two values.
    """
    fixed: dict[str, DimRange] = {}
    for spec in signature.inputs:
        for size, dim in zip(values[spec.name].shape if spec.name in values else (), spec.shape, strict=False):
            if not isinstance(dim, str) or (size == 1 and dim in others):
                continue
            allowed = signature.dims[dim]
            if not allowed.min <= size <= (allowed.max or size):
                upto = "" if allowed.max is None else f" to {allowed.max}"
                raise _wrong(spec.name, f"the value has {size} along {dim}", f"{dim} takes {allowed.min}{upto}")
            if dim in fixed and fixed[dim].min != size:
                what = f"{dim} is {size} here, and {fixed[dim].min} of another baked input"
                raise _wrong(spec.name, what, "give one size")
            fixed[dim] = DimRange(min=int(size), max=int(size), opt=int(size))
    return fixed


def _replace(program: Program, name: str, value: Tensor, baked: Collection[str]) -> None:
    """Let everything that reads an input read a stored value."""
    node = next(n for n in program.placeholders if n.target == name)
    sizes = node.meta["val"].shape
    elsewhere = _places(program, baked)
    for user in list(node.users):
        if dialect.op_name(user) == _SIZE:
            user.args = elsewhere[sizes[int(dialect.operands(user)[1])].node.expr]
    if node.users:
        first = next(n for n in program.graph.nodes if n.op not in ("placeholder", "get_attr"))
        made = program.add_tensor(f"{name.replace('.', '_')}_baked", value, before=first, kind="constant")
        if any(isinstance(size, torch.SymInt) for size in sizes):
            made = _repeated(program, made, sizes, elsewhere, before=first, reader=next(iter(node.users)))
        node.replace_all_uses_with(made)
    program.graph.erase_node(node)


def _repeated(
    program: Program, value: Node, sizes: Sequence[Any], elsewhere: Mapping[Any, tuple[Node, int]], *, before: Node,
    reader: Node,
) -> Node:  # fmt: skip
    """A stored value once for each sample."""
    value_of = reader if reader.op == "call_function" else program.calls()[0]
    entries = [
        program.add_call(aten.sym_size.int, elsewhere[size.node.expr], before=before, value_of=value_of)
        if isinstance(size, torch.SymInt)
        else int(size)
        for size in sizes
    ]
    return program.add_call(aten.expand.default, (value, entries), before=before, value_of=value_of)


def _places(program: Program, baked: Collection[str]) -> dict[Any, tuple[Node, int]]:
    """Symbol → an input that stays, and the axis along which it has that size."""
    return {
        size.node.expr: (node, axis)
        for node in reversed(program.placeholders)
        if node.target not in baked
        for axis, size in reversed(list(enumerate(node.meta["val"].shape)))
        if isinstance(size, torch.SymInt)
    }


def _require_running(program: Program, names: Sequence[str]) -> None:
    try:
        program.run(*program.example)
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        text = error.message if isinstance(error, VlexportError) else str(error)
        reason = text.splitlines()[0] if text else type(error).__name__
        raise _wrong(
            ", ".join(names), f"the model fails on the value: {reason}", "give what the model takes"
        ) from error


def _wrong(name: str, what: str, hint: str) -> UsageError:
    return UsageError("VLX0707", f"--bake {name}: {what}", where="--bake", hint=hint)
