"""Tensors of an archive that read one member: as one type, or not at all."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.frontends.test_hostile import WEIGHTS, clean_members, edited
from vlexport.core.errors import ModelFileError
from vlexport.frontends.archive import check_archive
from vlexport.frontends.archive_zip import write_members

HALF = 6
"""float16 among the types of torch's export schema."""


def test_archive_is_refused_when_two_tensors_read_one_member_as_different_types() -> None:
    members = clean_members()
    config = json.loads(members[WEIGHTS])["config"]
    shared, left = config["linear.weight"]["path_name"], config["linear.bias"]["path_name"]

    def edit(content: Any) -> None:
        content["config"]["linear.bias"]["path_name"] = shared
        content["config"]["linear.bias"]["tensor_meta"]["dtype"] = HALF

    changed = edited(members, WEIGHTS, edit)
    del changed[f"data/weights/{left}"]
    with pytest.raises(ModelFileError, match="as different types") as caught:
        check_archive(write_members(changed))
    assert caught.value.code == "VLX0106"
