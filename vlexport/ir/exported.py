"""Program ↔ ``torch.export.ExportedProgram``, without tracing again.

*Unlifting* turns the lifted placeholders of an exported graph into named tensors; *lifting* is the exact reverse:
placeholders ordered parameters, buffers, constants, inputs. Text, names, dims and module paths survive the round trip.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx import Graph, Node

from vlexport.core.artifact import Signature
from vlexport.core.errors import CaptureError
from vlexport.ir import compat, dialect, provenance
from vlexport.ir.program import Kind, Program

_KINDS: dict[InputKind, Kind] = {
    InputKind.PARAMETER: "parameter",
    InputKind.BUFFER: "buffer",
    InputKind.CONSTANT_TENSOR: "constant",
}
_INPUT_KINDS = {kind: input_kind for input_kind, kind in _KINDS.items()}
_ORDER: tuple[Kind, ...] = ("parameter", "buffer", "constant")


def program_from_exported(exported: ExportedProgram, signature: Signature) -> Program:
    """Unlift an exported graph.

    Args:
        exported: A functional graph whose inputs and outputs are tensors.
        signature: Public names for its user inputs and outputs, in order.

    Raises:
        CaptureError: VLX0303 when a sub-graph is left, VLX0305 when the graph mutates a buffer or an
            input, VLX0306 when an output is no tensor.
    """
    require_no_mutation(exported)
    graph = Graph()
    tensors: dict[str, torch.Tensor] = {}
    kinds: dict[str, Kind] = {}
    mapping: dict[Node, Node] = {}
    inputs = iter(signature.inputs)
    specs = {s.arg.name: s for s in exported.graph_signature.input_specs if hasattr(s.arg, "name")}
    for node in exported.graph.nodes:
        if node.op == "get_attr":
            raise CaptureError(
                "VLX0303",
                "forward branches on a tensor's value (torch.cond), which no target takes",
                hint="compute both branches and choose with torch.where",
            )
        if node.op != "placeholder":
            mapping[node] = graph.node_copy(node, lambda n: mapping[n])
            mapping[node].meta = dict(node.meta)
            if node.op == "call_function" and dialect.checks_at_run_time(node):
                mapping[node].meta["val"] = None  # it gives nothing, and a saved file keeps no record of that
            continue
        spec = specs[node.name]
        if spec.kind is InputKind.USER_INPUT:
            mapping[node] = graph.placeholder(next(inputs).name)
            mapping[node].meta = {"val": node.meta["val"]}
            continue
        name = str(spec.target)
        stored = exported.constants if name in exported.constants else exported.state_dict
        tensors[name] = stored[name].detach()
        kinds[name] = _KINDS[spec.kind]
        mapping[node] = graph.create_node("get_attr", name)
        mapping[node].meta = {"val": node.meta["val"]}
    example = tuple(exported.example_inputs[0]) if exported.example_inputs else ()
    program = Program(graph, tensors, kinds, signature, dict(exported.range_constraints), example)
    for result in program.results:
        if not isinstance(result, Node) or not isinstance(result.meta.get("val"), torch.Tensor):
            raise CaptureError("VLX0306", f"an output of forward is {result}, not a tensor", hint="return tensors only")
    for node in [n for n in graph.nodes if n.op == "get_attr" and not n.users]:
        program.erase_dead(node)
    return program


def require_no_mutation(exported: ExportedProgram) -> None:
    """Refuse a graph that writes to a buffer or an input.

    Raises:
        CaptureError: VLX0305.
    """
    mutated = [o for o in exported.graph_signature.output_specs if o.kind is not OutputKind.USER_OUTPUT]
    if mutated:
        raise CaptureError(
            "VLX0305",
            f"forward changes {mutated[0].target or 'one of its inputs'}",
            where=str(mutated[0].target or ""),
            hint="return the new value instead of writing to it; caches are set up before saving",
        )


def exported_from_program(program: Program) -> ExportedProgram:
    """Lift a Program; the reverse of :func:`program_from_exported`.

    Node names are made from the operator and the last origin (``conv2d_12``), so that names in an artifact do not
    depend on FX's own counters.
    """
    graph = Graph()
    mapping: dict[Node, Node] = {}
    readers = [n for n in program.graph.nodes if n.op == "get_attr"]
    specs: list[InputSpec] = []
    state: dict[str, Any] = {}
    constants: dict[str, Any] = {}
    lifted: dict[str, Node] = {}
    for kind in _ORDER:
        for node in readers:
            name = str(node.target)
            if program.kinds[name] != kind:
                continue
            if name not in lifted:
                lifted[name] = graph.placeholder(f"{kind[0]}_{re.sub(r'[^0-9a-zA-Z_]', '_', name)}")
                lifted[name].meta = {"val": node.meta["val"]}
                tensor = program.tensors[name]
                if kind == "constant":
                    constants[name] = tensor
                else:
                    state[name] = torch.nn.Parameter(tensor, requires_grad=False) if kind == "parameter" else tensor
                persistent = True if kind == "buffer" else None
                specs.append(InputSpec(_INPUT_KINDS[kind], TensorArgument(lifted[name].name), name, persistent))
            mapping[node] = lifted[name]
    for node in program.placeholders:
        mapping[node] = graph.placeholder(str(node.target))
        mapping[node].name = str(node.target)  # as torch.export does: FX would call `input` `input_1`
        mapping[node].meta = dict(node.meta)
        specs.append(InputSpec(InputKind.USER_INPUT, TensorArgument(mapping[node].name), None))
    for node in program.graph.nodes:
        if node.op == "call_function":
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), mapping.__getitem__)
            name = _stable_name(node)
            mapping[node] = graph.create_node("call_function", node.target, args, kwargs, name=name)
            mapping[node].meta = dict(node.meta)
    graph.output(tuple(mapping[n] for n in program.results))
    outputs = [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(mapping[n].name), None) for n in program.results]
    in_spec, out_spec = compat.flat_call_spec(len(program.placeholders), len(program.results))
    names = [spec.name for spec in program.signature.inputs]
    arguments: list[Any] = [TensorArgument(mapping[n].name) for n in program.placeholders]
    call = ModuleCallSignature(arguments, [o.arg for o in outputs], in_spec, out_spec, names)
    return ExportedProgram(
        root=torch.nn.Module(),
        graph=graph,
        graph_signature=ExportGraphSignature(input_specs=specs, output_specs=outputs),
        state_dict=state,
        range_constraints=dict(program.ranges),
        module_call_graph=[ModuleCallEntry(fqn="", signature=call)],
        example_inputs=(program.example, {}),
        constants=constants,
        verifiers=[compat.verifier],
    )


def _stable_name(node: Node) -> str:
    target = node.target
    packet = target.overloadpacket if isinstance(target, torch._ops.OpOverload) else target
    base = getattr(packet, "__name__", "call").strip("_")
    origins = provenance.origins(node)
    return f"{base}_{origins[-1]}" if origins else base
