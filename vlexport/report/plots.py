"""The plots of a report, drawn by matplotlib where it is installed (``pip install 'vlexport[report]'``).

Every plot repeats what a table of the page says, so that a page without them lacks nothing but the picture.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from vlexport.core.bundle_schema import Report
from vlexport.core.layer_record import LayerRecord, RangeRecord
from vlexport.core.trials import SearchRecord, lost
from vlexport.core.verdict import Verdict
from vlexport.report.svg import INKS, SETTINGS, shown, svg_from_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH = 5.0
"""Inches of 72 units; a phone shows it at about its own size."""
_TEXT = 11
"""Units that text is high: on a phone, which shows a plot at about its own size, still 10 pixels."""
_LEFT, _FIGURES_LEFT, _RIGHT = 0.42, 0.28, 0.95
_NAME = 21
"""Characters that fit on the left."""
_ROW = 0.2
"""Inches of a bar with its name."""
_FOOT = 0.5
"""Inches below an axis for its figures and what they are."""
_LAYERS_SHOWN = 40
_TRADE_HEIGHT, _TRADE_LEFT = 2.8, 0.18


@dataclass(frozen=True)
class Interval:
    """One row of an interval plot.

    Attributes:
        name: What was measured, with its unit.
        value: The figure.
        low: Lower end of its interval; that of the figure where there is none.
        high: Upper end.
        mark: Where a gate's bound or a reference lies, in the same unit; None for neither.
    """

    name: str
    value: float
    low: float
    high: float
    mark: float | None = None


@dataclass(frozen=True)
class Point:
    """One candidate of a search that was both timed and judged.

    Attributes:
        number: Its row in the table, from 1.
        ratio: Times as fast as the recipe; above 1 is faster.
        low: Lower end of the interval or range of that.
        high: Upper end.
        lost: Points of top-1 that it loses, or of agreement.
        best: No other one beats it in both.
    """

    number: int
    ratio: float
    low: float
    high: float
    lost: float
    best: bool


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def intervals_of(report: Report) -> tuple[Interval, ...]:
    """What a report knows with an interval, each row for an axis of its own."""
    found = []
    bounds = {each.measured.metric: each for each in reversed(report.verdicts)}
    accuracy = report.accuracy
    if accuracy is not None:
        mark = _bound(bounds.get("top1"), accuracy.reference_top1)
        found.append(Interval("top-1, %", accuracy.top1, accuracy.top1_low, accuracy.top1_high, mark))
        if accuracy.drop is not None and accuracy.drop_low is not None and accuracy.drop_high is not None:
            mark = _bound(bounds.get("drop"), 0.0)
            found.append(Interval("drop, points", accuracy.drop, accuracy.drop_low, accuracy.drop_high, mark))
    latency = report.latency
    if latency is not None and latency.ratio is not None and latency.ratio_low is not None:
        high = latency.ratio_high if latency.ratio_high is not None else latency.ratio
        found.append(Interval("times as fast", latency.ratio, latency.ratio_low, high, 1.0))
    return tuple(each for each in found if all(map(math.isfinite, (each.value, each.low, each.high))))


def points_of(search: SearchRecord) -> tuple[Point, ...]:
    """The candidates of a search that can be set side by side."""
    found = []
    for index, trial in enumerate(search.trials):
        loss = lost(trial)
        if trial.ratio is not None and loss is not None:
            low, high = (trial.ratio if end is None else end for end in (trial.ratio_low, trial.ratio_high))
            found.append(Point(index + 1, trial.ratio, low, high, loss, index in search.front))
    return tuple(each for each in found if all(map(math.isfinite, (each.ratio, each.low, each.high, each.lost))))


def _bound(verdict: Verdict | None, otherwise: float | None) -> float | None:
    return verdict.gate.value if verdict is not None else otherwise


@lru_cache(maxsize=8)
def interval_plot(rows: tuple[Interval, ...]) -> Markup:
    """One short axis a row: a dot of the figure on the bar of its interval, and a broken line at what it is held to."""
    with _settings():
        figure = _figure(0.62 * len(rows))
        for index, row in enumerate(rows):
            height = 1 / len(rows)
            axes = _axes(figure, bottom=1 - height * (index + 0.62), height=height * 0.4, left=_FIGURES_LEFT)
            ends = [row.low, row.high, row.value] + ([row.mark] if row.mark is not None else [])
            margin = max((max(ends) - min(ends)) * 0.12, abs(row.value) * 0.04, 0.2)  # no zoom into nothing
            axes.set_xlim(min(ends) - margin, max(ends) + margin)
            axes.set_ylim(-0.5, 0.5)
            if row.mark is not None:
                _line(axes, [row.mark, row.mark], [-0.5, 0.5], "bad", 1.5, dashed=True)
            _line(axes, [row.low, row.high], [0, 0], "base", 2)
            _line(axes, [row.value, row.value], [-0.25, 0.25], "ours", 4)
            axes.set_yticks([0], [row.name])
            texts = [f"{row.low:.4g}", f"{row.high:.4g}"]
            axes.set_xticks([row.low, row.high], texts)
            unit = (max(ends) - min(ends) + 2 * margin) / (72 * _WIDTH * (_RIGHT - _FIGURES_LEFT))
            if row.high - row.low < unit * _TEXT * (0.3 * len("".join(texts)) + 0.4):  # one would lie on the other
                axes.set_xticks([row.value], [f"{row.value:.4g}"])
        told = "; ".join(f"{each.name} {each.value:.4g}, {each.low:.4g} to {each.high:.4g}" for each in rows)
        return svg_from_figure(figure, title=f"Figures with their intervals: {told}")


@lru_cache(maxsize=8)
def layer_plot(layers: tuple[LayerRecord, ...]) -> Markup:
    """Signal to noise ratio of each layer in the graph's order; only the worst are drawn where there are many."""
    rows = [each for each in layers if each.sqnr_db is not None]
    worst = sorted(rows, key=lambda each: each.sqnr_db or 0.0)[:_LAYERS_SHOWN]
    kept = [each for each in rows if each in worst]
    values = [each.sqnr_db or 0.0 for each in kept]
    with _settings():
        figure, axes = _bars(len(kept))
        axes.barh(range(len(kept)), values, height=0.6, color=INKS["ours"], clip_on=False)
        _rows(axes, [each.module or each.op for each in kept])
        axes.set_xlabel("signal to noise ratio, dB", color=INKS["soft"], size=_TEXT)
        low = f"{kept[values.index(min(values))].module} {min(values):.1f} dB" if kept else "none"
        return svg_from_figure(figure, title=f"Signal to noise ratio of {len(kept)} layers, least {low}")


