"""Reading a bundle: paths stay inside, later versions and damage are refused in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vlexport.core.artifact import Artifact, TensorSpec
from vlexport.core.bundle import bundle_text, check_files, inside, read_bundle, recorded_files, size_bytes
from vlexport.core.bundle_schema import BUNDLE_SCHEMA, Bundle, Component, CostRecord, FileRecord, Golden, digest_of
from vlexport.core.errors import BundleError, GateError

OUTSIDE = {
    "empty": "",
    "parent": "../secret",
    "parent in the middle": "artifact/../../secret",
    "parent at the end": "artifact/..",
    "absolute": "/etc/passwd",
    "doubled slash": "//host/share",
    "backslash": "artifact\\..\\..\\secret",
    "drive": "C:\\secret",
    "nul": "artifact/main.onnx\0.png",
}


@pytest.mark.parametrize("path", OUTSIDE.values(), ids=OUTSIDE)
def test_path_is_refused_when_it_leaves_the_bundle(tmp_path: Path, path: str) -> None:
    with pytest.raises(BundleError) as caught:
        inside(tmp_path, path)
    assert caught.value.code == "VLX0605"


@pytest.mark.parametrize("path", ["artifact/main.onnx", "a", "a/b/c", "a/./b", "..a/..b", "ä ö/ü", "console/com/lpt"])
def test_path_is_given_back_when_it_stays_inside(tmp_path: Path, path: str) -> None:
    found = inside(tmp_path, path)
    assert found == tmp_path / path
    assert found.resolve().is_relative_to(tmp_path.resolve())


NOT_EVERYWHERE = (
    "CON",
    "a/nul.txt",
    "Com1.onnx",
    "aux /x",
    "lpt¹",
    "a:stream",
    "C:x",
    "a.",
    "a/b ",
    "a\n",
    "\x1b[31m",
    "a*",
    "x" * 256,
)


@pytest.mark.parametrize("path", NOT_EVERYWHERE)
def test_path_is_refused_when_some_system_takes_it_for_something_else(tmp_path: Path, path: str) -> None:
    with pytest.raises(BundleError) as caught:
        inside(tmp_path, path)
    assert caught.value.code == "VLX0605"


@pytest.mark.parametrize(
    ("one", "other"), [("assets/A.json", "assets/a.json"), ("assets/ü", "assets/u\u0308"), ("assets/ß", "assets/SS")]
)
def test_bundle_is_refused_when_two_files_are_one_on_some_systems(tmp_path: Path, one: str, other: str) -> None:
    record = FileRecord(sha256="0" * 64, size_bytes=0)
    make_bundle(tmp_path, files={one: record, other: record})
    with pytest.raises(BundleError) as caught:
        read_bundle(tmp_path)
    assert (caught.value.code, "one file on some systems" in caught.value.message) == ("VLX0605", True)


@pytest.mark.parametrize("spelling", ["spaces", "order", "no-newline", "crlf", "bom"])
def test_bundle_is_altered_when_its_json_is_spelled_otherwise(tmp_path: Path, spelling: str) -> None:
    make_bundle(tmp_path)
    file = tmp_path / "bundle.json"
    text = file.read_text(encoding="utf-8")
    values = json.loads(text)
    changed = {
        "spaces": json.dumps(values, sort_keys=True) + "\n",
        "order": json.dumps(dict(reversed(values.items())), separators=(",", ":")) + "\n",
        "no-newline": text.rstrip("\n"),
        "crlf": text.replace("\n", "\r\n"),
        "bom": "\ufeff" + text,
    }[spelling]
    file.write_bytes(changed.encode())
    with pytest.raises((GateError, BundleError)) as caught:
        read_bundle(tmp_path)
    assert caught.value.code == ("VLX0601" if spelling == "bom" else "VLX0602")


def test_bundle_is_refused_when_a_key_is_repeated(tmp_path: Path) -> None:
    make_bundle(tmp_path)
    file = tmp_path / "bundle.json"
    file.write_text(file.read_text().replace('"target":', '"target":"evil","target":', 1))
    with pytest.raises(BundleError) as caught:
        read_bundle(tmp_path)
    assert (caught.value.code, "repeated" in caught.value.message) == ("VLX0601", True)


def test_bundle_is_refused_when_its_json_is_a_link(tmp_path: Path) -> None:
    make_bundle(tmp_path / "bundle")
    (tmp_path / "bundle" / "bundle.json").rename(tmp_path / "away.json")
    (tmp_path / "bundle" / "bundle.json").symlink_to(tmp_path / "away.json")
    with pytest.raises(BundleError) as caught:
        read_bundle(tmp_path / "bundle")
    assert caught.value.code == "VLX0605"


@pytest.mark.parametrize("linked", ["file", "folder", "dangling"])
def test_path_is_refused_when_a_link_lies_on_it(tmp_path: Path, linked: str) -> None:
    bundle, other = tmp_path / "bundle", tmp_path / "other"
    (bundle / "artifact").mkdir(parents=True)
    other.mkdir()
    (other / "x").write_text("secret")
    if linked == "folder":
        (bundle / "artifact" / "sub").symlink_to(other, target_is_directory=True)
        path = "artifact/sub/x"
    else:
        (bundle / "artifact" / "x").symlink_to(other / ("x" if linked == "file" else "none"))
        path = "artifact/x"
    with pytest.raises(BundleError) as caught:
        inside(bundle, path)
    assert caught.value.code == "VLX0605"


def make_bundle(folder: Path, **changes: Any) -> Bundle:
    """A bundle of three small files, with its digest."""
    for path in ("artifact/main.onnx", "golden/main/inputs.npz", "golden/main/outputs.npz", "recipe.toml"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(path.encode())
    spec = TensorSpec(name="image", dtype="float32", shape=("batch", 3, 8, 8))
    component = Component(
        artifact=Artifact(target="onnxruntime", path="main.onnx", inputs=(spec,), outputs=(spec,)),
        dims={},
        preprocess={},
        labels=(),
        golden=Golden(inputs="golden/main/inputs.npz", outputs="golden/main/outputs.npz", tolerance=1e-4),
        passes=(),
        cost=CostRecord(macs=0, parameters=0, size_bytes=0, opaque=()),
    )
    bundle = Bundle(
        vlexport="0",
        state="verified",
        target="onnxruntime",
        precision="fp32",
        device_profile="this",
        source_hash="0",
        components={"main": component},
        tools={},
        instruction_set=(),
        compatibility={},
        files=dict(recorded_files(folder)),
    ).model_copy(update=changes)
    bundle = bundle.model_copy(update={"digest": digest_of(bundle)})
    (folder / "bundle.json").write_text(bundle_text(bundle), encoding="utf-8", newline="\n")
    return bundle


def rewrite(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
    (folder / "bundle.json").write_text(json.dumps({**values, **changes}), encoding="utf-8")


def test_bundle_is_read_when_it_is_whole(tmp_path: Path) -> None:
    written = make_bundle(tmp_path)
    assert read_bundle(tmp_path) == written
    check_files(tmp_path, written)
    assert set(written.files) == {
        "artifact/main.onnx",
        "golden/main/inputs.npz",
        "golden/main/outputs.npz",
        "recipe.toml",
    }
    assert size_bytes(written) == len("artifact/main.onnx")


def test_bundle_is_refused_when_the_folder_holds_none(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(BundleError) as caught:
            read_bundle(folder)
        assert caught.value.code == "VLX0601"


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", "3", "{}", '{"schema_version": "1"}', '{"schema_version": 1}', "[" * 100_000],
    ids=lambda text: text[:24] or "empty",
)
def test_bundle_is_refused_when_its_file_is_damaged(tmp_path: Path, content: str) -> None:
    (tmp_path / "bundle.json").write_text(content, encoding="utf-8")
    with pytest.raises(BundleError) as caught:
        read_bundle(tmp_path)
    assert caught.value.code == "VLX0601"


def test_bundle_is_refused_when_it_is_of_a_later_version(tmp_path: Path) -> None:
    make_bundle(tmp_path)
    rewrite(tmp_path, schema_version=BUNDLE_SCHEMA + 1, novelty=1)
    with pytest.raises(BundleError) as caught:
        read_bundle(tmp_path)
    assert caught.value.code == "VLX0603"


def test_bundle_is_refused_when_a_field_was_altered(tmp_path: Path) -> None:
    make_bundle(tmp_path)
    rewrite(tmp_path, precision="int8")
    with pytest.raises(GateError) as caught:
        read_bundle(tmp_path)
    assert caught.value.code == "VLX0602"


def test_bundle_is_refused_when_it_has_an_unknown_field(tmp_path: Path) -> None:
    make_bundle(tmp_path)
    rewrite(tmp_path, novelty=1)
    with pytest.raises(BundleError) as caught:
        read_bundle(tmp_path)
    assert caught.value.code == "VLX0601"
    assert "novelty" in caught.value.message


@pytest.mark.parametrize("where", ["files", "artifact", "golden"])
def test_bundle_is_refused_when_a_path_in_it_leaves_it(tmp_path: Path, where: str) -> None:
    whole = make_bundle(tmp_path)
    record = whole.files["recipe.toml"]
    main = whole.main
    escaping = {
        "files": {"files": {**whole.files, "../x": record}},
        "artifact": {"artifact": main.artifact.model_copy(update={"path": "../../x"})},
        "golden": {"golden": main.golden.model_copy(update={"outputs": "/x"})},
    }[where]
    if where != "files":
        escaping = {"components": {"main": main.model_copy(update=escaping)}}
    make_bundle(tmp_path, **escaping)
    with pytest.raises(BundleError) as caught:
        read_bundle(tmp_path)
    assert caught.value.code == "VLX0605"


@pytest.mark.parametrize("what", ["altered", "same size", "missing", "added"])
def test_file_is_named_when_it_does_not_fit(tmp_path: Path, what: str) -> None:
    bundle = make_bundle(tmp_path)
    file = tmp_path / "artifact" / "main.onnx"
    if what == "altered":
        file.write_bytes(b"x")
    elif what == "same size":
        file.write_bytes(file.read_bytes()[::-1])
    elif what == "missing":
        file.unlink()
    else:
        file = tmp_path / "golden" / "main" / "extra.npz"
        file.write_bytes(b"")
    with pytest.raises(GateError) as caught:
        check_files(tmp_path, bundle)
    assert caught.value.code == "VLX0602"
    assert file.relative_to(tmp_path).as_posix() in caught.value.message


def test_measurements_are_no_part_of_the_promise_when_added(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path)
    (tmp_path / "measured" / "local-1").mkdir(parents=True)
    (tmp_path / "measured" / "local-1" / "report.json").write_text("{}")
    check_files(tmp_path, bundle)
    assert read_bundle(tmp_path) == bundle


def test_digest_does_not_depend_on_itself_when_computed(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path)
    assert digest_of(bundle.model_copy(update={"digest": "x"})) == bundle.digest
    assert digest_of(bundle.model_copy(update={"source_hash": "1"})) != bundle.digest
