"""vlexport: trained PyTorch vision models become verified, measured deployment bundles.

Public names are loaded when they are used: importing the package imports neither torch nor a runtime.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# ONNX Runtime 1.32 reports its use to its maker over HTTPS, under an id that it stores in the home folder. It reads
# this when it is first imported, in this process or a child; whoever sets it is not overruled.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_PUBLIC = {
    "BuildConfig": "vlexport.core.config",
    "ProfileConfig": "vlexport.stages.profile",
    "ValidateConfig": "vlexport.stages.validate",
    "VlexportError": "vlexport.core.errors",
    "build": "vlexport.stages.build",
    "build_each": "vlexport.stages.build_each",
    "load": "vlexport.stages.run",
    "profile": "vlexport.stages.profile",
    "save": "vlexport.frontends.save",
    "validate": "vlexport.stages.validate",
    "verify": "vlexport.stages.verify",
}
_NEED_BUILD = ("build", "build_each", "save")
"""Names of the half that is installed by the extra ``build``."""

__all__ = [
    "BuildConfig",
    "ProfileConfig",
    "ValidateConfig",
    "VlexportError",
    "__version__",
    "build",
    "build_each",
    "load",
    "profile",
    "save",
    "validate",
    "verify",
]

if TYPE_CHECKING:
    from vlexport.core.config import BuildConfig
    from vlexport.core.errors import VlexportError
    from vlexport.frontends.save import save
    from vlexport.stages.build import build
    from vlexport.stages.build_each import build_each
    from vlexport.stages.profile import ProfileConfig, profile
    from vlexport.stages.run import load
    from vlexport.stages.validate import ValidateConfig, validate
    from vlexport.stages.verify import verify


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        try:
            return getattr(importlib.import_module(_PUBLIC[name]), name)
        except ModuleNotFoundError as error:
            missing = (error.name or "vlexport").partition(".")[0]
            if name not in _NEED_BUILD or missing == "vlexport":
                raise
            message = f"vlexport.{name} needs {missing}, which is not installed: pip install 'vlexport[build]'"
            raise ImportError(message) from error
    raise AttributeError(f"module 'vlexport' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
