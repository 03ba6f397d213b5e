"""cast-floats: computes in fp16 or bf16 what such a type can hold, and casts at the borders; the rest stays fp32.

Before → after::

    %0 = linear(x, @w: f32[8,8])           %0 = _to_copy(x, dtype=f16)
    %1 = gelu(%0)                    →     %1 = linear(%0, @w_fp16: f16[8,8])
    %2 = layer_norm(%1, [8])               %2 = gelu(%1)
    return %2                              %3 = _to_copy(%2, dtype=f32)
                                           %4 = layer_norm(%3, [8])
                                           return %4

For targets that take the types of a graph at their word. Inputs and outputs keep their dtype; parameters that half
calls read are stored in half; a value is cast once, and never to and fro.

Does not apply when (measured on the example, the gate's probes and calibration samples): a value, times ``margin``,
lies beyond the type, or a weight or a written number (1e-12) is too small for it; q·k of an attention, bounded by the
largest row norms, may lie beyond it, or its logits where the type counts in steps of 1; a float holds whole numbers
that the type skips; rounding the operands of an elementwise call or a norm would leave less than 40 dB (fp16; bf16:
25 dB) of its result: then what computes them stays too; the call is a norm, a softmax, a sum of more than 64 terms, or
one that sorts, counts or addresses; its module is kept; only calls that stay stand around it.
Numerical effect: rounding to 11 (fp16) or 8 (bf16) significant bits at every half value. Judged by the signal to noise
ratio of every output against the fp32 program: at least 40 dB (fp16) or 25 dB (bf16). What is run is the rounded twin
(``ir/rounded``): fp32 arithmetic, rounded wherever a half value is made, so that an overflow shows.
Source: Micikevicius et al., Mixed Precision Training, 2018, for what stays in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg
from typing_extensions import Self

from vlexport.core.artifact import Frozen
from vlexport.core.errors import GateError
from vlexport.ir import dialect, provenance
from vlexport.ir.program import Program
from vlexport.passes.base import Change, Effect, Match, NearMiss, Pass, Stage
from vlexport.passes.half.choice import STAYS, candidates, choose, comparisons, fixed, parts, singles
from vlexport.passes.half.ranges import measure
from vlexport.passes.kept_modules import require_modules
from vlexport.passes.statistic import Statistic

HalfName = Literal["fp16", "bf16"]
DTYPES: dict[HalfName, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16}
MIN_SQNR_DB: dict[HalfName, float] = {"fp16": 40.0, "bf16": 25.0}
"""Least signal to noise ratio of an output: 1 % and 6 % of its root mean square."""
aten = torch.ops.aten
_copy = aten._to_copy.default


def _split(value: object) -> object:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


class CastFloatsOptions(Frozen):
    """Options of cast-floats.

    Attributes:
        dtype: The half type; --precision sets it.
        margin: How many times larger than measured a value may become on inputs that were not seen.
        keep: Modules that stay in fp32, with commas between; blocks.*.attn names one of every block, and what lies in
            it.
        strict: Type everything, for a device that runs nothing but half: what does not fit is an error.
        min_sqnr_db: Least signal to noise ratio of an output; none means 40 for fp16 and 25 for bf16.
    """

    dtype: HalfName = "fp16"
    margin: float = Field(default=2.0, ge=1.0, le=1000.0)
    keep: Annotated[tuple[str, ...], BeforeValidator(_split)] = ()
    strict: bool = False
    min_sqnr_db: float | None = Field(default=None, ge=0.0, le=200.0)

    @model_validator(mode="after")
    def _all_or_some(self) -> Self:
        if self.strict and self.keep:
            raise ValueError("strict types everything, so nothing can be kept: leave one of the two out")
        return self


class CastFloats(Pass[Program]):
    """Computes in fp16 or bf16 what such a type can hold; the rest stays fp32."""

    name: ClassVar[str] = "cast-floats"
    stage: ClassVar[Stage] = "precision"
    effect: ClassVar[Effect] = "approximate"
    Options: ClassVar[type[Frozen]] = CastFloatsOptions
    options: CastFloatsOptions

    def __init__(self, options: Frozen | None = None, *, samples: Sequence[tuple[Tensor, ...]] = ()) -> None:
        """``samples`` are what ranges are measured on, one tensor per input each; none means the Program's example."""
        super().__init__(options)
        self.samples = tuple(samples)

    @property
    def half(self) -> torch.dtype:
        """The half type."""
        return DTYPES[self.options.dtype]

    @property
    def statistic(self) -> Statistic:
        """Signal to noise ratio."""
        chosen = self.options.min_sqnr_db
        bound = MIN_SQNR_DB[self.options.dtype] if chosen is None else chosen
        hint = (
            f"keep that module in fp32 (--set {self.name}.keep=MODULE), or accept more noise "
            f"(--set {self.name}.min_sqnr_db=…)"
        )
        return Statistic("sqnr_db", bound, hint=hint)

    def find(self, ir: Program) -> Iterator[Match | NearMiss]:
        """Every call that can be typed, and why the others stay.

        Raises:
            GateError: VLX0409 with ``strict``, when something cannot be.
            UsageError: VLX0703 when ``keep`` names no module.
        """
        require_modules(ir, self.options.keep, name=self.name)
        undecided = candidates(ir)
        if not undecided:
            return
        choice = choose(
            ir, measure(ir, self.samples or (ir.example,), self.half), self.half,
            margin=self.options.margin, keep=self.options.keep,
        )  # fmt: skip
        typed = set(choice.typed)
        if self.options.strict:
            typed = {*undecided, *comparisons(ir)}
            stuck = [(kept.node, kept.reason) for kept in choice.kept if kept.cause in ("fit", "fixed")]
            for node, reason in (*stuck, *((node, "its result is float32 in any case") for node in fixed(ir))):
                raise GateError(
                    "VLX0409", f"the program cannot be {self.options.dtype} throughout: {reason}",
                    where=provenance.describe(node),
                    hint=f"let it stay in fp32 (without --set {self.name}.strict=true), or change the model there",
                )  # fmt: skip
        else:
            for kept in choice.kept:
                yield NearMiss(f"typed {self.options.dtype}", kept.node, kept.reason)
        for node in ir.calls():
            if node in typed:
                yield Match(node, (node, *parts(node)))

    def apply(self, ir: Program, match: Match) -> Change:
        """Type one call: its operands are cast, or read as they were before they were cast back, and so is its result.

        A cast that nobody reads any more goes.
        """
        node = match.node
        what, where = f"{dialect.plain_name(node)} typed {self.options.dtype}", (provenance.module_path(node),)
        made = 1
        grown = 0
        replaced: dict[Node, Node] = {}
        for operand in node.all_input_nodes:
            if singles(operand.meta["val"]):
                replaced[operand], calls, elements = self._half_of(ir, operand, node)
                made, grown = made + calls, grown + elements
        args: Any
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: replaced.get(n, n))
        typed = ir.add_call(node.target, args, kwargs, before=node, value_of=node)  # type: ignore[arg-type]
        olds = parts(node)
        for old in olds:
            part = ir.add_call(old.target, (typed, *old.args[1:]), before=old, value_of=old)  # type: ignore[arg-type]
            made += 1 + self._hand_over(ir, old, part)
        made += self._hand_over(ir, node, typed)
        erased = freed = 0
        for old in olds or [node]:  # the call goes with the last of its parts
            calls, elements = _erased(ir, old)
            erased, freed = erased + calls, freed + elements
        return Change(what=what, where=where, saved_nodes=erased - made, saved_parameters=freed - grown)

    def run(self, ir: Program, *, limit: int | None = None) -> tuple[list[Change], list[NearMiss]]:
        """Decide once, on the Program as it came, then type call by call.

        The runner's way would measure again after each sweep and see its own rounding. What stays is noted on the
        node, so that applying the pass again decides nothing.
        """
        found = list(self.find(ir))
        misses = [each for each in found if isinstance(each, NearMiss)]
        matches = [each for each in found if isinstance(each, Match)]
        for miss in misses:
            provenance.remember(miss.node, f"{STAYS}{miss.reason}")
        return [self.apply(ir, match) for match in matches[:limit]], misses

    def _half_of(self, ir: Program, operand: Node, reader: Node) -> tuple[Node, int, int]:
        """``operand`` in half: node, calls made for it, elements stored for it."""
        stored = ir.tensor_of(operand)
        if stored is not None:
            return (*_stored(ir, operand, stored.to(self.half), f"{operand.target}_{self.options.dtype}", reader),)
        source: Any = operand.args[0] if operand.args else None
        if dialect.is_cast(operand) and source.meta["val"].dtype is self.half:
            return source, 0, 0
        for user in operand.users:
            if dialect.is_cast(user) and user.meta["val"].dtype is self.half and user < reader:
                return user, 0, 0
        before = operand.next
        while before.op == "placeholder":
            before = before.next
        value_of = operand if operand.op == "call_function" else reader
        return ir.add_call(_copy, (operand,), {"dtype": self.half}, before=before, value_of=value_of), 1, 0

    def _hand_over(self, ir: Program, old: Node, new: Node) -> int:
        """Let the readers of ``old`` read ``new``, cast back; returns how many calls that took."""
        value = new.meta["val"]
        if not old.users or not isinstance(value, Tensor):
            return 0
        if value.dtype is not self.half:
            old.replace_all_uses_with(new)
            return 0
        dtype = old.meta["val"].dtype
        back = ir.add_call(_copy, (new,), {"dtype": dtype}, before=old, value_of=old)
        old.replace_all_uses_with(back)
        return 1


def _erased(ir: Program, node: Node) -> tuple[int, int]:
    """Erase what nobody reads; returns how many calls went, and how many stored elements."""
    before = {name: tensor.numel() for name, tensor in ir.tensors.items() if tensor.is_floating_point()}
    calls = ir.erase_dead(node)
    return calls, sum(size for name, size in before.items() if name not in ir.tensors)


def _stored(ir: Program, operand: Node, half: Tensor, name: str, reader: Node) -> tuple[Node, int, int]:
    """A node that reads ``half``, which is stored once however many calls read it."""
    kept = ir.tensors.get(name)
    if kept is not None and kept.dtype is half.dtype and torch.equal(kept, half):
        there = next((n for n in ir.graph.nodes if n.op == "get_attr" and n.target == name and n < reader), None)
        if there is not None:
            return there, 0, 0
    kind = ir.kinds[str(operand.target)]
    return ir.add_tensor(name, half, before=operand.next, kind=kind), 0, half.numel()
