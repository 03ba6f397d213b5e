"""legalize-spelling: operators that coremltools lacks, or takes for another, written with those that it has.

Before → after::

    to.dtype(x, half)               →  _to_copy(x, dtype=half)
    where(c, x, 3.0)                →  where(c, x, full([], 3.0))
    a & b, a ^ b   (booleans)       →  logical_and, logical_xor
    chunk(x, 3)                     →  split(x, ceil(size / 3))
    max_pool1d(x, k)                →  squeeze(max_pool2d(unsqueeze(x)))
    rms_norm(x)                     →  x · rsqrt(mean(x²) + eps) · weight
    var_mean(x), std_mean(x)        →  var(x) or std(x), mean(x)
    gelu(x, approximate=tanh)       →  x/2 · (1 + tanh(√(2/π) (x + 0.044715 x³)))
    reciprocal(x)                   →  1 / x
    add(x, y, alpha=a), sub, rsub   →  x + y · a, x − y · a, y − x · a
    addmm, baddbmm(x, a, b, beta, alpha)
                                    →  x · beta + matmul(a, b) · alpha   (x + … with beta 1, no x with beta 0)
    softplus(x, beta, threshold)    →  where(x · beta > threshold, x, softplus(x, beta))   (threshold below 15)
    attention(q, k, v, scale=1/√d)  →  attention(q, k, v)
    attention with another scale, a boolean mask or is_causal
                                    →  attention(q · scale · √d, k, v, where(mask, 0, −3e4))
    attention of operands whose batches come from several reshapes, of a batch with a range
                                    →  matmul(softmax(matmul(q · scale, kᵀ) + mask), v)
    clamp, clamp_min or clamp_max of fp16 with one number
                                    →  maximum(x, full([], v)), minimum(x, full([], v))
    addcmul, lerp, logit, trunc, fmod, isinf, channel_shuffle, take_along_dim  →  the arithmetic that defines them

Does not apply when: a bitwise operator works on integers; the sizes that a chunk, a shuffle or a causal mask needs
depend on the input.
Numerical effect: rounding only; −3e4 is what coremltools itself writes for a masked place.
Source: coremltools 9.0, converters/mil/frontend/torch/ops.py; definitions as in torch's documentation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, cast

import torch
from torch.fx import Node

from vlexport.ir import dialect, provenance
from vlexport.ir.program import Program
from vlexport.passes.base import Change, Effect, Match, NearMiss, Pass, Stage
from vlexport.targets.coreml.open_attention import as_products, is_uneven

aten = torch.ops.aten
Emit = Callable[..., Any]
"""Inserts a call before the node that is rewritten."""
_Rule = Callable[[Emit, Node, tuple[Any, ...]], Any]


class LegalizeSpelling(Pass[Program]):
    """Operators without a conversion, written with others."""

    name: ClassVar[str] = "legalize-spelling"
    stage: ClassVar[Stage] = "legalize"
    effect: ClassVar[Effect] = "exact"

    def find(self, ir: Program) -> Iterator[Match | NearMiss]:
        for node in ir.calls():
            if dialect.op_name(node) not in _RULES or _is_taken(node):
                continue
            reason = _why_not(node)
            if reason:
                yield NearMiss(dialect.plain_name(node), node, reason)
            else:
                yield Match(node, (node, *_items(node)))

    def apply(self, ir: Program, match: Match) -> Change:
        node = match.node
        was, before = dialect.plain_name(node), len(ir.calls())
        where = (provenance.module_path(node),)

        def emit(target: Any, *args: Any, **kwargs: Any) -> Node:
            return ir.add_call(target, args, kwargs, before=node, value_of=node)

        made = _RULES[dialect.op_name(node)](emit, node, dialect.operands(node))
        if isinstance(made, Node):
            ir.replace(node, made)
        else:  # a call that several values are taken from: replacing the last of them erases it
            for item in _items(node):
                ir.replace(item, made[cast("int", item.args[1])])
            for value in made:
                ir.erase_dead(value)
        now = "_to_copy" if was == "to" else "other operators"
        return Change(what=f"{was} written as {now}", where=where, saved_nodes=before - len(ir.calls()))


def _items(node: Node) -> list[Node]:
    """Readers that take one of several results, in the order of the graph."""
    several = isinstance(node.meta["val"], (tuple, list)) and dialect.op_name(node) in _SEVERAL
    return [user for user in node.users if several]


def is_misread(node: Node) -> bool:
    """Whether coremltools would convert the call without an error, to something else."""
    name = dialect.op_name(node)
    return name.startswith("aten._upsample_bilinear2d_aa.") or (name in _MISREAD and not _is_taken(node))


def _is_taken(node: Node) -> bool:
    """Whether coremltools takes the call as it is, for what it leaves unread has no effect there."""
    name, args = dialect.op_name(node), dialect.operands(node)
    if name == "aten.gelu.default":
        return bool(args[1] != "tanh")
    if name in _SCALED:
        return bool(args[2] == 1)
    if name in _PRODUCTS:
        return bool(args[3] == args[4] == 1)
    if name in _CLAMPS:
        return node.meta["val"].dtype is not torch.float16 or None not in _bounds(node)
    if name == _ATTENTION:
        return args[6] is None and not args[5] and not _is_boolean(args[3]) and (args[7] or not is_uneven(node))
    return name == "aten.softplus.default" and args[2] >= _UNSEEN_THRESHOLD


def _shape(value: Any) -> tuple[Any, ...]:
    return tuple(value.meta["val"].shape)


def _why_not(node: Node) -> str:
    name, args = dialect.op_name(node), dialect.operands(node)
    if name in ("aten.__and__.Tensor", "aten.__xor__.Tensor", "aten.__or__.Tensor"):
        kinds = {a.meta["val"].dtype for a in args[:2] if isinstance(a, Node)}
        return "" if kinds == {torch.bool} else "it works on the bits of integers"
    if name == "aten.chunk.default" and isinstance(_shape(args[0])[args[2]], torch.SymInt):
        return "the size that is cut depends on the input"
    if name == "aten.channel_shuffle.default" and any(isinstance(s, torch.SymInt) for s in _shape(args[0])[1:]):
        return "a size beside the batch depends on the input"
    if name == "aten.take_along_dim.default" and (args[2] is None or not _same_but(args[0], args[1], args[2])):
        return "values and indices have other sizes"
    if name == _ATTENTION and args[5] and any(isinstance(_shape(a)[-2], torch.SymInt) for a in args[:2]):
        return "the size of its causal mask depends on the input"
    if name == "aten.max_pool1d.default" and len(_shape(args[0])) != 3:
        return "its input has no batch dim"
    return ""


def _same_but(a: Any, b: Any, dim: int) -> bool:
    pairs = list(zip(_shape(a), _shape(b), strict=False))
    own = dim % len(_shape(a))
    return len(_shape(a)) == len(_shape(b)) and all(x == y for i, (x, y) in enumerate(pairs) if i != own)


def _cast(emit: Emit, node: Node, args: tuple[Any, ...]) -> Node:
    made: Node = emit(aten._to_copy.default, args[0], dtype=node.meta["val"].dtype)
    return made


def _where(emit: Emit, node: Node, args: tuple[Any, ...]) -> Node:
    """Numbers become tensors without dims, of the result's dtype."""
    dtype = node.meta["val"].dtype
    values = [v if isinstance(v, Node) else emit(aten.full.default, [], v, dtype=dtype) for v in args[1:3]]
    made: Node = emit(aten.where.self, args[0], *values)
    return made


