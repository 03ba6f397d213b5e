"""What a command names must be there: looked at in an instant, before torch or a runtime is imported. No torch."""

from __future__ import annotations

import os
from pathlib import Path

from vlexport.core.bundle import BUNDLE_FILE
from vlexport.core.config import BuildConfig
from vlexport.core.errors import ModelFileError
from vlexport.core.samples import require_data
from vlexport.core.user_code import require_code_file
from vlexport.core.user_metric import metric_names
from vlexport.frontends.components import find_components
from vlexport.frontends.model_file import kind_of
from vlexport.frontends.model_place import place_of
from vlexport.frontends.transformers_folder import is_transformers_folder


def require_model(model: str, arch: str | None = None) -> None:
    """Refuse a MODEL that is not there or cannot be one, and an architecture whose file is not there.

    Args:
        model: As a build takes it.
        arch: As ``--arch`` names it.

    Raises:
        ModelFileError: VLX0101, VLX0102, VLX0103, VLX0105, VLX0110, VLX0114.
    """
    if find_components(Path(model)) is None:
        path = place_of(model).path
        if not is_transformers_folder(path):
            kind_of(path)
    if arch is not None:
        require_factory_file(arch)


def require_reference(reference: str, arch: str | None = None) -> None:
    """The same of ``--reference``, which is a model or a bundle; an empty one is none.

    Raises:
        ModelFileError: As :func:`require_model`.
    """
    if reference and not os.path.isfile(Path(reference) / BUNDLE_FILE):
        require_model(reference, arch)


def require_samples(config: BuildConfig) -> None:
    """Refuse DATA and metrics whose file or folder is not there.

    Raises:
        DataError: VLX0201.
        UsageError: VLX0703 for a metric that names no function.
    """
    require_data(config.data)
    require_data(config.calib)
    metric_names(config.metric)
    for text in config.metric:
        file, _, function = text.rpartition(":")
        require_code_file(Path(file), function)


def require_factory_file(arch: str) -> None:
    """Refuse ``FILE.py:FACTORY`` without its file.

    Raises:
        ModelFileError: VLX0110.
    """
    place, _, _ = arch.rpartition(":")
    if place.endswith(".py") and not os.path.isfile(place):
        raise ModelFileError(
            "VLX0110", "the architecture's file does not exist", where=f"--arch {arch}", hint="check the path"
        )
