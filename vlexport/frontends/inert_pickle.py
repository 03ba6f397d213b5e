"""An unpickler that runs nothing: no import, no call, no attribute of anything that a pickle names.

Python's own machine calls whatever a pickle asks for. This one reads the same opcodes onto the same kind of stack, and
where an object would be made (REDUCE, NEWOBJ, INST, OBJ, BUILD) looks its name up in
:data:`vlexport.frontends.inert_values.BUILDERS`, or leaves a stub. It neither recurses nor allocates more than the
pickle is long, in proportion; bytes, opcodes and the depth of keys have limits.

Source: the opcodes are those of Python's ``pickletools``, which also takes the bytes apart.
"""

from __future__ import annotations

import io
import pickletools
import struct
from collections.abc import Callable
from typing import Any, BinaryIO

from vlexport.frontends.inert_values import BUILDERS, DTYPES, InertError, Stub, fill, require_key

MAX_BYTES = 256 * 2**20
MAX_OPCODES = 20_000_000
_MAX_ASKED = 1000
_FREE_MADE = 2**20
_MAX_MADE_RATIO = 4
"""What calls take, in characters, bytes and items, may be this much and so many times what was read: an honest pickle
gives each call arguments of its own, a bomb gives the same text or list to a call every five bytes."""

Persistent = Callable[[object], object]
"""Makes a value from a persistent id; torch writes storages so."""


class _Bounded:
    """The next bytes of a file, of which at most so many are given out."""

    def __init__(self, file: BinaryIO, limit: int) -> None:
        self._file = file
        self._limit = limit
        self._left = limit

    def given(self) -> int:
        """Bytes that were read so far."""
        return self._limit - self._left

    def read(self, size: int) -> bytes:
        return self._given(self._file.read(min(size, self._left + 1)))

    def readline(self) -> bytes:
        return self._given(self._file.readline(self._left + 1))

    def tell(self) -> int:
        return self._file.tell()

    def _given(self, data: bytes) -> bytes:
        self._left -= len(data)
        if self._left < 0:
            raise InertError("the pickle is longer than any honest one")
        return data


