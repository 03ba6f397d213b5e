"""The user's own source lines: where an error came from, and what decided a size.

A frame is the user's unless it is torch's, Python's or ours; a model zoo's frame counts as the user's.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from typing import Any

import torch

from vlexport.core.errors import CaptureError

_OURS = f"{Path(__file__).resolve().parents[1]}{os.sep}"
_PASSED_THROUGH = f"{_OURS}frontends{os.sep}size_checks.py"
"""It stands between the user's line and every operator that is traced."""
_NOT_USERS = (_OURS, f"{Path(torch.__file__).parent}{os.sep}", sysconfig.get_paths()["stdlib"], "<")


def _is_users(file: str) -> bool:
    """Whether a frame is the user's (timm's counts as such), not torch's, Python's or ours."""
    inside_site = {"site-packages", "dist-packages"} & set(PurePath(file).parts)
    skipped = "sympy" in PurePath(file).parts if inside_site else file.startswith(_NOT_USERS[2])
    return not skipped and not file.startswith((*_NOT_USERS[:2], _NOT_USERS[3]))


def user_line(error: BaseException) -> str:
    """``file.py:LINE`` of the last frame of the user's own in the error's traceback."""
    found = ""
    trace = error.__traceback__
    while trace is not None:
        if _is_users(trace.tb_frame.f_code.co_filename):
            found = f"{PurePath(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found


def parting_line(run: Callable[[int], object]) -> str:
    """The user's line after which ``forward`` goes different ways at batch 1 and 2, or an empty string.

    torch assumes sizes of at least 2 and takes ``if batch == 1`` for decided, without a word in its log.

    Args:
        run: Runs ``forward`` at a batch size.
    """
    steps: list[list[tuple[str, int]]] = []
    for size in (1, 2):
        walked: list[tuple[str, int]] = []

        def trace(frame: Any, event: str, _: Any, walked: list[tuple[str, int]] = walked) -> Any:
            if not _is_users(frame.f_code.co_filename):
                return None
            if event == "line":
                walked.append((frame.f_code.co_filename, frame.f_lineno))
            return trace

        previous = sys.gettrace()
        sys.settrace(trace)
        try:
            run(size)
        except CaptureError:
            return ""
        finally:
            sys.settrace(previous)
        steps.append(walked)
    common = 0
    while common < min(map(len, steps)) and steps[0][common] == steps[1][common]:
        common += 1
    if common == 0 or common == len(steps[0]) == len(steps[1]):
        return ""
    file, line = steps[0][common - 1]
    return f"{PurePath(file).name}:{line}"


@contextlib.contextmanager
def watch_guards(lines: list[str]) -> Iterator[None]:
    """Collect the user's lines at which torch decides something about a symbolic size."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            frame: Any = sys._getframe(1)
            while frame is not None:
                file = frame.f_code.co_filename
                if file.startswith(_OURS) and file != _PASSED_THROUGH:
                    return
                if _is_users(file):
                    line = f"{PurePath(file).name}:{frame.f_lineno}"
                    if not lines or lines[-1] != line:
                        lines.append(line)
                    return
                frame = frame.f_back

    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    handler = Handler(level=logging.INFO)
    level, propagate, handlers = logger.level, logger.propagate, logger.handlers
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.handlers = handlers
        logger.setLevel(level)
        logger.propagate = propagate
