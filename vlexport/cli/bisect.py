"""``vlexport bisect``: which pass, and which match of it, makes a built model differ."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from vlexport.cli.build_flags import NOT_OF_THE_GRAPH, command_line, config_of, flag, takes
from vlexport.cli.console import make_reporter
from vlexport.cli.outcome import Outcome
from vlexport.core.bundle_schema import plain_json
from vlexport.core.config import BuildConfig
from vlexport.core.finding import Finding
from vlexport.core.halves import require_build_half
from vlexport.report.finding import finding_lines


def bisect(**values: Any) -> Outcome:
    """Find the pass, and the match of it, that makes a built model differ from its source."""
    values.pop("json_output")
    bound = values.pop("bound")
    from vlexport.core.bundle import RECIPE_FILE, read_bundle
    from vlexport.frontends.named_paths import require_model, require_samples

    built = None
    if values["recipe"] and os.path.isdir(values["recipe"]):
        folder = Path(values["recipe"])
        built = (folder, read_bundle(folder))
        values["recipe"] = str(folder / RECIPE_FILE)
    config = config_of(values)
    require_model(config.model, config.arch)
    require_samples(config)
    require_build_half("vlexport bisect")

    from vlexport.stages.bisect import bisect as stage

    found = stage(config, bound=bound, bundle=built, reporter=make_reporter())
    following = _following(found, values, config.seed)
    return Outcome([*finding_lines(found), f"Next     {following}"], {**plain_json(found), "next": following})


def _following(found: Finding, values: dict[str, Any], seed: int) -> str:
    """What to type next; where nothing differs on real samples, the same with other probes."""
    if found.kind == "nothing":
        if values["data"] or values["calib"]:
            return command_line("bisect", {**values, "seed": (seed + 1) % 2**32})
        return command_line("bisect", values, "--data", "DATA")
    if found.cure:
        return command_line("build", values, "--set", found.cure)
    if found.kind == "bundle":
        return command_line("build", values, "--force")
    if found.distribution and values.get("passes"):
        kept = [each for each in values["passes"] if each != found.culprit]
        return command_line("build", {**values, "passes": kept})
    return command_line("build", values, "--no-gate", "--no-profile", "--dump", "graphs")


_FIELDS = tuple(name for name in BuildConfig.model_fields if name not in NOT_OF_THE_GRAPH)
_EXTRA = {
    "recipe": flag(str, "Bundle that was built, or the TOML file of its recipe; flags win.", "--recipe"),
    "bound": flag(
        float, "For approximate passes, in the unit of their statistic, instead of their promise.", "--bound"
    ),
    "json_output": flag(bool, "Print one JSON object on stdout.", "--json"),
}
takes(bisect, _FIELDS, _EXTRA)