@lru_cache(maxsize=8)
def range_plot(ranges: tuple[RangeRecord, ...]) -> Markup:
    """How far the largest value of each range lies above the magnitude that 99.9 % stay within, the farthest first."""
    kept = sorted((each for each in ranges if each.typical), key=lambda each: -each.spread)[: _LAYERS_SHOWN // 2]
    with _settings():
        figure, axes = _bars(len(kept))
        axes.barh(range(len(kept)), [each.spread for each in kept], height=0.6, color=INKS["base"], clip_on=False)
        _rows(axes, [f"{each.op} {each.module}" for each in kept])
        axes.set_xlabel("largest over typical magnitude", color=INKS["soft"], size=_TEXT)
        most = f"{kept[0].op} in {kept[0].module} at {kept[0].spread:.1f} times" if kept else "none"
        return svg_from_figure(figure, title=f"Outliers of {len(kept)} values, farthest {most}")


@lru_cache(maxsize=8)
def trade_plot(points: tuple[Point, ...]) -> Markup:
    """Points lost against speed: a bar of its range and a mark a candidate, by number, and a line through the best.

    The recipe as it stands is where the broken lines cross: as fast as itself, nothing lost.
    """
    with _settings():
        figure = _figure(_TRADE_HEIGHT)
        foot = _FOOT / _TRADE_HEIGHT
        axes = _axes(figure, bottom=foot, height=0.96 - foot, left=_TRADE_LEFT)
        across = [1.0, *(end for each in points for end in (each.low, each.high))]
        down = [0.0, *(each.lost for each in points)]
        wide, tall = max(max(across) - min(across), 0.1), max(max(down) - min(down), 0.5)
        left, right = min(across) - 0.06 * wide, max(across) + 0.1 * wide
        top, bottom = min(down) - 0.1 * tall, max(down) + 0.1 * tall
        axes.set_xlim(left, right)
        axes.set_ylim(bottom, top)
        _line(axes, [1, 1], [top, bottom], "bad", 1, dashed=True)
        _line(axes, [left, right], [0, 0], "bad", 1, dashed=True)
        best = sorted((each.ratio, each.lost) for each in points if each.best)
        _line(axes, [ratio for ratio, _ in best], [loss for _, loss in best], "line", 1.5)
        places = _Places(
            (right - left) / (72 * _WIDTH * (_RIGHT - _TRADE_LEFT)),
            (bottom - top) / (72 * (_TRADE_HEIGHT * 0.96 - _FOOT)),
        )
        for each in points:
            places.take(each.ratio, each.lost)
        for each in points:
            ink = "ours" if each.best else "base"
            _line(axes, [each.low, each.high], [each.lost, each.lost], ink, 2)
            half = 0.03 * tall
            _line(axes, [each.ratio, each.ratio], [each.lost - half, each.lost + half], ink, 4)
            x, y = places.free(each.ratio, each.lost)
            axes.text(x, y, str(each.number), color=INKS["ink"], size=_TEXT, ha="center", va="center")
        axes.ticklabel_format(useOffset=False, style="plain")
        axes.set_xlabel("times as fast as the recipe", color=INKS["soft"], size=_TEXT)
        axes.set_ylabel("points lost", color=INKS["soft"], size=_TEXT)
        told = "; ".join(f"{each.number} {each.ratio:.2f} times, {each.lost:.2f} lost" for each in points)
        return svg_from_figure(figure, title=f"Candidates by speed and points lost: {told}")


class _Places:
    """Where numbers go beside marks without lying on one another.

    Args:
        across: Units of the axis below that a 72nd of an inch is wide.
        down: Units of the axis on the left that it is high.
    """

    _AROUND = ((0, -12), (0, 12), (14, -12), (-14, -12), (14, 12), (-14, 12), (0, -24), (0, 24))

    def __init__(self, across: float, down: float) -> None:
        self._across, self._down = across, down
        self._taken: list[tuple[float, float]] = []

    def take(self, x: float, y: float) -> None:
        """Nothing else shall lie here."""
        self._taken.append((x / self._across, y / self._down))

    def free(self, x: float, y: float) -> tuple[float, float]:
        """The first place around a mark where nothing lies; the first of all where every one is taken."""
        tried = [(x / self._across + right, y / self._down + under) for right, under in self._AROUND]
        found = next((place for place in tried if self._is_free(*place)), tried[0])
        self._taken.append(found)
        return found[0] * self._across, found[1] * self._down

    def _is_free(self, x: float, y: float) -> bool:
        return all(abs(x - other) >= 13 or abs(y - below) >= 11 for other, below in self._taken)


def _settings() -> Any:
    import matplotlib

    return matplotlib.rc_context(SETTINGS)


def _figure(height: float) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, max(height, 0.7)))
    figure.patch.set_visible(False)
    return figure


def _axes(figure: Figure, *, bottom: float, height: float, left: float = _LEFT) -> Axes:
    axes = figure.add_axes((left, bottom, _RIGHT - left, height))
    axes.patch.set_visible(False)
    for name, spine in axes.spines.items():
        spine.set_visible(name == "bottom")
        spine.set_color(INKS["line"])
    axes.tick_params(left=False, bottom=False, labelcolor=INKS["ink"], labelsize=_TEXT)
    return axes


def _bars(count: int) -> tuple[Figure, Axes]:
    """A figure for so many bars that lie on each other, and room below for the axis."""
    height = _ROW * count + _FOOT + 0.1
    figure = _figure(height)
    return figure, _axes(figure, bottom=_FOOT / height, height=_ROW * count / height)


def _rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), [shown(name, most=_NAME) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)


def _line(axes: Axes, x: Sequence[float], y: Sequence[float], ink: str, width: float, *, dashed: bool = False) -> None:
    axes.plot(
        x, y, color=INKS[ink], linewidth=width, linestyle="--" if dashed else "-", clip_on=False,
        solid_capstyle="butt",
    )  # fmt: skip
