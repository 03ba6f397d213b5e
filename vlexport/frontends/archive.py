"""Model archives (``.pt2``) read without trusting them, and written so that this reader accepts them.

``torch.export.load`` runs code that a file brings: it unpickles, evaluates shape strings, executes source made of
names in the file and imports modules that the file mentions. :func:`read_archive` therefore checks every byte first
(container, JSON by a closed schema, pickles by a closed list of opcodes and globals) and gives torch an archive
rebuilt from what was checked, never the file.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import pickletools
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.export import ExportedProgram

from vlexport.core.errors import BundleError, ModelFileError
from vlexport.frontends.archive_rules import DTYPE_BYTES, SCHEMA_MAJOR, check, strict_json
from vlexport.frontends.archive_zip import (
    SERIALIZATION_ID,
    damaged,
    read_members,
    refused,
    write_members,
    write_members_to,
)
from vlexport.frontends.compat import LOAD_ERRORS, load_program
from vlexport.frontends.model_file import METADATA_MEMBER, require_model_file
from vlexport.ir.quant_form import problem

ARCHIVE_SCHEMA = 1
"""The version of ``vlexport.json`` that this release writes, and the latest that it reads."""

PROGRAM, SAMPLES = "models/model.json", "data/sample_inputs/model.pt"
WEIGHTS, CONSTANTS = "data/weights/model_weights_config.json", "data/constants/model_constants_config.json"
_WEIGHTS_FOLDER = WEIGHTS.rpartition("/")[0]
MAX_PROGRAM_BYTES = 256 * 2**20
MAX_CONFIG_BYTES = 64 * 2**20
MAX_METADATA_BYTES = 16 * 2**20
MAX_PICKLE_BYTES = 2**20
MAX_EXPANDED_BYTES = 64 * 2**20
"""What strides of 0 may add to a tensor beyond its content: buffers are sometimes saved expanded."""

_FIXED = {"archive_format": b"pt2", "archive_version": b"0", "byteorder": b"little"}
_NEEDED = frozenset({PROGRAM, SAMPLES, WEIGHTS, CONSTANTS, METADATA_MEMBER, *_FIXED, ".data/version"})
_KNOWN = re.compile(r"data/weights/weight_\d{1,6}|data/constants/tensor_\d{1,6}")
_DIGITS = re.compile(rb"\d{1,3}\n?")
_SAMPLE_MEMBERS = re.compile(r"data\.pkl|byteorder|version|\.format_version|\.storage_alignment|data/\d{1,6}")

# What torch.save writes for tensors in tuples, lists and dicts, and nothing that calls or builds anything else.
_OPCODES = frozenset(
    {"PROTO", "FRAME", "STOP", "MARK", "MEMOIZE", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"}
    | {"GLOBAL", "REDUCE", "BINPERSID"}
    | {"EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "APPEND", "APPENDS"}
    | {"EMPTY_DICT", "SETITEM", "SETITEMS"}
    | {"NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"}
    | {"BINUNICODE", "SHORT_BINUNICODE"}
)
_STORAGES = frozenset(
    {"Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool"}
    | {"ComplexFloat", "ComplexDouble"}
)
_GLOBALS = frozenset(
    {"torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter", "collections OrderedDict"}
    | {f"torch {name}Storage" for name in _STORAGES}
)


@dataclass(frozen=True)
class GuardedArchive:
    """A checked archive.

    Attributes:
        metadata: ``vlexport.json``, parsed.
        source_hash: SHA-256 over names and contents of the members; independent of the file's own name.

    An archive that was read from a file holds every weight in memory once; programs made from it share that memory.
    """

    metadata: dict[str, Any]
    source_hash: str
    _members: Mapping[str, bytes | memoryview] = field(repr=False)

    def exported_program(self) -> ExportedProgram:
        """Rebuild the program; each call makes a new one.

        torch's own reader gets one element in place of each weight's content, and would copy the whole.

        Raises:
            ModelFileError: VLX0105, the checked content does not make a program.
        """
        try:
            exported = load_program(write_members(_without_weights(self._members)))
            _restore_weights(exported, self._members)
        except LOAD_ERRORS as error:
            reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
            raise damaged(f"torch cannot rebuild the program: {reason[0]}", PROGRAM) from error
        for module in exported.graph_module.modules():
            for node in getattr(module, "graph", exported.graph).nodes:
                if why := problem(node):
                    raise damaged(f"{node.name} cannot be computed: {why}", PROGRAM)
        return exported


def read_archive(path: Path) -> GuardedArchive:
    """Read and check a model archive; torch does not see it before :meth:`GuardedArchive.exported_program`.

    Raises:
        ModelFileError: VLX0101 missing, VLX0102 directory, VLX0103 empty, VLX0104 no ``.pt2``, VLX0105 damaged,
            VLX0106 refused, VLX0111 of a later version, VLX0112 not written by ``vlexport.save``.
    """
    require_model_file(path)
    try:
        with path.open("rb") as file:
            return check_archive(file)
    except ModelFileError as error:
        error.where = error.where or str(path)
        raise


def check_archive(data: bytes | BinaryIO) -> GuardedArchive:
    """:func:`read_archive` for bytes in memory, or an open file."""
    members = read_members(data)
    if bytes(members.get("archive_format", b"")) != b"pt2":
        raise ModelFileError(
            "VLX0104",
            "the file is an archive, but no .pt2",
            hint="a checkpoint of weights opens with --arch; vlexport.save writes model archives",
        )
    if METADATA_MEMBER not in members:
        raise ModelFileError(
            "VLX0112",
            "the file is a .pt2 that vlexport.save did not write",
            hint="only files written by vlexport.save open without consent; save the model with it",
        )
    return check_members(members)


def check_members(members: Mapping[str, memoryview]) -> GuardedArchive:
    """:func:`read_archive` for members that were read already.

    Raises:
        ModelFileError: VLX0105, VLX0106, VLX0111.
    """
    metadata = _metadata(members[METADATA_MEMBER])
    _check_names(members)
    program = strict_json(members[PROGRAM], PROGRAM, MAX_PROGRAM_BYTES)
    _check_version(program)
    check("program", program, PROGRAM)
    used = _check_payloads(members, WEIGHTS, "data/weights/weight_") | _check_payloads(
        members, CONSTANTS, "data/constants/tensor_"
    )
    if unused := sorted(name for name in members if _KNOWN.fullmatch(name) and name not in used):
        raise refused("no tensor of the model lies in this member", unused[0])
    checked: dict[str, bytes | memoryview] = {**members, SAMPLES: _checked_samples(members[SAMPLES])}
    return GuardedArchive(metadata, _source_hash(members), checked)


def write_archive(ep: ExportedProgram, metadata: Mapping[str, Any], path: Path) -> None:
    """Write a program and its ``vlexport.json`` so that equal models give equal bytes and no byte names this machine.

    The result passes :func:`check_archive` before it replaces ``path``, in one step.

    Raises:
        ModelFileError: VLX0106, the program holds something that the reader refuses.
        BundleError: VLX0607, the file cannot be written.
    """
    text = json.dumps({**metadata, "schema": ARCHIVE_SCHEMA}, sort_keys=True, allow_nan=False, indent=1)
    buffer = io.BytesIO()
    torch.export.save(ep, buffer, extra_files={METADATA_MEMBER.removeprefix("extra/"): text})
    members = stripped_members(read_members(buffer.getvalue()))
    try:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            with temporary.open("xb") as file:
                write_members_to(file, members)
                file.flush()
                os.fsync(file.fileno())
            del members, buffer  # a large model would be in memory a third time
            with temporary.open("rb") as file:
                check_archive(file)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise BundleError(
            "VLX0607", f"the model cannot be written: {error.strerror}", where=str(path), hint="check the folder"
        ) from error


def strip_paths(data: bytes) -> bytes:
    """Rewrite what ``torch.export.save`` wrote: no absolute paths, no guards, no random id, fixed order and dates."""
    return write_members(stripped_members(read_members(data)))


def stripped_members(members: Mapping[str, bytes | memoryview]) -> dict[str, bytes | memoryview]:
    """The members without what names a machine or would run; of a stranger's file, not a check of what is left."""
    members = dict(members)
    program = json.loads(bytes(members[PROGRAM]))
    program["guards_code"] = []
    _strip_graph(program["graph_module"]["graph"])
    members[PROGRAM] = json.dumps(program, separators=(",", ":")).encode()
    members[SAMPLES] = write_members(read_members(members[SAMPLES]), stem="archive")
    return members


