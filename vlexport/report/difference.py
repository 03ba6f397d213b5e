"""Two bundles beside each other: lines for the terminal, and a comment for a pull request."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence

from vlexport.core.difference import Cause, Difference, LayerDifference, Side
from vlexport.core.inert import one_line
from vlexport.core.markdown_text import markdown_text
from vlexport.core.operators import OperatorCount
from vlexport.report.figures import device_phrase, macs_phrase, parameters_phrase, size_phrase

_SHOWN = 12
"""Rows of a list that are shown; ``--json`` has all."""
_NONE = "–"


def difference_lines(found: Difference) -> list[str]:
    """Lines for the terminal."""
    rows = [("", "A", "B", ""), *_figures(found)]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [f"A        {_named(found.a)}", f"B        {_named(found.b)}"]
    for row in rows:
        cells = "  ".join(cell.ljust(width) for cell, width in zip(row[:3], widths, strict=True))
        lines.append(f"         {cells}  {row[3]}".rstrip())
    lines += [f"Cause    {each}" for each in verdict_phrases(found)]
    lines += [f"Judged   {_cause(each)}: no part of the artifact" for each in found.judging]
    lines += [f"Around   {_cause(each)}" for each in found.surroundings]
    lines += _listed("Pass", [f"{each.name}: {_changes(each.a)} → {_changes(each.b)}" for each in found.passes])
    lines += _listed("Layers", list(_layer_rows(found.layers)))
    lines += _listed("Ops", list(map(_operator, found.operators)))
    return lines + [f"Next     {each}" for each in _next(found)]


def difference_markdown(found: Difference) -> str:
    """A comment for a pull request; every name in it is inert."""

    def safe(text: str) -> str:
        return markdown_text(one_line(text))

    lines = [
        f"### {safe(found.a.name)} against {safe(found.b.name)}",
        "",
        *(f"- {safe(each)}" for each in verdict_phrases(found)),
        "",
        "| | A | B | B against A |",
        "|---|---:|---:|---:|",
        *(f"| {' | '.join(map(safe, row))} |" for row in _figures(found)),
    ]
    sections = (
        ("Passes", [f"{each.name}: {_changes(each.a)} → {_changes(each.b)}" for each in found.passes]),
        ("Precision of layers", list(_layer_rows(found.layers))),
        ("Operators", list(map(_operator, found.operators))),
        ("Surroundings", [_cause(each) for each in (*found.judging, *found.surroundings)]),
    )
    for title, rows in sections:
        if rows:
            more = [f"and {len(rows) - _SHOWN} more"] if len(rows) > _SHOWN else []
            lines += ["", f"<details><summary>{title} ({len(rows)})</summary>", ""]
            lines += [f"- {safe(row)}" for row in [*rows[:_SHOWN], *more]]
            lines += ["", "</details>"]
    lines += ["", *(f"- {safe(each)}" for each in _next(found))]
    return "\n".join(lines).rstrip() + "\n"


def verdict_phrases(found: Difference) -> list[str]:
    """What made the difference, first of all."""
    if found.same:
        why = " although " + " and ".join(_cause(each) for each in found.causes) if found.causes else ""
        return [f"both artifacts hold the same bytes{why}"]
    if not found.causes and not found.surroundings:
        return ["the artifacts differ, and nothing that is recorded says why: another thread count or processor may"]
    if not found.causes:
        return ["no flag made the difference: " + "; ".join(_cause(each) for each in found.surroundings)]
    if len(found.causes) == 1:
        return [f"{_cause(found.causes[0])} made the difference"]
    return [f"{len(found.causes)} things were decided otherwise and made the difference together: "
            + "; ".join(_cause(each) for each in found.causes)]  # fmt: skip


def _cause(each: Cause) -> str:
    return f"{each.flag} {each.b or 'not given'} (A: {each.a or 'not given'})"


def _named(side: Side) -> str:
    return (
        f"{side.name}: {side.target} {side.precision} for {device_phrase(side.device_profile)}, {side.state}, "
        f"digest {side.digest[:12]}"
    )  # fmt: skip


def _figures(found: Difference) -> Iterator[tuple[str, str, str, str]]:
    """Name, A, B, and what B is against A."""
    a, b = found.a, found.b
    yield ("precision", f"{a.target} {a.precision}", f"{b.target} {b.precision}", "")
    yield ("size", size_phrase(a.size_bytes), size_phrase(b.size_bytes), _times(a.size_bytes, b.size_bytes))
    yield ("work", _work(a), _work(b), _times(a.cost.macs * b.batch, b.cost.macs * a.batch))
    yield ("parameters", _count(a), _count(b), _times(a.cost.parameters, b.cost.parameters))
    yield ("top-1", _top1(a), _top1(b), _drop(found))
    if any(each.accuracy is not None and each.accuracy.drop is not None for each in (a, b)):
        yield ("drop from its reference", _own_drop(a), _own_drop(b), "")
    yield ("p50", _p50(a), _p50(b), _ratio(found))
    if a.latency is not None or b.latency is not None:
        yield ("measured", a.latency_on or _NONE, b.latency_on or _NONE, "")


def _work(side: Side) -> str:
    return macs_phrase(side.cost.macs, (), batch=side.batch)


def _count(side: Side) -> str:
    return parameters_phrase(side.cost.parameters).partition(" parameter")[0]


def _times(a: int, b: int) -> str:
    return f"{b / a:.2f}×" if a else ""


def _top1(side: Side) -> str:
    found = side.accuracy
    if found is None:
        return "not measured"
    return f"{found.top1:.2f} % ({found.top1_low:.2f} to {found.top1_high:.2f}, {found.samples} samples)"


def _own_drop(side: Side) -> str:
    found = side.accuracy
    if found is None or found.drop is None or found.drop_low is None or found.drop_high is None:
        return _NONE
    return f"{found.drop:+.2f} points ({found.drop_low:+.2f} to {found.drop_high:+.2f})"


def _p50(side: Side) -> str:
    return f"{side.latency.p50_ms:.2f} ms" if side.latency is not None else "not measured"


def _drop(found: Difference) -> str:
    if found.drop is not None:
        return f"drop {found.drop.drop:+.2f} points ({found.drop.low:+.2f} to {found.drop.high:+.2f}), paired"
    return "not paired" if found.a.accuracy is not None and found.b.accuracy is not None else ""


def _ratio(found: Difference) -> str:
    if found.ratio is not None:
        each = found.ratio
        return f"{each.ratio:.2f}× as fast ({each.low:.2f} to {each.high:.2f}, {each.verdict})"
    return "measured apart" if found.a.latency is not None and found.b.latency is not None else ""


def _changes(count: int | None) -> str:
    return "not run" if count is None else f"{count} change{'s' if count != 1 else ''}"


def _layer_rows(layers: Sequence[LayerDifference]) -> Iterator[str]:
    """Layers of one operator and one change of precision together: most differ alike."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for each in layers:
        groups.setdefault((each.op, each.a, each.b), []).append(each.module)
    for (op, a, b), modules in groups.items():
        shown = ", ".join(modules[:3]) + (f" and {len(modules) - 3} more" if len(modules) > 3 else "")
        yield f"{len(modules)} {op}: {a} → {b} ({shown})"


def _operator(row: OperatorCount) -> str:
    """Calls of both, and the work where there is any."""
    said = f"{row.name}: {row.before} → {row.after}"
    if not row.macs_before and not row.macs_after:
        return said
    return f"{said} ({row.macs_before / 1e6:.1f} → {row.macs_after / 1e6:.1f} MMACs)"


def _listed(head: str, rows: Sequence[str]) -> list[str]:
    lines = [f"{head:8} {row}" for row in rows[:_SHOWN]]
    return lines + ([f"         and {len(rows) - _SHOWN} more (--json has all)"] if len(rows) > _SHOWN else [])


def _next(found: Difference) -> Iterator[str]:
    """What would tell what two reports cannot."""
    if found.same:
        return
    a, b = shlex.quote(found.a.name), shlex.quote(found.b.name)
    if found.ratio is None and found.a.target == found.b.target:
        yield f"vlexport profile {b} --against {a}   (times of two runs are not compared)"
    if found.drop is None:
        yield f"vlexport validate {b} --data DATA --baseline {a}   (accuracy on the same samples)"
