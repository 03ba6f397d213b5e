"""Archives whose quantization operators do not hold together are refused before anything is computed."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vlexport
from vlexport.core.errors import ModelFileError
from vlexport.frontends.archive import check_archive
from vlexport.frontends.archive_zip import read_members, write_members
from vlexport.ir.quant_ops import DEQUANTIZE, LOOK_UP, QUANTIZE

PROGRAM = "models/model.json"
_BY_KEYWORD = 2


class Rounded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor([0.1, 0.2, 0.3]))
        self.register_buffer("point", torch.zeros(3, dtype=torch.int8))
        self.register_buffer("places", torch.tensor([[1, 0, 15]], dtype=torch.uint8))
        self.register_buffer("tables", torch.arange(16.0)[None])

    def forward(self, x: Tensor) -> Tensor:
        rounded = DEQUANTIZE(QUANTIZE(x, self.scale, self.point, 1), self.scale, self.point, 1, 0, 8)
        return rounded + LOOK_UP(self.places, self.tables)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    file = tmp_path_factory.mktemp("quantized") / "m.pt"
    vlexport.save(Rounded().eval(), file, inputs=torch.randn(2, 3), dynamic=False)
    return {name: bytes(content) for name, content in read_members(file.read_bytes()).items()}


def calls(program: Any, operator: str) -> list[dict[str, Any]]:
    nodes = program["graph_module"]["graph"]["nodes"]
    return [node for node in nodes if node["target"] == f"torch.ops.vlexport.{operator}.default"]


def with_number(name: str, value: int) -> Callable[[Any], None]:
    def edit(program: Any) -> None:
        (node,) = calls(program, "dequantize")
        kept = [each for each in node["inputs"] if each["name"] != name]  # a default is not written
        node["inputs"] = [*kept, {"name": name, "arg": {"as_int": value}, "kind": _BY_KEYWORD}]

    return edit


def points_that_are_scales(program: Any) -> None:
    (node,) = calls(program, "quantize")
    by_name = {each["name"]: each for each in node["inputs"]}
    by_name["zero_point"]["arg"] = by_name["scale"]["arg"]


def read_as(name: str, operator: str, other: str) -> Callable[[Any], None]:
    """``look_up`` reads for ``name`` what another call reads as ``other``."""

    def edit(program: Any) -> None:
        (node,), (giver,) = calls(program, "look_up"), calls(program, operator)
        (given,) = [each["arg"] for each in giver["inputs"] if each["name"] == other]
        next(each for each in node["inputs"] if each["name"] == name)["arg"] = given

    return edit


def no_axis(program: Any) -> None:
    (node,) = calls(program, "quantize")
    (place,) = [each for each in node["inputs"] if each["name"] == "axis"]
    place["arg"] = {"as_none": True}


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        (with_number("axis", 7), "axis 7"),
        (with_number("axis", 0), "scale and zero point have shapes"),
        (with_number("block", -4), "blocks of -4"),
        (with_number("block", 1 << 33), "blocks of"),
        (with_number("bits", 99), "bits are 99"),
        (points_that_are_scales, "it does not take"),
        (no_axis, "scale and zero point have shapes"),
        (read_as("input", "quantize", "scale"), "it takes places in uint8"),
        (read_as("tables", "look_up", "input"), "it takes places in uint8"),
        (read_as("tables", "quantize", "scale"), "do not divide places"),
    ],
    ids=[
        "axis",
        "other axis",
        "negative block",
        "huge block",
        "bits",
        "dtype",
        "no axis",
        "places",
        "no floats",
        "tables",
    ],
)
def test_archive_is_refused_when_a_quantization_operator_cannot_be_computed(
    members: dict[str, bytes], edit: Callable[[Any], None], why: str
) -> None:
    program = json.loads(members[PROGRAM])
    edit(program)
    changed = write_members({**members, PROGRAM: json.dumps(program).encode()})
    with pytest.raises(ModelFileError, match=why) as caught:
        check_archive(changed).exported_program()
    assert caught.value.code == "VLX0105"


def test_archive_opens_when_its_quantization_operators_are_sound(members: dict[str, bytes]) -> None:
    found = check_archive(write_members(members)).exported_program()
    x = torch.randn(2, 3)
    torch.testing.assert_close(found.module()(x)[0], Rounded()(x))