def _without_weights(members: Mapping[str, bytes | memoryview]) -> dict[str, bytes | memoryview]:
    """The members, with one element in place of each weight's content: strides of 0 make it a tensor of any shape."""
    spared = dict(members)
    weights = json.loads(bytes(members[WEIGHTS]))
    for payload in weights["config"].values():
        meta, member = payload["tensor_meta"], f"{_WEIGHTS_FOLDER}/{payload['path_name']}"
        spared[member] = bytes(DTYPE_BYTES[meta["dtype"]]) if len(members[member]) else b""
        if spared[member]:
            meta["strides"] = [{"as_int": 0} for _ in meta["sizes"]]
            meta["storage_offset"] = {"as_int": 0}
    spared[WEIGHTS] = json.dumps(weights).encode()
    return spared


def _restore_weights(exported: ExportedProgram, members: Mapping[str, bytes | memoryview]) -> None:
    """Put tensors that lie in the members in place of what :func:`_without_weights` left; tied ones stay tied."""
    stored: dict[str, torch.Tensor] = {}
    for name, payload in json.loads(bytes(members[WEIGHTS]))["config"].items():
        left, meta, member = exported.state_dict[name], payload["tensor_meta"], payload["path_name"]
        content = memoryview(members[f"{_WEIGHTS_FOLDER}/{member}"])
        if not len(content):
            continue
        if member not in stored:
            stored[member] = torch.frombuffer(bytearray(content) if content.readonly else content, dtype=left.dtype)
        sizes, strides = ([each["as_int"] for each in meta[key]] for key in ("sizes", "strides"))
        found = stored[member].as_strided(sizes, strides, meta["storage_offset"]["as_int"])
        is_parameter = isinstance(left, torch.nn.Parameter)
        found = torch.nn.Parameter(found, requires_grad=left.requires_grad) if is_parameter else found
        exported.state_dict[name] = found


