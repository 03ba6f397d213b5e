"""Running steps with numpy. No torch."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlexport.core.artifact import Array, Artifact, Session, artifact_file
from vlexport.core.errors import CapabilityError
from vlexport_toy.steps import FORMAT, OPERATORS


class NumpySession(Session):
    """Steps and tensors in memory. numpy has no thread count of its own, so ``threads`` is not looked at."""

    timing = "emulated"

    def __init__(self, folder: Path, artifact: Artifact) -> None:
        super().__init__(artifact.inputs, artifact.outputs)
        file = artifact_file(folder, artifact)
        try:
            self._program: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            version = self._program["format"]
            with np.load(file.with_name("tensors.npz"), allow_pickle=False) as tensors:
                self._tensors: dict[str, Array] = {name: tensors[name] for name in tensors.files}
        except (OSError, ValueError, LookupError, TypeError, zipfile.BadZipFile) as error:
            raise CapabilityError("VLX0505", f"{artifact.path} holds no steps", where=artifact.path) from error
        if version != FORMAT:
            raise CapabilityError(
                "VLX0505", f"{artifact.path} has format {version}, {FORMAT} is read", where=artifact.path
            )
        self._open = True

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run step by step."""
        if not self._open:
            raise CapabilityError("VLX0506", "the session is closed")
        arrays = self.checked(inputs)
        values = dict(self._tensors)
        values |= {name: arrays[spec.name] for name, spec in zip(self._program["inputs"], self.inputs, strict=True)}
        for step in self._program["steps"]:
            result = OPERATORS[step["op"]](*(_read(arg, values) for arg in step["args"]))
            values[step["to"]] = np.asarray(result, np.dtype(step["dtype"]))
        results = [np.array(_read(name, values)) for name in self._program["outputs"]]  # nobody else's memory
        return {spec.name: value for spec, value in zip(self.outputs, results, strict=True)}

    def close(self) -> None:
        """Forget steps and tensors."""
        self._open = False
        self._program, self._tensors = {}, {}


def _read(arg: Any, values: dict[str, Array]) -> Any:
    return values[arg["value"]] if isinstance(arg, dict) else arg


def open_session(folder: Path, artifact: Artifact, threads: int) -> Session:
    """Open an artifact in this process."""
    return NumpySession(folder, artifact)
