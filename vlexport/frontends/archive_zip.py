"""The container of a ``.pt2`` file: a zip of stored members under one stem, read strictly and written reproducibly.

Two readers of one zip may disagree (names in the local header and in the directory, bytes in front, members that
overlap), so a checked file is never handed on as it is: whoever needs an archive gets one that
:func:`write_members` made anew from the members that were checked.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from typing import BinaryIO

import torch

from vlexport.core.errors import ModelFileError
from vlexport.frontends.model_file import ZIP_ERRORS

SERIALIZATION_ID = ".data/serialization_id"
"""A member that torch may fill at random and never needs: neither hashed nor written."""

_EPOCH = (1980, 1, 1, 0, 0, 0)
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_DESCRIPTOR_BIT, _UTF8_BIT = 0x8, 0x800
_DESCRIPTOR_SIZES = (12, 16, 20, 24)  # CRC and two sizes of 4 or 8 bytes, with or without a signature


def refused(message: str, where: str) -> ModelFileError:
    """The archive holds something that a file of ours never holds."""
    return ModelFileError(
        "VLX0106", message, where=where, hint="do not open this file; ask its author for one written by vlexport.save"
    )


def damaged(message: str, where: str = "") -> ModelFileError:
    """The archive is not whole."""
    return ModelFileError("VLX0105", message, where=where, hint="copy or download the file again")


_Part = Callable[[int, int], memoryview]
"""Bytes from one position to another, fewer at the end."""


def _part_of_file(file: BinaryIO) -> _Part:
    """Parts of a file, each read once into memory of its own; what a check saw cannot change under its reader.

    The memory is torch's, so that a tensor may lie in it: weights are in memory once.
    """
    end = os.fstat(file.fileno()).st_size

    def part(start: int, stop: int) -> memoryview:
        start, stop = max(0, min(start, end)), max(0, min(stop, end))
        read = torch.empty(max(0, stop - start), dtype=torch.uint8).numpy().data
        file.seek(start)
        done = 0
        while done < len(read) and (found := file.readinto(read[done:])):  # type: ignore[attr-defined]
            done += found
        return read[:done]

    return part


def read_members(data: bytes | memoryview | BinaryIO) -> dict[str, memoryview]:
    """Every member of a zip, by its name without the common stem.

    Args:
        data: A zip in memory, of which nothing is copied, or an open file.

    Raises:
        ModelFileError: VLX0104 not a zip, VLX0105 truncated or damaged, VLX0106 a member that is compressed,
            duplicated, of an escaping name, or bytes that belong to no member.
    """
    if isinstance(data, bytes | bytearray | memoryview):
        view = memoryview(data)
        return _members(io.BytesIO(data), lambda start, stop: view[start:stop], len(view))
    return _members(data, _part_of_file(data), os.fstat(data.fileno()).st_size)


def _members(file: BinaryIO, part: _Part, size: int) -> dict[str, memoryview]:
    if bytes(part(0, 4)) != b"PK\x03\x04":
        raise ModelFileError("VLX0104", "the file is no .pt2 archive: it does not begin as a zip does")
    try:
        with zipfile.ZipFile(file) as archive:
            infos, directory_start, comment = archive.infolist(), archive.start_dir, archive.comment
    except ZIP_ERRORS as error:
        raise damaged(f"the archive is truncated or damaged: {error}") from error
    if comment or bytes(part(max(0, size - 22), max(0, size - 18))) != b"PK\x05\x06":
        raise damaged("the archive is truncated, or bytes follow its end")
    if not infos:
        raise damaged("the archive has no members")

    members: dict[str, memoryview] = {}
    stem = infos[0].filename.partition("/")[0]
    position = 0
    ordered = sorted(infos, key=lambda each: each.header_offset)
    for info, following in zip(ordered, [*(each.header_offset for each in ordered[1:]), directory_start], strict=True):
        name = _checked_name(info, stem)
        if name in members:
            raise refused("two members have the same name", name)
        start, after = _payload(part, info, position)
        content = part(start, start + info.file_size)
        if len(content) != info.file_size or zlib.crc32(content) != info.CRC:
            raise damaged("a member's checksum is wrong", name)
        members[name] = content
        gaps = _DESCRIPTOR_SIZES if info.flag_bits & _DESCRIPTOR_BIT else (0,)
        if following - after not in gaps:
            raise refused("members overlap, or bytes between them belong to none", name)
        position = following
    return members


def _checked_name(info: zipfile.ZipInfo, stem: str) -> str:
    full = info.orig_filename
    head, _, name = full.partition("/")
    parts = name.split("/")
    if "\\" in full or not full.isprintable() or head in ("", ".", "..") or any(p in ("", ".", "..") for p in parts):
        raise refused("a member's name is absolute, leaves the archive or is no file name", repr(full))
    if full != info.filename or head != stem:
        raise refused("the members do not lie under one common stem", repr(full))
    if info.flag_bits & ~(_DESCRIPTOR_BIT | _UTF8_BIT):
        raise refused("a member is encrypted or of a form that torch never writes", name)
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        raise refused("a member is compressed; model files store their members as they are", name)
    return name


def _payload(part: _Part, info: zipfile.ZipInfo, expected_offset: int) -> tuple[int, int]:
    """Where the member's bytes begin and end, after its local header was compared with the directory."""
    where = info.filename
    if expected_offset == 0 and info.header_offset:
        raise damaged("the archive is truncated, or bytes precede it")
    if info.header_offset != expected_offset:
        raise refused("members overlap, or bytes between them belong to none", where)
    try:
        magic, _, flags, method, _, _, _, _, _, name_length, extra_length = _LOCAL_HEADER.unpack(
            part(info.header_offset, info.header_offset + _LOCAL_HEADER.size)
        )
    except struct.error as error:
        raise damaged("the archive is truncated", where) from error
    name_start = info.header_offset + _LOCAL_HEADER.size
    start = name_start + name_length + extra_length
    local_name = bytes(part(name_start, name_start + name_length))
    if magic != b"PK\x03\x04" or local_name != info.filename.encode("utf-8", "replace"):
        raise damaged("a member's header does not agree with the archive's directory", where)
    if flags != info.flag_bits or method != info.compress_type:
        raise damaged("a member's header does not agree with the archive's directory", where)
    return start, start + info.file_size


def write_members(members: Mapping[str, bytes | memoryview], *, stem: str = "model") -> bytes:
    """A zip of these members: stored, sorted, dated 1980-01-01, so that equal members give equal bytes."""
    buffer = io.BytesIO()
    write_members_to(buffer, members, stem=stem)
    return buffer.getvalue()


def write_members_to(file: BinaryIO, members: Mapping[str, bytes | memoryview], *, stem: str = "model") -> None:
    """:func:`write_members` into an open file."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(members):
            if name == SERIALIZATION_ID:
                continue
            info = zipfile.ZipInfo(f"{stem}/{name}", _EPOCH)
            info.external_attr = 0o644 << 16
            info.create_system = 3
            info.file_size = memoryview(members[name]).nbytes
            with archive.open(info, "w") as member:
                member.write(members[name])
