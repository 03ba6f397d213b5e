"""Hints of a refused capture say what to give, not what to guess."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vlexport.core.errors import CaptureError
from vlexport.frontends.capture import capture


class KeepsNothing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[x > 1e9].sum()[None]


def test_hint_is_about_the_example_when_a_selection_keeps_nothing_of_it() -> None:
    with pytest.raises(CaptureError, match="VLX0304") as caught:
        capture(KeepsNothing().eval(), torch.zeros(1, 4), dynamic=False)
    assert "keeps nothing of the example" in caught.value.hint


class ScalesBack(nn.Module):
    """One row that the convolution leaves is scaled otherwise than several."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.interpolate(x[..., ::2, ::2] * 2, size=x.shape[-2:], mode="bilinear")


def test_hint_is_a_range_when_a_named_dim_has_sizes_that_do_not_fit() -> None:
    model, x = ScalesBack().eval(), torch.randn(2, 3, 8, 6)
    with pytest.raises(CaptureError, match="VLX0303") as caught:
        capture(model, x, dynamic={"x": {0: "batch", 2: "height", 3: "width"}})
    assert '("height", 8, 512)' in caught.value.hint
    assert '("width", 8, 512)' in caught.value.hint
    ranges = {0: "batch", 2: ("height", 8, 512), 3: ("width", 6, 512)}
    assert set(capture(model, x, dynamic={"x": ranges}).program.signature.dims) == {"batch", "height", "width"}