def _strip_graph(graph: dict[str, Any]) -> None:
    for node in graph["nodes"]:
        kept = {key: node["metadata"][key] for key in ("nn_module_stack", "custom") if key in node["metadata"]}
        if trace := _portable_trace(node["metadata"].get("stack_trace", "")):
            kept["stack_trace"] = trace
        node["metadata"] = kept
        for argument in node["inputs"]:
            if "as_graph" in argument["arg"]:
                _strip_graph(argument["arg"]["as_graph"]["graph"])


_FRAME = re.compile(r'File "([^"\n]+)", line (\d+), in ([\w.<>]+)')
_PACKAGES = re.compile(r".*/(?:site|dist)-packages/")
_ABSOLUTE = re.compile(r"/|[A-Za-z]:|.*\.\./")


def _portable_trace(trace: str) -> str:
    """The frames without source text; a file is named within its package, or by its bare name outside of one."""
    frames = []
    for path, line, function in _FRAME.findall(trace.replace("\\", "/")):
        inside, found = _PACKAGES.subn("", path)
        name = inside if found or not _ABSOLUTE.match(path) else path.rpartition("/")[2]
        frames.append(f'File "{name}", line {line}, in {function}')
    return "\n".join(frames)


def _metadata(member: memoryview) -> dict[str, Any]:
    metadata = strict_json(member, METADATA_MEMBER, MAX_METADATA_BYTES)
    schema = metadata.get("schema") if isinstance(metadata, dict) else None
    if not isinstance(metadata, dict) or type(schema) is not int or schema < 1:
        raise damaged("it names no schema version", METADATA_MEMBER)
    if schema > ARCHIVE_SCHEMA:
        raise ModelFileError(
            "VLX0111",
            f"the model archive has schema {schema}; this vlexport reads up to {ARCHIVE_SCHEMA}",
            where=METADATA_MEMBER,
            hint="update vlexport",
        )
    return metadata


def _check_names(members: Mapping[str, memoryview]) -> None:
    for name in members:
        if name not in _NEEDED and name != SERIALIZATION_ID and _KNOWN.fullmatch(name) is None:
            raise refused("a model file has no such member", name)
    if missing := sorted(_NEEDED - set(members)):
        raise damaged("a member is missing", missing[0])
    for name, content in _FIXED.items():
        if bytes(members[name]).strip() != content:
            raise damaged(f"it holds {bytes(members[name][:16])!r}, not {content!r}", name)
    if _DIGITS.fullmatch(bytes(members[".data/version"])) is None:
        raise damaged("it holds no version", ".data/version")


