"""Importing a Python file that the user named on the command line. The only place where such a file is run."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def import_user_file(file: Path) -> ModuleType:
    """Run a file as a module, as a script is run: modules beside it can be imported by it.

    Raises:
        ImportError: It is no Python file; otherwise whatever the file itself raises.
    """
    path = file.resolve()
    name = "vlexport_user_" + hashlib.sha256(str(path).encode()).hexdigest()[:12]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError("it is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up there
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module
