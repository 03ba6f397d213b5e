"""The closed schema of the JSON in a ``.pt2`` archive: which keys exist and what each may hold.

torch ignores unknown keys, writes names into Python source that it then executes (node names, argument names,
parameter paths, guards) and imports the module that a tree spec names. So every value has a rule here, and what has
no rule is refused: custom objects, pickled payloads, guards, operators as arguments, tokens, named tuples.

A rule is a name of :data:`RECORDS`, :data:`UNIONS` or :data:`LEAVES`; ``rule?`` also takes null, ``[rule]`` is a
list, ``{key:rule}`` a dictionary. A key that ends in ``?`` may be absent.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from vlexport.frontends.archive_expression import SYMBOL, ExpressionError, check_expression
from vlexport.frontends.archive_targets import refusal_of
from vlexport.frontends.archive_zip import damaged, refused

SCHEMA_MAJOR = 8
MAX_SIZE = 2**48
MAX_TEXT = 65_536
MAX_GRAPH_DEPTH = 8

_DTYPES_OF_BYTES = {1: (1, 2, 12, 29, 30, 31, 32, 33), 2: (3, 6, 13, 28), 4: (4, 7, 34), 8: (5, 8, 10, 35), 16: (11,)}
DTYPE_BYTES = {dtype: width for width, dtypes in _DTYPES_OF_BYTES.items() for dtype in dtypes}
"""Scalar type of the schema → bytes of one element."""

TREE_TYPES = frozenset({"builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict"})

RECORDS: dict[str, dict[str, str]] = {
    "program": {
        "graph_module": "graph_module",
        "opset_version": "{name:int}",
        "range_constraints": "{symbol:range}",
        "schema_version": "schema_version",
        "verifiers?": "[verifier]",
        "torch_version?": "version",
        "guards_code?": "nothing",
    },
    "graph_module": {
        "graph": "graph",
        "signature": "signature",
        "module_call_graph": "[module_call]",
        "metadata?": "graph_metadata",
        "treespec_namedtuple_fields?": "nothing",
    },
    "graph": {
        "inputs": "[argument]",
        "outputs": "[argument]",
        "nodes": "[node]",
        "tensor_values": "{name:tensor_meta}",
        "sym_int_values": "{name:sym_int}",
        "sym_bool_values": "{name:sym_bool}",
        "sym_float_values?": "{name:sym_float}",
        "is_single_tensor_return?": "bool",
        "custom_obj_values?": "nothing",
    },
    "node": {
        "target": "target",
        "inputs": "[named_argument]",
        "outputs": "[argument]",
        "metadata": "node_metadata",
        "is_hop_single_tensor_return?": "bool?",
        "name?": "name?",
    },
    "named_argument": {"name": "name_or_empty", "arg": "argument", "kind?": "argument_kind?"},
    "node_metadata": {"stack_trace?": "text", "nn_module_stack?": "text", "custom?": "json_object"},
    "graph_metadata": {"custom?": "json_object"},
    "tensor_meta": {
        "dtype": "dtype",
        "sizes": "[sym_int]",
        "requires_grad": "bool",
        "device": "device",
        "strides": "[sym_int]",
        "storage_offset": "sym_int",
        "layout": "layout",
    },
    "device": {"type": "cpu", "index?": "nothing"},
    "named": {"name": "name"},
    "complex": {"real": "float", "imag": "float"},
    "sub_graph": {"name": "name", "graph": "graph"},
    "symbolic": {"expr_str": "expression", "hint?": "hint?"},
    "range": {"min_val": "int?", "max_val": "int?"},
    "schema_version": {"major": "int", "minor": "int"},
    "signature": {"input_specs": "[input_spec]", "output_specs": "[output_spec]"},
    "user_spec": {"arg": "argument"},
    "constant_spec": {"name": "name", "value": "constant"},
    "parameter_spec": {"arg": "named", "parameter_name": "path"},
    "buffer_spec": {"arg": "named", "buffer_name": "path", "persistent": "bool"},
    "tensor_constant_spec": {"arg": "named", "tensor_constant_name": "path"},
    "buffer_mutation_spec": {"arg": "named", "buffer_name": "path"},
    "module_call": {"fqn": "path_or_empty", "signature?": "module_call_signature?"},
    "module_call_signature": {
        "inputs": "[argument]",
        "outputs": "[argument]",
        "in_spec": "input_tree",
        "out_spec": "tree",
        "forward_arg_names?": "[name]?",
    },
    "payload_config": {"config": "{path:payload}"},
    "payload": {"path_name": "payload_name", "is_param": "bool", "use_pickle": "false", "tensor_meta": "tensor_meta"},
}

UNIONS: dict[str, dict[str, str]] = {
    "hint": {"as_int": "int", "as_bool": "bool", "as_float": "float"},
    "sym_int": {"as_expr": "symbolic", "as_int": "size"},
    "sym_float": {"as_expr": "symbolic", "as_float": "float"},
    "sym_bool": {"as_expr": "symbolic", "as_bool": "bool"},
    "sym_int_argument": {"as_name": "name", "as_int": "int"},
    "sym_float_argument": {"as_name": "name", "as_float": "float"},
    "sym_bool_argument": {"as_name": "name", "as_bool": "bool"},
    "optional_tensor": {"as_tensor": "named", "as_none": "bool"},
    "constant": {"as_none": "bool", "as_int": "int", "as_float": "float", "as_string": "text", "as_bool": "bool"},
    "input_spec": {
        "user_input": "user_spec",
        "parameter": "parameter_spec",
        "buffer": "buffer_spec",
        "tensor_constant": "tensor_constant_spec",
        "constant_input": "constant_spec",
    },
    "output_spec": {"user_output": "user_spec", "buffer_mutation": "buffer_mutation_spec"},
    "argument": {
        "as_none": "bool",
        "as_tensor": "named",
        "as_tensors": "[named]",
        "as_int": "int",
        "as_ints": "[int]",
        "as_float": "float",
        "as_floats": "[float]",
        "as_string": "text",
        "as_strings": "[text]",
        "as_sym_int": "sym_int_argument",
        "as_sym_ints": "[sym_int_argument]",
        "as_sym_float": "sym_float_argument",
        "as_sym_floats": "[sym_float_argument]",
        "as_sym_bool": "sym_bool_argument",
        "as_sym_bools": "[sym_bool_argument]",
        "as_scalar_type": "dtype",
        "as_memory_format": "memory_format",
        "as_layout": "layout",
        "as_device": "device",
        "as_bool": "bool",
        "as_bools": "[bool]",
        "as_graph": "sub_graph",
        "as_optional_tensor": "optional_tensor",
        "as_optional_tensors": "[optional_tensor]",
        "as_complex": "complex",
    },
}

_PATH = re.compile(r"[\w@-]+(?:\.[\w@-]+)*")
_PAYLOAD = re.compile(r"(?:weight|tensor)_\d{1,6}")
_VERSION = re.compile(r"[\w.+-]{1,64}")


def _is_int(value: Any) -> bool:
    return type(value) is int and abs(value) <= 2**63


def _is_float(value: Any) -> bool:
    return type(value) is float or _is_int(value) or value in ("Infinity", "-Infinity", "NaN")


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 512 and value.isidentifier()


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 1024 and _PATH.fullmatch(value) is not None


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= MAX_TEXT and value.replace("\n", "").isprintable()


def _is_json_object(value: Any) -> bool:
    return isinstance(value, str) and isinstance(strict_json(value.encode(), "custom metadata", MAX_TEXT), dict)


def _is_tree(value: Any) -> bool:
    return isinstance(value, str) and _tree_problem(value) is None


def _is_input_tree(value: Any) -> bool:
    """(positional, keywords): the keywords become argument names in generated source."""
    if not _is_tree(value):
        return False
    node = json.loads(value)[1]
    if node["type"] != "builtins.tuple" or len(node["children_spec"]) != 2:
        return False
    keywords = node["children_spec"][1]
    return keywords["type"] == "builtins.dict" and all(_is_name(key) for key in json.loads(keywords["context"]))


LEAVES: dict[str, Callable[[Any], bool]] = {
    "int": _is_int,
    "size": lambda value: _is_int(value) and abs(value) <= MAX_SIZE,
    "bool": lambda value: isinstance(value, bool),
    "float": _is_float,
    "text": _is_text,
    "name": _is_name,
    "name_or_empty": lambda value: value == "" or _is_name(value),
    "path": _is_path,
    "path_or_empty": lambda value: value == "" or _is_path(value),
    "payload_name": lambda value: isinstance(value, str) and _PAYLOAD.fullmatch(value) is not None,
    "version": lambda value: isinstance(value, str) and _VERSION.fullmatch(value) is not None,
    "verifier": lambda value: value in ("ATEN", "TRAINING"),
    "symbol": lambda value: isinstance(value, str) and SYMBOL.fullmatch(value) is not None,
    "argument_kind": lambda value: value in (1, 2),
    "dtype": lambda value: type(value) is int and value in DTYPE_BYTES,
    "layout": lambda value: value == 7,
    "memory_format": lambda value: value in (1, 2, 3, 4),
    "cpu": lambda value: value == "cpu",
    "false": lambda value: value is False,
    "nothing": lambda value: value is None or value == [] or value == {},
    "json_object": _is_json_object,
    "tree": _is_tree,
    "input_tree": _is_input_tree,
}


def strict_json(data: bytes | memoryview, where: str, limit: int) -> Any:
    """Parse JSON of at most ``limit`` bytes that repeats no key and holds no NaN."""
    if len(data) > limit:
        raise refused(f"it holds {len(data)} bytes, more than {limit}", where)
    try:
        return json.loads(bytes(data).decode("utf-8"), object_pairs_hook=_distinct, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise damaged(f"it is no JSON that a model file holds: {error}", where) from error


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is repeated")
    return found


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON")


def _tree_problem(text: str) -> str | None:
    """Why a tree spec is refused: torch imports the module that a context names, so types and contexts are closed."""
    pair = strict_json(text.encode(), "a tree spec", MAX_TEXT)
    if not isinstance(pair, list) or len(pair) != 2 or pair[0] != 1:
        return "it is of no known protocol"
    pending = [pair[1]]
    while pending:
        node = pending.pop()
        if not isinstance(node, dict) or set(node) != {"type", "context", "children_spec"}:
            return "a node of it has unknown keys"
        kind, context, children = node["type"], node["context"], node["children_spec"]
        if not isinstance(children, list):
            return "a node of it has no children"
        pending.extend(children)
        if kind is None and context is None and not children:
            continue
        if not isinstance(kind, str) or kind not in TREE_TYPES or not isinstance(context, str):
            return f"it names the type {kind!r}"
        expected = strict_json(context.encode(), "a tree spec", MAX_TEXT)
        is_mapping = kind in ("builtins.dict", "collections.OrderedDict")
        if not is_mapping and expected is not None:
            return f"it gives {kind} a context"
        if is_mapping and not (isinstance(expected, list) and all(_is_text(key) for key in expected)):
            return f"the keys of a {kind} are not plain texts"
        if is_mapping and len(expected) != len(children):
            return f"a {kind} has {len(expected)} keys and {len(children)} children"
    return None


def check(rule: str, value: Any, where: str, depth: int = 0) -> None:
    """Raises VLX0106 unless ``value`` fits ``rule``; ``where`` is the archive member, then the node, then the key."""
    if rule.endswith("?"):
        if value is None:
            return
        rule = rule[:-1]
    if rule.startswith("["):
        for item in _typed(value, list, rule, where):
            check(rule[1:-1], item, where, depth)
    elif rule.startswith("{"):
        key_rule, _, value_rule = rule[1:-1].partition(":")
        for key, item in _typed(value, dict, rule, where).items():
            check(key_rule, key, f"{where}, a key", depth)
            check(value_rule, item, f"{where}[{key}]", depth)
    elif rule in RECORDS:
        _check_record(rule, _typed(value, dict, rule, where), where, depth)
    elif rule in UNIONS:
        _check_union(rule, _typed(value, dict, rule, where), where, depth)
    elif rule == "target":
        _check_target(value, where)
    elif rule == "expression":
        _check_expression(value, where)
    elif not LEAVES[rule](value):
        raise refused(f"{_shown(value)} is not allowed here ({rule.replace('_', ' ')})", where)


def _check_record(rule: str, record: dict[str, Any], where: str, depth: int) -> None:
    if rule == "node":
        where = f"{where}, node {_shown(record.get('name') or record.get('target'))}"
    if rule == "graph" and (depth := depth + 1) > MAX_GRAPH_DEPTH:
        raise refused(f"graphs are nested deeper than {MAX_GRAPH_DEPTH}", where)
    fields = RECORDS[rule]
    known = {key.removesuffix("?") for key in fields}
    if unknown := sorted(set(record) - known):
        raise refused(f"the {rule.replace('_', ' ')} holds the unknown key {_shown(unknown[0])}", where)
    for key, field_rule in fields.items():
        name = key.removesuffix("?")
        if name in record:
            check(field_rule, record[name], where if rule in ("program", "node") else f"{where}.{name}", depth)
        elif name == key:
            raise damaged(f"the {rule.replace('_', ' ')} lacks the key '{name}'", where)


def _check_union(rule: str, union: dict[str, Any], where: str, depth: int) -> None:
    key = next(iter(union), None)
    if len(union) != 1 or key not in UNIONS[rule]:
        raise refused(f"the {rule.replace('_', ' ')} {_shown(key)} is not allowed in a model file", where)
    check(UNIONS[rule][key], union[key], where, depth)


def _check_target(value: Any, where: str) -> None:
    reason = refusal_of(value) if isinstance(value, str) else "it is no text"
    if reason is not None:
        raise refused(f"the operator {_shown(value)} may not be called: {reason}", where)


def _check_expression(value: Any, where: str) -> None:
    if not isinstance(value, str):
        raise refused("a shape expression is no text", where)
    try:
        check_expression(value)
    except ExpressionError as error:
        raise refused(f"the shape expression {_shown(value)} is refused: {error}", where) from error


def _typed(value: Any, kind: type, rule: str, where: str) -> Any:
    if not isinstance(value, kind):
        raise refused(f"{_shown(value)} is no {rule.strip('[]{}').replace('_', ' ')}", where)
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
