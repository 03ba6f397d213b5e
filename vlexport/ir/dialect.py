"""What an op is: the closed table of functional ATen overloads that make the vlexport dialect.

An operator outside the table is *opaque*: nothing matches across it, its MACs are unknown, and a target may refuse it
by name and source line. In-place and out-variant operators are never part of a Program.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.fx import Node

Category = Literal["affine", "elementwise", "view", "reduction", "select", "attention", "quant", "make", "shape"]
Shape = Sequence[int]
MacsRule = Callable[[list[Shape], Shape, tuple[Any, ...]], int]


@dataclass(frozen=True)
class OpInfo:
    """One row of the table.

    Attributes:
        category: What kind of op it is; passes reason on it.
        macs: Multiply-accumulates from the shapes of the tensor operands (in order, lists opened) and of the output,
            and from all operands as the call has them; None means none.
        quantizable: Whether quantization may consider it.
    """

    category: Category
    macs: MacsRule | None = None
    quantizable: bool = False


def _numel(shape: Shape) -> int:
    return math.prod(shape)


def _conv(operands: list[Shape], out: Shape, args: tuple[Any, ...]) -> int:
    weight = operands[1]
    return _numel(out) * _numel(weight[1:])


def _conv_transpose(operands: list[Shape], out: Shape, args: tuple[Any, ...]) -> int:
    return _numel(operands[0]) * _numel(operands[1][1:])


def _matmul(operands: list[Shape], out: Shape, args: tuple[Any, ...]) -> int:
    return _numel(out) * operands[0][-1]


def _linear(operands: list[Shape], out: Shape, args: tuple[Any, ...]) -> int:
    return _numel(out) * operands[0][-1]


def _addmm(operands: list[Shape], out: Shape, args: tuple[Any, ...]) -> int:
    return _numel(out) * operands[1][-1]


def _attention(operands: list[Shape], out: Shape, args: tuple[Any, ...]) -> int:
    query, key, value = operands[:3]
    return _numel(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _einsum(operands: list[Shape], out: Shape, args: tuple[Any, ...]) -> int:
    """The product of all index sizes, however the call orders its products; one operand is only moved or summed."""
    if len(operands) < 2:
        return 0
    sizes: dict[str, int] = {}
    for term, shape in zip(args[0].replace(" ", "").partition("->")[0].split(","), operands, strict=True):
        before, dots, after = term.partition("...")
        hidden = len(shape) - len(before) - len(after)  # broadcast dims, counted from the right
        names = [*before, *(f"...{hidden - i}" for i in range(hidden if dots else 0)), *after]
        for name, size in zip(names, shape, strict=True):
            sizes[name] = max(sizes.get(name, 0), size)
    return math.prod(sizes.values())


def _row(category: Category, names: str, macs: MacsRule | None = None) -> dict[str, OpInfo]:
    return {f"aten.{n}": OpInfo(category, macs, quantizable=macs is not None) for n in names.split()}


OPS: dict[str, OpInfo] = {
    **_row(
        "affine", "conv1d.default conv2d.default conv3d.default conv1d.padding conv2d.padding conv3d.padding", _conv
    ),
    **_row("affine", "conv_transpose1d.default conv_transpose2d.input conv_transpose3d.input", _conv_transpose),
    **_row("affine", "linear.default", _linear),
    **_row("affine", "matmul.default mm.default bmm.default", _matmul),
    **_row("affine", "addmm.default baddbmm.default", _addmm),
    **_row("affine", "einsum.default", _einsum),
    **_row("affine", "batch_norm.default avg_pool1d.default avg_pool2d.default"),
    **_row("affine", "adaptive_avg_pool1d.default adaptive_avg_pool2d.default"),
    **_row("attention", "scaled_dot_product_attention.default", _attention),
    **_row("reduction", "layer_norm.default group_norm.default rms_norm.default instance_norm.default"),
    **_row(
        "reduction", "softmax.int log_softmax.int _softmax.default mean.dim mean.default sum.dim_IntList sum.default"
    ),
    **_row(
        "reduction", "amax.default amin.default max.dim min.dim max.default min.default argmax.default argmin.default"
    ),
    **_row("reduction", "diff.default"),
    **_row("reduction", "var.correction std.correction var_mean.correction linalg_vector_norm.default prod.dim_int"),
    **_row(
        "reduction", "max_pool2d.default adaptive_max_pool2d.default any.dim all.dim cumsum.default logsumexp.default"
    ),
    **_row(
        "reduction", "norm.ScalarOpt_dim linalg_norm.default max_pool1d.default var.dim std.dim any.default all.default"
    ),
    **_row("elementwise", "add.Tensor sub.Tensor mul.Tensor div.Tensor add.Scalar sub.Scalar mul.Scalar div.Scalar"),
    **_row(
        "elementwise", "rsub.Scalar rsub.Tensor pow.Tensor_Scalar pow.Scalar pow.Tensor_Tensor neg.default abs.default"
    ),
    **_row(
        "elementwise", "exp.default log.default sqrt.default rsqrt.default reciprocal.default sin.default cos.default"
    ),
    **_row(
        "elementwise", "erf.default tanh.default sigmoid.default relu.default relu6.default gelu.default silu.default"
    ),
    **_row("elementwise", "hardswish.default hardsigmoid.default hardtanh.default leaky_relu.default elu.default"),
    **_row("elementwise", "mish.default softplus.default prelu.default selu.default log1p.default expm1.default"),
    **_row("elementwise", "clamp.default clamp.Tensor clamp_min.default clamp_max.default clip.default floor.default"),
    **_row("elementwise", "ceil.default round.default trunc.default sign.default where.self where.ScalarOther"),
    **_row("elementwise", "where.Scalar where.ScalarSelf maximum.default minimum.default masked_fill.Scalar"),
    **_row("elementwise", "masked_fill.Tensor eq.Tensor eq.Scalar ne.Tensor ne.Scalar gt.Tensor gt.Scalar ge.Tensor"),
    **_row("elementwise", "ge.Scalar lt.Tensor lt.Scalar le.Tensor le.Scalar logical_and.default logical_or.default"),
    **_row("elementwise", "logical_not.default bitwise_and.Tensor bitwise_or.Tensor bitwise_not.default isnan.default"),
    **_row(
        "elementwise", "_to_copy.default to.dtype floor_divide.default remainder.Scalar remainder.Tensor fmod.Scalar"
    ),
    **_row("elementwise", "div.Tensor_mode div.Scalar_mode square.default atan2.default logit.default glu.default"),
    **_row(
        "elementwise",
        "isinf.default type_as.default to.dtype_layout bitwise_xor.Tensor logical_xor.default addcmul.default",
    ),
    **_row("elementwise", "max.other min.other"),
    **_row("elementwise", "__and__.Tensor __or__.Tensor __xor__.Tensor fill.Tensor fill.Scalar"),
    **_row("view", "reshape.default permute.default expand.default squeeze.dim squeeze.dims squeeze.default"),
    **_row("view", "unsqueeze.default slice.Tensor select.int cat.default stack.default split.Tensor"),
    **_row(
        "view", "split_with_sizes.default chunk.default unbind.int roll.default pad.default constant_pad_nd.default"
    ),
    **_row("view", "flip.default repeat.default repeat_interleave.self_int tile.default pixel_shuffle.default"),
    **_row("view", "pixel_unshuffle.default unfold.default im2col.default narrow.default channel_shuffle.default"),
    **_row("view", "transpose.int t.default view.default flatten.using_ints unflatten.int expand_as.default"),
    **_row("view", "broadcast_to.default"),
    **_row("view", "movedim.int movedim.intlist swapaxes.default mT.default numpy_T.default view_as.default"),
    **_row("view", "reshape_as.default _unsafe_view.default swapdims.default adjoint.default clone.default"),
    **_row("view", "upsample_nearest2d.vec upsample_bilinear2d.vec upsample_bicubic2d.vec upsample_nearest2d.default"),
    **_row("view", "upsample_bilinear2d.default upsample_bicubic2d.default _upsample_bicubic2d_aa.default"),
    **_row("view", "_upsample_bicubic2d_aa.vec _upsample_bilinear2d_aa.vec _upsample_nearest_exact2d.vec"),
    **_row("view", "_upsample_nearest_exact2d.default"),
    **_row("view", "_upsample_bilinear2d_aa.default grid_sampler.default tril.default triu.default meshgrid.indexing"),
    **_row("view", "meshgrid.default reflection_pad2d.default replication_pad2d.default contiguous.default"),
    **_row("select", "index.Tensor index_select.default gather.default topk.default sort.default sort.stable"),
    **_row("select", "argsort.default argsort.stable nonzero.default masked_select.default embedding.default"),
    **_row("select", "scatter.src scatter.value scatter_add.default scatter_reduce.two index_put.default"),
    **_row("select", "index_copy.default take_along_dim.default masked_scatter.default select_scatter.default"),
    **_row("select", "slice_scatter.default one_hot.default bucketize.Tensor index_add.default index_fill.int_Scalar"),
    **_row("select", "repeat_interleave.self_Tensor nonzero_numpy.default argwhere.default where.default"),
    **_row("make", "arange.default arange.start arange.start_step full.default full_like.default zeros.default"),
    **_row(
        "make", "zeros_like.default ones.default ones_like.default scalar_tensor.default linspace.default eye.default"
    ),
    **_row("make", "new_zeros.default new_ones.default new_full.default new_empty.default"),
    **_row("shape", "sym_size.int sym_numel.default item.default _local_scalar_dense.default"),
    **{f"vlexport.{name}.default": OpInfo("quant") for name in ("quantize", "dequantize", "choose_qparams", "look_up")},
    **_row("shape", "_assert_scalar.default sym_constrain_range_for_size.default sym_constrain_range.default"),
}
"""``aten.NAME.OVERLOAD``, or that of our own operators (``ir/quant_ops``) → what it is."""

CONVOLUTIONS = (
    "aten.conv1d.default", "aten.conv2d.default", "aten.conv3d.default", "aten.conv1d.padding", "aten.conv2d.padding",
    "aten.conv3d.padding",
)  # fmt: skip
TRANSPOSED_CONVOLUTIONS = (
    "aten.conv_transpose1d.default", "aten.conv_transpose2d.input", "aten.conv_transpose3d.input",
)  # fmt: skip
SECOND_SPELLINGS: dict[str, tuple[str, ...]] = {
    "aten.permute.default": (
        "aten.transpose.int", "aten.t.default", "aten.numpy_T.default", "aten.mT.default", "aten.swapaxes.default",
        "aten.swapdims.default", "aten.movedim.int", "aten.movedim.intlist",
    ),
    "aten.reshape.default": (
        "aten.view.default", "aten.flatten.using_ints", "aten.unflatten.int", "aten._unsafe_view.default",
        "aten.view_as.default", "aten.reshape_as.default",
    ),
    "aten.expand.default": ("aten.expand_as.default", "aten.broadcast_to.default"),
}  # fmt: skip
"""Operator → others that say the same; in canonical form only the first is left."""
COPIES = ("aten.clone.default", "aten.contiguous.default")
"""Their value is that of their operand, and memory layout is no idea of a Program."""

_CHECKS = {
    "aten._assert_scalar.default", "aten._assert_async.default", "aten._assert_async.msg",
    "aten.sym_constrain_range_for_size.default", "aten.sym_constrain_range.default",
    "aten._assert_tensor_metadata.default",
}  # fmt: skip
_CASTS = {"aten._to_copy.default", "aten.to.dtype", "aten.to.dtype_layout", "aten.type_as.default"}
_PADS = {"aten.pad.default", "aten.constant_pad_nd.default"}
_UNDEFINED = {"aten.empty.memory_format", "aten.empty_like.default", "aten.new_empty.default"}
_DROP_RATES = ("p", "dropout", "dropout_p")
_PYTHON_MODULES = ("_operator", "operator", "math", "builtins", "torch")


def op_name(node: Node) -> str:
    """``aten.conv2d.default`` for an ATen call, ``operator.add`` for a Python call, else the FX opcode."""
    if node.op != "call_function":
        return node.op
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    module = (getattr(target, "__module__", "") or "").removeprefix("_")
    return f"{module}.{getattr(target, '__name__', target)}"


def plain_name(call: Node | str) -> str:
    """``conv2d`` for ``aten.conv2d.default``, ``getitem`` for ``operator.getitem``: what messages call an operator."""
    library, _, rest = (call if isinstance(call, str) else op_name(call)).partition(".")
    return rest.partition(".")[0] or library


def info(node: Node) -> OpInfo | None:
    """The table's row, or None for an opaque op. Arithmetic on sizes and tuple access count as ``shape``."""
    name = op_name(node)
    row = OPS.get(name)
    if row is None and node.op == "call_function" and not isinstance(node.target, torch._ops.OpOverload):
        return OpInfo("shape")
    return row


