"""Capture: a module and example inputs become one Program, with a dynamic batch where the model allows it.

``torch.export`` runs once, here. The result is checked against the eager model before anybody sees it.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from vlexport.core.artifact import DimRange, Signature, TensorSpec
from vlexport.core.errors import CaptureError, VlexportError
from vlexport.core.numerics import relative_error
from vlexport.frontends.clean import clean, functional
from vlexport.ir import compat, provenance
from vlexport.ir.exported import program_from_exported
from vlexport.ir.program import Program
from vlexport.ir.text import size_text

log = logging.getLogger("vlexport.capture")

DimChoice = str | tuple[str, int, int | None]
Dynamic = Literal["auto"] | bool | Mapping[str, Mapping[int, DimChoice]]
Inputs = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
TOLERANCE = 1e-4
"""Largest max|a−b| / max|b| between the captured graph and the eager model, float32."""
_CHECKED_BATCHES = (1, 2, 3)


@dataclass(frozen=True)
class Captured:
    """A Program and what the user should know about how it was made."""

    program: Program
    notes: tuple[str, ...] = ()


@dataclass
class _Arguments:
    """Example inputs bound to ``forward``'s own argument names, in its order."""

    positional: tuple[Tensor, ...]
    keyword: dict[str, Tensor]
    nested: dict[str, Any]
    names: list[str] = field(default_factory=list)

    @property
    def flat(self) -> list[Tensor]:
        return [*self.positional, *self.keyword.values()]

    def with_values(self, values: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        count = len(self.positional)
        return tuple(values[:count]), dict(zip(self.keyword, values[count:], strict=True))


def capture(model: nn.Module, inputs: Inputs, *, dynamic: Dynamic = "auto") -> Captured:
    """Capture ``model`` as a functional Program.

    Args:
        model: A module in eval mode. It is not changed; a deep copy is exported.
        inputs: One tensor, a sequence in ``forward``'s order, or tensors by argument name.
        dynamic: ``"auto"`` makes dim 0 of every input the dynamic dim ``batch`` if the model allows it, and falls back
            to the example's sizes naming the line that forbids it; False keeps all sizes; a mapping
            ``{input: {axis: name | (name, min, max)}}`` asks for certain dims and fails if they cannot be had.

    Raises:
        CaptureError: VLX0301 train mode, VLX0302 inputs that do not fit, VLX0303 not exportable, VLX0304 the graph
            disagrees with the eager model, VLX0305 mutation, VLX0306 outputs that are no tensors.
    """
    _require_eval(model)
    twin = copy.deepcopy(model)
    notes: list[str] = []
    if any(t.is_floating_point() and t.dtype is not torch.float32 for t in twin.state_dict().values()):
        notes.append("half- or double-precision weights were loaded as float32")
    twin = twin.to(device="cpu", dtype=torch.float32)
    reference = model if not notes and _on_cpu(model) else copy.deepcopy(twin)
    arguments = _bind(twin, inputs)
    before = _eager(reference, arguments, arguments.flat)

    program: Program | None = None
    batch = _auto_batch(arguments) if dynamic == "auto" else None
    if batch is not None:
        lines: list[str] = []
        try:
            with _watch_guards(lines):
                program = _checked(twin, reference, arguments, batch)
        except CaptureError as error:
            where = lines[-1] if lines else error.where
            reason = f"{where} depends on it" if where else error.message
            notes.append(f"the batch is fixed at {arguments.flat[0].shape[0]}: {reason}")
    if program is None:
        program = _checked(twin, reference, arguments, dynamic if isinstance(dynamic, Mapping) else {})
    if not _equal(before, _eager(reference, arguments, arguments.flat)):
        notes.append("the model gives different outputs for the same input: it holds randomness or changing state")
    for note in notes:
        log.warning(note)
    return Captured(program, tuple(notes))


def _require_eval(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if module.training and (not name or isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.Dropout))):
            raise CaptureError(
                "VLX0301",
                f"{name or 'the model'} is in train mode",
                where=name,
                hint="call model.eval() before saving or building",
            )


def _on_cpu(model: nn.Module) -> bool:
    return all(t.device.type == "cpu" for t in model.state_dict().values())


def _bind(model: nn.Module, inputs: Inputs) -> _Arguments:
    signature = inspect.signature(model.forward)
    try:
        if isinstance(inputs, Tensor):
            bound = signature.bind(inputs)
        elif isinstance(inputs, Mapping):
            bound = signature.bind(**inputs)
        else:
            bound = signature.bind(*inputs)
    except TypeError as error:
        raise CaptureError(
            "VLX0302",
            f"the example inputs do not fit forward{signature}: {error}",
            hint="give one tensor per argument, or a dict keyed by argument names",
        ) from error
    result = _Arguments((), {}, {})
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            values = {f"{name}_{i}": v for i, v in enumerate(value)}
        elif kind is inspect.Parameter.VAR_KEYWORD:
            values = dict(value)
        else:
            values = {name: value}
        for key, tensor in values.items():
            if not isinstance(tensor, Tensor):
                raise CaptureError(
                    "VLX0302",
                    f"input {key} is a {type(tensor).__name__}, not a tensor",
                    where=key,
                    hint="wrap the model in a module whose forward takes tensors only",
                )
            result.names.append(key)
        moved = {k: t.detach().cpu() for k, t in values.items()}
        moved = {k: t.float() if t.is_floating_point() else t for k, t in moved.items()}
        by_keyword = kind in (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)
        if by_keyword or (isinstance(inputs, Mapping) and result.keyword):
            result.keyword.update(moved)
        else:
            result.positional += tuple(moved.values())
        result.nested[name] = (kind, list(moved))
    return result


