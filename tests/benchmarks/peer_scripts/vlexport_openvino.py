"""vlexport itself, from this checkout, over an ONNX Runtime that has the OpenVINO provider."""

from __future__ import annotations

from child import serve
from vlexport_here import build, open_session

if __name__ == "__main__":
    serve(build, open_session, ("onnxruntime-openvino", "torch"))