def carries_on(node: Node) -> bool:
    """Whether a call only moves numbers, or changes each by itself."""
    row = info(node)
    return row is not None and row.category in ("view", "elementwise")


def is_opaque(node: Node) -> bool:
    """Whether nothing is known about a call."""
    return node.op == "call_function" and info(node) is None


def checks_at_run_time(node: Node) -> bool:
    """Whether a call is there for what it refuses, not for its value."""
    return op_name(node) in _CHECKS


def is_cast(node: Node) -> bool:
    """Whether a call gives its operand another dtype, and nothing else."""
    return op_name(node) in _CASTS


def stores_scalars(node: Node) -> bool:
    """Whether a plain number among the operands is computed with in the dtype of the result, as a target stores it."""
    row = info(node)
    return (row is not None and row.category == "elementwise") or op_name(node) in _PADS


def is_random(node: Node) -> bool:
    """Whether a call may give another value each time: it draws, or leaves memory as it finds it.

    A call with a drop rate draws only if the rate is not 0.
    """
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    if op_name(node) in _UNDEFINED:
        return True
    if torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    rates = [v for a, v in zip(target._schema.arguments, operands(node), strict=True) if a.name in _DROP_RATES]
    return not rates or any(rate != 0 for rate in rates)


def operands(node: Node) -> tuple[Any, ...]:
    """All operands of a call in the order of its schema, whether given by position, by keyword or by default.

    A call without a schema (arithmetic on sizes) has its arguments, then its keyword arguments by name.
    """
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return (*node.args, *(node.kwargs[key] for key in sorted(node.kwargs)))
    rest = target._schema.arguments[len(node.args) :]
    return (*node.args, *(node.kwargs.get(a.name, a.default_value) for a in rest))


