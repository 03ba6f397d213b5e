"""What ``--json`` prints, command by command, as typed data; ``vlexport schema`` shows their JSON Schemas. No torch.

Every object holds ``schema``, ``ok`` and ``exit``. A failure adds ``error`` and nothing else; a gate that failed is no
error but a result with ``ok`` false.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from vlexport.core.account import Account
from vlexport.core.artifact import Frozen
from vlexport.core.bundle_schema import Bundle, CostRecord, PassRecord, Report
from vlexport.core.comparison import Comparison
from vlexport.core.device_profiles import Fact
from vlexport.core.difference import Difference
from vlexport.core.errors import UsageError, nearest
from vlexport.core.explanations import Explanation
from vlexport.core.finding import Finding
from vlexport.core.health import Health
from vlexport.core.inspection import BundleInspection, ModelInspection
from vlexport.core.json_schema import json_schema_of
from vlexport.core.layer_record import Layers
from vlexport.core.option_records import OptionRecord
from vlexport.core.preprocess_diagnosis import Diagnosis


class ErrorObject(Frozen):
    """An error: its code (empty for an interrupt), what is wrong, where, and what to do."""

    code: str = Field(pattern=r"^(VLX\d{4})?$")
    message: str
    where: str
    hint: str


class Printed(Frozen):
    """What every object holds: the version of this form, whether all is well, and the exit code."""

    form: Literal[1] = Field(alias="schema")
    ok: bool
    exit: int


class Failed(Printed):
    """A command that did not come to its end."""

    ok: Literal[False]
    error: ErrorObject


class BuiltPart(Frozen):
    """One bundle of a build."""

    bundle: str
    digest: str
    state: Literal["built", "verified"]
    report: Report
    report_file: str
    seconds: dict[str, float]
    use_it: tuple[str, ...]


class BuiltOne(Printed, BuiltPart):
    """``build`` for one target."""


class BuiltSeveral(Printed):
    """``build`` for several targets: those that were made, and the errors of the others."""

    output: str
    comparison: Comparison
    targets: dict[str, BuiltPart]
    refused: dict[str, ErrorObject]


class PlannedPart(Frozen):
    """What one build would do."""

    passes: tuple[PassRecord, ...]
    lowered_passes: tuple[str, ...]
    account: tuple[Account, ...]
    before: CostRecord
    after: CostRecord
    problems: tuple[ErrorObject, ...]
    notes: tuple[str, ...]
    candidates: dict[str, tuple[str, ...]]


class PlannedOne(Printed, PlannedPart):
    """``build --plan`` for one target."""


class PlannedSeveral(Printed):
    """``build --plan`` for several targets."""

    targets: dict[str, PlannedPart]


class Measured(Printed):
    """``validate`` and ``profile``."""

    report: Report


class Diagnosed(Printed):
    """``validate --diagnose-preprocess``."""

    diagnosis: Diagnosis


class VerifiedBundle(Printed):
    """``verify``."""

    digest: str
    golden_errors: dict[str, float]
    emulator: str


class LabelShare(Frozen):
    """A class and its share; None where the scores have none."""

    label: str
    share: float | None


class Classified(Frozen):
    """A sample with its likeliest classes."""

    sample: str
    classes: tuple[LabelShare, ...]


class Shaped(Frozen):
    """A sample whose outputs are no class scores: their shapes."""

    sample: str
    shapes: dict[str, tuple[int, ...]]


class Ran(Printed):
    """``run``."""

    results: tuple[Classified | Shaped, ...]


class Wrote(Printed):
    """``run --output``."""

    samples: int
    output: str


class InspectedModel(Printed, ModelInspection):
    """``inspect`` of a model."""

    kind: Literal["model"]


class InspectedBundle(Printed, BundleInspection):
    """``inspect`` of a bundle."""

    kind: Literal["bundle"]


class ExplainedCode(Printed, Explanation):
    """``explain VLX0503``."""


class ExplainedBundle(Printed):
    """``explain BUNDLE``."""

    components: dict[str, tuple[PassRecord, ...]]


class ExplainedLayers(Printed):
    """``explain BUNDLE --layers``: what each layer in integers loses, and what to try."""

    layers: Layers
    suggestions: tuple[str, ...]


class Compared(Printed):
    """``compare``: one difference a target."""

    differences: tuple[Difference, ...]


class Bisected(Printed, Finding):
    """``bisect``."""

    next: str


class ListedPass(Frozen):
    """A pass in the list; ``distribution`` is the package that brings it, ``turned_on_by`` what ``--set`` takes."""

    name: str
    stage: str
    effect: str
    distribution: str | None = None
    turned_on_by: tuple[str, ...] | None = None


class ListedPasses(Printed):
    """``passes``."""

    passes: tuple[ListedPass, ...]
    broken: dict[str, ErrorObject]


class DescribedPass(Printed, ListedPass):
    """``passes NAME``."""

    description: str
    options: tuple[OptionRecord, ...]


class ListedTarget(Frozen):
    """A target, and what it finds on this machine."""

    available: bool
    timing: Literal["real", "emulated", "none"]
    version: str
    providers: tuple[str, ...]
    instruction_set: tuple[str, ...]
    reason: str
    emulator: str
    summary: str
    precisions: tuple[str, ...]
    distribution: str
    options: tuple[OptionRecord, ...]


class ListedProfile(Frozen):
    """A device profile."""

    summary: str
    targets: tuple[str, ...]
    instruction_set: tuple[str, ...]
    facts: dict[str, Fact]


class ListedTargets(Printed):
    """``targets``."""

    targets: dict[str, ListedTarget]
    broken: dict[str, ErrorObject]
    device_profiles: dict[str, ListedProfile]


class DescribedTarget(Printed, ListedTarget):
    """``targets NAME``."""

    name: str


class CacheOff(Printed):
    """``cache``, switched off."""

    off: Literal[True]


class CacheOn(Printed):
    """``cache``."""

    off: Literal[False]
    folder: str
    entries: int
    searches: int
    size_bytes: int
    cap_bytes: int
    freed_bytes: int


class Checkup(Printed, Health):
    """``doctor``."""


class ListedSchemas(Printed):
    """``schema``: name → what it describes."""

    schemas: dict[str, str]


class ShownSchema(Printed):
    """``schema NAME``."""

    name: str
    json_schema: dict[str, Any]


COMMANDS: dict[str, tuple[type[Printed], ...]] = {
    "build": (BuiltOne, BuiltSeveral, PlannedOne, PlannedSeveral),
    "validate": (Measured, Diagnosed),
    "profile": (Measured,),
    "verify": (VerifiedBundle,),
    "run": (Ran, Wrote),
    "inspect": (InspectedModel, InspectedBundle),
    "compare": (Compared,),
    "explain": (ExplainedCode, ExplainedBundle, ExplainedLayers),
    "bisect": (Bisected,),
    "passes": (ListedPasses, DescribedPass),
    "targets": (ListedTargets, DescribedTarget),
    "cache": (CacheOff, CacheOn),
    "doctor": (Checkup,),
    "schema": (ListedSchemas, ShownSchema),
}
"""Command → what it prints when it comes to its end."""
FILES: dict[str, tuple[type[Frozen], str]] = {
    "bundle.json": (Bundle, "what lies in a bundle"),
    "report.json": (Report, "what was measured on one machine, on one day"),
    "compare.json": (Comparison, "the bundles of one build for several targets"),
}
"""File → its content, and what that is."""


def schema_names() -> dict[str, str]:
    """Name → what that schema describes."""
    commands = {name: f"the object that `vlexport {name} --json` prints" for name in COMMANDS}
    return {
        **commands,
        "error": "the object that any command prints when it fails",
        **{k: v[1] for k, v in FILES.items()},
    }


def schema_named(name: str) -> dict[str, Any]:
    """A JSON Schema.

    Args:
        name: A command, a file of a bundle, or ``error``.

    Raises:
        UsageError: VLX0703 for a name that has none, with the nearest one.
    """
    if name in COMMANDS:
        kinds: Any = Failed
        for kind in COMMANDS[name]:
            kinds = kinds | kind
        return json_schema_of(kinds, f"vlexport {name} --json")
    if name == "error":
        return json_schema_of(Failed, "a failure of any command")
    if name not in FILES:
        raise UsageError(
            "VLX0703", f"no schema is called '{name}'{nearest(name, schema_names())}", where="schema",
            hint=f"these are: {', '.join(schema_names())}",
        )  # fmt: skip
    return json_schema_of(FILES[name][0], name)
