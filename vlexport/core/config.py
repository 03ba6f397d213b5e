"""The one model behind flags, help texts, recipe keys and the Python API of a build.

A field's metadata says how it travels: ``flags`` are its spellings on the command line, ``recipe`` whether the resolved
recipe records it. What names a place on this machine (model, data, output) or the user's code is never recorded.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tomli_w
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from vlexport.core.baked_values import resolved
from vlexport.core.errors import UsageError, nearest
from vlexport.core.wrong_value import wrong_value

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_BUNDLE_FILE = "bundle.json"

Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8", "auto"]


def _option(default: Any, help_text: str, *flags: str, recipe: bool = True, **limits: Any) -> Any:
    extra: dict[str, Any] = {"flags": list(flags), "recipe": recipe}
    return Field(default=default, description=help_text, json_schema_extra=extra, **limits)


def _texts(values: object) -> object:
    """Options are texts; TOML may give numbers and booleans for them."""
    if not isinstance(values, dict):
        return values
    return {k: str(v).lower() if isinstance(v, bool) else str(v) for k, v in values.items()}


def _split(values: object) -> object:
    """Names may be given one by one or joined by commas."""
    if isinstance(values, str):
        values = [values]
    if not isinstance(values, list | tuple) or not all(isinstance(each, str) for each in values):
        return values
    return tuple(name.strip() for each in values for name in each.split(",") if name.strip())


class BuildConfig(BaseModel):
    """All that decides a build. Immutable; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = _option(
        ...,
        "Archive of vlexport.save, transformers folder, weights with --arch, or folder with components.toml.",
        recipe=False,
    )
    target: str = _option("onnxruntime", "Runtimes to build for: one, several as A,B, or all.", "--target", "-t")
    output: str | None = _option(
        None, "Bundle folder to write. Default: MODEL's name + .bundle.", "-o", "--out", recipe=False
    )
    device_profile: str | None = _option(None, "Device profile to build for; the target has a default.", "--for")
    precision: Precision | None = _option(
        None, "Precision; the target's default is printed with its reason. auto: the fastest that holds the gates.",
        "--precision",
    )  # fmt: skip
    tokens: str | None = _option(
        None, "METHOD[:key=value,…]: freeze, evit:keep=0.7,layers=4+7+10, tome:r=8, mctf:r=16, cls, random or auto.",
        "--tokens",
    )  # fmt: skip
    calib: str | None = _option(
        None, "Unlabelled samples; one of them probes the numeric gate.", "--calib", recipe=False
    )
    data: str | None = _option(
        None, "Evaluation samples: class folders, images, .npz, .jsonl or FILE.py:FUNCTION.", "--data", recipe=False
    )
    skip_bad: bool = _option(
        False, "Leave out samples that cannot be read or hold NaN; the report lists them.", "--skip-bad", recipe=False
    )
    metric: tuple[str, ...] = _option(
        (), "Repeatable FILE.py:FUNCTION, (outputs, label) → number a sample; gates use its name.", "--metric",
        recipe=False,
    )  # fmt: skip
    gate: tuple[str, ...] = _option((), 'Repeatable "METRIC OP VALUE", as "drop<=0.5"; judges only.', "--gate")
    max_drop: float | None = _option(
        None, "Largest drop of top-1 in points; with int8, layers go back to float until it holds.", "--max-drop", ge=0
    )
    input: tuple[str, ...] = _option((), "Repeatable NAME=SHAPE[:dtype] for --arch, as image=1x3x224x224.", "--input")
    dynamic: tuple[str, ...] = _option(
        (), "Repeatable NAME=SIZE, MIN:MAX or MIN:OPT:MAX: sizes of a dynamic dim, within what was saved.", "--dynamic"
    )
    preprocess: str | None = _option(
        None, "How an image becomes the input: timm:NAME or resize=…,crop=….", "--preprocess"
    )
    outputs: Annotated[tuple[str, ...], BeforeValidator(_split)] = _option(
        (), "NAME[,NAME]: outputs to keep, in this order; by default all.", "--output"
    )
    bake: tuple[str, ...] = _option(
        (), "Repeatable NAME=VALUE or NAME=FILE.npy: an input that becomes a constant; numbers as 3 or [[1,2]].",
        "--bake",
    )  # fmt: skip
    fold_preprocess: bool = _option(
        False, "Mean and std go into the first convolution; what the bundle records is scale only.", "--fold-preprocess"
    )
    arch: str | None = _option(
        None,
        "Architecture for weights: timm:NAME, transformers:DIR, FILE.py:FACTORY or package.module:FACTORY.",
        "--arch",
    )
    arch_arg: tuple[str, ...] = _option((), "Repeatable K=V: arguments of the architecture's factory.", "--arch-arg")
    weights_key: str | None = _option(
        None, "Entry of a training checkpoint that holds the weights, as teacher or ema.state_dict.", "--weights-key"
    )
    allow_code: bool = _option(
        False, "Run the code that MODEL or the recipe brings. Only for files that you trust.", "--allow-code",
        recipe=False,
    )  # fmt: skip
    passes: tuple[str, ...] = _option(
        (), "Repeatable: a plugin's pass to run too, where its stage belongs; ours always run.", "--pass"
    )
    options: Annotated[dict[str, str], BeforeValidator(_texts)] = _option(
        {}, "Repeatable SCOPE.NAME=VALUE: any option of a pass or target.", "--set"
    )
    numeric_gate: bool = _option(True, "Check the numbers after every pass.", "--numeric-gate/--no-gate")
    profile: bool = _option(True, "Measure latency quickly after the build.", "--profile/--no-profile", recipe=False)
    require: Literal["built", "verified"] = _option(
        "built", "Exit with 4 when the artifact was made but could not be verified here.", "--require", recipe=False
    )
    autotune: bool = _option(
        False,
        "Measure the target's fusions and other session options, and keep what is faster.",
        "--autotune",
        recipe=False,
    )
    budget_minutes: float | None = _option(
        None, "No candidate of a search is begun after so many minutes.", "--budget-minutes", recipe=False,
        gt=0, allow_inf_nan=False,
    )  # fmt: skip
    resume: bool = _option(False, "Go on with a search that was interrupted.", "--resume", recipe=False)
    threads: int = _option(
        0,
        "Threads for every runtime, recorded in the bundle; 0 means all cores of wherever it runs.",
        "--threads",
        ge=0,
        le=1024,
    )
    seed: int = _option(0, "Seed of probes and golden vectors.", "--seed", ge=0, le=2**32 - 1)
    force: bool = _option(False, "Replace an existing bundle.", "--force", recipe=False)
    dump: str | None = _option(None, "Folder for the graph's text after every pass.", "--dump", recipe=False)

    @field_validator("model", "output", "calib", "data", "dump", mode="before")
    @classmethod
    def _path_as_text(cls, value: object) -> object:
        return os.fspath(value) if isinstance(value, os.PathLike) else value

    @field_validator("bake")
    @classmethod
    def _bake_as_content(cls, texts: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(resolved(text) for text in texts)  # a file's content, never its path

    def recipe(self) -> str:
        """The resolved recipe as TOML: everything that decides the artifact, nothing that names a place."""
        kept = {
            name: getattr(self, name)
            for name, field in type(self).model_fields.items()
            if _extra(field)["recipe"] and getattr(self, name) is not None
        }
        if not str(kept.get("arch", "timm:")).startswith("timm:"):  # code, or a folder of this machine
            del kept["arch"]
        kept["options"] = {name: value for name, value in self.options.items() if name not in _FILES}
        kept = {k: list(v) if isinstance(v, tuple) else v for k, v in kept.items()}
        return tomli_w.dumps({"vlexport_recipe": 1, **kept})

    def scoped_options(self, scope: str) -> dict[str, str]:
        """Options given as ``--set SCOPE.NAME=VALUE`` for one pass or target."""
        prefix = f"{scope}."
        return {k.removeprefix(prefix): v for k, v in self.options.items() if k.startswith(prefix)}


_FILES = ("quantize.table",)
"""Options that name a file of this machine; what it holds goes into the bundle."""


def names_code(arch: object) -> bool:
    """Whether an architecture is the user's own code: consent to run it is given on the command line only."""
    return isinstance(arch, str) and not arch.startswith(("timm:", "transformers:"))


def _extra(field: Any) -> dict[str, Any]:
    return dict(field.json_schema_extra or {})


def flags_of(name: str) -> list[str]:
    """Command-line spellings of a field of :class:`BuildConfig`."""
    return list(_extra(BuildConfig.model_fields[name])["flags"])


def config_from(values: Mapping[str, Any], *, recipe: Path | None = None) -> BuildConfig:
    """A config from plain values laid over a recipe.

    Args:
        values: Field → value; those that are None or empty leave the recipe's. Options are merged name by name.
        recipe: TOML file.

    Raises:
        UsageError: VLX0705 for a recipe that is not understood, VLX0703 for a value that is.
    """
    base = read_recipe(recipe, allow_code=values.get("allow_code") is True) if recipe is not None else {}
    merged = {**base, **{k: v for k, v in values.items() if v not in (None, (), {})}}
    for key in merged:
        if key not in BuildConfig.model_fields:
            raise UsageError("VLX0703", f"a build has no option '{key}'{nearest(key, BuildConfig.model_fields)}")
    if isinstance(base.get("options"), dict) and isinstance(merged["options"], dict):
        merged["options"] = {**base["options"], **merged["options"]}
    try:
        return BuildConfig.model_validate(merged)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(p) for p in first["loc"])
        flag = next(iter(flags_of(name)), name) if name in BuildConfig.model_fields else name
        raise UsageError(
            "VLX0703", f"{flag}: {wrong_value(first)}", where=flag, hint="see `vlexport build --help`"
        ) from error


