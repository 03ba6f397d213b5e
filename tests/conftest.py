"""Shared set-up: timm imports torchvision, whose operators must be declared beside a CPU build of torch.

No test touches the developer's cache, and each has one of its own, so that none can pass by what another left.
"""

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

if importlib.util.find_spec("torch") is not None:
    from vlexport.frontends.compat import declare_torchvision_operators

    declare_torchvision_operators()

_CACHES = tempfile.mkdtemp(prefix="vlexport-tests-")
_NUMBERS = count()
os.environ["VLEXPORT_CACHE"] = str(Path(_CACHES) / "shared")


def pytest_unconfigure() -> None:
    shutil.rmtree(_CACHES, ignore_errors=True)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The cache folder of this test; not there before it is used."""
    folder = Path(_CACHES) / str(next(_NUMBERS))
    monkeypatch.setenv("VLEXPORT_CACHE", str(folder))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
