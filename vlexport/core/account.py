"""The account of a graph as typed data: modules that were expected to become one operator, and what came of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Literal

from vlexport.core.artifact import Frozen

Idea = Literal["attention", "norm", "activation", "fused attention"]
"""The last one is of what a target lowers to: one operator of the runtime with its projections in it."""


class Missing(Frozen):
    """Modules of one class that are not one operator, for one reason.

    Attributes:
        of: Name of the class.
        reason: Why, in words a user can act on.
        modules: Their paths.
    """

    of: str
    reason: str
    modules: tuple[str, ...]


class Account(Frozen):
    """What the model's own modules promise of one idea, and what the passes made of it.

    Attributes:
        idea: Of what.
        expected: Modules whose class and content say that they compute it.
        found: Those of them that became one operator.
        fates: Operator → how many became it; ``folded into conv2d`` for those that another operator took up, ``unread``
            for those that no output needs.
        beyond: Operators of that idea which lie in none of these modules.
        missing: The other modules, by class and reason.
    """

    idea: Idea
    expected: int
    found: int
    fates: dict[str, int]
    beyond: int = 0
    missing: tuple[Missing, ...] = ()


def whole_account(accounts: Mapping[str, tuple[Account, ...]]) -> tuple[Account, ...]:
    """One account an idea over all components, with paths ``component.module``; a single component's as it is."""
    if len(accounts) == 1:
        return next(iter(accounts.values()))
    whole = []
    for idea in dict.fromkeys(each.idea for of in accounts.values() for each in of):
        own = [(name, each) for name, of in accounts.items() for each in of if each.idea == idea]
        fates: Counter[str] = Counter()
        for _, each in own:
            fates.update(each.fates)
        missing = tuple(
            Missing(of=m.of, reason=m.reason, modules=tuple(f"{name}.{path}" for path in m.modules))
            for name, each in own
            for m in each.missing
        )
        expected, found, beyond = (sum(getattr(e, key) for _, e in own) for key in ("expected", "found", "beyond"))
        whole.append(
            Account(
                idea=idea, expected=expected, found=found, fates=dict(fates.most_common()), beyond=beyond,
                missing=missing,
            )
        )  # fmt: skip
    return tuple(whole)
