"""Execution providers of ONNX Runtime by the name that a user gives. Names only: no runtime is imported here."""

from __future__ import annotations

from vlexport.core.errors import CapabilityError

CPU = "cpu"
PROVIDERS: dict[str, str] = {
    CPU: "CPUExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "xnnpack": "XnnpackExecutionProvider",
}
"""Name → ONNX Runtime's own name. Only ``cpu`` has been run by us."""


def wanted_providers(name: str) -> list[str]:
    """What a session is opened with: the provider, and the CPU for operators that it has no kernel of."""
    return list(dict.fromkeys((PROVIDERS[name], PROVIDERS[CPU])))


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
