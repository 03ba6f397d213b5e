"""components.toml: what it may say, and what is refused before any model file is opened."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlexport.core.errors import ModelFileError
from vlexport.frontends.components import find_components, read_components

GOOD = """\
vlexport_components = 1
edges = [["encoder.features", "head.features"]]
[components.encoder]
model = "towers/encoder.pt"
[components.head]
model = "head.pt"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "components.toml"
    path.write_text(GOOD)
    return path


def test_components_and_edges_are_read_when_the_file_is_sound(file: Path) -> None:
    found, files = read_components(file)
    assert found.edges == (("encoder.features", "head.features"),)
    assert files == {"encoder": file.parent / "towers/encoder.pt", "head": file.parent / "head.pt"}


def test_file_is_found_when_model_is_it_or_its_folder(file: Path, tmp_path: Path) -> None:
    assert find_components(file) == find_components(tmp_path) == file
    renamed = file.rename(tmp_path / "pair.txt")
    assert find_components(renamed) == renamed
    assert find_components(tmp_path) is None


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04vlexport_components = 1", b"\xff\xfe", b"a = 1", b"x" * 70_000])
def test_file_is_left_to_others_when_it_is_no_list_of_components(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(content)
    assert find_components(tmp_path / "model.pt") is None
    assert find_components(tmp_path / ("n" * 300)) is None
    assert find_components(tmp_path / "missing") is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("vlexport_components = 1", "wrong at components"),
        (GOOD.replace("= 1", "= 2", 1), "has version 2"),
        (GOOD.replace("vlexport_components = 1\n", ""), "no line vlexport_components = 1"),
        (GOOD.replace("= 1", "= true", 1), "no line vlexport_components = 1"),
        (GOOD.replace("= 1", '= "1"', 1), "no line vlexport_components = 1"),
        (GOOD.replace("edges", "edgs"), "unknown key edgs; did you mean 'edges'"),
        (GOOD + 'arch = "my_code.py:make"', "unknown key components.head.arch"),
        (GOOD.replace("model", "modle", 1), "components.encoder"),
        (GOOD.replace('"head.features"]', '"head.features", "more"]'), "wrong at edges.0"),
        (GOOD.replace('"head.pt"', "3"), "components.head.model"),
        (GOOD + "[components.head]", "cannot be read"),
        ("vlexport_components = 1\nedges = " + "[" * 5000, "cannot be read"),
        (GOOD.replace("head.pt", "../head.pt"), "head names '../head.pt', which leaves"),
        (GOOD.replace("head.pt", "/etc/hostname"), "leaves the folder"),
        (GOOD.replace("head.pt", ""), "leaves the folder"),
        (GOOD.replace("head.pt", "head\\\\u0000.pt"), "leaves the folder"),
        (GOOD.replace("head.pt", "linked.pt"), "or is a link"),
        (GOOD.replace("head.pt", "aside/head.pt"), "or is a link"),
        ("#" * 70_000, "larger than"),
    ],
)
def test_file_is_refused_in_words_when_it_is_wrong(text: str, said: str, file: Path) -> None:
    (file.parent / "linked.pt").symlink_to("/etc/hostname")
    (file.parent / "aside").symlink_to("/etc")
    file.write_text(text)
    with pytest.raises(ModelFileError) as caught:
        read_components(file)
    assert caught.value.code == "VLX1101"
    assert said in caught.value.message
    assert str(file.parent) not in str(caught.value)


def test_file_is_refused_when_it_is_no_text(file: Path) -> None:
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ModelFileError, match="VLX1101"):
        read_components(file)
