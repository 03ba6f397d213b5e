"""A grammar of ONNX graphs that rewrites look at: attention in many spellings, linears, norms, choices of tokens.

A seed gives one graph over ``x: f32[batch, tokens, width]``. Most blocks are what a rewrite takes; some carry one fault
that makes them another computation, which has to stay as it is. Weights are drawn so that values stay near 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir
from onnx import TensorProto, helper, numpy_helper

from vlexport.core.artifact import DimRange, Signature, TensorSpec
from vlexport.targets.onnx.model import OnnxModel

KINDS = ("float", "static", "dynamic")
FAULTS = (
    "scaled values", "softmax over queries", "turned query", "other keys", "query returned", "relu in between",
    "weights read twice", "mixed heads",
)  # fmt: skip
BIASES = ("row", "per head", "causal", "computed")
Array = npt.NDArray[np.generic]


@dataclass(frozen=True)
class RandomGraph:
    """One graph.

    Attributes:
        model: As a lowered pass gets it.
        inputs: Seeded, by name.
        kinds: What its blocks compute in.
        blocks: What they are, with their fault.
    """

    model: OnnxModel
    inputs: dict[str, Array]
    kinds: tuple[str, ...]
    blocks: tuple[str, ...]

    @property
    def integers(self) -> bool:
        """Whether anything is rounded to integers."""
        return any(kind != "float" for kind in self.kinds)


def random_graph(seed: int) -> RandomGraph:
    """The graph of a seed: one to three blocks."""
    return _Writer(np.random.default_rng(seed)).graph()


@dataclass
class _Writer:
    drawn: np.random.Generator
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    stored: list[onnx.TensorProto] = field(default_factory=list)
    returned: list[str] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    blocks: list[str] = field(default_factory=list)

    def graph(self) -> RandomGraph:
        self.heads, self.depth = int(self.drawn.integers(1, 4)), int(self.drawn.choice([2, 4, 5, 8]))
        self.width, self.tokens = self.heads * self.depth, int(self.drawn.integers(2, 8))
        batch: str | int = "batch" if self.odds(0.5) else int(self.drawn.integers(1, 4))
        value = "x"
        for _ in range(int(self.drawn.integers(1, 4))):
            value = self.block(value)
        if self.odds(0.4):
            value = self.chosen(value)
        self.returned.append(value)
        made = helper.make_graph(
            self.nodes, "main",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, self.tokens, self.width])],
            [helper.make_tensor_value_info(each, TensorProto.FLOAT, None) for each in self.returned], self.stored,
        )  # fmt: skip
        proto = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        proto = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)
        onnx.checker.check_model(proto)
        model = onnx_ir.from_proto(proto)
        for known in model.graph.initializers.values():
            assert known.const_value is not None
            known.const_value = onnx_ir.tensor(np.array(known.const_value.numpy()), name=known.name)
        signature = Signature(
            inputs=tuple(map(_spec, model.graph.inputs)), outputs=tuple(map(_spec, model.graph.outputs)),
            dims={"batch": DimRange()} if batch == "batch" else {},
        )  # fmt: skip
        shape = (2 if batch == "batch" else int(batch), self.tokens, self.width)
        inputs = {"x": self.drawn.standard_normal(shape).astype(np.float32)}
        return RandomGraph(OnnxModel(model, signature), inputs, tuple(self.kinds), tuple(self.blocks))

    # -- blocks --------------------------------------------------------------------------------------------------

    def block(self, value: str) -> str:
        kind = KINDS[int(self.drawn.choice(3, p=[0.5, 0.25, 0.25]))]
        self.kinds.append(kind)
        read = self.norm(value) if self.odds(0.7) else value
        if self.odds(0.3):
            self.blocks.append("mlp")
            hidden = self.linear([read], kind, [self.width], [2 * self.width])[0]
            made = self.linear([self.node("Relu", [hidden])], kind, [2 * self.width], [self.width])[0]
        else:
            made = self.attention(read, value, kind)
        if self.odds(0.2):
            made = self.node("Transpose", [self.node("Transpose", [made], perm=[1, 0, 2])], perm=[1, 0, 2])
        total = self.node("Add", [value, made]) if self.odds(0.7) else made
        return self.norm(total) if self.odds(0.2) else total  # behind the sum, as BERT has it

    def chosen(self, value: str) -> str:
        """Some tokens, as the input says: what is computed may tip over where it is rounded. Or each width's own."""
        count = self.tensor(np.array([int(self.drawn.integers(1, self.tokens + 1))]))
        if self.odds(0.3):
            self.blocks.append("values chosen")
            return self.node("GatherElements", [value, self.many("TopK", ["x", count], 2, axis=1)[1]], axis=1)
        self.blocks.append("tokens chosen")
        last = self.tensor(np.array([2]))
        first = self.node("Slice", ["x", *(self.tensor(np.array([at])) for at in (0, 1, 2))])
        places = self.many("TopK", [self.node("Squeeze", [first, last]), count], 2, axis=1)[1]
        index = self.node("Expand", [self.node("Unsqueeze", [places, last]), self.tensor(np.array([1, 1, self.width]))])
        return self.node("GatherElements", [value, index], axis=1)

    def attention(self, read: str, value: str, kind: str) -> str:
        fault = FAULTS[int(self.drawn.integers(len(FAULTS)))] if self.odds(0.3) else ""
        bias = BIASES[int(self.drawn.integers(len(BIASES)))] if kind == "float" and self.odds(0.35) else ""
        self.blocks.append(" ".join(["attention", kind, bias, fault]).strip())
        packed = fault != "other keys" and self.odds(0.5)
        if packed:
            (whole,) = self.linear([read], kind, [self.width], [3 * self.width])
            query, key, kept = self.unpacked(whole)
        else:
            reads = [read, value if fault == "other keys" else read, read]
            made = self.linear(reads, kind, [self.width] * 3, [self.width] * 3)
            if fault == "query returned":
                self.returned.append(made[0])
            query, key, kept = (self.to_heads(each, mixed=fault == "mixed heads" and each is made[0]) for each in made)
        if fault == "relu in between":
            query = self.node("Relu", [query])
        if fault == "turned query":
            order = np.roll(np.arange(self.tokens), 1)
            query = self.node("Gather", [query, self.tensor(order)], axis=2)
        if fault == "scaled values":
            kept = self.node("Mul", [kept, self.number(0.5)])
        scale = float(self.drawn.choice([self.depth**-0.5, 0.3]))
        where = str(self.drawn.choice(["query", "both", "scores", "quotient"]))
        if where == "query":
            query = self.node("Mul", [query, self.number(scale)])
        turned = self.node("Transpose", [key], perm=[0, 1, 3, 2])
        if where == "both":
            query, turned = (self.node("Mul", [each, self.number(scale**0.5)]) for each in (query, turned))
        scores = self.node("MatMul", [query, turned])
        if where == "scores":
            scores = self.node("Mul", [scores, self.number(scale)])
        if where == "quotient":
            scores = self.node("Div", [scores, self.number(1 / scale)])
        if bias:
            operands = [scores, self.bias(bias, read)]
            scores = self.node("Add", operands if self.odds(0.5) else operands[::-1])
        weights = self.node("Softmax", [scores], axis=2 if fault == "softmax over queries" else -1)
        if fault == "weights read twice":
            self.returned.append(self.node("Neg", [weights]))
        joined = self.node("Transpose", [self.node("MatMul", [weights, kept])], perm=[0, 2, 1, 3])
        return self.linear([self.reshape(joined, [0, 0, self.width])], kind, [self.width], [self.width])[0]

    def unpacked(self, whole: str) -> list[str]:
        """Query, key and value of one projection, each (batch, heads, tokens, depth)."""
        form = int(self.drawn.integers(4))
        if form == 0:  # of the last dim
            parts = self.many("Split", [whole, self.tensor(np.array([self.width] * 3))], 3, axis=-1)
            return [self.to_heads(each) for each in parts]
        split = self.reshape(whole, [0, self.tokens, 3, self.heads, self.depth])
        if form == 1:
            moved = self.node("Transpose", [split], perm=[2, 0, 3, 1, 4])
            return [self.node("Gather", [moved, self.tensor(np.array(i))], axis=0) for i in range(3)]
        if form == 2:
            moved, axis = self.node("Transpose", [split], perm=[2, 0, 3, 1, 4]), self.tensor(np.array([0]))
            bounds = [[self.tensor(np.array([at])) for at in (i, i + 1)] for i in range(3)]
            return [self.node("Squeeze", [self.node("Slice", [moved, *each, axis]), axis]) for each in bounds]
        mixed = self.reshape(whole, [0, self.tokens, self.heads, 3 * self.depth])  # heads first, then the three
        moved = self.node("Transpose", [mixed], perm=[0, 2, 1, 3])
        return self.many("Split", [moved, self.tensor(np.array([self.depth] * 3))], 3, axis=-1)

    def to_heads(self, value: str, *, mixed: bool = False) -> str:
        if mixed:  # depth before heads: another computation
            split = self.reshape(value, [0, 0, self.depth, self.heads])
            return self.node("Transpose", [split], perm=[0, 3, 1, 2])
        return self.node("Transpose", [self.reshape(value, [0, 0, self.heads, self.depth])], perm=[0, 2, 1, 3])

    def bias(self, kind: str, read: str) -> str:
        count = self.tokens
        if kind == "row":
            return self.tensor(self.drawn.standard_normal((count, count)).astype(np.float32))
        if kind == "per head":
            return self.tensor(self.drawn.standard_normal((1, self.heads, count, count)).astype(np.float32))
        if kind == "causal":
            return self.tensor(np.triu(np.full((count, count), -np.inf, np.float32), 1))
        first = self.node("Slice", [read, *(self.tensor(np.array([at])) for at in (0, 1, 2))])
        return self.node("Unsqueeze", [self.node("Transpose", [first], perm=[0, 2, 1]), self.tensor(np.array([1]))])

    def norm(self, value: str) -> str:
        scale, shift = self.drawn.uniform(0.5, 1.5, self.width), self.drawn.uniform(-0.2, 0.2, self.width)
        operands = [value, *(self.tensor(each.astype(np.float32)) for each in (scale, shift))]
        return self.node("LayerNormalization", operands, axis=-1, epsilon=1e-5)

    # -- linears -------------------------------------------------------------------------------------------------

    def linear(self, reads: Sequence[str], kind: str, depths: Sequence[int], widths: Sequence[int]) -> list[str]:
        """One linear a value that is read; equal values are rounded once."""
        known: dict[str, str] = {}
        found = []
        for read, depth, width in zip(reads, depths, widths, strict=True):
            if read not in known:
                known[read] = read if kind == "float" else self.rounded(read, kind)
            weight = (self.drawn.standard_normal((depth, width)) / np.sqrt(depth)).astype(np.float32)
            stored = self.tensor(weight) if kind == "float" else self.in_integers(weight)
            made = self.node("MatMul", [known[read], stored])
            if self.odds(0.8):
                bias = self.tensor(self.drawn.uniform(-0.3, 0.3, width).astype(np.float32))
                made = self.node("Add", [made, bias] if self.odds(0.7) else [bias, made])
            found.append(made)
        return found

    def rounded(self, value: str, kind: str) -> str:
        """A value over its integers: by a stored range, or by that of the run."""
        if kind == "static":
            scale, zero = self.number(0.04), self.tensor(np.array(int(self.drawn.integers(100, 156)), np.uint8))
        else:
            _, scale, zero = self.many("DynamicQuantizeLinear", [value], 3)
        integers = self.node("QuantizeLinear", [value, scale, zero])
        return self.node("DequantizeLinear", [integers, scale, zero])

    def in_integers(self, weight: Array) -> str:
        """A weight as s8 with a scale a column or one for all; sometimes stored the other way round."""
        columns = np.abs(weight).max(0) / 63 if self.odds(0.7) else np.full(weight.shape[1], np.abs(weight).max() / 63)
        integers = np.clip(np.rint(weight / columns), -63, 63).astype(np.int8)
        scale, zero = self.tensor(columns.astype(np.float32)), self.tensor(np.zeros(len(columns), np.int8))
        if self.odds(0.3):
            made = self.node("DequantizeLinear", [self.tensor(integers.T.copy()), scale, zero], axis=0)
            return self.node("Transpose", [made], perm=[1, 0])
        return self.node("DequantizeLinear", [self.tensor(integers), scale, zero], axis=1)

    # -- parts ---------------------------------------------------------------------------------------------------

    def odds(self, share: float) -> bool:
        return bool(self.drawn.random() < share)

    def tensor(self, values: Array) -> str:
        name = f"w{len(self.stored)}"
        self.stored.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def number(self, value: float) -> str:
        return self.tensor(np.array(value, np.float32))

    def reshape(self, value: str, shape: list[int]) -> str:
        return self.node("Reshape", [value, self.tensor(np.array(shape, np.int64))])

    def node(self, kind: str, operands: Sequence[str], **attributes: Any) -> str:
        return self.many(kind, operands, 1, **attributes)[0]

    def many(self, kind: str, operands: Sequence[str], count: int, **attributes: Any) -> list[str]:
        name = f"n{len(self.nodes)}"
        made = [f"{name}_{i}" for i in range(count)]
        self.nodes.append(helper.make_node(kind, list(operands), made, name=name, **attributes))
        return made


def _spec(value: onnx_ir.Value) -> TensorSpec:
    assert value.shape is not None
    assert value.dtype is not None
    shape = tuple(size if isinstance(size, int) else str(size.value) for size in value.shape)
    return TensorSpec(name=str(value.name), dtype=value.dtype.numpy().name, shape=shape)
