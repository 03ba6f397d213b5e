"""The output takes its place in one step, and nothing that stands there by then is lost unasked."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlexport.core.bundle import BUNDLE_FILE
from vlexport.core.errors import BundleError
from vlexport.stages.write_bundle import staging


def _of_ours(word: str) -> str:
    """Text of a ``bundle.json`` that says who wrote it; nothing else is replaced by force."""
    return f'{{"tool": "vlexport", "word": "{word}"}}'


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("is_file", [False, True])
def test_what_came_meanwhile_is_kept_when_it_is_no_bundle(tmp_path: Path, force: bool, is_file: bool) -> None:
    output = tmp_path / "out"
    kept = output if is_file else output / "thesis.txt"

    def build() -> None:
        with staging(output, force=force) as folder:
            (folder / BUNDLE_FILE).write_text("{}", encoding="utf-8")
            if not is_file:
                output.mkdir()
            kept.write_text("precious", encoding="utf-8")

    with pytest.raises(BundleError) as caught:
        build()
    assert caught.value.code == "VLX0604"
    assert kept.read_text(encoding="utf-8") == "precious"
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


def test_other_build_is_not_replaced_when_it_was_quicker_unless_forced(tmp_path: Path) -> None:
    output = tmp_path / "out"

    def build(*, force: bool) -> None:
        with staging(output, force=force) as folder:
            (folder / BUNDLE_FILE).write_text(_of_ours("slower"), encoding="utf-8")
            output.mkdir(exist_ok=True)
            (output / BUNDLE_FILE).write_text(_of_ours("quicker"), encoding="utf-8")

    with pytest.raises(BundleError, match="exists already"):
        build(force=False)
    assert (output / BUNDLE_FILE).read_text(encoding="utf-8") == _of_ours("quicker")
    build(force=True)
    assert (output / BUNDLE_FILE).read_text(encoding="utf-8") == _of_ours("slower")
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


def test_other_tools_file_of_that_name_is_kept_when_forced(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / BUNDLE_FILE).write_text('{"tool": "another"}', encoding="utf-8")
    with pytest.raises(BundleError, match="no bundle"), staging(output, force=True) as folder:
        (folder / BUNDLE_FILE).write_text(_of_ours("new"), encoding="utf-8")
    assert (output / BUNDLE_FILE).read_text(encoding="utf-8") == '{"tool": "another"}'


def test_nothing_is_left_beside_when_a_link_is_replaced(tmp_path: Path) -> None:
    real, output = tmp_path / "real", tmp_path / "out"
    real.mkdir()
    (real / BUNDLE_FILE).write_text(_of_ours("old"), encoding="utf-8")
    output.symlink_to(real)
    with staging(output, force=True) as folder:
        (folder / BUNDLE_FILE).write_text(_of_ours("new"), encoding="utf-8")
    assert not output.is_symlink()
    assert [(path / BUNDLE_FILE).read_text(encoding="utf-8") for path in (output, real)] == [
        _of_ours("new"),
        _of_ours("old"),
    ]
    assert sorted(each.name for each in tmp_path.iterdir()) == ["out", "real"]