def _eager(model: nn.Module, arguments: _Arguments, values: Sequence[Tensor]) -> Any:
    positional, keyword = arguments.with_values(values)
    try:
        with torch.no_grad():
            return model(*(v.clone() for v in positional), **{k: v.clone() for k, v in keyword.items()})
    except VlexportError:
        raise
    except Exception as error:  # the user's own forward may raise anything
        raise CaptureError(
            "VLX0302",
            f"forward fails on the example inputs: {type(error).__name__}: {_first_line(error)}",
            where=_user_line(error),
            hint="check the shapes and dtypes of inputs= (or --input NAME=SHAPE:dtype)",
        ) from error


def _auto_batch(arguments: _Arguments) -> dict[str, dict[int, DimChoice]] | None:
    sizes = {t.shape[0] if t.ndim else None for t in arguments.flat}
    if len(sizes) != 1 or None in sizes:
        return None
    return {name: {0: "batch"} for name in arguments.names}


def _checked(
    twin: nn.Module, reference: nn.Module, arguments: _Arguments, chosen: Mapping[str, Mapping[int, DimChoice]]
) -> Program:
    """Export with these dynamic dims and compare with the eager model."""
    program = _program(_export(twin, arguments, chosen), arguments, chosen)
    _agree(program, reference, arguments, _variants(arguments, chosen))
    return program


def _export(twin: nn.Module, arguments: _Arguments, chosen: Mapping[str, Mapping[int, DimChoice]]) -> ExportedProgram:
    dims: dict[str, Any] = {}

    def spec(name: str) -> dict[int, Any] | None:
        axes = {}
        for axis, choice in chosen.get(name, {}).items():
            dim, low, high = choice if isinstance(choice, tuple) else (choice, 1, None)
            axes[axis] = dims.setdefault(dim, Dim(dim, min=low, max=high) if high else Dim(dim, min=low))
        return axes or None

    shapes: dict[str, Any] = {}
    for argument, (kind, names) in arguments.nested.items():
        specs = [spec(n) for n in names]
        if kind is inspect.Parameter.VAR_POSITIONAL:
            shapes[argument] = tuple(specs)
        elif kind is inspect.Parameter.VAR_KEYWORD:
            shapes[argument] = dict(zip(names, specs, strict=True))
        else:
            shapes[argument] = specs[0]
    positional, keyword = arguments.with_values(_grown(arguments, chosen))
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about attributes that the deep copy alone gets
            return torch.export.export(twin, positional, keyword, dynamic_shapes=shapes if dims else None, strict=False)
    except Exception as error:  # torch.export raises many private kinds
        raise CaptureError(
            "VLX0303",
            f"torch.export refuses the model: {_first_line(error)}",
            where=_user_line(error),
            hint="rewrite that line without branches on tensor values, or save with dynamic=False",
        ) from error


def _grown(arguments: _Arguments, chosen: Mapping[str, Mapping[int, DimChoice]]) -> list[Tensor]:
    """Example values with size-1 dynamic dims repeated to 2: a traced 1 specialises."""
    values = []
    for name, value in zip(arguments.names, arguments.flat, strict=True):
        for axis in chosen.get(name, {}):
            if value.shape[axis] == 1:
                value = torch.cat([value, value.flip(-1)], dim=axis)
        values.append(value)
    return values