def _and(emit: Emit, node: Node, args: tuple[Any, ...]) -> Node:
    made: Node = emit(aten.logical_and.default, args[0], args[1])
    return made


def _or(emit: Emit, node: Node, args: tuple[Any, ...]) -> Node:
    made: Node = emit(aten.logical_or.default, args[0], args[1])
    return made


def _xor(emit: Emit, node: Node, args: tuple[Any, ...]) -> Node:
    made: Node = emit(aten.logical_xor.default, args[0], args[1])
    return made


def _chunk(emit: Emit, node: Node, args: tuple[Any, ...]) -> Node:
    size = -(-int(_shape(args[0])[args[2]]) // args[1])
    made: Node = emit(aten.split.Tensor, args[0], size, args[2])
    return made


def _max_pool1d(emit: Emit, node: Node, args: tuple[Any, ...]) -> Node:
    x, kernel, stride, padding, dilation, ceil = args
    tall = emit(aten.unsqueeze.default, x, 2)
    steps = [1, *(stride or kernel)]
    pooled = emit(aten.max_pool2d.default, tall, [1, *kernel], steps, [0, *padding], [1, *dilation], ceil)
    made: Node = emit(aten.squeeze.dim, pooled, 2)
    return made


def _rms_norm(emit: Emit, node: Node, args: tuple[Any, ...]) -> Node:
    x, normalized, weight, eps = args
    dims = list(range(-len(normalized), 0))
    eps = torch.finfo(x.meta["val"].dtype).eps if eps is None else eps
    power = emit(aten.mean.dim, emit(aten.mul.Tensor, x, x), dims, True)
    scaled = emit(aten.mul.Tensor, x, emit(aten.rsqrt.default, emit(aten.add.Tensor, power, eps)))
    made: Node = scaled if weight is None else emit(aten.mul.Tensor, scaled, weight)
    return made


def _var_mean(emit: Emit, node: Node, args: tuple[Any, ...]) -> tuple[Node, Node]:
    name = dialect.op_name(node)
    if name.endswith(".correction"):
        x, dims, correction, keep = args
        correction = 1 if correction is None else correction
    else:
        x, dims, unbiased, keep = args if name.endswith(".dim") else (args[0], None, args[1], False)
        correction = 1 if unbiased else 0
    dims = list(range(len(_shape(x)))) if dims is None else dims
    spread = aten.std.correction if name.startswith("aten.std") else aten.var.correction
    return emit(spread, x, dims, correction=correction, keepdim=keep), emit(aten.mean.dim, x, dims, keep)


def _addcmul(emit: Emit, node: Node, args: tuple[Any, ...]) -> Node:
    x, a, b, value = args
    product = emit(aten.mul.Tensor, a, b)
    made: Node = emit(aten.add.Tensor, x, product if value == 1 else emit(aten.mul.Tensor, product, value))
    return made


def _lerp(emit: Emit, node: Node, args: tuple[Any, ...]) -> Node:
    start, end, weight = args
    made: Node = emit(aten.add.Tensor, start, emit(aten.mul.Tensor, emit(aten.sub.Tensor, end, start), weight))
    return made


def _logit(emit: Emit, node: Node, args: tuple[Any, ...]) -> Node:
    x, eps = args
    inside = x if eps is None else emit(aten.clamp.default, x, eps, 1 - eps)
    other = emit(aten.rsub.Scalar, inside, 1)
    made: Node = emit(aten.log.default, emit(aten.div.Tensor, inside, other))
    return made


def _truncated(emit: Emit, x: Any) -> Node:
    made: Node = emit(aten.mul.Tensor, emit(aten.sign.default, x), emit(aten.floor.default, emit(aten.abs.default, x)))
    return made


def _trunc(emit: Emit, node: Node, args: tuple[Any, ...]) -> Node:
    return _truncated(emit, args[0])


def _fmod(emit: Emit, node: Node, args: tuple[Any, ...]) -> Node:
    x, divisor = args
    whole = _truncated(emit, emit(aten.div.Tensor, x, divisor))
    made: Node = emit(aten.sub.Tensor, x, emit(aten.mul.Tensor, whole, divisor))
    return made


def _isinf(emit: Emit, node: Node, args: tuple[Any, ...]) -> Node:
    made: Node = emit(aten.eq.Scalar, emit(aten.abs.default, args[0]), math.inf)
    return made


def _gelu_tanh(emit: Emit, node: Node, args: tuple[Any, ...]) -> Node:
    """Without it coremltools computes the exact one: it does not look at ``approximate``."""
    x = args[0]
    cube = emit(aten.mul.Tensor, emit(aten.mul.Tensor, emit(aten.mul.Tensor, x, x), x), 0.044715)
    inner = emit(aten.mul.Tensor, emit(aten.add.Tensor, x, cube), math.sqrt(2 / math.pi))
    gate = emit(aten.add.Tensor, emit(aten.tanh.default, inner), 1.0)
    made: Node = emit(aten.mul.Tensor, emit(aten.mul.Tensor, x, 0.5), gate)
    return made


def _scaled(emit: Emit, node: Node, args: tuple[Any, ...]) -> Node:
    """Without it coremltools computes ``x + y``: it does not look at ``alpha``."""
    x, y, alpha = args
    made: Node
    if dialect.op_name(node).startswith("aten.rsub"):
        made = (
            emit(aten.rsub.Tensor, emit(aten.mul.Tensor, x, alpha), y)
            if isinstance(y, Node)
            else emit(aten.rsub.Scalar, emit(aten.mul.Tensor, x, alpha), y)
        )
        return made
    target = aten.add.Tensor if dialect.op_name(node).startswith("aten.add") else aten.sub.Tensor
    made = emit(target, x, emit(aten.mul.Tensor, y, alpha) if isinstance(y, Node) else y * alpha)
    return made


def _addmm(emit: Emit, node: Node, args: tuple[Any, ...]) -> Node:
    """Without it coremltools multiplies floats by an integer, and refuses that."""
    x, a, b, beta, alpha = args
    made: Node = emit(aten.matmul.default, a, b)
    if alpha != 1:
        made = emit(aten.mul.Tensor, made, float(alpha))
    if beta == 0:
        return made
    return cast("Node", emit(aten.add.Tensor, x if beta == 1 else emit(aten.mul.Tensor, x, float(beta)), made))


def _softplus(emit: Emit, node: Node, args: tuple[Any, ...]) -> Node:
    """Without it coremltools computes the logarithm above the threshold, too."""
    x, beta, threshold = args
    curve = emit(aten.softplus.default, x, beta, _TORCH_THRESHOLD)
    made: Node = emit(aten.where.self, emit(aten.gt.Scalar, emit(aten.mul.Tensor, x, beta), threshold), x, curve)
    return made


def _reciprocal(emit: Emit, node: Node, args: tuple[Any, ...]) -> Node:
    """Without it coremltools computes ``1 / (x + 1e-4)``."""
    one = emit(aten.full.default, [], 1.0, dtype=node.meta["val"].dtype)
    made: Node = emit(aten.div.Tensor, one, args[0])
    return made


def _clamp(emit: Emit, node: Node, args: tuple[Any, ...]) -> Node:
    """Without it coremltools refuses fp16, or computes in fp32: it makes the number, and the bound not given, fp32."""
    low, high = _bounds(node)
    bound = emit(aten.full.default, [], high if low is None else low, dtype=node.meta["val"].dtype)
    made: Node = emit(aten.minimum.default if low is None else aten.maximum.default, args[0], bound)
    return made


def _bounds(node: Node) -> tuple[Any, Any]:
    """Least and largest number of a clamp, None where there is none."""
    name, args = dialect.op_name(node), dialect.operands(node)
    return (None, args[1]) if name == "aten.clamp_max.default" else (args[1], (*args, None)[2])


def _channel_shuffle(emit: Emit, node: Node, args: tuple[Any, ...]) -> Node:
    x, groups = args
    _, channels, *rest = _shape(x)
    split = emit(aten.reshape.default, x, [-1, groups, channels // groups, *rest])
    dims = [0, 2, 1, *range(3, 3 + len(rest))]
    made: Node = emit(aten.reshape.default, emit(aten.permute.default, split, dims), [-1, channels, *rest])
    return made


def _take_along_dim(emit: Emit, node: Node, args: tuple[Any, ...]) -> Node:
    made: Node = emit(aten.gather.default, args[0], args[2], args[1])
    return made


def _is_boolean(mask: Any) -> bool:
    return isinstance(mask, Node) and mask.meta["val"].dtype is torch.bool


def _query_factor(node: Node) -> float:
    """What the query is multiplied by where attention has its own scale, 1/√d; 1 up to the last digit of a double."""
    args = dialect.operands(node)
    if args[6] is None:
        return 1.0
    factor = float(args[6]) * math.sqrt(int(_shape(args[0])[-1]))
    return 1.0 if math.isclose(factor, 1.0, rel_tol=1e-14) else factor


def _attention(emit: Emit, node: Node, args: tuple[Any, ...]) -> Node:
    """Without it coremltools multiplies a half query by a single-precision scale, and mixes both types in a mask."""
    q, k, v, mask, dropout, causal, _, gqa = args
    dtype = node.meta["val"].dtype
    if causal:
        rows, columns = (emit(aten.arange.default, int(_shape(a)[-2])) for a in (q, k))
        mask = emit(aten.ge.Tensor, emit(aten.unsqueeze.default, rows, 1), columns)
    if _is_boolean(mask):
        seen, hidden = (emit(aten.full.default, [], value, dtype=dtype) for value in (0.0, _HIDDEN))
        mask = emit(aten.where.self, mask, seen, hidden)
    if is_uneven(node) and not gqa:
        scale = args[6] if args[6] is not None else int(_shape(q)[-1]) ** -0.5
        return as_products(emit, q, k, v, mask, float(scale))
    factor = _query_factor(node)
    # a tensor of the query's dtype: a plain number would make coremltools compute the product in single precision
    query = q if factor == 1 else emit(aten.mul.Tensor, q, emit(aten.full.default, [], factor, dtype=dtype))
    made: Node = emit(_SDPA, query, k, v, mask, dropout, enable_gqa=gqa)
    return made


_SDPA = aten.scaled_dot_product_attention.default
_ATTENTION = "aten.scaled_dot_product_attention.default"
_HIDDEN = -3e4
_UNSEEN_THRESHOLD = 15
"""Above it softplus is linear to 3e-7, which is rounding in fp32."""
_TORCH_THRESHOLD = 20
_SCALED = ("aten.add.Tensor", "aten.sub.Tensor", "aten.rsub.Tensor", "aten.rsub.Scalar")
_PRODUCTS = ("aten.addmm.default", "aten.baddbmm.default")
_CLAMPS = ("aten.clamp.default", "aten.clamp_min.default", "aten.clamp_max.default")
_MISREAD = (*_SCALED, "aten.gelu.default", "aten.softplus.default", "aten.reciprocal.default")
_SEVERAL = tuple(f"aten.{n}_mean.{overload}" for n in ("var", "std") for overload in ("default", "dim", "correction"))
_RULES: dict[str, _Rule] = {
    "aten.to.dtype": _cast,
    "aten.where.Scalar": _where,
    "aten.where.ScalarOther": _where,
    "aten.where.ScalarSelf": _where,
    "aten.__and__.Tensor": _and,
    "aten.__or__.Tensor": _or,
    "aten.__xor__.Tensor": _xor,
    "aten.chunk.default": _chunk,
    "aten.max_pool1d.default": _max_pool1d,
    "aten.rms_norm.default": _rms_norm,
    **dict.fromkeys(_SEVERAL, _var_mean),
    "aten.addcmul.default": _addcmul,
    "aten.lerp.Scalar": _lerp,
    "aten.logit.default": _logit,
    "aten.trunc.default": _trunc,
    "aten.fmod.Scalar": _fmod,
    "aten.isinf.default": _isinf,
    **dict.fromkeys(_SCALED, _scaled),
    "aten.softplus.default": _softplus,
    "aten.gelu.default": _gelu_tanh,
    "aten.reciprocal.default": _reciprocal,
    **dict.fromkeys(_CLAMPS, _clamp),
    **dict.fromkeys(_PRODUCTS, _addmm),
    "aten.channel_shuffle.default": _channel_shuffle,
    "aten.take_along_dim.default": _take_along_dim,
    _ATTENTION: _attention,
}
