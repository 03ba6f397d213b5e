"""Damaged and hostile variants of pickles and of ``torch.save`` files, from a seed; what reads them must run nothing.

Half of the mutations keep the pickle's grammar (steps are dropped, doubled, swapped, or a call of a hostile function is
put in), since blind bit flips hardly get past the first damaged byte.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import random
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

DATA = "data.pkl"
_FEW_STEPS = 8
CANARY_MODULE = "canary_of_the_mutator"
"""A module whose import is as telling as a call."""


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, canary: Path) -> None:
        self.code = f"open({str(canary)!r}, 'w')"

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return exec, (self.code,)


def hostile_parts(canary: Path) -> list[bytes]:
    """Opcodes that leave one value on the stack and, in Python's own unpickler, make the canary on the way."""
    code = f"open({str(canary)!r}, 'w')"
    text = pickle.SHORT_BINUNICODE + bytes([len(code.encode())]) + code.encode()
    called = b"cbuiltins\nexec\n"
    return [
        called + text + pickle.TUPLE1 + pickle.REDUCE,
        pickle.MARK + text + b"ibuiltins\nexec\n",
        pickle.MARK + called + text + pickle.OBJ,
        b"\x8c\x08builtins\x8c\x04exec" + pickle.STACK_GLOBAL + text + pickle.TUPLE1 + pickle.REDUCE,
        f"c{CANARY_MODULE}\nmake\n".encode(),
        b"cbuiltins\ngetattr\n" + b"cbuiltins\nexec\n" + b"\x8c\x08__call__" + pickle.TUPLE2 + pickle.REDUCE,
        b"cbuiltins\nexec\n)\x81" + pickle.EMPTY_DICT + pickle.BUILD,
    ]


def steps_of(data: bytes) -> list[bytes]:
    """A pickle cut into its opcodes with their arguments."""
    starts = [position for _, _, position in pickletools.genops(data)]
    return [data[start:end] for start, end in zip(starts, [*starts[1:], len(data)], strict=True)]


def mutated(data: bytes, *, count: int, seed: int, canary: Path) -> Iterator[bytes]:
    """``count`` variants of a pickle; of a file that begins with a short one, by bytes alone."""
    rng = random.Random(seed)
    steps, hostile = steps_of(data), hostile_parts(canary)
    by_steps = len(steps) > _FEW_STEPS
    for _ in range(count):
        yield _by_steps(steps, hostile, rng) if by_steps and rng.random() < 0.5 else _by_bytes(data, hostile, rng)


def _by_steps(steps: list[bytes], hostile: list[bytes], rng: random.Random) -> bytes:
    made = list(steps)
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(1, len(made))
        what = rng.randrange(6)
        if what == 0:
            del made[place]
        elif what == 1:
            made.insert(place, rng.choice(made))
        elif what == 2:
            other = rng.randrange(1, len(made))
            made[place], made[other] = made[other], made[place]
        elif what == 3:
            made.insert(place, rng.choice(hostile) + pickle.POP)
        elif what == 4:
            made.insert(place, rng.choice(hostile))
        else:
            made[place] = rng.choice(hostile)
    return b"".join(made)


def _by_bytes(data: bytes, hostile: list[bytes], rng: random.Random) -> bytes:
    made = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(made))
        what = rng.randrange(5)
        if what == 0:
            made[place] ^= 1 << rng.randrange(8)
        elif what == 1:
            made[place] = rng.randrange(256)
        elif what == 2:
            del made[place : place + rng.randint(1, 9)]
        elif what == 3:
            made[place:place] = rng.choice(hostile)
        else:
            made[place:place] = bytes(rng.randrange(256) for _ in range(rng.randint(1, 9)))
        if not made:
            return data
    return bytes(made)


def saved(content: Any, *, protocol: int = 2, legacy: bool = False) -> bytes:
    """What ``torch.save`` writes for ``content``."""
    buffer = io.BytesIO()
    torch.save(content, buffer, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def members_of(file: bytes) -> dict[str, bytes]:
    """Members of a ``torch.save`` zip by their names without the stem."""
    with zipfile.ZipFile(io.BytesIO(file)) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def zipped(members: dict[str, bytes], *, method: int = zipfile.ZIP_STORED) -> bytes:
    """The reverse of :func:`members_of`."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(f"archive/{name}", content)
    return buffer.getvalue()
