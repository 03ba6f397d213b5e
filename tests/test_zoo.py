"""No false alarm of the gate, and no lost module path, on real architectures."""

from __future__ import annotations

import pytest

pytest.importorskip("timm")
from tests.zoo_models import MODELS, SHORT, examine


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in SHORT else pytest.mark.zoo) for n in MODELS])
def test_gate_is_silent_when_a_real_model_goes_through_every_pass(name: str) -> None:
    row = examine(name)
    assert row.alarm == ""
    assert row.lost_paths == 0
    assert row.captured != "refused", row.note
    assert row.calls > 0
