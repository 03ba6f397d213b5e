"""What ``--json`` prints fits the schemas that ``vlexport schema`` shows, command by command."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer.main

from tests.json_schema_check import problems
from vlexport.cli.main import OUTPUT_SCHEMA, app
from vlexport.core.bundle import COMPARE_FILE, read_bundle
from vlexport.core.bundle_schema import LatencyResult, Report
from vlexport.core.comparison import Compared, Comparison
from vlexport.core.errors import CapabilityError
from vlexport.core.finding import Finding
from vlexport.core.health import Health
from vlexport.core.numerics import OutputFidelity
from vlexport.core.outputs import COMMANDS, FILES, Printed, schema_named, schema_names
from vlexport.report.write import new_report
from vlexport.stages.build import BuildResult
from vlexport.stages.build_each import Built


def test_every_command_has_a_schema_and_none_is_left_over() -> None:
    commands = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    assert commands == set(COMMANDS), "a command prints an object: describe it in core/outputs.py"
    assert set(schema_names()) == {*COMMANDS, *FILES, "error"}
    assert COMPARE_FILE in FILES
    assert Printed.model_fields["form"].annotation.__args__ == (OUTPUT_SCHEMA,)  # type: ignore[union-attr]


def printed(cli: Any, *arguments: object, exit_code: int = 0) -> dict[str, Any]:
    """What a command prints with ``--json``, checked against its schema."""
    code, out, err = cli(*arguments, "--json")
    assert code == exit_code, err
    value: dict[str, Any] = json.loads(out)
    assert problems(value, schema_named(str(arguments[0]))) == []
    return value


def test_commands_on_a_bundle_print_what_their_schemas_say(
    cli: Any, bundle: Path, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make.npz(Path("x.npz"), [0, 1, 2] * 10)
    printed(cli, "verify", "bundle")
    found = printed(cli, "validate", "bundle", "--data", data, "--reference", "bundle", "--gate", "top1>=1")
    assert found["report"]["fidelity"]["output"]["sqnr_db"] == "Infinity", "a word, which the schema allows"
    failed = printed(cli, "validate", "bundle", "--data", data, "--gate", "top1<=1", exit_code=3)
    assert (failed["ok"], "error" in failed) == (False, False)
    latency = LatencyResult(p50_ms=1.5, load_ms=9.0, runs=30, threads=1, ratio=1.1, ratio_low=0.9, ratio_high=math.inf)
    report = new_report(read_bundle(Path("bundle"))).model_copy(update={"latency": latency})
    monkeypatch.setattr("vlexport.stages.profile.profile", lambda *_, **__: report)
    assert printed(cli, "profile", "bundle")["report"]["latency"]["ratio_high"] == "Infinity"
    assert "classes" in printed(cli, "run", "bundle", data)["results"][0]
    printed(cli, "run", "bundle", data, "-o", "out.npz")
    assert printed(cli, "inspect", "bundle")["kind"] == "bundle"
    printed(cli, "explain", "bundle")
    printed(cli, "compare", "bundle", "bundle")
    for name in ("bundle.json", "measured/local-2/report.json"):
        value = json.loads((bundle / name).read_text(encoding="utf-8"))
        assert problems(value, schema_named(name.rpartition("/")[2])) == []


def test_commands_on_a_model_print_what_their_schemas_say(
    cli: Any, here: Path, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    several = printed(cli, "build", "model.pt", "-o", "made", "--plan", "--target", "onnxruntime,tensorrt")
    assert list(several["targets"]) == ["onnxruntime", "tensorrt"]
    Path("there").touch()
    refused = printed(cli, "build", "model.pt", "-o", "there", "--plan", exit_code=1)
    assert refused["problems"][0]["code"] == "VLX0604"
    printed(cli, "inspect", "model.pt")
    text = (built / "measured" / "local-1" / "report.json").read_text(encoding="utf-8")
    made = BuildResult(built, read_bundle(built), Report.model_validate_json(text), {"lower": 0.5})
    monkeypatch.setattr("vlexport.stages.build.build", lambda *_, **__: made)
    assert printed(cli, "build", "model.pt", "-o", "made")["state"] == "verified"
    comparison = Comparison(vlexport="0", rows=(Compared(target="onnxruntime"),))
    every = Built(built, {"onnxruntime": made}, {"coreml": CapabilityError("VLX0501", "none")}, comparison)
    monkeypatch.setattr("vlexport.stages.build_each.build_each", lambda *_, **__: every)
    assert printed(cli, "build", "model.pt", "-o", "made", "--target", "all", exit_code=4)["refused"]
    monkeypatch.setattr("vlexport.stages.bisect.bisect", lambda *_, **__: Finding(kind="nothing"))
    printed(cli, "bisect", "model.pt")


@pytest.mark.parametrize(
    "arguments",
    [
        ("passes",), ("passes", "canonicalize"), ("passes", "simplify-onnx"), ("targets",), ("targets", "onnxruntime"),
        ("cache",), ("explain", "VLX0503"), ("schema",), ("schema", "verify"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_listings_print_what_their_schemas_say(arguments: tuple[str, ...], cli: Any) -> None:
    printed(cli, *arguments)


def test_doctor_and_cache_print_what_their_schemas_say_when_nothing_works(
    cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlexport.stages.doctor.doctor", lambda **_: Health(works=(), symptoms=()))
    assert printed(cli, "doctor", exit_code=4)["ok"] is False
    monkeypatch.setenv("VLEXPORT_CACHE", "off")
    assert printed(cli, "cache")["off"] is True


def test_schema_is_printed_alone_when_named(cli: Any) -> None:
    code, out, _ = cli("schema", "bundle.json")
    assert code == 0
    assert json.loads(out) == schema_named("bundle.json")
    code, out, _ = cli("schema")
    assert [line.partition(": ")[0] for line in out.splitlines()] == list(schema_names())
    assert "did you mean 'verify'" in cli("schema", "verfy")[2]


def _without(value: dict[str, Any]) -> None:
    del value["exit"]


BROKEN: list[tuple[str, Callable[[dict[str, Any]], object]]] = [
    ("missing", _without),
    ("more", lambda value: value.update(more=1)),
    ("type", lambda value: value.update(exit="0")),
    ("version", lambda value: value.update(schema=2)),
    ("both", lambda value: value.update(error={"code": "", "message": "", "where": "", "hint": ""})),
    ("deep", lambda value: value["golden_errors"].update(main="small")),
    ("boolean", lambda value: value.update(exit=True)),
]


@pytest.mark.parametrize("edit", [b[1] for b in BROKEN], ids=[b[0] for b in BROKEN])
def test_object_does_not_fit_when_it_was_changed(edit: Callable[[dict[str, Any]], object]) -> None:
    value = {"schema": 1, "ok": True, "exit": 0, "digest": "", "golden_errors": {"main": 1e-7}, "emulator": ""}
    assert problems(value, schema_named("verify")) == []
    edit(value)
    assert problems(value, schema_named("verify")) != []


def test_no_float_of_ours_is_outside_the_schema_when_it_is_no_number() -> None:
    from vlexport.core.bundle_schema import plain_json
    from vlexport.core.json_schema import json_schema_of

    worst = OutputFidelity.model_construct(
        **{name: math.inf for name in OutputFidelity.model_fields if name != "samples"}, samples=1
    )
    values = plain_json(worst)
    floats = {name for name, field in OutputFidelity.model_fields.items() if field.annotation is float}
    assert floats
    schema = json_schema_of(OutputFidelity, "")
    for name in floats:
        assert values[name] == "Infinity"
        assert problems(values[name], schema["properties"][name], schema) == []
