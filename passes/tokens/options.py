"""Options of reduce-tokens."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from vlexport.core.artifact import Frozen


def _plus(value: object) -> object:
    """Numbers joined by +."""
    return tuple(part.strip() for part in value.split("+")) if isinstance(value, str) else value


class ReduceTokensOptions(Frozen):
    """Options of reduce-tokens; --tokens METHOD:key=value,… gives them.

    Attributes:
        method: How tokens are reduced; --tokens names it.
        keep: Share of the patch tokens that stay at each layer (evit, random), or behind the encoder (cls).
        r: Tokens that merge at each layer (tome, mctf): one number, or one for each layer of the model joined by +;
            none means 8 for tome and 16 for mctf.
        layers: Blocks where it is done, counted from 1 and joined by +. None means, for evit and random, a quarter,
            half and three quarters of the way (4+7+10 of 12), for tome all, for mctf all but the first; for cls, where
            attention is averaged over them, the last quarter.
        fuse: The tokens that do not stay become one (evit); the authors' code leaves that out, their paper does not.
        count: That one token is their mean and counts as many in every attention behind it, as merged tokens do (evit);
            with it a model that was never trained to lose tokens loses less. The paper has a sum that counts as one.
        squeeze: Each token that does not stay joins the one that stays which it is most like, and there is no token for
            the rest (evit); it counts as merged tokens do. What was never trained to lose tokens loses least so.
        seed: Of the choice (random).
        unmerge: What needs all tokens gets them back; else such a model is refused.
        min_cosine: Least cosine of every output with what it was before. Untrained weights are far off at any rate, so
            nothing more is promised than the gates on your data judge.
    """

    method: Literal["evit", "tome", "mctf", "cls", "random"] = "evit"
    keep: float = Field(default=0.7, gt=0.0, le=1.0)
    r: Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(_plus)] = ()
    layers: Annotated[tuple[int, ...], BeforeValidator(_plus)] = ()
    fuse: bool = True
    count: bool = False
    squeeze: bool = False
    seed: int = Field(default=0, ge=0, le=2**32 - 1)
    unmerge: bool = True
    min_cosine: float = Field(default=0.0, ge=-1.0, le=1.0)
