"""Running Python code that the user named on the command line. The only place where such code is run."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from vlexport.core.errors import DataError, VlexportError, nearest


@contextlib.contextmanager
def on_path(*folders: Path) -> Iterator[None]:
    """Python looks for modules in these folders first, as it does in that of a script."""
    added = [str(folder) for folder in folders]
    sys.path[:0] = added
    try:
        yield
    finally:
        for each in added:
            with contextlib.suppress(ValueError):  # the user's code may have taken it out
                sys.path.remove(each)


def code_folders(file: Path) -> tuple[Path, ...]:
    """Where a file finds its neighbours: the folder of the package that it belongs to, and its own."""
    path = file.resolve()
    root = _package_root(path)
    return (path.parent,) if root == path.parent else (root, path.parent)


def import_user_file(file: Path) -> ModuleType:
    """Run a file as a module: as a script is run, or, in a package, as a part of it, so that it may import relatively.

    Raises:
        ImportError: It is no Python file; otherwise whatever the file itself raises.
    """
    path = file.resolve()
    root = _package_root(path)
    if root != path.parent:
        return import_user_module(".".join(path.relative_to(root).with_suffix("").parts), root)
    name = "vlexport_user_" + hashlib.sha256(str(path).encode()).hexdigest()[:12]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError("it is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up there
    with on_path(path.parent):
        spec.loader.exec_module(module)
    return module


def import_user_module(name: str, folder: Path) -> ModuleType:
    """Import a module by its dotted name, from ``folder`` or from what is installed.

    A package of the same name that was imported from another folder of the user's makes room for this one.

    Raises:
        ImportError: There is no such module, or its name is that of a package in use; otherwise whatever it raises.
    """
    top = name.partition(".")[0]
    place = folder.resolve() / top
    loaded = sys.modules.get(top)
    if loaded is not None and place.is_dir() and str(place) not in [str(each) for each in _folders_of(loaded)]:
        if top in sys.stdlib_module_names or not getattr(loaded, _MARK, False):
            raise ImportError(f"its package is called '{top}', as one that is in use")
        for each in [key for key in sys.modules if key == top or key.startswith(f"{top}.")]:
            del sys.modules[each]
    importlib.invalidate_caches()
    with on_path(folder.resolve()):
        module = importlib.import_module(name)
    if place.is_dir():
        setattr(sys.modules[top], _MARK, True)
    return module


_MARK = "__vlexport_user__"
"""On a package that was imported for the user, and may be replaced by another one of that name."""


def _folders_of(module: ModuleType) -> list[Path]:
    return [Path(each).resolve() for each in getattr(module, "__path__", ())]


def _package_root(path: Path) -> Path:
    """The folder in which the outermost package around a file lies; the file's own folder where it is in none."""
    folder = path.parent
    if not path.stem.isidentifier():
        return folder
    while (folder / "__init__.py").is_file() and folder.name.isidentifier():
        folder = folder.parent
    return folder


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


def require_code_file(file: Path, name: str) -> None:
    """Refuse ``FILE.py:NAME`` without its file.

    Raises:
        DataError: VLX0201.
    """
    if not os.path.isfile(file):
        raise DataError("VLX0201", f"'{file}' does not exist", where=f"{file}:{name}")


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
    require_code_file(file, name)
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
