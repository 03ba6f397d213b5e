"""``vlexport build``. Its flags are made from :class:`vlexport.core.config.BuildConfig`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vlexport.cli.build_flags import config_of, flag, takes
from vlexport.cli.console import make_reporter
from vlexport.cli.formats import FormatOption, OutputFormat
from vlexport.cli.outcome import Check, Outcome, checks_of
from vlexport.core.bundle_schema import plain_json
from vlexport.core.config import BuildConfig
from vlexport.core.errors import EXIT_CAPABILITY
from vlexport.core.halves import require_build_half
from vlexport.core.verdict import exit_code, gate_from_text

if TYPE_CHECKING:
    from vlexport.stages.build import BuildResult


def build(**values: Any) -> Outcome:
    """Build a verified, measured bundle from a model file."""
    values.pop("json_output")
    values.pop("output_format")
    planned = values.pop("plan")
    config = config_of(values)

    from vlexport.core.user_metric import metric_names
    from vlexport.frontends.named_paths import require_model, require_samples
    from vlexport.stages.write_bundle import output_of, require_folder, require_free
    from vlexport.targets import open_target, target_names

    names = target_names(config.target)
    for name in names:
        open_target(name)
    for text in config.gate:
        gate_from_text(text, extra=metric_names(config.metric))
    require_model(config.model, config.arch)
    if not planned:  # a plan lists what else is wrong
        require_samples(config)
        require_folder(config.dump)
        require_free(output_of(config), force=config.force, several=len(names) > 1)
    require_build_half("vlexport build")
    if planned:
        return _plan(config)
    _use_threads(config.threads)
    if len(names) > 1:
        return _several(config)
    from vlexport.stages.build import build as build_stage

    result = build_stage(config, reporter=make_reporter())
    return Outcome(*_shown(config, result), _checks(result))


def _shown(config: BuildConfig, result: BuildResult) -> tuple[list[str], dict[str, Any], int]:
    """Receipt, ``--json`` object and exit code of one bundle."""
    from vlexport.core.bundle import MEASURED_FOLDER
    from vlexport.report.receipt import receipt
    from vlexport.targets import open_target

    shown = str(result.output)
    use_it = open_target(result.bundle.target).usage(result.bundle.main.artifact, shown)
    lines = receipt(result.bundle, result.report, shown, use_it=use_it)
    payload = {
        "bundle": str(result.output),
        "digest": result.bundle.digest,
        "state": result.bundle.state,
        "report": plain_json(result.report),
        "report_file": str(result.output / MEASURED_FOLDER / "local-1" / "report.html"),
        "seconds": {name: round(spent, 3) for name, spent in result.seconds.items()},
        "use_it": lines[lines.index("Use it:") + 1 :],
    }
    code = exit_code(result.report.verdicts)
    if not code and config.require == "verified" and result.bundle.state != "verified":
        code = EXIT_CAPABILITY
    return lines, payload, code


def _checks(result: BuildResult, prefix: str = "") -> tuple[Check, ...]:
    """The numeric gate of every pass that changed something, the golden check and the gates that were asked for."""
    records = [(name, record) for name, each in result.bundle.components.items() for record in each.passes]
    several = len(result.bundle.components) > 1
    passes: dict[str, Check] = {}
    for name, record in records:
        if record.changes:
            title = f"{prefix}pass {record.name}{f' of {name}' if several else ''}"
            times = sum(known.partition(" (run ")[0] == title for known in passes)
            title += f" (run {times + 1})" if times else ""  # a pass may run twice, and a case's name tells it apart
            said = f"gate: {record.gate.proof}, max|a−b|/max|b| {record.gate.worst:.0e}"
            passes[title] = Check(title, "skipped" if record.gate.proof == "off" else "pass", said)
    ran = result.bundle.state == "verified" or bool(result.report.emulator)
    golden = Check(f"{prefix}golden vectors", "pass" if ran else "skipped", result.bundle.state)
    return (*passes.values(), golden, *checks_of(result.report.verdicts, prefix))


def _several(config: BuildConfig) -> Outcome:
    from vlexport.core.bundle import COMPARE_FILE
    from vlexport.report.comparison import comparison_lines
    from vlexport.stages.build_each import build_each

    made = build_each(config, reporter=make_reporter())
    shown = {name: _shown(config, result) for name, result in made.results.items()}
    lines = comparison_lines(made.comparison)
    lines += [f"Gate     {name}: {verdict}" for name, each in made.results.items() for verdict in each.report.verdicts]
    lines += [f"Note     {name}: {note}" for name, each in made.results.items() for note in each.report.notes[:2]]
    lines += [f"Built    {made.output}: {', '.join(made.results)}; {COMPARE_FILE} holds the table"]
    payload = {
        "output": str(made.output),
        "comparison": plain_json(made.comparison),
        "targets": {name: payload for name, (_, payload, _) in shown.items()},
        "refused": {name: error.as_dict() for name, error in made.refused.items()},
    }
    codes = [error.exit_code for error in made.refused.values()] + [code for _, _, code in shown.values() if code]
    checks = [check for name, each in made.results.items() for check in _checks(each, f"{name}: ")]
    checks += [Check(f"{name}: {error.code}", "error", error.message) for name, error in made.refused.items()]
    return Outcome(lines, payload, codes[0] if codes else 0, tuple(checks))


def _plan(config: BuildConfig) -> Outcome:
    from vlexport.stages.order import configs_of

    configs = configs_of(config)
    planned = {name: _planned(each, several=len(configs) > 1) for name, each in configs.items()}
    lines = [line for each, _, _ in planned.values() for line in each]
    code = next((code for _, _, code in planned.values() if code), 0)
    lines.append("Nothing was written." if code else "No problem found; nothing was written.")
    payloads = {name: payload for name, (_, payload, _) in planned.items()}
    whole = next(iter(payloads.values())) if len(payloads) == 1 else {"targets": payloads}
    found = [(name, each) for name, payload in payloads.items() for each in payload["problems"]]
    checks = tuple(Check(f"{name}: {each['code']}", "error", each["message"]) for name, each in found)
    return Outcome(lines, whole, code, checks)


def _planned(config: BuildConfig, *, several: bool) -> tuple[list[str], dict[str, Any], int]:
    """Lines, ``--json`` object and exit code of one target's plan; of several, one may have nothing to search."""
    from vlexport.report.figures import account_phrase, macs_phrase, missing_phrase, pass_phrase, size_phrase
    from vlexport.stages.plan import plan

    found = plan(config, several=several, reporter=make_reporter())
    if several:
        idle = [each for each in found.problems if each.code == "VLX0805" and config.autotune and config.profile]
        found = replace(
            found,
            problems=tuple(each for each in found.problems if each not in idle),
            notes=(*found.notes, *(f"not searched: {each.message}" for each in idle)),
        )
    lines = [
        f"Plan     {config.target}: {found.calls_before} calls become {found.calls_after}, "
        f"{macs_phrase(found.after.macs, found.after.opaque)}, {size_phrase(found.after.size_bytes)} of weights"
    ]
    for record in found.passes:
        lines.append(f"Pass     {pass_phrase(record)}")
        lines += [f"         {change.what} ×{change.count}" for change in record.changes]
        lines += [f"         not {miss.pattern} at {miss.node}: {miss.reason}" for miss in record.near_misses]
    lines += [f"Pass     {name}: on the lowered graph, which a plan does not make" for name in found.lowered]
    for each in found.account:
        lines.append(f"Modules  {account_phrase(each)}")
        lines += [f"         not {missing_phrase(missing)}" for missing in each.missing]
    lines += [f"Try      {name} = {', '.join(values)}" for name, values in found.candidates.items()]
    lines += [f"Note     {note}" for note in found.notes]
    for problem in found.problems:
        where = f" ({problem.where})" if problem.where else ""
        hint = f"; {problem.hint}" if problem.hint else ""
        lines.append(f"Problem  {problem.code}: {problem.message}{where}{hint}")
    payload = {
        "passes": [plain_json(record) for record in found.passes],
        "lowered_passes": list(found.lowered),
        "account": [plain_json(each) for each in found.account],
        "before": plain_json(found.before),
        "after": plain_json(found.after),
        "problems": [problem.as_dict() for problem in found.problems],
        "notes": list(found.notes),
        "candidates": {name: list(values) for name, values in found.candidates.items()},
    }
    return lines, payload, found.problems[0].exit_code if found.problems else 0


def _use_threads(threads: int) -> None:
    """The command line owns its process, so it may set torch's thread count."""
    if threads:
        import torch

        torch.set_num_threads(threads)


_EXTRA = {
    "recipe": flag(str, "TOML file with any of these options; flags win.", "--recipe"),
    "output_format": (FormatOption, OutputFormat.HUMAN),
    "plan": flag(bool, "Say what a build would do, in seconds; write nothing.", "--plan"),
    "json_output": flag(bool, "Print one JSON object on stdout.", "--json"),
}
takes(build, tuple(BuildConfig.model_fields), _EXTRA)
