"""``--format``: JUnit XML, GitHub's workflow commands, Markdown; hostile names are nothing but text in all of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlexport.cli.formats import OutputFormat, format_of, formatted
from vlexport.cli.outcome import Check, Outcome
from vlexport.core.bundle import read_bundle
from vlexport.core.errors import VlexportError
from vlexport.core.inert import inert
from vlexport.report.write import new_report
from vlexport.stages.build import BuildResult

HOSTILE = (
    "<img src=x onerror=alert(1)>", "]]></system-out>", "[red]x", "\x1b]0;title\x07", "a\n::warning::b", "a|b`c`*d*",
    "\u202eabc", "@everyone #1 https://evil.example www.evil.example", "##[error]x", "##vso[task.setvariable]x",
    "100%0A::error::x", "\ufffe\ud800",
)  # fmt: skip
CASE_CHILDREN = {"failure", "error", "skipped"}
COMMAND = re.compile(r"::(notice|warning|error) title=[^:,\r\n]*::[^\r\n]*")


def assert_junit(text: str) -> ElementTree.Element:
    """The document fits the schemas of Jenkins' xunit plugin and of Ant: names, order, required attributes, counts."""
    root = ElementTree.fromstring(text.encode())
    assert root.tag == "testsuites"
    for suite in root:
        assert suite.tag == "testsuite"
        needed = {"id", "name", "package", "timestamp", "hostname", "tests", "failures", "errors", "time"}
        assert set(suite.attrib) == needed
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", suite.attrib["timestamp"])
        assert float(suite.attrib["time"]) >= 0
        cases = suite.findall("testcase")
        assert [child.tag for child in suite] == [
            "properties", *["testcase"] * len(cases), "system-out", "system-err",
        ]  # fmt: skip
        assert int(suite.attrib["tests"]) == len(cases) > 0
        assert int(suite.attrib["failures"]) == len(suite.findall("testcase/failure"))
        assert int(suite.attrib["errors"]) == len(suite.findall("testcase/error"))
        for case in cases:
            assert set(case.attrib) == {"name", "classname", "time"}
            assert len(case) <= 1
            for child in case:
                assert child.tag in CASE_CHILDREN
                assert set(child.attrib) == ({"message"} if child.tag == "skipped" else {"message", "type"})
    return root


def shown(wanted: OutputFormat, checks: list[Check], lines: list[str] | None = None, exit_code: int = 0) -> list[str]:
    return formatted(wanted, ["verify"], Outcome(lines or [], exit_code=exit_code, checks=tuple(checks)), None, 1.5)


def test_outcomes_are_told_apart_in_every_format() -> None:
    checks = [Check(each, each, "said") for each in ("pass", "fail", "error", "inconclusive", "skipped")]
    (suite,) = assert_junit("\n".join(shown(OutputFormat.JUNIT, checks, ["a line"], 3)))
    assert [[child.tag for child in case] for case in suite.findall("testcase")] == [
        [], ["failure"], ["error"], ["error"], ["skipped"],
    ]  # fmt: skip
    assert suite.findtext("system-out") == "a line"
    levels = [line.split()[0] for line in shown(OutputFormat.GITHUB, checks, exit_code=3)]
    assert levels == ["::notice", "::error", "::error", "::warning", "::notice"]
    table = shown(OutputFormat.MARKDOWN, checks, exit_code=3)
    assert table[0] == "### vlexport verify: fail"
    assert [line.split(" | ")[1] for line in table[4:9]] == [
        "pass", "**fail**", "**error**", "**inconclusive**", "skipped",
    ]  # fmt: skip


def test_exit_code_is_a_check_when_no_gate_explains_it() -> None:
    lines = shown(OutputFormat.GITHUB, [Check("a", "pass")], ["too noisy"], exit_code=5)
    assert lines[1] == "::warning title=vlexport verify%3A exit code 5::inconclusive: too noisy"


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_text_in_every_format(text: str) -> None:
    checks = [Check(text, "fail", text), Check(text, "skipped", text)]
    junit = "\n".join(shown(OutputFormat.JUNIT, checks, [text]))
    assert_junit(junit)
    assert not re.search(r"<(?!/?(testsuites?|testcase|properties|failure|skipped|system-(out|err)|\?xml)\b)", junit)
    for line in shown(OutputFormat.GITHUB, checks, [text]):
        assert COMMAND.fullmatch(line), line
        assert "##[" not in line
        assert "##vso[" not in line
    rows = shown(OutputFormat.MARKDOWN, checks, [text])
    assert len(rows) == 8
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 4 for row in rows[2:6])
    whole = re.sub("<br>|<!-- -->", "", "\n".join(rows))
    assert "<" not in whole
    assert not re.search(r"(?<!\\)[`\[\]]|@(?!<!-- -->)|://|www\.", "\n".join(rows[4:]))


