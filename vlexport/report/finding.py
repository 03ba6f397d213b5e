"""What a bisection found, in words."""

from __future__ import annotations

from vlexport.core.finding import Finding, Measure


def finding_lines(found: Finding) -> list[str]:
    """Lines for the terminal: who is to blame, where, what it did, and the figures around it."""
    lines = [f"Agrees   {each}" for each in found.agreed]
    if found.kind == "nothing":
        lines.append("Blame    nothing differs: " + ("passes and artifact agree" if found.agreed else "nothing ran"))
    elif found.kind in ("pass", "lowered pass"):
        lines += _pass_lines(found)
    elif found.kind == "narrowing":
        lines.append(f"Blame    narrowing: {found.change}")
    elif found.kind == "drift":
        lines.append("Blame    all passes together: each agrees with the one before, the last does not with the source")
    elif found.kind == "bundle":
        lines.append("Blame    the bundle's artifact: one lowered here agrees, so it was made otherwise or altered")
    else:
        lines.append("Blame    the lowering: the passes agree, the artifact does not compute what they made")
    if found.cure:
        lines.append(f"Cure     with {found.cure} it agrees: the runtime is to blame, not the graph")
    for name, measure in (("Before", found.before), ("After", found.after)):
        if measure is not None:
            lines.append(f"{name:8} {_figure(measure, found)}")
    if found.reason:
        lines.append(f"Said     {found.reason}")
    if found.component:
        lines.append(f"Part     component {found.component}")
    return lines + [f"Note     {each}" for each in found.notes]


def _pass_lines(found: Finding) -> list[str]:
    of = f" of {found.distribution}" if found.distribution else ""
    place = f"pass {found.position} of those run" if found.kind == "pass" else "on the lowered graph"
    lines = [f"Blame    {found.culprit}{of} ({found.stage}, {found.effect}), {place}"]
    if found.match is not None:
        lines.append(f"Match    {found.match} of {found.matches}: {found.node}")
    else:
        lines.append("Match    it works on the whole graph at once, or the match cannot be told")
    if found.change:
        lines.append(f"Did      {found.change}")
    if found.where:
        lines.append(f"Differs  first at {found.where}")
    return lines


def _figure(measure: Measure, found: Finding) -> str:
    bound = f", bound {found.bound:g}" if found.bound is not None else ""
    return f"{found.statistic} {measure.value:.3g} on the {measure.probe}, output {measure.output}{bound}"
