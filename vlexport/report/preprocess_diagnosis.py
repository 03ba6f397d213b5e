"""What the preprocessing doctor found, in words."""

from __future__ import annotations

from vlexport.core.preprocess_diagnosis import Diagnosis, Round, Trial

_AXES = {"range": "Range", "color": "Range", "size": "Size"}
_SHOWN = 4


def diagnosis_lines(found: Diagnosis) -> list[str]:
    """Lines for the terminal: the verdict with its figures, what to paste, and what cannot be told apart."""
    level = f"{100 * found.confidence:.1f} %"
    if found.verdict == "named":
        first = (
            f"Named    {_changes(found)}: {found.top1:.1f} against {found.recorded_top1:.1f} on {found.samples}, "
            f"{found.gain:+.1f} points ({level}: {found.gain_low:+.1f} to {found.gain_high:+.1f})"
        )
    elif found.verdict == "stands":
        first = f"Stands   the recorded one: {found.recorded_top1:.1f} on {found.samples}, all others are worse"
    else:
        near = _nearest(found)
        first = (
            f"Cannot   cannot tell: {found.recorded_top1:.1f} against {near.top1:.1f} on {near.samples} ({near.what}); "
            "no other is better"
        )
    lines = [first, f"Recorded {found.recorded}"]
    if found.verdict == "named":
        lines += [f'Paste    --preprocess "{found.line}"']
    for each in found.rounds:
        lines += _round_lines(each)
    best = f"computed by {found.runner}; every interval at {level}, so that all together hold at 95 %"
    return [*lines, f"Note     {best}"]


def _changes(found: Diagnosis) -> str:
    """In words, what was taken."""
    return ", then ".join(
        next(trial.what for trial in each.trials if trial.spec == each.took) for each in found.rounds if each.took
    )


def _nearest(found: Diagnosis) -> Trial:
    """Of what cannot be told from the recorded one, what was right most often."""
    untold = [trial for each in found.rounds for trial in each.trials if trial.standing == "cannot tell"]
    return max(untold, key=lambda trial: (trial.samples, trial.top1))


def _round_lines(found: Round) -> list[str]:
    shown = [trial for trial in found.trials if trial.standing != "same"]
    width = max((len(trial.what) for trial in shown), default=0)
    rows = [
        f"{trial.what:{width}}  {trial.top1:5.1f} against {trial.against:5.1f} on {trial.samples}, {trial.standing}"
        for trial in sorted(shown, key=lambda trial: -trial.samples)
    ]
    name = _AXES[found.axis]
    lines = [f"{'' if i else name:8} {row}" for i, row in enumerate(rows)]
    if found.alike:
        more = f" and {len(found.alike) - _SHOWN} more" if len(found.alike) > _SHOWN else ""
        ended = "the one taken" if found.took else "what it began with"
        lines.append(f"Alike    cannot be told from {ended}: {', '.join(found.alike[:_SHOWN])}{more}")
    return lines
