"""What this machine is: processor, instruction set, system. No host, user or path."""

from __future__ import annotations

import os
import platform
from functools import lru_cache
from pathlib import Path

from vlexport.core.bundle_schema import Machine
from vlexport.core.huge_pages import memory_pages

_INTERESTING = (
    "sse4_2", "avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16",
    "avx512_fp16", "amx_int8", "amx_bf16", "asimd", "asimdhp", "asimddp", "bf16", "i8mm",
)  # fmt: skip
"""Flags that change which kernels a runtime picks, as Linux spells them."""


@lru_cache(maxsize=1)
def this_machine() -> Machine:
    """The machine that this process runs on."""
    model, flags = _linux_cpu()
    return Machine(
        cpu=model or platform.processor() or platform.machine(),
        instruction_set=tuple(f for f in _INTERESTING if f in flags),
        cores=available_cores(),
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        memory_pages=memory_pages(),
    )


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _linux_cpu() -> tuple[str, set[str]]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "", set()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    return fields.get("model name", ""), set((fields.get("flags") or fields.get("Features") or "").split())
