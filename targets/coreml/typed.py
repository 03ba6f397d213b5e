"""Keeps coremltools to the types that a Program says, where it would compute in fp32 or refuse what it mixed itself.

coremltools makes every number of Python fp32. Its elementwise operators then go over to fp32 with all that follows
them, its others (addmm, baddbmm, attention, norms, hardtanh, log2 …) refuse fp32 beside fp16; its division computes in
fp32 in any case. Under :func:`typed_conversion` a number takes the type of the tensors beside it, fp16 divided by fp16
is fp16, and what comes out otherwise nevertheless is cast to what the Program says. Where fp16 cannot hold a number,
that operator is computed in fp32.
Source: coremltools 9.0, converters/mil/mil/builder.py, mil/ops/defs/_utils.py (promote_input_dtypes) and
frontend/torch/ops.py (div). No torch.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

HALF, SINGLE = "fp16", "fp32"
_HALF = np.finfo(np.float16)
_Call = Callable[..., Any]


@contextlib.contextmanager
def typed_conversion(wanted: Mapping[str, str]) -> Iterator[None]:
    """While it lasts, conversions give what is wanted.

    Args:
        wanted: Name of a node of the exported graph → ``fp16`` or ``fp32``.
    """
    operators = importlib.import_module("coremltools.converters.mil.frontend.torch.ops")
    mil = importlib.import_module("coremltools.converters.mil.mil")
    own = _Typed(mil.Builder, mil.types, operators, wanted)
    with contextlib.ExitStack() as undo:
        for owner, name, made in (
            (mil.Builder, "_add_op", staticmethod(own.add)),
            (operators, "promote_input_dtypes", own.promote),
            (type(operators._TORCH_OPS_REGISTRY), "get_func", staticmethod(own.find)),
        ):
            undo.callback(setattr, owner, name, owner.__dict__[name])
            setattr(owner, name, made)
        yield


class _Typed:
    """What stands in for coremltools' own functions, which do the rest."""

    def __init__(self, builder: Any, types: Any, operators: Any, wanted: Mapping[str, str]) -> None:
        self._builder, self._types, self._operators, self._wanted = builder, types, operators, wanted
        self._add: _Call = builder._add_op
        self._promote: _Call = operators.promote_input_dtypes
        self._find: _Call = operators._TORCH_OPS_REGISTRY.get_func

    def add(self, op_cls: Any, **given: Any) -> Any:
        """An operator: of operands that are to have one type, numbers take that of the tensors; mixed, all are fp32."""
        single = False
        for names in _groups(op_cls, given):
            numbers = {name: number for name in names if (number := self._number(given[name])) is not None}
            tensors = [name for name in names if name not in numbers]
            types = {self._type(given[name]) for name in tensors}
            if HALF not in types:
                continue
            held = SINGLE not in types and all(_is_held(number) for number in numbers.values())
            given.update({name: n.astype(np.float16 if held else np.float32) for name, n in numbers.items()})
            if not held:
                single = True
                given.update({name: self._builder.cast(x=given[name], dtype=SINGLE) for name in tensors})
        if not single:
            return self._add(op_cls, **given)
        name = {"name": given.pop("name")} if "name" in given else {}
        made = self._add(op_cls, **given)
        return self._builder.cast(x=made, dtype=HALF, **name) if self._type(made) == SINGLE else made

    def promote(self, given: list[Any]) -> list[Any]:
        """Operands of one type: as in torch, a number does not change that of tensors with dims."""
        numbers = [None if number is None or number.ndim else number for number in map(self._number, given)]
        tensors = (value for value, number in zip(given, numbers, strict=True) if number is None)
        if self._is_half(tensors) and all(number is None or _is_normal(number) for number in numbers):
            for i, number in enumerate(numbers):
                if number is not None:
                    given[i] = self._builder.const(val=number.astype(np.float16))
        made: list[Any] = self._promote(given)
        return made

    def find(self, operator: str) -> _Call | None:
        """The conversion of an operator; a result of it is cast where it is of another type than wanted."""
        found = self._find(operator)
        if found is None:
            return None

        def convert(context: Any, node: Any) -> None:
            if found.__name__ != "div" or not self._divided(context, node):
                found(context, node)
            wanted = self._wanted.get(node.name)
            made = context[node.name] if wanted and node.name in context else None
            if self._type(made) not in ("", wanted):
                cast = self._builder.cast(x=made, dtype=wanted, name=f"{node.name}_{wanted}")
                context.add(cast, torch_name=node.name, override=True)

        return convert

    def _divided(self, context: Any, node: Any) -> bool:
        """Whether it is a quotient in fp16: not of numbers whose reciprocal fp16 does not hold, and not rounded."""
        operands = self._operators._get_inputs(context, node)
        rounding = self._operators._get_kwinputs(context, node, "rounding_mode", default=[None])[0]
        if len(operands) != 2 or rounding is not None:
            return False
        x, y = self.promote(list(operands))
        if not self._type(x) == self._type(y) == HALF or (y.val is not None and not _has_reciprocal(y.val)):
            return False
        context.add(self._builder.real_div(x=x, y=y, name=node.name))
        return True

    def _type(self, value: Any) -> str:
        """``fp16``, ``int32`` …; empty for what is no tensor."""
        kind = getattr(value, "dtype", None)
        return str(self._types.builtin_to_string(kind)) if isinstance(kind, type) else ""

    def _is_half(self, values: Iterable[Any]) -> bool:
        """Whether some are fp16, and none fp32."""
        found = {self._type(value) for value in values}
        return HALF in found and SINGLE not in found

    def _number(self, value: Any) -> Any:
        """The array that a constant stands for, unless it has a type of its own: fp16 or bool."""
        value = getattr(value, "val", None) if self._type(value) else value
        if value is None:
            return None
        array = np.asarray(value)
        return array if array.dtype.kind in "fiu" and array.dtype != np.float16 else None


def _groups(op_cls: Any, given: Mapping[str, Any]) -> list[list[str]]:
    """Names of operands given that are to have one type."""
    groups: dict[str, list[str]] = {}
    for name, kind in op_cls.input_spec.input_types.items():
        domain = getattr(kind, "type_domain_id", None)
        if domain is not None and given.get(name) is not None:
            groups.setdefault(domain, []).append(name)
    return list(groups.values())


def _is_held(number: Any) -> bool:
    """Whether fp16 makes nothing infinite and nothing zero of it."""
    with np.errstate(over="ignore"):
        half = number.astype(np.float16)
    return bool(np.all(np.isfinite(half) == np.isfinite(number)) and np.all((half == 0) == (number == 0)))


def _has_reciprocal(number: Any) -> bool:
    """Whether coremltools may multiply instead."""
    size = np.abs(np.asarray(number, np.float64))
    return bool(np.all((size >= 1 / _HALF.max) & (size <= 1 / _HALF.tiny)))


def _is_normal(number: Any) -> bool:
    """Whether fp16 holds it with all its bits: it is 0, infinite, or neither too large nor too small."""
    size = np.abs(number)
    return bool(np.all((size == 0) | np.isinf(size) | ((size >= _HALF.tiny) & (size <= _HALF.max))))