def read_recipe(path: Path, *, allow_code: bool = False) -> dict[str, Any]:
    """Values of a recipe file.

    Args:
        path: The file.
        allow_code: The user consents to an architecture that is code; never to one that a bundle names.

    Raises:
        UsageError: VLX0705 naming the key and the nearest known one.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # also an integer of more digits than Python reads
        why = getattr(error, "strerror", None) or str(error)
        raise UsageError(
            "VLX0705", f"the recipe cannot be read: {why}", where=str(path),
            hint="give a TOML file, as the recipe.toml of a bundle",
        ) from error  # fmt: skip
    if values.pop("vlexport_recipe", 1) != 1:
        raise UsageError(
            "VLX0705", "the recipe was written by a later version", where=str(path), hint="update vlexport"
        )
    allowed = [n for n, f in BuildConfig.model_fields.items() if _extra(f)["recipe"]]
    for key in values:
        if key == "allow_code":
            raise UsageError(
                "VLX0705", "a recipe may not consent to running code", where=str(path),
                hint="give --allow-code on the command line",
            )  # fmt: skip
        if key == "metric":
            raise UsageError(
                "VLX0705", "a recipe may not name code", where=str(path),
                hint="give --metric FILE.py:FUNCTION on the command line",
            )  # fmt: skip
        if key not in allowed:
            raise UsageError(
                "VLX0705", f"a recipe has no key '{key}'{nearest(key, allowed)}", where=str(path),
                hint=f"known: {', '.join(allowed)}",
            )  # fmt: skip
    if names_code(values.get("arch")) and (not allow_code or (path.parent / _BUNDLE_FILE).is_file()):
        raise UsageError(
            "VLX0705",
            "a recipe may not name code",
            where=str(path),
            hint="give --arch FILE.py:FACTORY on the command line, or --allow-code for a recipe outside of a bundle",
        )
    return values


def options_from_text(pairs: tuple[str, ...] | list[str]) -> dict[str, str]:
    """``SCOPE.NAME=VALUE`` texts as a dict.

    Raises:
        UsageError: VLX0703.
    """
    found = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or "." not in key:
            raise UsageError(
                "VLX0703", f"--set {pair} is not SCOPE.NAME=VALUE", where="--set", hint="as --set onnxruntime.opset=20"
            )
        found[key.strip()] = value.strip()
    return found


PRECISIONS: tuple[str, ...] = get_args(Precision)
