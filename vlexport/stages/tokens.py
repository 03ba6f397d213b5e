"""tokens: which component ``--tokens`` is about, and what its pass measures on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from vlexport.core.config import BuildConfig
from vlexport.core.dataset import Dataset
from vlexport.core.errors import UsageError, nearest
from vlexport.core.tokens import AUTO, tokens_from_text
from vlexport.frontends.sources import Sources
from vlexport.ir.program import Program
from vlexport.passes.base import Pass
from vlexport.stages.choices import passes_of
from vlexport.stages.component import in_order
from vlexport.stages.whole_model import samples_of


@dataclass(frozen=True)
class CalibrationSamples:
    """Calibration samples as one component is given them, read one by one, each time anew.

    Attributes:
        dataset: Of ``--calib``.
        sources: The model.
        name: Of the component.
    """

    dataset: Dataset
    sources: Sources
    name: str

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        """One tensor per input of the component, with batch dim."""
        program = self.sources.components[self.name].program
        for inputs in samples_of(self.dataset, self.sources):
            yield in_order(program, inputs[self.name])


def component_passes(
    config: BuildConfig, sources: Sources, name: str, calibration: Dataset | None
) -> list[Pass[Program]]:
    """Passes of a build for one component; that of ``--tokens`` is among them where the component is meant.

    Args:
        config: What is built.
        sources: The model.
        name: Of the component.
        calibration: What the pass of ``--tokens`` measures on.

    Raises:
        UsageError: VLX0703, also where ``--tokens`` does not say which of several components is meant.
    """
    if config.tokens is None or config.tokens == AUTO:
        return passes_of(config)
    if name != _component(config.tokens, sources):
        return passes_of(config.model_copy(update={"tokens": None}))
    samples: Iterable[tuple[Tensor, ...]] = ()
    if calibration is not None:
        samples = CalibrationSamples(calibration, sources, name)
    return passes_of(config, samples=samples)


def _component(text: str, sources: Sources) -> str:
    names = list(sources.components)
    asked = tokens_from_text(text).component
    if not asked and len(names) == 1:
        return names[0]
    if asked not in names:
        what = f"there is no component '{asked}'{nearest(asked, names)}" if asked else "which component is meant?"
        raise UsageError(
            "VLX0703", f"--tokens {text}: {what}", where="--tokens",
            hint=f"give component=NAME, one of {', '.join(names)}",
        )  # fmt: skip
    return asked
