"""Running an artifact with ONNX Runtime: the session that everything made of ONNX shares. No torch."""

from __future__ import annotations

from vlexport.targets.onnx.session import OnnxRuntimeSession, open_session

__all__ = ["OnnxRuntimeSession", "open_session"]
