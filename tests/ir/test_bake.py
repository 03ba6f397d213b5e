"""Baked inputs: what they compute, what becomes constant with them, and which values are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vlexport.core.baked_values import Baked, baked, resolved
from vlexport.core.config import BuildConfig
from vlexport.core.errors import UsageError
from vlexport.frontends.capture import Dynamic, capture
from vlexport.ir import dialect
from vlexport.ir.bake import with_baked
from vlexport.ir.program import Program
from vlexport.passes.canonicalize import Canonicalize
from vlexport.passes.eliminate_dead import EliminateDead
from vlexport.passes.fold_constants import FoldConstants
from vlexport.passes.pipeline import run_pipeline, verify


class Net(nn.Module):
    """An image, a task id for each sample, a prompt of its own length, a temperature and a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.tasks, self.words = nn.Linear(6, 4), nn.Embedding(5, 4), nn.Embedding(9, 4)

    def forward(self, image: Tensor, task: Tensor, prompt: Tensor, temperature: Tensor, mask: Tensor) -> Tensor:
        features = self.head(image) + self.tasks(task) + torch.ones(task.shape[0], 1)
        words = self.words(prompt).relu() * mask.reshape(1, 3, 1)
        return torch.einsum("bc,nlc->bn", features, words) / temperature


def values() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "image": torch.randn(3, 6, generator=generator), "task": torch.tensor([3, 3, 3]),
        "prompt": torch.tensor([[1, 2, 3], [4, 5, 6]]), "temperature": torch.tensor(2.5),
        "mask": torch.tensor([True, True, False]),
    }  # fmt: skip


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    dynamic: Dynamic = {"image": {0: "batch"}, "task": {0: "batch"}, "prompt": {0: "texts"}}
    return capture(Net().eval(), values(), dynamic=dynamic).program


TEXTS = {
    "task": "task=3", "prompt": "prompt=[[1,2,3],[4,5,6]]", "temperature": "temperature=2.5",
    "mask": "mask=[true,true,false]",
}  # fmt: skip


@pytest.mark.parametrize("names", [("task",), ("prompt",), ("temperature", "mask"), tuple(TEXTS)])
def test_values_are_those_of_the_whole_when_inputs_are_baked(program: Program, names: tuple[str, ...]) -> None:
    given = values()
    (expected,) = program.run(*given.values())
    found, notes = with_baked(program, [baked(TEXTS[name]) for name in names])
    verify(found, made_by="baking")
    kept = [spec.name for spec in found.signature.inputs]
    assert kept == [name for name in given if name not in names]
    assert [str(n.target) for n in found.placeholders] == kept
    assert torch.equal(found.run(*(given[name] for name in kept))[0], expected)
    assert ("texts" in found.signature.dims) == ("prompt" not in names), "a dim that only the prompt has is constant"
    assert "batch" in found.signature.dims
    assert not notes
    assert len(found.example) == len(kept)
    assert len(program.signature.inputs) == 5, "the Program itself stays as it is"


def test_what_follows_from_a_value_is_folded_when_its_sizes_are_constant(program: Program) -> None:
    found, _ = with_baked(program, [baked(TEXTS["prompt"]), baked(TEXTS["mask"])])
    after, _ = run_pipeline(found, [Canonicalize(), FoldConstants(), EliminateDead()], gate=None)
    assert [dialect.plain_name(n) for n in after.calls("aten.embedding.default")] == ["embedding"], "the task's"
    assert not after.calls("aten.relu.default")
    expected = program.run(*values().values())[0]
    assert torch.allclose(after.run(*(values()[n] for n in ("image", "task", "temperature")))[0], expected)


def test_batch_is_fixed_and_said_when_the_value_has_one_row_a_sample(program: Program) -> None:
    found, notes = with_baked(program, [baked("task=[3,1,0]")])
    assert notes == ("batch is 3: the baked value has this size",)
    assert found.signature.inputs[0].shape == (3, 6)
    given = {**values(), "task": torch.tensor([3, 1, 0])}
    kept = [value for name, value in given.items() if name != "task"]
    assert torch.equal(found.run(*kept)[0], program.run(*given.values())[0])


def test_rank_is_completed_when_only_the_batch_is_missing(program: Program) -> None:
    found, _ = with_baked(program, [baked("prompt=[1,2,3]")])
    assert found.signature.outputs[0].shape == ("batch", 1)


