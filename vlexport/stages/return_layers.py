"""The strategy of ``--max-drop``: layers go back to float until the gates hold, the most sensitive first. No torch.

First the recipe as it stands. Where it does not hold, each layer alone in integers: its signal to noise ratio at the
outputs is its sensitivity. Then 1, 2, 4, 8 … of the most sensitive layers in float until the gates hold, and then, by
halving the last step, as few of them as will do: of 100 layers at most 15 artifacts are judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from vlexport.core.trials import Trial

KEEP = "quantize.keep"
ONLY = "quantize.only"
WORST_DB = -200.0
"""Stands for a layer that cannot be in integers alone."""


@dataclass(frozen=True)
class ReturnLayers:
    """Returns layers to float.

    Attributes:
        layers: Names of all that are quantized, in the order of the graph.
        given: What the recipe keeps in float as it stands.
        known: Layer → sensitivity in dB, where it was measured before.
    """

    layers: tuple[str, ...]
    given: tuple[str, ...] = ()
    known: dict[str, float] = field(default_factory=dict)

    def propose(self, trials: Sequence[Trial]) -> dict[str, str] | None:
        """The next candidate; None once the least number of layers in float is known, or none is left in integers."""
        judged = self._judged(trials)
        if 0 not in judged:
            return {}
        if self._holds(judged[0]) or len(self.layers) < 2:
            return None
        measured = self.sensitivities(trials)
        for layer in self.layers:
            if layer not in measured:
                return {ONLY: layer}
        enough = [count for count in judged if self._holds(judged[count])]
        if not enough:
            most = len(self.layers) - 1
            count = min(max(2 * max(judged), 1), most)
            return None if count in judged else self._options(count, trials)
        least = min(enough)
        below = max(count for count in judged if count < least)
        return None if least - below < 2 else self._options((least + below) // 2, trials)

    def best(self, trials: Sequence[Trial]) -> dict[str, str]:
        """The fewest layers in float that hold; where none do, what came nearest."""
        near = self.nearest(trials)
        return dict(near.options) if near is not None else {}

    def nearest(self, trials: Sequence[Trial]) -> Trial | None:
        """The candidate with fewest layers in float that holds; where none does, the one that lost least."""
        judged = self._judged(trials)
        enough = [count for count in judged if self._holds(judged[count])]
        if enough:
            return judged[min(enough)]
        order = ("undecided", "fails")
        found = [trial for trial in judged.values() if trial.outcome in order]
        return min(found, key=lambda each: (order.index(each.outcome), each.figures.get("drop", 0.0)), default=None)

    def sensitivities(self, trials: Sequence[Trial]) -> dict[str, float]:
        """Layer → signal to noise ratio of the outputs with it alone in integers, dB; least where it cannot be."""
        found = dict(self.known)
        for trial in trials:
            if ONLY in trial.options:
                found[trial.options[ONLY]] = trial.figures.get("sqnr_db", WORST_DB)
        return found

    def returned(self, trial: Trial) -> tuple[str, ...]:
        """Layers that a candidate keeps in float beside those that were given."""
        kept = trial.options.get(KEEP, "")
        return tuple(name for name in kept.split(",") if name and name not in self.given)

    def _judged(self, trials: Sequence[Trial]) -> dict[int, Trial]:
        """Number of layers returned to float → what became of it."""
        return {len(self.returned(trial)): trial for trial in trials if ONLY not in trial.options}

    def _options(self, count: int, trials: Sequence[Trial]) -> dict[str, str]:
        found = self.sensitivities(trials)
        order = sorted(self.layers, key=lambda layer: found[layer])  # stable: equals in the order of the graph
        worst = set(order[:count])
        return {KEEP: ",".join((*self.given, *(layer for layer in self.layers if layer in worst)))}

    @staticmethod
    def _holds(trial: Trial) -> bool:
        return trial.outcome == "holds"