class InertUnpickler:
    """Reads one pickle, or several that follow each other in a file.

    Args:
        persistent: Makes values from persistent ids; without it they are refused.

    Attributes:
        asked: Names that became stubs, in order, each once.
    """

    def __init__(self, persistent: Persistent | None = None) -> None:
        self.asked: dict[str, None] = {}
        self._persistent = persistent
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._source = _Bounded(io.BytesIO(), 0)
        self._taken = 0

    def load(self, file: BinaryIO, *, limit: int = MAX_BYTES) -> Any:
        """The value of the pickle that begins where the file stands; the file then stands behind it.

        Raises:
            InertError: Damaged, or larger than ``limit`` bytes or :data:`MAX_OPCODES`.
        """
        self._stack, self._marks, self._memo = [], [], {}
        self._source, self._taken = _Bounded(file, limit), 0
        count = 0
        try:
            for opcode, argument, _ in pickletools.genops(self._source):  # type: ignore[arg-type]
                count += 1
                if count > MAX_OPCODES:
                    raise InertError("the pickle has more steps than any honest one")
                if opcode.name == "STOP":
                    return self._stack.pop()
                self._step(opcode.name, argument)
        except InertError:
            raise
        except (ArithmeticError, LookupError, MemoryError, TypeError, ValueError, struct.error) as error:
            raise InertError(f"the pickle is damaged: {error}") from error
        raise InertError("the pickle has no end")

    def _step(self, name: str, argument: Any) -> None:
        if name in _CONSTANTS:
            self._stack.append(_CONSTANTS[name])
        elif name in _PUSHES:
            self._stack.append(argument)
        elif name in _EMPTY:
            self._stack.append(_EMPTY[name]())
        elif name in ("PROTO", "FRAME"):
            pass
        else:
            method = getattr(self, f"_{name.lower()}", None)
            if method is None:
                raise InertError(f"the pickle uses the opcode {name}")
            method(argument)

    def _take(self, count: int) -> list[Any]:
        found = self._stack[-count:]
        if len(found) < count:
            raise InertError("the pickle takes more than it gave")
        del self._stack[-count:]
        return found

    def _marked(self) -> list[Any]:
        start = self._marks.pop()
        found = self._stack[start:]
        del self._stack[start:]
        return found

    # -- stack and memo --------------------------------------------------------------------------------------------

    def _mark(self, _: Any) -> None:
        self._marks.append(len(self._stack))

    def _pop_mark(self, _: Any) -> None:
        self._marked()

    def _pop(self, _: Any) -> None:
        if self._marks and self._marks[-1] == len(self._stack):
            self._marks.pop()
        else:
            self._stack.pop()

    def _dup(self, _: Any) -> None:
        self._stack.append(self._stack[-1])

    def _put(self, argument: Any) -> None:
        self._memo[argument] = self._stack[-1]

    _binput = _long_binput = _put

    def _memoize(self, _: Any) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def _get(self, argument: Any) -> None:
        self._stack.append(self._memo[argument])

    _binget = _long_binget = _get

    # -- containers ------------------------------------------------------------------------------------------------

    def _tuple1(self, _: Any) -> None:
        self._stack.append(tuple(self._take(1)))

    def _tuple2(self, _: Any) -> None:
        self._stack.append(tuple(self._take(2)))

    def _tuple3(self, _: Any) -> None:
        self._stack.append(tuple(self._take(3)))

    def _tuple(self, _: Any) -> None:
        self._stack.append(tuple(self._marked()))

    def _list(self, _: Any) -> None:
        self._stack.append(self._marked())

    def _dict(self, _: Any) -> None:
        items = self._marked()
        self._stack.append({})
        self._set_all(items)

    def _append(self, _: Any) -> None:
        self._extend(self._take(1))

    def _appends(self, _: Any) -> None:
        self._extend(self._marked())

    def _extend(self, items: list[Any]) -> None:
        if isinstance(self._stack[-1], list):
            self._stack[-1].extend(items)

    def _setitem(self, _: Any) -> None:
        self._set_all(self._take(2))

    def _setitems(self, _: Any) -> None:
        self._set_all(self._marked())

    def _set_all(self, items: list[Any]) -> None:
        """A stub takes no items: whatever it stood for is not there."""
        target = self._stack[-1]
        if len(items) % 2:
            raise InertError("a key has no value")
        if isinstance(target, dict):
            for key, value in zip(items[::2], items[1::2], strict=True):
                require_key(key)
                target[key] = value

    def _additems(self, _: Any) -> None:
        items = self._marked()
        if isinstance(self._stack[-1], set):
            for each in items:
                require_key(each)
                self._stack[-1].add(each)

    def _frozenset(self, _: Any) -> None:
        items = self._marked()
        for each in items:
            require_key(each)
        self._stack.append(frozenset(items))

    # -- what a pickle asks for ------------------------------------------------------------------------------------

    def _global(self, argument: Any) -> None:
        module, _, name = str(argument).partition(" ")
        self._stack.append(self._named(module, name))

    def _stack_global(self, _: Any) -> None:
        module, name = self._take(2)
        if not isinstance(module, str) or not isinstance(name, str):
            raise InertError("a name is no text")
        self._stack.append(self._named(module, name))

    def _count(self, *given: object) -> None:
        """Copies are made of what a call takes; a memo gives the same to many calls for few bytes."""
        self._taken += sum(len(each) for each in given if isinstance(each, _SIZED))
        if self._taken > _FREE_MADE + _MAX_MADE_RATIO * self._source.given():
            raise InertError("the pickle asks for far more than it holds")

    def _named(self, module: str, name: str) -> Any:
        self._count(module, name)
        full = f"{module}.{name}"
        return DTYPES.get(full) or Stub(full if full.isprintable() else ascii(full))

    def _reduce(self, _: Any) -> None:
        function, arguments = self._take(2)
        self._stack.append(self._made(function, arguments))

    def _newobj(self, _: Any) -> None:
        self._reduce(None)

    def _newobj_ex(self, _: Any) -> None:
        function, arguments, _ = self._take(3)
        self._stack.append(self._made(function, arguments))

    def _inst(self, argument: Any) -> None:
        module, _, name = str(argument).partition(" ")
        self._stack.append(self._made(self._named(module, name), tuple(self._marked())))

    def _obj(self, _: Any) -> None:
        function, *arguments = self._marked()
        self._stack.append(self._made(function, tuple(arguments)))

    def _build(self, _: Any) -> None:
        (state,) = self._take(1)
        if isinstance(state, tuple):
            self._count(*state)
        fill(self._stack[-1], state)

    def _made(self, function: object, arguments: object) -> Any:
        if not isinstance(function, Stub):
            raise InertError(f"the pickle calls a {type(function).__name__}")
        if isinstance(arguments, tuple):
            self._count(*arguments)
        builder = BUILDERS.get(function.name)
        made = builder(arguments) if builder is not None and isinstance(arguments, tuple) else NotImplemented
        if made is not NotImplemented:
            return made
        if len(self.asked) < _MAX_ASKED:
            self.asked[function.name] = None
        return Stub(function.name)

    def _persid(self, argument: Any) -> None:
        if self._persistent is None:
            raise InertError("the pickle names storages that are not there")
        self._stack.append(self._persistent(argument))

    def _binpersid(self, _: Any) -> None:
        self._persid(self._take(1)[0])


_SIZED = (str, bytes, bytearray, list, tuple, dict, set, frozenset)
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_DICT": dict, "EMPTY_SET": set}
_PUSHES = frozenset(
    {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"}
    | {"STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
    | {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}
)
