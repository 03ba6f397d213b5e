"""Checkpoints of ``torch.save`` opened without running what they hold: both file formats, storages read when wanted.

The pickle is read by :class:`vlexport.frontends.inert_pickle.InertUnpickler`, so a training checkpoint with a
namespace, an optimizer or a malicious reducer inside gives its tensors and nothing else. Elements are read from the
file for the tensors that are asked for, once a storage, so that optimizer states cost no memory.

Source: torch.serialization, ``_save`` (zip) and ``_legacy_save``.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from vlexport.frontends.inert_pickle import InertUnpickler
from vlexport.frontends.inert_values import (
    STORAGE_TYPES,
    InertError,
    Storage,
    StoredArray,
    StoredTensor,
    Stub,
)

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_CHUNK = 16 * 2**20
_MAX_HEADER = 2**20
_ENCRYPTED = 0x1
_ZIP_ERRORS = (zipfile.BadZipFile, LookupError, NotImplementedError, OSError, RuntimeError, ValueError)


class InertCheckpoint:
    """An opened checkpoint.

    Attributes:
        content: What was pickled: containers, numbers, text, :class:`StoredTensor`, :class:`StoredArray` and stubs.
        asked: Names of what the file asked for and did not get.
    """

    def __init__(self, content: Any, asked: tuple[str, ...], read: Callable[[Storage], Tensor]) -> None:
        self.content = content
        self.asked = asked
        self._read = read
        self._storages: dict[str, Tensor] = {}

    def tensor(self, value: Tensor | StoredTensor | StoredArray) -> Tensor:
        """The tensor itself; tensors of one storage share memory, as they did when they were saved.

        Raises:
            InertError: The file does not hold its bytes.
        """
        if isinstance(value, Tensor):
            return value
        if isinstance(value, StoredArray):
            if value.array is None:
                raise InertError("a numpy array has no content")
            return torch.from_numpy(value.array)
        key = value.storage.key
        if key not in self._storages:
            self._storages[key] = self._read(value.storage)
        held = self._storages[key]
        if held.numel() < value.storage.size_bytes:
            raise InertError(f"storage {key[:40]!r} is said to be of two sizes, one larger than it is")
        whole = held[: held.numel() // value.dtype.itemsize * value.dtype.itemsize].view(value.dtype)
        return whole.as_strided(value.shape, value.stride, value.offset)


def read_inert(path: Path) -> InertCheckpoint:
    """Open a checkpoint: ``torch.save``'s zip, its older format, or a plain pickle.

    Raises:
        InertError: Damaged, or not of these forms.
    """
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
    return _from_zip(path) if is_zip else _from_stream(path)


def _storage(persistent_id: object) -> Storage | Stub:
    """``("storage", type, key, location, elements[, view])``; a view of another storage is left out."""
    if not isinstance(persistent_id, tuple) or len(persistent_id) not in (5, 6) or persistent_id[0] != "storage":
        raise InertError("a persistent id is no storage")
    kind, key, count, view = persistent_id[1], persistent_id[2], persistent_id[4], persistent_id[5:]
    if not isinstance(kind, Stub) or type(key) is not str or type(count) is not int or count < 0:
        raise InertError("a storage's persistent id is damaged")
    if kind.name not in STORAGE_TYPES or (view and view[0] is not None):
        return Stub(kind.name)
    dtype = STORAGE_TYPES[kind.name]
    return Storage(key, dtype, count * (1 if dtype is None else dtype.itemsize))


def _bytes_of(file: BinaryIO, count: int) -> Tensor:
    """The next ``count`` bytes of a file, in memory of torch's own."""
    held = torch.empty(count, dtype=torch.uint8)
    view, done = held.numpy().data, 0
    while done < count:
        chunk = file.read(min(_CHUNK, count - done))
        if not chunk:
            raise InertError("the file ends inside a tensor")
        view[done : done + len(chunk)] = chunk
        done += len(chunk)
    return held


# -- zip ---------------------------------------------------------------------------------------------------------------