def _check_version(program: Any) -> None:
    version = program.get("schema_version") if isinstance(program, dict) else None
    major = version.get("major") if isinstance(version, dict) else None
    if type(major) is int and major > SCHEMA_MAJOR:
        raise ModelFileError(
            "VLX0111",
            f"the program has torch's schema {major}; this vlexport reads {SCHEMA_MAJOR}",
            where=PROGRAM,
            hint="update vlexport and torch",
        )
    if major != SCHEMA_MAJOR:
        raise refused(f"the program has torch's schema {major}, not {SCHEMA_MAJOR}", PROGRAM)


def _check_payloads(members: Mapping[str, memoryview], config_name: str, prefix: str) -> set[str]:
    """Every tensor lies inside its member; returns the members that hold one."""
    config = strict_json(members[config_name], config_name, MAX_CONFIG_BYTES)
    check("payload_config", config, config_name)
    folder, _, first = prefix.rpartition("/")
    dtypes: dict[str, int] = {}
    for name, payload in config["config"].items():
        where = f"{config_name}[{name}]"
        member, meta = f"{folder}/{payload['path_name']}", payload["tensor_meta"]
        if member not in members or not payload["path_name"].startswith(first):
            raise damaged(f"the member {payload['path_name']} is missing", where)
        if dtypes.setdefault(member, meta["dtype"]) != meta["dtype"]:
            raise refused("two tensors read one member as different types", where)
        numbers = [each.get("as_int", -1) for each in (*meta["sizes"], *meta["strides"], meta["storage_offset"])]
        rank = len(meta["sizes"])
        if any(number < 0 for number in numbers) or len(meta["strides"]) != rank:
            raise refused("a stored tensor has a size or stride that is no natural number", where)
        sizes, strides, offset = numbers[:rank], numbers[rank:-1], numbers[-1]
        reach = offset + 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
        needed = 0 if 0 in sizes else reach * DTYPE_BYTES[meta["dtype"]]
        if needed > len(members[member]) or len(members[member]) % DTYPE_BYTES[meta["dtype"]]:
            raise damaged(f"the tensor needs {needed} bytes of a member of {len(members[member])}", where)
        if math.prod(sizes) * DTYPE_BYTES[meta["dtype"]] > len(members[member]) + MAX_EXPANDED_BYTES:
            raise refused("a stored tensor's strides make it far larger than what is stored", where)
    return set(dtypes)


def _checked_samples(member: memoryview) -> bytes:
    """The example inputs, rebuilt after their pickle was found to hold tensors and plain containers only."""
    try:
        inner = read_members(member)
    except ModelFileError as error:
        raise refused(f"it is no file that torch.save wrote: {error.message}", SAMPLES) from error
    for name in inner:
        if name != SERIALIZATION_ID and _SAMPLE_MEMBERS.fullmatch(name) is None:
            raise refused("the example inputs have no such member", f"{SAMPLES}/{name}")
    _check_pickle(bytes(inner.get("data.pkl", b"")), f"{SAMPLES}/data.pkl")
    rebuilt = write_members(inner, stem="archive")
    try:
        samples = torch.load(io.BytesIO(rebuilt), weights_only=True, map_location="cpu")
    except LOAD_ERRORS as error:
        raise damaged("the example inputs cannot be read", SAMPLES) from error
    is_call = isinstance(samples, tuple) and len(samples) == 2
    if not is_call or not isinstance(samples[0], tuple) or not isinstance(samples[1], dict) or not _is_plain(samples):
        raise refused("the example inputs are no tensors in tuples, lists and dictionaries", SAMPLES)
    return rebuilt


def _check_pickle(pickled: bytes, where: str) -> None:
    if len(pickled) > MAX_PICKLE_BYTES:
        raise refused(f"it holds {len(pickled)} bytes, more than {MAX_PICKLE_BYTES}", where)
    try:
        opcodes = [(opcode.name, argument) for opcode, argument, _ in pickletools.genops(pickled)]
    except (ValueError, LookupError, OverflowError) as error:
        raise damaged(f"the pickle is damaged: {error}", where) from error
    for name, argument in opcodes:
        if name == "GLOBAL" and argument not in _GLOBALS:
            raise refused(f"the pickle asks for {str(argument).replace(' ', '.')!r}", where)
        if name not in _OPCODES:
            raise refused(f"the pickle uses the opcode {name}", where)


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, torch.Tensor | bool | int | float | str)


def _source_hash(members: Mapping[str, memoryview]) -> str:
    digest = hashlib.sha256()
    for name in sorted(members):
        if name != SERIALIZATION_ID:
            digest.update(f"{len(name)}:{name}:{len(members[name])}:".encode())
            digest.update(members[name])
    return digest.hexdigest()
