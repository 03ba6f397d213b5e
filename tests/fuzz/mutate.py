"""Mutators: bytes in, other bytes out. All chance comes from the generator that is handed in.

Blind ones work on any file. Those that know a format keep what a reader checks first (lengths, checksums, the
directory of a zip), so that the mutation reaches what lies behind.
"""

from __future__ import annotations

import io
import json
import lzma
import random
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from typing import Any

Mutator = Callable[[bytes, random.Random], bytes]

HOSTILE_TEXTS = (
    "<img src=x onerror=alert(1)>",
    "[red]x[/red]",
    "\x1b]0;title\x07\x1b[31m",
    "\u202egnp.exe",
    "a\nerror VLX0000: forged",
    "a\r\nb",
    "\x00",
    "\ud800",
    "../../etc/passwd",
    "/etc/passwd",
    "C:\\x",
    "CON",
    "x" * 5000,
    "",
    "os.system",
    "__import__('os')",
)
HOSTILE_VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    2**31,
    2**63,
    2**64,
    -(2**63) - 1,
    10**400,
    1e308,
    float("nan"),
    float("inf"),
    [],
    {},
    [[]],
    {"": None},
    *HOSTILE_TEXTS,
)
_BYTES = (
    b"\x00",
    b"\xff",
    b"\x80",
    b"\x7f",
    b"\xff\xff\xff\xff",
    b"\x00\x00\x00\x80",
    b"\xff\xff\xff\xff\xff\xff\xff\x7f",
)


def flip_bits(data: bytes, chance: random.Random) -> bytes:
    """One to eight bits turned."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 8))):
        if changed:
            changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def truncate(data: bytes, chance: random.Random) -> bytes:
    """Cut at the end, or at the beginning."""
    at = chance.randrange(len(data) + 1)
    return data[:at] if chance.random() < 0.8 else data[at:]


def overwrite(data: bytes, chance: random.Random) -> bytes:
    """A few bytes that numbers at their limits consist of, put over others or between them."""
    at, value = chance.randrange(len(data) + 1), chance.choice(_BYTES)
    return data[:at] + value + data[at + (len(value) if chance.random() < 0.7 else 0) :]


def move_span(data: bytes, chance: random.Random) -> bytes:
    """A span deleted, repeated or put elsewhere."""
    start = chance.randrange(len(data) + 1)
    stop = min(len(data), start + chance.choice((1, 4, 16, 256, 4096)))
    span, rest = data[start:stop], data[:start] + data[stop:]
    kind, at = chance.randrange(3), chance.randrange(len(rest) + 1)
    return rest if kind == 0 else data[:stop] + span * 3 + data[stop:] if kind == 1 else rest[:at] + span + rest[at:]


def splice_with(others: Sequence[bytes]) -> Mutator:
    """The head of a file with the tail of another."""

    def splice(data: bytes, chance: random.Random) -> bytes:
        other = chance.choice(others)
        return data[: chance.randrange(len(data) + 1)] + other[chance.randrange(len(other) + 1) :]

    return splice


BLIND: tuple[Mutator, ...] = (flip_bits, truncate, overwrite, move_span)


def blind(data: bytes, chance: random.Random) -> bytes:
    """Any of the blind mutators."""
    return chance.choice(BLIND)(data, chance)


# -- JSON and TOML -----------------------------------------------------------------------------------------------------


def _places(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in pairs:
        found.append((value, key))
        _places(item, found)
    return found


def edit_json(data: bytes, chance: random.Random) -> bytes:
    """A value of a JSON document replaced, removed, renamed, repeated or nested without end."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return blind(data, chance)
    places = _places(document, [])
    if not places:
        return blind(data, chance)
    holder, key = chance.choice(places)
    kind = chance.randrange(7)
    if kind == 0 and isinstance(holder, dict):
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[chance.choice(HOSTILE_TEXTS)] = holder.pop(key)
    elif kind == 2 and isinstance(holder, list):
        holder *= 3
    elif kind == 3:
        other, name = chance.choice(places)
        holder[key] = json.loads(json.dumps(other[name])) if name in _keys(other) else None
    else:
        holder[key] = chance.choice(HOSTILE_VALUES)
    text = _dumped(document)
    if kind == 4:
        text = text.replace("null", "[" * 100_000, 1)
    elif kind == 5 and '":' in text:
        at = text.index('":', chance.randrange(text.rindex('":') + 1)) + 2
        begin = text.rindex('"', 0, at - 2)
        text = text[:begin] + text[begin:at] + "1," + text[begin:]
    return text.encode("utf-8", "surrogatepass")


def _keys(holder: Any) -> Any:
    return holder.keys() if isinstance(holder, dict) else range(len(holder))


def _dumped(document: Any) -> str:
    try:
        return json.dumps(document)
    except (ValueError, RecursionError):  # an integer of more digits than Python prints
        return "[" * 100_000


_TOML_VALUES = (
    "9" * 5000,
    "1e400",
    "nan",
    "inf",
    "-1",
    "true",
    "[" * 50_000,
    "{a=" * 5_000,
    '"\\u0000"',
    '"../x"',
    '"arch.py:make"',
    '"timm:hf-hub:a/b"',
    '"""' + "x" * 70_000 + '"""',
    "1979-05-27T07:32:00Z",
    "0x" + "f" * 400,
    '["a", 1, {}]',
)


