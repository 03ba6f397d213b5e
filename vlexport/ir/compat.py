"""The private or moving parts of torch that the rest of ``ir`` needs, in one place. Checked on torch 2.11 to 2.13."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import sympy
import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._export.verifier import Verifier
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic
from torch.utils import _pytree as pytree
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

verifier: type[Verifier] = Verifier
"""The ATen verifier that accepts a functional graph without decomposition."""


def fake_mode_of(values: list[Any]) -> FakeTensorMode | None:
    """The fake mode that made ``values``; None when there is no fake tensor among them."""
    return detect_fake_mode(values)


def fake_from(mode: FakeTensorMode, tensor: torch.Tensor) -> torch.Tensor:
    """A static fake of a real tensor."""
    return mode.from_tensor(tensor, static_shapes=True)


@contextlib.contextmanager
def quiet_fake(mode: FakeTensorMode) -> Iterator[None]:
    """Run operators on fakes; new guards are not recorded (the capture has settled them).

    Sizes that the data decides get new symbols; nobody has to bind them, and who traces the graph next makes its own.
    Without the Python dispatcher, operators made of others (``pad``) would turn a symbolic size into the hint's number.
    """
    shape_env = mode.shape_env
    with mode, enable_python_dispatcher():
        if shape_env is None:
            yield
        else:
            with shape_env.suppress_guards(), shape_env.ignore_fresh_unbacked_symbols():
                yield


def fake_empty(mode: FakeTensorMode, sizes: Sequence[int | torch.SymInt], dtype: torch.dtype) -> torch.Tensor:
    """A contiguous fake on the CPU, made without asking for an operator's: a third of the time of ``torch.empty``."""
    quiet = contextlib.nullcontext() if mode.shape_env is None else mode.shape_env.suppress_guards()
    with quiet:
        fake: torch.Tensor = FakeTensor(mode, torch.empty(list(sizes), dtype=dtype, device="meta"), torch.device("cpu"))
    return fake


def map_tensors(change: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """``value`` with every tensor in it, however nested, replaced by ``change(tensor)``."""
    return pytree.tree_map_only(torch.Tensor, change, value)


def leaves(value: Any) -> list[Any]:
    """The leaves of nested tuples, lists and dicts, in order."""
    return list(pytree.tree_leaves(value))


def flat_call_spec(inputs: int, outputs: int) -> tuple[pytree.TreeSpec, pytree.TreeSpec]:
    """Tree specs of a function with ``inputs`` positional tensors that returns a tuple of ``outputs`` tensors."""
    _, in_spec = pytree.tree_flatten(((0,) * inputs, {}))
    _, out_spec = pytree.tree_flatten((0,) * outputs)
    return in_spec, out_spec


def output_paths(spec: pytree.TreeSpec) -> list[tuple[str, ...]]:
    """For every leaf of a pytree spec, the keys (or positions) that lead to it."""
    leaves = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    with_path, _ = pytree.tree_flatten_with_path(leaves)
    return [tuple(_key(k) for k in path) for path, _ in with_path]


def _key(entry: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)


def public_symbol(name: str) -> Any:
    """The symbol that stands for a public dim name when sizes are printed."""
    return sympy.Symbol(name, integer=True, positive=True)


def value_range(smallest: int, largest: int | None) -> Any:
    """The sizes that a symbol may take, as ``ExportedProgram.range_constraints`` keeps them."""
    return ValueRanges(smallest, int_oo if largest is None else largest)


def batched_fakes(mode: FakeTensorMode, fakes: list[torch.Tensor], batch: int | None) -> list[torch.Tensor]:
    """Fakes like these, whose first size is ``batch``, or a new symbol that is the same in all of them."""
    from torch._dynamo.source import ConstantSource  # imports the whole tracer

    size: Any = batch
    if batch is None:
        shape_env = mode.shape_env
        assert shape_env is not None
        source = ConstantSource("batch")
        symbol = shape_env.create_symbol(2, source, DimDynamic.DYNAMIC, constraint_dim=None)
        size = shape_env.create_symintnode(symbol, hint=2, source=source)
    with mode:
        return [torch.empty((size, *fake.shape[1:]), dtype=fake.dtype, device=fake.device) for fake in fakes]
