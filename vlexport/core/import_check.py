"""Do installed packages import? Asked in a child process: a broken runtime may abort. No torch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence

_CHILD = """
import importlib, json, sys, warnings
sys.path[:] = filter(None, sys.path)
warnings.simplefilter("ignore")
real, sys.stdout = sys.stdout, sys.stderr
for name in json.loads(sys.argv[1]):
    print(json.dumps([name, None]), file=real, flush=True)
    try:
        importlib.import_module(name)
        said = ""
    except BaseException as error:
        said = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    print(json.dumps([name, said]), file=real, flush=True)
"""
"""Says which it begins with before it does, so that one that takes the process down is known."""


def import_failures(modules: Sequence[str], *, timeout_s: float = 120.0) -> dict[str, str]:
    """Module → why it does not import, for those that do not; a child is started anew behind one that kills it.

    Args:
        modules: To import, in this order.
        timeout_s: Seconds that all of them may take; whichever is under way then is said to hang.
    """
    failed: dict[str, str] = {}
    left = list(modules)
    while left:
        command = [sys.executable, "-c", _CHILD, json.dumps(left)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
            lines, ended = done.stdout, f"the process ended with {done.returncode}"
        except subprocess.TimeoutExpired as error:
            told = error.stdout or b""
            lines = told.decode(errors="replace") if isinstance(told, bytes) else told
            ended = f"no answer within {timeout_s:g} s"
        answers: dict[str, str | None] = {}
        for line in lines.splitlines():
            if line.startswith("["):
                name, said = json.loads(line)
                answers[name] = said
        failed |= {name: said for name, said in answers.items() if said}
        under_way = [name for name, said in answers.items() if said is None] or ([] if answers else left[:1])
        failed |= dict.fromkeys(under_way, ended)
        left = [name for name in left if name not in answers and name not in under_way]
    return failed
