"""Running an artifact where there is no TensorRT: the portable ONNX file on ONNX Runtime's CPU provider. No torch.

The numbers are those of the graph that TensorRT reads; times mean nothing, and the session says so.
"""

from __future__ import annotations

from pathlib import Path

from vlexport.core.artifact import Artifact, Session
from vlexport.targets.onnx.session import OnnxRuntimeSession


class EmulatedSession(OnnxRuntimeSession):
    """The graph of a TensorRT artifact, computed on the CPU."""

    timing = "emulated"


def open_session(folder: Path, artifact: Artifact, threads: int) -> Session:
    """Open an artifact in this process."""
    return EmulatedSession(folder, artifact, threads)