def _from_zip(path: Path) -> InertCheckpoint:
    try:
        with zipfile.ZipFile(path) as archive:
            members = _members(archive, path.stat().st_size)
            unpickler = InertUnpickler(_storage)
            with archive.open(members["data.pkl"]) as file:
                content = unpickler.load(file)  # type: ignore[arg-type]
            if "byteorder" in members and archive.read(members["byteorder"]).strip() != b"little":
                raise InertError("its numbers are stored with the highest byte first")
    except InertError:
        raise
    except _ZIP_ERRORS as error:
        raise InertError(str(error)) from error

    def read(storage: Storage) -> Tensor:
        info = members.get(f"data/{storage.key}")
        if info is None or info.file_size < storage.size_bytes:
            raise InertError(f"the file does not hold the {storage.size_bytes} bytes of storage {storage.key[:40]!r}")
        try:
            with zipfile.ZipFile(path) as archive, archive.open(info) as file:
                return _bytes_of(file, info.file_size)  # type: ignore[arg-type]
        except _ZIP_ERRORS as error:
            raise InertError(str(error)) from error

    return InertCheckpoint(content, tuple(unpickler.asked), read)


def _members(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """Name below the common folder → member; all stored, unique, and together no larger than the file.

    Members that overlap or unpack to more than they are would fill memory from a small file.
    """
    found: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        name = info.filename.partition("/")[2]
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & _ENCRYPTED:
            raise InertError("its members are compressed; torch stores them as they are")
        if name in found:
            raise InertError("two members have the same name")
        found[name] = info
    if min((info.header_offset for info in found.values()), default=0):
        raise InertError("it is truncated, or bytes precede it")
    if sum(info.file_size for info in found.values()) > size:
        raise InertError("its members claim more bytes than the file has")
    if "data.pkl" not in found:
        raise InertError("it has no data.pkl")
    if found.get("byteorder", found["data.pkl"]).file_size > size:
        raise InertError("its byte order is no word")
    return found


# -- the older format, and plain pickles -------------------------------------------------------------------------------


def _from_stream(path: Path) -> InertCheckpoint:
    """Pickles one after another: magic number, protocol, the writer's machine, content, keys; then the storages."""
    storages: dict[str, Storage] = {}

    def persistent(persistent_id: object) -> Storage | Stub:
        made = _storage(persistent_id)
        return storages.setdefault(made.key, made) if isinstance(made, Storage) else made

    unpickler = InertUnpickler(persistent)
    try:
        with path.open("rb") as file:
            first = unpickler.load(file)
            if type(first) is not int or first != _LEGACY_MAGIC:
                return InertCheckpoint(first, tuple(unpickler.asked), _nowhere)
            for _ in range(2):
                unpickler.load(file, limit=_MAX_HEADER)
            content = unpickler.load(file)
            keys = unpickler.load(file)
            places = _places(file, keys, storages, path.stat().st_size)
    except OSError as error:
        raise InertError(str(error)) from error

    def read(storage: Storage) -> Tensor:
        if storage.key not in places:
            raise InertError(f"the file does not hold storage {storage.key[:40]!r}")
        with path.open("rb") as file:
            file.seek(places[storage.key])
            return _bytes_of(file, storage.size_bytes)

    return InertCheckpoint(content, tuple(unpickler.asked), read)


def _places(file: BinaryIO, keys: object, storages: dict[str, Storage], size: int) -> dict[str, int]:
    """Key → where its bytes begin; each storage's come behind its count of elements, in the order of ``keys``."""
    if not isinstance(keys, list):
        raise InertError("the keys of its storages are no list")
    places: dict[str, int] = {}
    position = file.tell()
    for key in keys:
        storage = storages.get(key) if isinstance(key, str) else None
        if storage is None or key in places:
            break  # of a type that is not known, so where the next begins is not known either
        file.seek(position)
        count = int.from_bytes(file.read(8), "little")
        width = 1 if storage.dtype is None else storage.dtype.itemsize
        if count * width != storage.size_bytes or position + 8 + storage.size_bytes > size:
            raise InertError("the file ends before its tensors do")
        places[key] = position + 8
        position += 8 + storage.size_bytes
    return places


def _nowhere(storage: Storage) -> Tensor:
    raise InertError(f"a plain pickle does not hold storage {storage.key[:40]!r}")