@given(text=st.text(max_size=9))
def test_any_text_gives_well_formed_documents(text: str) -> None:
    checks = [Check(text, "error", text)]
    assert_junit("\n".join(shown(OutputFormat.JUNIT, checks, [text], 1)))
    assert all(COMMAND.fullmatch(line) for line in shown(OutputFormat.GITHUB, checks, [text], 1))
    assert len(shown(OutputFormat.MARKDOWN, checks, [], 1)) == 5


def test_a_log_holds_no_command_of_others_when_a_name_looks_like_one() -> None:
    assert inert("x\n  ::warning::y") == "x\n  \\x3a:warning::y"
    assert inert("##[group]z ##vso[x]") == "#\\x23[group]z #\\x23vso[x]"
    assert inert("a::b c ## d") == "a::b c ## d"


def test_format_is_read_before_the_command_line_is_parsed() -> None:
    assert format_of(["verify", "b", "--format", "junit"]) is OutputFormat.JUNIT
    assert format_of(["validate", "--format=github", "b"]) is OutputFormat.GITHUB
    assert format_of(["verify", "b", "--format"]) is OutputFormat.HUMAN
    assert format_of(["verify", "junit"]) is OutputFormat.HUMAN
    assert format_of(["other", "--format", "junit"]) is OutputFormat.HUMAN, "a --format of its own"
    with pytest.raises(VlexportError) as caught:
        format_of(["verify", "b", "--json", "--format", "junit"])
    assert caught.value.code == "VLX0703"


def test_gates_are_cases_when_validate_judges_them(cli: Any, bundle: Path, make: Any) -> None:
    data = make.npz(Path("x.npz"), [0, 1, 2] * 10)
    gates = ("--gate", "top1>=99", "--gate", "top1<=1", "--gate", "size_mb<=25")
    code, out, _ = cli("validate", "bundle", "--data", data, *gates, "--format", "junit")
    (suite,) = assert_junit(out)
    assert code == 3
    assert [(case.attrib["name"], [child.tag for child in case]) for case in suite.findall("testcase")] == [
        ("gate top1>=99", ["error"]), ("gate top1<=1", ["failure"]), ("gate size_mb<=25", []),
    ]  # fmt: skip
    assert "samples would decide" in suite.find("testcase/error").attrib["message"]  # type: ignore[union-attr]


def test_build_tells_its_passes_and_golden_vectors_as_cases(
    cli: Any, here: Path, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = read_bundle(built)
    made = BuildResult(built, bundle, new_report(bundle), {})
    monkeypatch.setattr("vlexport.stages.build.build", lambda *_, **__: made)
    code, out, err = cli("build", "model.pt", "-o", "made", "--no-profile", "--format", "junit")
    assert code == 0, err
    (suite,) = assert_junit(out)
    names = [case.attrib["name"] for case in suite.findall("testcase")]
    assert "pass reparameterize" in names
    assert len(set(names)) == len(names), "a system that tells cases apart by name shows each"
    assert names[-1] == "golden vectors"
    Path("made").touch()
    code, out, _ = cli("build", "model.pt", "-o", "made", "--plan", "--format", "github")
    assert code == 1
    assert out.startswith("::error title=vlexport build%3A onnxruntime%3A VLX0604::error: ")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("verify", "nowhere"), 1),
        (("build", "model.pt", "--target", "onnxruntim"), 2),
        (("validate", "--taget"), 2),
        (("verify", "b", "--format", "junt"), 2),
    ],
    ids=["bundle", "target", "flag", "format"],
)
def test_failure_is_told_in_the_format_that_was_asked_for(
    arguments: tuple[str, ...], code: int, cli: Any, here: Path
) -> None:
    if "junt" in arguments:
        found, out, err = cli(*arguments)
        assert (found, out) == (code, "")
        assert "'junit'" in err
        return
    found, out, err = cli(*arguments, "--format", "junit")
    assert found == code
    assert assert_junit(out)[0].find("testcase/error") is not None
    assert "error VLX" in err, "people read it on stderr"
    found, out, _ = cli(*arguments, "--format", "github")
    assert COMMAND.fullmatch(out.strip())
    assert cli("--version")[1].startswith("vlexport "), "stdout is back where it was"
