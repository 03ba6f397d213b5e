"""Capture: a module and example inputs become one Program, with a dynamic batch where the model allows it.

``torch.export`` runs once, here. The result is checked against the eager model before anybody sees it.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import logging
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from vlexport.core.artifact import DimRange, Signature, TensorSpec
from vlexport.core.errors import CODES, CaptureError, VlexportError, nearest
from vlexport.core.numerics import relative_error
from vlexport.frontends.clean import clean, functional
from vlexport.frontends.decomposed import NOTE, own_quantization
from vlexport.frontends.inline import inline_regions
from vlexport.frontends.output_types import register_output_types
from vlexport.frontends.quantized import require_float_module, require_not_quantized
from vlexport.frontends.size_checks import SizeChecks
from vlexport.frontends.user_lines import parting_line, user_line, watch_guards
from vlexport.ir import compat, provenance
from vlexport.ir.exported import program_from_exported, require_no_mutation
from vlexport.ir.program import Program
from vlexport.ir.quant_ops import E4M3
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


def capture(model: nn.Module, inputs: Inputs, *, dynamic: Dynamic = "auto", own: bool = False) -> Captured:
    """Capture ``model`` as a functional Program.

    Args:
        model: A module in eval mode. It is not changed; a deep copy is exported.
        inputs: One tensor, a sequence in ``forward``'s order, or tensors by argument name.
        dynamic: ``"auto"`` makes dim 0 of every input the dynamic dim ``batch`` if the model allows it, and falls back
            to the example's sizes naming the line that forbids it; True fails instead of falling back; False keeps all
            sizes; a mapping ``{input: {axis: name | (name, min, max)}}`` asks for certain dims and fails if they cannot
            be had.
        own: The caller gives the model up: it is exported itself, and its weights become the Program's.

    Raises:
        CaptureError: VLX0301 train mode, VLX0302 inputs that do not fit, VLX0303 not exportable, VLX0304 the graph
            disagrees with the eager model, VLX0305 mutation, VLX0306 outputs that are no tensors, VLX0307 it is
            quantized already.
    """
    _require_eval(model)
    require_float_module(model)
    twin = model if own else copied(model)
    notes: list[str] = []
    if any(t.is_floating_point() and t.dtype not in (torch.float32, E4M3) for t in twin.state_dict().values()):
        notes.append("half- or double-precision weights were loaded as float32")
    twin = _as_float32(twin.cpu())
    reference = copied(twin)  # the user's own module never runs: a forward may write to its state
    arguments = _bind(twin, inputs)
    if isinstance(dynamic, Mapping):
        _require_axes(dynamic, arguments)
    before = _eager(reference, arguments, arguments.flat)
    register_output_types(before)

    program: Program | None = None
    batch = None if dynamic is False or isinstance(dynamic, Mapping) else _auto_batch(arguments)
    if batch is not None:
        lines: list[str] = []
        try:
            with watch_guards(lines):
                program = _checked(twin, reference, arguments, batch)
        except CaptureError as error:
            if dynamic is True or error.code in ("VLX0305", "VLX0306"):
                raise
            notes.append(_why_fixed(error, lines, reference, arguments))
    elif dynamic is True or (dynamic == "auto" and len(arguments.flat) > 1):
        reason = "the inputs do not share their first size"
        if dynamic is True:
            raise CaptureError("VLX0302", f"the batch cannot be dynamic: {reason}", hint="name the dims with dynamic=")
        notes.append(f"all sizes are fixed: {reason}")
    if program is None:
        program = _checked(twin, reference, arguments, dynamic if isinstance(dynamic, Mapping) else {})
    if own_quantization(program):
        notes.append(NOTE)
    if not _equal(before, _eager(reference, arguments, arguments.flat)):
        notes.append("the model gives different outputs for the same input: it holds randomness or changing state")
    for note in notes:
        log.warning(note)
    return Captured(program, tuple(notes))


def _as_float32(twin: nn.Module) -> nn.Module:
    """``twin`` with its floating tensors in float32, but for buffers that hold quantized values."""
    kept = {name: buffer for name, buffer in twin.named_buffers() if buffer.dtype is E4M3}
    twin = twin.float()  # unlike to(float32), leaves complex buffers whole
    for name, buffer in kept.items():
        place, _, leaf = name.rpartition(".")
        setattr(twin.get_submodule(place), leaf, buffer)
    return twin


def _require_eval(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if module.training and (
            not name or isinstance(module, (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd))
        ):
            raise CaptureError(
                "VLX0301",
                f"{name or 'the model'} is in train mode",
                where=name,
                hint="call model.eval() before saving or building",
            )


def copied(model: nn.Module) -> nn.Module:
    """A deep copy of a module.

    Raises:
        CaptureError: VLX0303.
    """
    try:
        return copy.deepcopy(model)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise CaptureError(
            "VLX0303",
            f"the model cannot be copied: {_first_line(error)}",
            where=type(model).__name__,
            hint="delete cached tensors and open handles from the model's attributes, or save a freshly loaded model",
        ) from error


def _require_axes(dynamic: Mapping[str, Mapping[int, DimChoice]], arguments: _Arguments) -> None:
    known = dict(zip(arguments.names, arguments.flat, strict=True))
    for name, axes in dynamic.items():
        if name not in known:
            raise CaptureError(
                "VLX0302", f"dynamic= names '{name}', which is no input{nearest(name, known)}", where="dynamic",
                hint=f"inputs: {', '.join(known)}",
            )  # fmt: skip
        for axis in axes:
            if not 0 <= axis < known[name].ndim:
                raise CaptureError(
                    "VLX0302", f"dynamic= names axis {axis} of {name}, which has {known[name].ndim}", where="dynamic",
                    hint="axes count from 0",
                )  # fmt: skip


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
        strange = [n for n in inputs if n not in signature.parameters] if isinstance(inputs, Mapping) else []
        near = f" ('{strange[0]}' is given{nearest(strange[0], signature.parameters)})" if strange else ""
        raise CaptureError(
            "VLX0302",
            f"the example inputs do not fit forward{signature}: {error}{near}",
            hint="give one tensor per argument, or a dict keyed by argument names",
        ) from error
    result = _Arguments((), {}, {})
    passed = list(bound.arguments)
    gap = next((n for n, each in zip(signature.parameters, passed, strict=False) if n != each), None)
    after_gap = set(list(signature.parameters)[list(signature.parameters).index(gap) :]) if gap is not None else set()
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
        if by_keyword or name in after_gap:
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
            where=user_line(error),
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
    program = program_of(_export(twin, arguments, chosen), arguments.names, arguments.flat, chosen)
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
        with torch.no_grad(), warnings.catch_warnings(), SizeChecks():
            warnings.simplefilter("ignore")  # torch warns about attributes that the deep copy alone gets
            shaped = shapes if dims else None
            exported = torch.export.export(twin, positional, keyword, dynamic_shapes=shaped, strict=False)
            return functional(inline_regions(exported))
    except CaptureError:
        raise
    except Exception as error:  # torch.export raises many private kinds
        raise CaptureError(
            "VLX0303",
            f"torch.export refuses the model: {_first_line(error)}",
            where=user_line(error),
            hint=_export_hint(error),
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
    ranges = [axes[0] if isinstance(axes[0], tuple) else (axes[0], 1, None) for axes in chosen.values()]
    low, high = max(r[1] for r in ranges), min((r[2] for r in ranges if r[2] is not None), default=None)
    variants = []
    for size in sorted({max(low, s if high is None else min(s, high)) for s in _CHECKED_BATCHES}):
        values = []
        for name, value in zip(arguments.names, arguments.flat, strict=True):
            repeats = -(-size // value.shape[0]) if name in batched else 1
            grown = torch.cat([value.roll(i, -1) for i in range(repeats)])[:size] if name in batched else value
            values.append(grown)
        variants.append(values)
    return variants


def program_of(
    exported: ExportedProgram,
    input_names: Sequence[str],
    example: Sequence[Tensor],
    chosen: Mapping[str, Mapping[int, DimChoice]],
) -> Program:
    """The Program of a functional exported graph.

    Args:
        exported: The graph; owned by the Program from here on.
        input_names: One a user input, in order.
        example: One tensor an input.
        chosen: Input → axis → its dynamic dim.

    Raises:
        CaptureError: VLX0303, VLX0305, VLX0306, VLX0307.
    """
    require_no_mutation(exported)
    require_not_quantized(exported)
    symbols: dict[Any, str] = {}
    dims: dict[str, DimRange] = {}
    by_name = {n.name: n for n in exported.graph.nodes if n.op == "placeholder"}
    inputs = []
    for name, user_input in zip(input_names, exported.graph_signature.user_inputs, strict=True):
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
    program.example = tuple(each.detach().clone() for each in example)  # torch notes dims on tensors that it traces
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
                f"output {'.'.join(path) or position} of forward is no tensor, but of type {type(fake).__name__}",
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
            emptied = re.search(r"expression \S*u\d+\S* >= 1\b", str(error)) is not None
            raise CaptureError(
                "VLX0304", f"the captured graph does not run: {_first_line(error)}",
                hint="a selection keeps nothing of the example: give an example of which something is left"
                if emptied else "save with dynamic=False",
            ) from error  # fmt: skip
        for spec, a, b in zip(program.signature.outputs, found, expected, strict=True):
            worst = relative_error(_array(a), _array(b))
            if not worst <= TOLERANCE:
                sizes = "×".join(str(s) for s in values[0].shape)
                raise CaptureError(
                    "VLX0304",
                    f"output {spec.name} of the captured graph differs from the model by {worst:.1e} at input {sizes}",
                    where=spec.name,
                    hint="the model may cache shapes or hold randomness; dynamic=False shows whether it does",
                )


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in compat.leaves(value) if leaf is not None]


def _array(tensor: Tensor) -> Any:
    return (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).detach().numpy()


def _equal(a: Any, b: Any) -> bool:
    pairs = zip(_tensors(a), _tensors(b), strict=True)
    return all(relative_error(_array(x), _array(y)) <= TOLERANCE for x, y in pairs if isinstance(x, Tensor))


def _export_hint(error: BaseException) -> str:
    """What torch itself suggests for a dim (``height = Dim('height', min=4)``), or a range if a size does not fit."""
    _, found, suggested = str(error).partition("Suggested fixes:\n")
    if found:
        lines = itertools.takewhile(str.strip, suggested.splitlines())
        return f"give dynamic= that range: {'; '.join(map(str.strip, lines))}"
    if names := dict.fromkeys(re.findall(r"Not all values of (\w+) = ", str(error))):
        examples = ", ".join(f'("{name}", 8, 512)' for name in names)
        return f"give dynamic= a range without the sizes that the model does not take, often the smallest: {examples}"
    return "rewrite that line without branches on tensor values, or save with dynamic=False"


def _why_fixed(error: CaptureError, lines: Sequence[str], reference: nn.Module, arguments: _Arguments) -> str:
    """Why the batch could not be made dynamic, naming the user's line if there is one."""
    line = lines[-1] if lines else parting_line(lambda size: _eager(reference, arguments, _batched(arguments, size)))
    # never the message itself: torch's and the user's texts may hold paths, and notes travel in files
    reason = f"{line} depends on it" if line else f"{CODES[error.code]} ({error.code})"
    return f"the batch is fixed at {arguments.flat[0].shape[0]}: {reason}"


def _batched(arguments: _Arguments, size: int) -> list[Tensor]:
    return [torch.cat([v] * size)[:size] for v in arguments.flat]


def _first_line(error: BaseException) -> str:
    text = (error.message if isinstance(error, VlexportError) else str(error)).strip().splitlines()
    return text[0] if text else type(error).__name__
