"""A figure of matplotlib as an SVG that lies in a page: no style of its own, no reference, colours of the page.

A page with a strict policy runs no inline style, so what matplotlib writes as ``style="fill: #000101"`` becomes an
attribute, and the colours of :data:`INKS` become classes that the page's style sheet colours, in light and in dark.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from markupsafe import Markup

from vlexport.core.inert import one_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INKS = {"ink": "#000101", "soft": "#000102", "line": "#000103", "ours": "#000104", "base": "#000105", "bad": "#000106"}
"""Class of the page → the colour that stands for it while matplotlib draws."""
_CLASSES = {colour: name for name, colour in INKS.items()}
_ALLOWED = frozenset(
    {"fill", "stroke", "stroke-width", "stroke-linecap", "stroke-linejoin", "stroke-dasharray", "opacity",
     "fill-opacity", "stroke-opacity", "text-anchor", "font-size"}
)  # fmt: skip
_SVG = "{http://www.w3.org/2000/svg}"
_TAGS = frozenset({"svg", "g", "path", "text", "title"})
_FONT = re.compile(r"([\d.]+)px")
SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "vlexport", "text.parse_math": False, "text.usetex": False,
    "font.size": 10, "font.family": ["DejaVu Sans"], "path.snap": False,
}  # fmt: skip


def svg_from_figure(figure: Figure, *, title: str) -> Markup:
    """The figure, told to a screen reader by its title.

    Args:
        figure: Without markers, ticks, clipping and legends, whose parts refer to each other.
        title: What it shows, with its figures; the table beside it says the same.
    """
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    root = ElementTree.fromstring(stream.getvalue().encode())
    root.attrib = {"viewBox": root.attrib["viewBox"], "class": "plot", "role": "img", "aria-label": one_line(title)}
    _clean(root)
    ElementTree.register_namespace("", "http://www.w3.org/2000/svg")
    # An SVG in an HTML page needs no namespace; all its text was escaped by the writer.
    return Markup(ElementTree.tostring(root, encoding="unicode").replace(' xmlns="http://www.w3.org/2000/svg"', ""))


def histogram_svg(counts: Sequence[int]) -> Markup:
    """A histogram of a line's height. Heights are logarithms: what lies far out is rare, and is what matters.

    Args:
        counts: How many values lie in each of equal parts; only the first 256 are drawn.
    """
    kept = [max(count, 0) for count in counts[:256]]
    top = math.log1p(max(kept, default=0)) or 1.0
    bars = "".join(
        f"M{index} 10V{10 - max(10 * math.log1p(count) / top, 0.8):.1f}H{index + 1}V10Z"
        for index, count in enumerate(kept)
        if count
    )
    return Markup(
        f'<svg class="spark" viewBox="0 0 {max(len(kept), 1)} 10" preserveAspectRatio="none" aria-hidden="true" '
        f'focusable="false"><path class="fill-base" d="{bars}"/></svg>'
    )


def shown(text: str, *, most: int = 40) -> str:
    """A name as it is drawn: one line without control characters, which XML cannot hold, its end if it is long."""
    plain = one_line(text)
    return plain if len(plain) <= most else f"…{plain[1 - most :]}"


def _clean(element: ElementTree.Element) -> None:
    for child in list(element):
        if not isinstance(child.tag, str) or child.tag.removeprefix(_SVG) not in _TAGS:
            element.remove(child)
            continue
        kept = {name: value for name, value in child.attrib.items() if name in ("d", "x", "y", "transform")}
        kept.update(_attributes(child.attrib.get("style", "")))
        child.attrib = kept
        child.tail = None
        if child.tag == f"{_SVG}path":
            kept["d"] = " ".join(kept.get("d", "").split())
        if child.tag != f"{_SVG}text":
            child.text = None
        _clean(child)


def _attributes(style: str) -> dict[str, str]:
    """Declarations as attributes; a colour that stands for a class becomes it."""
    found: dict[str, str] = {}
    classes = []
    for declaration in style.split(";"):
        name, _, value = (part.strip() for part in declaration.partition(":"))
        if name == "font":
            size = _FONT.search(value)
            name, value = "font-size", size[1] if size else "10"
        if name in ("fill", "stroke") and value in _CLASSES:
            classes.append(f"{name}-{_CLASSES[value]}")
        elif name in _ALLOWED:
            found[name] = value
    return {**found, "class": " ".join(classes)} if classes else found