def operand_names(node: Node) -> tuple[str, ...]:
    """What the schema calls the :func:`operands`; nothing for a call without a schema."""
    target = node.target
    return tuple(a.name for a in target._schema.arguments) if isinstance(target, torch._ops.OpOverload) else ()


def arguments(target: torch._ops.OpOverload, given: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """:func:`operands` as a call writes them: without trailing defaults, and by keyword where the schema wants that."""
    pairs = list(zip(target._schema.arguments, given, strict=False))
    keywords = {
        a.name: v for a, v in pairs if a.kwarg_only and not (a.has_default_value() and _same(v, a.default_value))
    }
    positional = [(a, v) for a, v in pairs if not a.kwarg_only]
    while (
        positional
        and positional[-1][0].has_default_value()
        and _same(positional[-1][1], positional[-1][0].default_value)
    ):
        positional.pop()
    return tuple(v for _, v in positional), keywords


def _same(value: Any, default: Any) -> bool:
    return not isinstance(value, Node) and type(value) is type(default) and bool(value == default)


def mutates(target: Any) -> bool:
    """Whether an operator writes to one of its arguments."""
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def problems(node: Node) -> list[str]:
    """Why a node may not stand in a Program; empty when it may."""
    if node.op not in ("placeholder", "get_attr", "call_function", "output"):
        return [f"opcode {node.op}"]
    if node.op != "call_function":
        return []
    found = []
    if mutates(node.target):
        found.append(f"{op_name(node)} writes to its argument")
    module = (getattr(node.target, "__module__", "") or "").split(".")[0]
    if not isinstance(node.target, torch._ops.OpOverload) and module not in _PYTHON_MODULES:
        found.append(f"{op_name(node)} is neither an ATen overload nor arithmetic on sizes")
    if "val" not in node.meta:
        found.append(f"{op_name(node)} has no recorded shape")
    return found