REFUSED: dict[str, tuple[list[str], str, str, str]] = {
    "unknown name": (["promt=[1,2,3]"], "VLX0703", "did you mean 'prompt'?", "inputs: image, task"),
    "given twice": (["task=1", "task=2"], "VLX0703", "given twice", "inputs:"),
    "no input left": (
        ["image=0", *TEXTS.values()], "VLX0707", "no input would be left", "leave one input",
    ),
    "wrong shape": (["prompt=[[1,2]]"], "VLX0707", "shape [1,2]; prompt is int64[texts,3]", "of that shape"),
    "wrong rank": (["prompt=[[[1,2,3]]]"], "VLX0707", "the value has 3 axes", "of that shape"),
    "no integer": (["task=1.5"], "VLX0707", "task is int64, which does not hold the value", "give int64"),
    "far too large": (["task=1e30"], "VLX0707", "task is int64, which does not hold the value", "give int64"),
    "no boolean": (["mask=[1,2,0]"], "VLX0707", "mask is bool, which does not hold the value", "give bool"),
    "other dtype": (["task=float32[1]:AACAPw=="], "VLX0707", "the value is float32, task is int64", "give int64"),
    "too large": (["temperature=1e300"], "VLX0707", "infinite in float32", "float32"),
    "outside the vocabulary": (["prompt=[[1,2,9]]"], "VLX0707", "the model fails on the value", "what the model takes"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_value_is_refused_when(program: Program, case: str) -> None:
    texts, code, message, hint = REFUSED[case]
    with pytest.raises(UsageError) as caught:
        with_baked(program, [baked(text) for text in texts])
    assert (caught.value.code, caught.value.where) == (code, "--bake")
    assert message in caught.value.message
    assert hint in caught.value.hint


ARRAYS: list[Any] = [
    np.arange(6, dtype=np.int64).reshape(2, 3), np.array(2.5, np.float32), np.array([True, False]),
    np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)), np.zeros((0, 3), np.int32),
    np.arange(3, dtype=">i4"), np.array([1.5, -0.0], np.float16),
]  # fmt: skip


@pytest.mark.parametrize("array", ARRAYS, ids=lambda a: f"{a.dtype}{a.shape}")
def test_array_comes_back_and_its_path_does_not_when_it_is_a_file(array: Any, tmp_path: Path) -> None:
    np.save(tmp_path / "secret.npy", array)
    text = resolved(f"prompt={tmp_path / 'secret.npy'}")
    assert "secret" not in text
    assert resolved(text) == text
    found = baked(text)
    assert (found.name, found.typed) == ("prompt", True)
    assert (found.value.dtype, found.value.shape) == (array.dtype.newbyteorder("="), array.shape)
    assert found.value.tobytes() == np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="))).tobytes()


def test_recipe_holds_the_value_when_the_config_names_a_file(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.array([[1, 2, 3]]))
    config = BuildConfig(model="m.pt", bake=(f"prompt={tmp_path / 'ids.npy'}", "task=3"))
    assert config.bake == ("prompt=int64[1,3]:AQAAAAAAAAACAAAAAAAAAAMAAAAAAAAA", "task=3")
    assert str(tmp_path) not in config.recipe()
    assert "AQAAAAAAAAACAAAAAAAAAAMAAAAAAAAA" in config.recipe()


def test_fortran_scalars_and_numbers_are_read_when_typed() -> None:
    assert baked("task=3") == Baked("task", np.asarray(3), typed=False)
    assert baked(" mask = [1, 0] ").value.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("task", "is not NAME=VALUE"),
        ("=3", "is not NAME=VALUE"),
        ("task=three", "three is no number, no list of numbers and no .npy file"),
        ("task=[[1],[2,3]]", "no list of numbers"),
        ('task="3"', "does not hold numbers alone"),
        ("task=NaN", "holds NaN or infinity"),
        ("task=1e999", "holds NaN or infinity"),
        ("task=float32[1]:AADAfw==", "holds NaN or infinity"),
        ("task=int64[2]:AQAAAAAAAAA=", "the recorded value is damaged"),
        ("task=object[1]:AQAAAAAAAAA=", "the recorded value is damaged"),
        ("task=nowhere.npy", "nowhere.npy cannot be read: it does not exist"),
    ],
)
def test_text_is_refused_when_it_gives_no_value(text: str, part: str) -> None:
    with pytest.raises(UsageError) as caught:
        BuildConfig(model="m.pt", bake=(text,))
    assert caught.value.code == "VLX0707"
    assert part in caught.value.message


@pytest.mark.parametrize(
    ("array", "part"),
    [
        (np.array([{}], dtype=object), "it is no array of numbers"),
        (np.array(["a"]), "the file holds str"),
        (np.array([1j]), "the file holds complex128"),
        (np.zeros(1 << 18), "2.1 MB, and a recipe takes 1 MB"),
        (np.array([np.nan]), "holds NaN or infinity"),
    ],
)
def test_file_is_refused_when_it_holds_something_else(array: Any, part: str, tmp_path: Path) -> None:
    np.save(tmp_path / "value.npy", array, allow_pickle=True)
    with pytest.raises(UsageError) as caught:
        baked(resolved(f"task={tmp_path / 'value.npy'}"))
    assert part in caught.value.message
