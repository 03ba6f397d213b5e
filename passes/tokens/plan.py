"""What reduce-tokens does at which block: options and the model's layers become reductions, with every count known."""

from __future__ import annotations

import math
from collections.abc import Callable

from vlexport.core.errors import UsageError
from vlexport.passes.base import NearMiss
from vlexport.passes.tokens.blocks import Block, Encoder
from vlexport.passes.tokens.class_pick import ClassPick
from vlexport.passes.tokens.evit import Evit
from vlexport.passes.tokens.mctf import LEAST, Mctf
from vlexport.passes.tokens.options import ReduceTokensOptions
from vlexport.passes.tokens.pick import Pick
from vlexport.passes.tokens.sweep import Reduction, refused
from vlexport.passes.tokens.tome import Tome

Plan = tuple[list[Reduction], list[NearMiss]]
_R = {"tome": 8, "mctf": 16}


def plan(encoder: Encoder, options: ReduceTokensOptions) -> Plan:
    """Reductions in the order of their blocks, and blocks at which there is nothing to do.

    Raises:
        UsageError: VLX0703 for layers or rates that the model does not have.
        InputError: VLX0411 where the method needs a class token.
    """
    if options.method in ("evit", "cls") and not encoder.protected:
        raise refused(
            encoder.blocks[0].attention, f"{options.method} reads the class token's attention, and there is none; "
            f"tome and mctf work without"
        )  # fmt: skip
    if options.method == "cls":
        return _behind(encoder, options)
    if options.method in _R:
        return _merging(encoder, options)
    return _keeping(encoder, options)


def _keeping(encoder: Encoder, options: ReduceTokensOptions) -> Plan:
    """A share of the patches stays."""
    if options.squeeze and not options.fuse:
        raise UsageError(
            "VLX0703", "--tokens evit: squeeze=true and fuse=false say two things of the tokens that do not stay",
            where="--tokens", hint="squeeze=true joins them to those that stay; fuse=false drops them",
        )  # fmt: skip
    fused = options.method == "evit" and options.fuse and not options.squeeze
    total = len(encoder.blocks)
    made: list[Reduction] = []
    misses: list[NearMiss] = []
    count = encoder.tokens
    for block in _chosen(encoder, options, sorted({total * i // 4 + 1 for i in (1, 2, 3)})):
        patches = count - encoder.protected
        keep = math.ceil(options.keep * patches)
        if keep >= patches:
            misses.append(_nothing(block, options, f"all {patches} patch tokens stay"))
        elif fused and keep + 1 == patches:
            misses.append(_nothing(block, options, f"one of {patches} patch tokens would go, and come back as fused"))
        elif options.method == "evit":
            made.append(Evit(block, keep, options.fuse, options.count, options.squeeze))
            count = encoder.protected + keep + fused
        else:
            made.append(Pick(block, keep, options.seed + block.number))
            count = encoder.protected + keep
    return made, misses


def _behind(encoder: Encoder, options: ReduceTokensOptions) -> Plan:
    """A share of the patches is given out."""
    total = len(encoder.blocks)
    read = _chosen(encoder, options, list(range(total - max(total // 4, 1) + 1, total + 1)))
    patches = encoder.tokens - encoder.protected
    keep = math.ceil(options.keep * patches)
    if keep >= patches:
        return [], [_nothing(encoder.blocks[-1], options, f"all {patches} patch tokens stay")]
    return [ClassPick(encoder.blocks[-1], encoder.end, tuple(read), keep)], []


def _merging(encoder: Encoder, options: ReduceTokensOptions) -> Plan:
    """So many tokens merge."""
    make: Callable[[Block, int], Reduction] = Tome if options.method == "tome" else Mctf
    first, least = (1, 0) if options.method == "tome" else (2, LEAST)
    wanted = _rates(encoder, options)
    made: list[Reduction] = []
    misses: list[NearMiss] = []
    count = encoder.tokens
    for block in _chosen(encoder, options, list(range(first, len(encoder.blocks) + 1))):
        r = wanted[block.number - 1]
        most = min((count - encoder.protected) // 2, count - least)
        if r > most and not made and not misses:
            raise UsageError(
                "VLX0703", f"--tokens {options.method}: r={r} tokens cannot merge, there are {count}",
                where="--tokens", hint=f"at most {max(most, 0)} merge at layer {block.number}",
            )  # fmt: skip
        r = max(min(r, most), 0)
        if r == 0:
            misses.append(_nothing(block, options, f"none of {count} tokens merges"))
            continue
        made.append(make(block, r))
        count -= r
    return made, misses


def _rates(encoder: Encoder, options: ReduceTokensOptions) -> list[int]:
    """How many tokens are to merge at each layer."""
    total = len(encoder.blocks)
    given = options.r or (_R[options.method],)
    if len(given) > total:
        raise UsageError(
            "VLX0703", f"--tokens {options.method}: r names {len(given)} layers", where="--tokens",
            hint=f"the model has {total} layers",
        )  # fmt: skip
    return [given[0]] * total if len(given) == 1 else [*given, *[0] * (total - len(given))]


def _chosen(encoder: Encoder, options: ReduceTokensOptions, default: list[int]) -> list[Block]:
    total = len(encoder.blocks)
    wanted = options.layers or default
    for number in wanted:
        if not 1 <= number <= total:
            raise UsageError(
                "VLX0703", f"--tokens {options.method}: there is no layer {number}", where="--tokens",
                hint=f"the model has layers 1 to {total}",
            )  # fmt: skip
    return [block for block in encoder.blocks if block.number in wanted]


def _nothing(block: Block, options: ReduceTokensOptions, reason: str) -> NearMiss:
    return NearMiss(f"{options.method} at layer {block.number}", block.attention, reason)
