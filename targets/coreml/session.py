"""Why Core ML artifacts are built here and not run: the Core ML runtime is part of Apple's systems. No torch.

This version opens no session on macOS either: nothing about it could be tried where vlexport is developed.
"""

from __future__ import annotations

import sys
from pathlib import Path

from vlexport.core.artifact import Artifact, Session
from vlexport.core.errors import CapabilityError


def why_not_here() -> str:
    """Why no session can be opened on this machine."""
    if sys.platform == "darwin":
        return "this version of vlexport opens no Core ML session, on macOS either: add the package to an Xcode project"
    return "Core ML runs on Apple systems: copy the package to a Mac and add it to an Xcode project"


def open_session(folder: Path, artifact: Artifact, threads: int) -> Session:
    """Refuse, saying why.

    Raises:
        CapabilityError: VLX0501, always.
    """
    raise CapabilityError("VLX0501", f"{artifact.target} cannot run here: {why_not_here()}", where=artifact.path)
