"""Running a Python file that the user named on the command line. The only place where such a file is run."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from vlexport.core.errors import DataError, VlexportError, nearest


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


class Blamed(contextlib.AbstractContextManager[None]):
    """Turns an exception raised inside into a DataError that names the last line of the user's file on the way to it.

    Args:
        file: The user's file.
        doing: What was being done, for the message.
        code: VLX0209 for a function that yields samples, VLX0212 for a metric.
    """

    def __init__(self, file: Path, doing: str, code: str = "VLX0209") -> None:
        self._file = file
        self._doing = doing
        self._code = code

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, (Exception, SystemExit)) or isinstance(error, VlexportError):
            return  # Ctrl-C and our own errors pass
        path = str(self._file.resolve())
        lines = [frame.lineno for frame in traceback.extract_tb(trace) if frame.filename == path]
        if isinstance(error, SyntaxError) and error.filename == path:
            lines = [error.lineno]
        where = f"{self._file}:{lines[-1]}" if lines and lines[-1] else str(self._file)
        said = f"{type(error).__name__}: {error.msg if isinstance(error, SyntaxError) else error}"
        raise DataError(self._code, f"{self._doing} {self._file} failed at {where}: {said}", where=where) from error


def user_object(file: Path, name: str, *, code: str = "VLX0209") -> Any:
    """A function or class of a Python file of the user's. Importing the file runs it.

    Args:
        file: The Python file.
        name: What to take from it.
        code: Of the error when it cannot be had.

    Raises:
        DataError: VLX0201 when there is no such file, ``code`` when importing fails or the file has no such function.
    """
    where = f"{file}:{name}"
    if not file.is_file():
        raise DataError("VLX0201", f"'{file}' does not exist", where=where)
    with Blamed(file, "importing", code):
        module = import_user_file(file)
    found = getattr(module, name, None)
    if not callable(found):
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise DataError(
            code,
            f"{file} has no function '{name}'{nearest(name, functions)}",
            where=where,
            hint="functions: " + (", ".join(functions) or "none"),
        )
    return found
