"""onnxsim behind the channel of ``core/isolate``: a model's bytes go in, a simpler model's bytes come out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx

from vlexport.core.artifact import Array, Artifact, Session, TensorSpec
from vlexport.core.errors import CapabilityError

_MAX_ROUNDS = 5
MODEL = TensorSpec(name="model", dtype="uint8", shape=("bytes",))


class SimplifySession(Session):
    """One model after another."""

    def __init__(self, artifact: Artifact) -> None:
        super().__init__(artifact.inputs, artifact.outputs)
        self._limit = int(artifact.session_options["tensor_limit_bytes"])

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Simplify a serialized ``ModelProto``, uint8[bytes], until nothing changes.

        Raises:
            CapabilityError: VLX0408 when that does not happen.
        """
        import onnxsim  # here: the parent imports this module for its spec, and must not load what may crash

        reached = self.checked(inputs)[MODEL.name].tobytes()
        for _ in range(_MAX_ROUNDS):
            made, _ = onnxsim.simplify(onnx.load_from_string(reached), tensor_size_threshold=f"{self._limit}B")
            last, reached = reached, made.SerializeToString(deterministic=True)
            if reached == last:
                return {MODEL.name: np.frombuffer(reached, np.uint8)}
        raise CapabilityError("VLX0408", f"onnxsim still changes the model after {_MAX_ROUNDS} rounds")

    def close(self) -> None:
        """Nothing is held."""


def open_session(folder: Path, artifact: Artifact, threads: int) -> Session:
    """Ready for models."""
    return SimplifySession(artifact)
