"""Execution providers of ONNX Runtime by the name that a user gives, and how they are opened. No runtime is imported.

Source: ONNX Runtime, "OpenVINO Execution Provider", configuration options (1.24).
"""

from __future__ import annotations

import json

from vlexport.core.errors import CapabilityError

CPU = "cpu"
OPENVINO = "openvino"
PROVIDERS: dict[str, str] = {
    CPU: "CPUExecutionProvider",
    OPENVINO: "OpenVINOExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "xnnpack": "XnnpackExecutionProvider",
}
"""Name → ONNX Runtime's own name. Only ``cpu`` and ``openvino``, on a CPU, have been run by us."""
FLOATS = ("f32", "bf16")
"""What the OpenVINO provider may compute floats in."""

Opened = list[tuple[str, dict[str, str]]]
"""Providers with their options, as ``onnxruntime.InferenceSession`` takes them."""


def wanted_providers(name: str, *, threads: int = 0, floats: str = FLOATS[0]) -> Opened:
    """What a session is opened with: the provider, and the CPU for operators that it has no kernel of.

    Args:
        name: A key of :data:`PROVIDERS`.
        threads: For the provider; 0 leaves the number to it.
        floats: One of :data:`FLOATS`; of ``openvino`` alone.
    """
    if name == CPU:
        return [(PROVIDERS[CPU], {})]
    options: dict[str, str] = {}
    if name == OPENVINO:
        hints = {"INFERENCE_PRECISION_HINT": floats, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1"}
        options = {"device_type": "CPU", "load_config": json.dumps({"CPU": hints})}
        options |= {"num_of_threads": str(threads)} if threads else {}
    return [(PROVIDERS[name], options), (PROVIDERS[CPU], {})]


def missing_provider(name: str, found: list[str] | tuple[str, ...]) -> CapabilityError | None:
    """The error for a runtime or a session that has only the providers ``found``; None when ``name`` is among them.

    ONNX Runtime itself warns at most, and computes everything on the CPU.
    """
    if PROVIDERS[name] in found:
        return None
    known = [short for short, full in PROVIDERS.items() if full in found]
    return CapabilityError(
        "VLX0508", f"the artifact is for {PROVIDERS[name]}, which this machine's ONNX Runtime does not offer",
        where=f"provider={name}",
        hint=f"it offers {', '.join(known) or 'none of ours'}: install an ONNX Runtime with it, or build with "
        "--set onnxruntime.provider=cpu; provider_fallback=true lets the CPU stand in",
    )  # fmt: skip