def _variants(arguments: _Arguments, chosen: Mapping[str, Mapping[int, DimChoice]]) -> list[list[Tensor]]:
    """Values to compare on: the example, and batches 1, 2, 3 when the batch alone is dynamic."""
    batched = {name for name, axes in chosen.items() if set(axes) == {0}}
    if not chosen or batched != set(chosen):
        return [arguments.flat]
    variants = []
    for size in _CHECKED_BATCHES:
        values = []
        for name, value in zip(arguments.names, arguments.flat, strict=True):
            repeats = -(-size // value.shape[0]) if name in batched else 1
            grown = torch.cat([value.roll(i, -1) for i in range(repeats)])[:size] if name in batched else value
            values.append(grown)
        variants.append(values)
    return variants


def _program(
    exported: ExportedProgram, arguments: _Arguments, chosen: Mapping[str, Mapping[int, DimChoice]]
) -> Program:
    exported = functional(exported)
    symbols: dict[Any, str] = {}
    dims: dict[str, DimRange] = {}
    by_name = {n.name: n for n in exported.graph.nodes if n.op == "placeholder"}
    inputs = []
    for name, user_input in zip(arguments.names, exported.graph_signature.user_inputs, strict=True):
        fake = by_name[str(user_input)].meta["val"]
        shape: list[int | str] = []
        for axis, size in enumerate(fake.shape):
            choice = chosen.get(name, {}).get(axis)
            if choice is None or not isinstance(size, torch.SymInt):
                shape.append(int(size))
                continue
            dim, low, high = choice if isinstance(choice, tuple) else (choice, 1, None)
            symbols[size.node.expr] = dim
            dims[dim] = DimRange(min=low, max=high, opt=max(low, 1))
            shape.append(dim)
        inputs.append(TensorSpec(name=name, dtype=_dtype(fake), shape=tuple(shape)))
    outputs = _output_specs(exported, symbols)
    program = program_from_exported(exported, Signature(inputs=tuple(inputs), outputs=outputs, dims=dims))
    clean(program)
    provenance.stamp(program.graph)
    program.example = tuple(arguments.flat)
    return program


def _output_specs(exported: ExportedProgram, symbols: Mapping[Any, str]) -> tuple[TensorSpec, ...]:
    paths = compat.output_paths(exported.call_spec.out_spec)
    output = next(n for n in exported.graph.nodes if n.op == "output")
    nodes = list(output.args[0])
    kept = [(path, node) for path, node in zip(paths, nodes, strict=True) if node is not None]
    if len(kept) < len(nodes):
        output.args = (tuple(node for _, node in kept),)
        exported.graph_signature.output_specs[:] = [
            spec for spec, node in zip(exported.graph_signature.output_specs, nodes, strict=True) if node is not None
        ]
    specs = []
    for position, (path, node) in enumerate(kept):
        fake = node.meta["val"] if isinstance(node, torch.fx.Node) else node
        if not isinstance(fake, Tensor):
            raise CaptureError(
                "VLX0306",
                f"output {'.'.join(path) or position} of forward is a {type(fake).__name__}, not a tensor",
                hint="return tensors, or tuples and dicts of tensors",
            )
        named = any(not part.isdigit() for part in path)
        name = ".".join(path) if named else ("output" if position == 0 else f"output_{position}")
        shape = tuple(s if isinstance(s, int) else size_text(s, dict(symbols)) for s in fake.shape)
        specs.append(TensorSpec(name=name, dtype=_dtype(fake), shape=shape))
    return tuple(specs)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _agree(program: Program, reference: nn.Module, arguments: _Arguments, variants: list[list[Tensor]]) -> None:
    for values in variants:
        expected = _tensors(_eager(reference, arguments, values))
        try:
            found = program.run(*values)
        except RuntimeError as error:
            raise CaptureError(
                "VLX0304", f"the captured graph does not run: {_first_line(error)}", hint="save with dynamic=False"
            ) from error
        for spec, a, b in zip(program.signature.outputs, found, expected, strict=True):
            worst = relative_error(a.numpy(), b.numpy())
            if worst > TOLERANCE:
                sizes = "×".join(str(s) for s in values[0].shape)
                raise CaptureError(
                    "VLX0304",
                    f"output {spec.name} of the captured graph differs from the model by {worst:.1e} at input {sizes}",
                    where=spec.name,
                    hint="the model may cache shapes or hold randomness; dynamic=False shows whether it does",
                )


def _tensors(value: Any) -> list[Tensor]:
    leaves, _ = torch.utils._pytree.tree_flatten(value)
    return [leaf for leaf in leaves if leaf is not None]


def _equal(a: Any, b: Any) -> bool:
    return all(relative_error(x.numpy(), y.numpy()) <= TOLERANCE for x, y in zip(_tensors(a), _tensors(b), strict=True))


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__


def _user_line(error: BaseException) -> str:
    """``file.py:LINE`` of the last frame outside torch in the error's traceback."""
    found = ""
    trace = error.__traceback__
    while trace is not None:
        file = PurePath(trace.tb_frame.f_code.co_filename)
        if not {"torch", "vlexport"} & set(file.parts) and "frontends" not in file.parts:
            found = f"{file.name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found


@contextlib.contextmanager
def _watch_guards(lines: list[str]) -> Iterator[None]:
    """Collect the user's ``forward`` lines at which torch decides something about a symbolic size."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            frame = sys._getframe()
            while frame is not None:
                file = PurePath(frame.f_code.co_filename)
                if frame.f_code.co_name == "forward" and "torch" not in file.parts:
                    line = f"{file.name}:{frame.f_lineno}"
                    if not lines or lines[-1] != line:
                        lines.append(line)
                    return
                frame = frame.f_back  # type: ignore[assignment]

    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    handler = Handler(level=logging.INFO)
    level, propagate, handlers = logger.level, logger.propagate, logger.handlers
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.handlers = handlers
        logger.setLevel(level)
        logger.propagate = propagate
