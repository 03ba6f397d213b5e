"""JUnit XML, as Jenkins, GitLab and GitHub's actions read it: one suite a command, one case a check."""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from xml.etree import ElementTree

from vlexport.cli.outcome import Check

_NO_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_ELEMENTS = {"fail": "failure", "error": "error", "inconclusive": "error", "skipped": "skipped"}


def junit_lines(suite: str, checks: Sequence[Check], lines: Sequence[str], seconds: float) -> list[str]:
    """A document.

    Args:
        suite: Name of the suite.
        checks: Its cases, at least one.
        lines: What the command says, for ``system-out``.
        seconds: How long all of it took; a single check has no time of its own.
    """
    outcomes = [each.outcome for each in checks]
    totals = {
        "tests": str(len(checks)),
        "failures": str(outcomes.count("fail")),
        "errors": str(sum(_ELEMENTS.get(each) == "error" for each in outcomes)),
    }
    root = ElementTree.Element("testsuites")
    started = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(seconds=seconds)
    whole = {
        "id": "0", "name": suite, "package": "vlexport", "timestamp": started.strftime("%Y-%m-%dT%H:%M:%S"),
        "hostname": "localhost", **totals, "time": f"{seconds:.3f}",
    }  # fmt: skip
    parent = ElementTree.SubElement(root, "testsuite", whole)
    ElementTree.SubElement(parent, "properties")
    for each in checks:
        about = {"name": _text(each.name), "classname": suite.replace(" ", "."), "time": "0"}
        case = ElementTree.SubElement(parent, "testcase", about)
        if each.outcome != "pass":
            _add(case, each)
    ElementTree.SubElement(parent, "system-out").text = _text("\n".join(lines))
    ElementTree.SubElement(parent, "system-err").text = ""
    ElementTree.indent(root)
    text = ElementTree.tostring(root, encoding="unicode")
    return ['<?xml version="1.0" encoding="UTF-8"?>', *text.splitlines()]


def _add(case: ElementTree.Element, check: Check) -> None:
    name = _ELEMENTS[check.outcome]
    if name == "skipped":
        ElementTree.SubElement(case, name, {"message": _text(check.said)})
        return
    first, _, _ = check.said.partition("\n")
    kind = check.name if re.fullmatch(r"VLX\d{4}", check.name) else check.outcome
    ElementTree.SubElement(case, name, {"message": _text(first), "type": kind}).text = _text(check.said)


def _text(text: str) -> str:
    """Text without what XML 1.0 cannot hold."""
    return _NO_XML.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
