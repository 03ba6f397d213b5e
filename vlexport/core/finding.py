"""What a bisection found, as typed data. No torch."""

from __future__ import annotations

from typing import Literal

from vlexport.core.artifact import Frozen

Kind = Literal["nothing", "pass", "lowered pass", "narrowing", "lowering", "drift", "bundle"]


class Measure(Frozen):
    """A figure: its value, the probe and the output where it was worst."""

    value: float
    probe: str
    output: str


class Finding(Frozen):
    """What a bisection found.

    Attributes:
        kind: ``pass``, ``lowered pass``, ``narrowing`` of dims, ``lowering`` (the passes agree, the artifact differs
            from them), ``drift`` (each step is within its bound, all together are not), ``bundle`` (a fresh artifact
            agrees, the one in the bundle does not), or ``nothing``.
        component: Of the model; empty where nothing was found.
        culprit: Id of the pass.
        stage: Where it stands in the pipeline.
        effect: ``exact`` or ``approximate``.
        distribution: The package that brings it.
        position: Its place among the passes that were run, from 1.
        passes: All of them, in order.
        match: Which of its matches, from 1; None where it does not work match by match, or that cannot be told.
        matches: How many it has.
        node: Operator, module path and source line of that match.
        change: What the match did.
        statistic: What the figures are: ``max|a−b| / max|b|`` unless an approximate pass declares another.
        bound: What is allowed.
        before: Without it.
        after: With it.
        reason: The words of the gate, the runner or the runtime.
        where: The first node whose value differs.
        cure: An option with which the difference goes, as ``--set`` takes it.
        agreed: What was compared and agrees.
        notes: What could not be compared, and what else the user should know.
    """

    kind: Kind
    component: str = ""
    culprit: str = ""
    stage: str = ""
    effect: str = ""
    distribution: str = ""
    position: int = 0
    passes: tuple[str, ...] = ()
    match: int | None = None
    matches: int = 0
    node: str = ""
    change: str = ""
    statistic: str = "max|a−b| / max|b|"
    bound: float | None = None
    before: Measure | None = None
    after: Measure | None = None
    reason: str = ""
    where: str = ""
    cure: str = ""
    agreed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
