"""fusions: which operators of ONNX Runtime's own are worth writing, by what was measured on processors of each kind.

``fusion_costs.json`` holds what ``tests/benchmarks/onnxruntime_fusions.py`` measured, and where: a build times nothing.
A fusion is on where the lower end of the ratio's interval on processors of such a kind lies above 1 for one model and
the upper end below 1 for none; on a kind of which nothing is known it stays off.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib import resources

from vlexport.core.artifact import Frozen

FILE = "fusion_costs.json"


class FusionCost(Frozen):
    """How much faster a model is with a fusion than without.

    Attributes:
        fusion: Id of the pass.
        precision: Of the model.
        instruction_set: Flag of the processor that it was measured on; it speaks for processors that have it.
        processor: Its name; figures of several processors of one kind stand beside each other.
        model: What was measured.
        ratio: Median latency without the fusion over that with it; above 1 is faster.
        low: Lower end of its 95 % interval.
        high: Upper end.
        source: Threads, versions and command.
    """

    fusion: str
    precision: str
    instruction_set: str
    processor: str
    model: str
    ratio: float
    low: float
    high: float
    source: str


def fusion_costs() -> tuple[FusionCost, ...]:
    """What was measured, the newest kind of processor first."""
    text = resources.files(__package__).joinpath(FILE).read_text(encoding="utf-8")
    return tuple(FusionCost.model_validate(each) for each in json.loads(text))


def is_worth_it(fusion: str, precision: str, instruction_set: Iterable[str]) -> bool:
    """Whether a fusion was measured to be faster on a processor with these flags.

    Args:
        fusion: Id of the pass.
        precision: Of the model.
        instruction_set: Flags of the processor.
    """
    flags = set(instruction_set)
    asked = [each for each in fusion_costs() if (each.fusion, each.precision) == (fusion, precision)]
    kind = next((each.instruction_set for each in asked if each.instruction_set in flags), None)
    known = [each for each in asked if each.instruction_set == kind]
    return any(each.low > 1.0 for each in known) and not any(each.high < 1.0 for each in known)
