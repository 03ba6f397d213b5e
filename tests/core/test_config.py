"""One model decides flags, recipe keys and the Python API of a build."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import typer.main

from vlexport.cli.main import app
from vlexport.core.config import BuildConfig, config_from, flags_of, options_from_text, read_recipe
from vlexport.core.errors import UsageError

FIELDS = BuildConfig.model_fields
PLACES = {"model", "output", "calib", "data", "dump"}
"""What names a place on this machine."""
FULL: dict[str, Any] = {
    "model": "model.pt",
    "target": "onnxruntime",
    "output": "out/bundle",
    "precision": "fp32",
    "calib": "photos/",
    "data": "held_out.npz",
    "gate": ("drop<=0.5", 'p50_ms<="8"'),
    "max_drop": 0.25,
    "input": ("image=1x3x8x8",),
    "preprocess": "resize=8x8,scale=1/255",
    "arch": "timm:resnet18",
    "dump": "texts",
    "weights_key": "ema",
    "options": {"onnxruntime.opset": "19", "fold-batch-norm.x": "ä \n"},
    "numeric_gate": False,
    "profile": False,
    "threads": 3,
    "seed": 7,
    "force": True,
}


def recipe_keys() -> set[str]:
    return {name for name, field in FIELDS.items() if dict(field.json_schema_extra or {})["recipe"]}  # type: ignore[arg-type]


def test_flags_of_the_command_are_those_of_the_fields_when_listed() -> None:
    command = typer.main.get_command(app).commands["build"]  # type: ignore[attr-defined]
    shown = {o for p in command.params for o in (*p.opts, *p.secondary_opts) if o.startswith("-")}
    wanted = {part for name in FIELDS for flag in flags_of(name) for part in flag.split("/")}
    assert shown - {"--recipe", "--plan", "--format", "--json", "--help", "-h"} == wanted
    assert {p.name for p in command.params} - {"recipe", "plan", "output_format", "json_output", "help"} == set(FIELDS)


def test_no_two_fields_share_a_flag_when_listed() -> None:
    flags = [part for name in FIELDS for flag in flags_of(name) for part in flag.split("/")]
    assert len(flags) == len(set(flags))
    assert [name for name in FIELDS if not flags_of(name)] == ["model"]


def test_every_field_is_explained_when_help_is_made() -> None:
    assert [name for name, field in FIELDS.items() if not field.description] == []


def test_recipe_gives_the_same_config_when_read_back(tmp_path: Path) -> None:
    config = BuildConfig(**FULL)
    file = tmp_path / "recipe.toml"
    file.write_text(config.recipe(), encoding="utf-8")
    again = config_from({name: FULL[name] for name in FULL if name not in recipe_keys()}, recipe=file)
    assert again == config
    assert again.recipe() == config.recipe()


def test_recipe_gives_the_same_config_when_all_is_default(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(BuildConfig(model="m").recipe(), encoding="utf-8")
    assert config_from({"model": "m"}, recipe=file) == BuildConfig(model="m")


def test_places_are_not_recorded_when_a_recipe_is_written() -> None:
    text = BuildConfig(**FULL).recipe()
    assert recipe_keys().isdisjoint(PLACES)
    for name in PLACES:
        assert f"\n{name} =" not in text
        assert FULL[name] not in text
    assert text.startswith("vlexport_recipe = 1\n")


@pytest.mark.parametrize("name", sorted(PLACES | {"force", "profile"}))
def test_recipe_is_refused_when_it_gives_what_is_not_recorded(tmp_path: Path, name: str) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(f'{name} = "x"\n', encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        read_recipe(file)
    assert caught.value.code == "VLX0705"
    assert f"'{name}'" in caught.value.message


def test_nearest_key_is_named_when_a_recipe_has_an_unknown_one(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text("sede = 3\n", encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        read_recipe(file)
    assert caught.value.code == "VLX0705"
    assert "did you mean 'seed'?" in caught.value.message
    assert "max_drop" in caught.value.hint


def test_nearest_option_is_named_when_a_value_has_an_unknown_name() -> None:
    with pytest.raises(UsageError) as caught:
        config_from({"model": "m", "presicion": "fp32"})
    assert caught.value.code == "VLX0703"
    assert "did you mean 'precision'?" in caught.value.message


@pytest.mark.parametrize("content", [b"seed = ", b"\xff\xfe", b"vlexport_recipe = 2\n", b"[seed\n"])
def test_recipe_is_refused_when_it_is_damaged_or_later(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "recipe.toml"
    file.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        read_recipe(file)
    assert caught.value.code == "VLX0705"


def test_recipe_is_refused_when_it_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        config_from({"model": "m"}, recipe=tmp_path / "none.toml")
    assert caught.value.code == "VLX0705"


def test_flags_win_when_a_recipe_says_otherwise(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text('seed = 3\ntarget = "x"\ngate = ["drop<=1"]\nnumeric_gate = true\n', encoding="utf-8")
    config = config_from(
        {"model": "m", "seed": 0, "target": None, "gate": ("drop<=2",), "numeric_gate": False}, recipe=file
    )
    assert (config.seed, config.target, config.gate, config.numeric_gate) == (0, "x", ("drop<=2",), False)


def test_options_are_merged_by_name_when_a_recipe_has_some(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text('[options]\n"onnxruntime.opset" = "18"\n"a.b" = "1"\n', encoding="utf-8")
    config = config_from({"model": "m", "options": {"a.b": "2"}}, recipe=file)
    assert config.options == {"onnxruntime.opset": "18", "a.b": "2"}
    assert config_from({"model": "m", "options": {}}, recipe=file).options["a.b"] == "1"


@pytest.mark.parametrize(
    ("values", "flag"),
    [
        ({"seed": -1}, "--seed"),
        ({"max_drop": -0.5}, "--max-drop"),
        ({"max_drop": float("nan")}, "--max-drop"),
        ({"precision": "fp17"}, "--precision"),
        ({"threads": "many"}, "--threads"),
        ({"gate": "drop<=1"}, "--gate"),
    ],
)
def test_flag_is_named_when_its_value_is_wrong(values: dict[str, Any], flag: str) -> None:
    with pytest.raises(UsageError) as caught:
        config_from({"model": "m", **values})
    assert (caught.value.code, caught.value.where) == ("VLX0703", flag)
    assert caught.value.message.startswith(f"{flag}: ")


def test_model_is_asked_for_when_it_is_missing() -> None:
    with pytest.raises(UsageError) as caught:
        config_from({"seed": 1})
    assert caught.value.message.startswith("model: ")


def test_config_is_refused_when_it_would_be_changed() -> None:
    config = BuildConfig(model="m")
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3


def test_options_are_read_when_written_with_spaces_and_signs() -> None:
    assert options_from_text(["a.b=1", " quantize.bits = x=y "]) == {"a.b": "1", "quantize.bits": "x=y"}


@pytest.mark.parametrize("text", ["a.b", "ab=1", "=1", ""])
def test_option_is_refused_when_it_is_no_scope_name_value(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        options_from_text([text])
    assert (caught.value.code, caught.value.where) == ("VLX0703", "--set")


def test_options_go_to_their_scope_when_scopes_begin_alike() -> None:
    config = BuildConfig(
        model="m", options={"fold.a": "1", "fold-batch-norm.a": "2", "onnx.b": "3", "onnxruntime.b": "4"}
    )
    assert config.scoped_options("fold") == {"a": "1"}
    assert config.scoped_options("onnx") == {"b": "3"}
    scopes = ("fold", "fold-batch-norm", "onnx", "onnxruntime")
    assert len(list(itertools.chain.from_iterable(map(config.scoped_options, scopes)))) == 4


def test_code_is_not_recorded_when_the_architecture_is_a_file() -> None:
    text = BuildConfig(model="w.pt", arch="mine.py:make").recipe()
    assert "\narch = " not in text
    assert "mine" not in text
    assert 'arch = "timm:resnet18"' in BuildConfig(model="w.pt", arch="timm:resnet18").recipe()


def test_recipe_is_refused_when_it_names_code(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text('arch = "mine.py:make"\n', encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        read_recipe(file)
    assert (caught.value.code, caught.value.message) == ("VLX0705", "a recipe may not name code")


def test_options_are_texts_when_a_recipe_gives_numbers(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text('[options]\n"onnxruntime.opset" = 19\n"onnxruntime.x" = true\n', encoding="utf-8")
    config = config_from({"model": "m.pt"}, recipe=file)
    assert config.options == {"onnxruntime.opset": "19", "onnxruntime.x": "true"}