def edit_toml(data: bytes, chance: random.Random) -> bytes:
    """A line of a TOML document with another value, repeated, removed, or a key of every table that there is not."""
    lines = data.decode("utf-8", "replace").splitlines()
    at = chance.randrange(len(lines)) if lines else 0
    key = lines[at].partition("=")[0].strip() if lines else "a"
    kind = chance.randrange(5)
    if kind == 0:
        lines.insert(at, lines[at] if lines else "")
    elif kind == 1 and lines:
        del lines[at]
    elif kind == 2:
        lines.insert(at, f"{chance.choice(('allow_code', 'metric', 'arch', 'data', 'a.b.c', key))} = true")
    elif kind == 3:
        lines.append("[" + ".".join(["a"] * chance.choice((1, 100, 5000))) + "]")
    else:
        lines[at : at + 1] = [f"{key or 'a'} = {chance.choice(_TOML_VALUES)}"]
    return "\n".join(lines).encode("utf-8", "replace")


def edit_lines(data: bytes, chance: random.Random) -> bytes:
    """One line of a ``.jsonl``, as :func:`edit_json`."""
    lines = data.split(b"\n")
    at = chance.randrange(len(lines))
    lines[at] = edit_json(lines[at], chance)
    return b"\n".join(lines)


# -- containers --------------------------------------------------------------------------------------------------------

UNPACKABLE = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    NotImplementedError,
    OSError,
    RuntimeError,
    ValueError,
)
_NAMES = ("../x", "/x", "a/../../x", "a\\..\\x", "CON", "", "x" * 300, "\u202ex", "archive/data.pkl", "x.npy", "a\0b")


def edit_zip(inner: Mutator) -> Mutator:
    """A zip written anew, checksums right, with one member changed, renamed, doubled, dropped or compressed."""

    def edit(data: bytes, chance: random.Random) -> bytes:
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                members = [(each.filename, archive.read(each)) for each in archive.infolist()]
        except UNPACKABLE:
            return blind(data, chance)
        if not members:
            return blind(data, chance)
        at, kind, method = chance.randrange(len(members)), chance.randrange(10), zipfile.ZIP_STORED
        name, content = members[at]
        if kind == 0:
            members[at] = (chance.choice(_NAMES), content)
        elif kind == 1:
            members.insert(chance.randrange(len(members)), (name, inner(content, chance)))
        elif kind == 2:
            del members[at]
        elif kind == 3:
            method = chance.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
        else:
            members[at] = (name, inner(content, chance))
        made = io.BytesIO()
        with zipfile.ZipFile(made, "w", method) as archive:
            for each, content in members:
                archive.writestr(zipfile.ZipInfo(each or "x"), content, method)
        return made.getvalue()

    return edit


def edit_member(data: bytes, chance: random.Random) -> bytes:
    """A member by what it looks like: JSON, an array of numpy, or bytes."""
    if data[:1] in (b"{", b"["):
        return edit_json(data, chance)
    return edit_npy(data, chance) if data.startswith(b"\x93NUMPY") else blind(data, chance)


_SHAPES = ("()", "(0,)", "(-1,)", "(1000000000000,)", "(99999999999999999999,)", "('a',)", "(1.5,)", "None", "(" * 90)
_DESCRS = ("|O", "<f4", "<U9999999", "|V0", "<m8[s]", "nonsense", "f4,f4", "[('a','<f4')]")


def edit_npy(data: bytes, chance: random.Random) -> bytes:
    """The header of a ``.npy``: another shape, dtype or order, its length kept right."""
    if len(data) < 12 or chance.random() < 0.2:
        return blind(data, chance)
    length = int.from_bytes(data[8:10], "little")
    header = data[10 : 10 + length].decode("latin-1")
    kind, begin, end = chance.randrange(4), header.find("'shape':"), header.rfind(")")
    if kind == 0 and begin >= 0:
        header = f"{header[:begin]}'shape': {chance.choice(_SHAPES)}, }}"
    elif kind == 1 and end >= 0:
        header = f"{{'descr': {chance.choice(_DESCRS)!r}, 'fortran_order': False, {header[begin:]}"
    elif kind == 2:
        header = header.replace("False", chance.choice(("True", "1", "__import__('os')", "[" * 3000)))
    else:
        return data[:10] + blind(data[10:], chance)
    text = header.encode("latin-1", "replace")
    return data[:8] + min(len(text), 65535).to_bytes(2, "little") + text + data[10 + length :]


def edit_safetensors(data: bytes, chance: random.Random) -> bytes:
    """The header's JSON, its length kept right, or the length itself."""
    length = int.from_bytes(data[:8], "little")
    if chance.random() < 0.15:
        return chance.choice((0, 1, length + 1, 2**63, 2**64 - 1, len(data))).to_bytes(8, "little") + data[8:]
    header = edit_json(data[8 : 8 + length], chance)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def edit_png(data: bytes, chance: random.Random) -> bytes:
    """A chunk of a PNG changed, its checksum right."""
    if not data.startswith(b"\x89PNG"):
        return blind(data, chance)
    chunks, at = [], 8
    while at + 12 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += 12 + size
    if not chunks:
        return blind(data, chance)
    at = chance.choice((0, chance.randrange(len(chunks))))
    kind, content = chunks[at]
    if kind == b"IHDR" and len(content) == 13 and chance.random() < 0.7:
        width, height = (chance.choice((0, 1, 9, 60_000, 2**31 - 1, 2**32 - 1)) for _ in range(2))
        content = struct.pack(">II", width, height) + content[8:]
    else:
        content = blind(content, chance)
    chunks[at] = (
        kind if chance.random() < 0.9 else chance.choice((b"tRNS", b"PLTE", b"acTL", b"eXIf", b"zTXt")),
        content,
    )
    return data[:8] + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )
