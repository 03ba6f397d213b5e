"""Models that reduce their tokens, captured as their authors spell them: static behind the passes, equal to eager."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from samples.zoo.self_slimmed.model import SelfSlimmedViT
from tests.harness import captured, one_thread
from tests.token_models import MCTF, DynamicViT, EViT, ToMe, drawn, images
from vlexport.core.numerics import relative_error
from vlexport.ir import dialect
from vlexport.ir.program import Program
from vlexport.passes import pass_class
from vlexport.passes.tokens.order_rules import LARGEST_K
from vlexport.targets.base import Brief
from vlexport.targets.coreml import CoreMLOptions, CoreMLTarget
from vlexport.targets.coreml.mil import read_package
from vlexport.targets.onnx.lower import onnx_from_program
from vlexport.targets.tensorrt import TensorRTOptions, TensorRTTarget

TOLERANCE = 1e-4
OPSET = 20
SMALL = {"side": 24, "patch": 4, "width": 16, "heads": 2, "classes": 5}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "evit": lambda: EViT(layers=(1, 2), depth=2, **SMALL),
    "dynamic_vit": lambda: DynamicViT(layers=(1, 2), depth=2, **SMALL),
    "tome": lambda: ToMe(merged=(5, 8), depth=2, **SMALL),
    "mctf": lambda: MCTF(merged=9, layers=(1,), depth=1, **SMALL),
    "self_slimmed": lambda: SelfSlimmedViT(stages=(1, 1), **SMALL),
}
ON_RUNTIME = ("evit", "tome")
"""Models that are lowered too: a complement, and merges."""
PASSES = ("canonicalize", "eliminate-layout", "legalize-selections")
"""Tensors keep their names: other weights can be put into the same graph."""
HOSTILE = (
    "sort", "argsort", "scatter", "scatter_reduce", "scatter_add", "index", "index_put", "slice_scatter",
    "select_scatter", "nonzero", "masked_select",
)  # fmt: skip


def weighted(name: str, kind: str) -> nn.Module:
    model = MODELS[name]().eval()
    model.load_state_dict(drawn({k: v.shape for k, v in model.state_dict().items()}, kind))
    return model


@pytest.fixture(scope="module")
def programs() -> dict[str, Program]:
    """Concentrated attention, which shows errors in fused tokens; a dynamic batch."""
    with one_thread():
        found = {n: captured(weighted(n, "concentrated"), images("concentrated", 2, 24, 4)) for n in MODELS}
    for program in found.values():
        for name in PASSES:
            pass_class(name)().run(program)
    return found


@pytest.mark.parametrize("batch", [1, 2, 8])
@pytest.mark.parametrize("name", MODELS)
def test_static_model_equals_eager_when_the_batch_varies(name: str, batch: int, programs: dict[str, Program]) -> None:
    x = images("concentrated", batch, 24, 4, seed=batch)
    with torch.inference_mode():
        expected = weighted(name, "concentrated")(x).numpy()
    assert relative_error(programs[name].run(x)[0].numpy(), expected) <= TOLERANCE


@pytest.mark.parametrize("name", MODELS)
def test_nothing_hostile_is_left_when_a_model_reduces_its_tokens(name: str, programs: dict[str, Program]) -> None:
    program = programs[name]
    assert not [n for n in program.calls() if dialect.plain_name(n) in HOSTILE]
    for node in program.calls("aten.topk.default"):
        assert isinstance(node.args[1], int)
        assert node.args[1] <= LARGEST_K
    tensors = [n.meta["val"] for n in program.calls() if isinstance(n.meta["val"], torch.Tensor)]
    sizes = [size for tensor in tensors for size in tensor.shape if isinstance(size, torch.SymInt)]
    symbols = {symbol for size in sizes for symbol in size.node.expr.free_symbols}
    assert symbols == set(program.symbol_names()), "only the batch is dynamic"


@pytest.mark.parametrize("kind", ["diffuse", "ties"])
@pytest.mark.parametrize("name", MODELS)
def test_static_model_equals_eager_when_attention_is_diffuse_or_tokens_are_equal(
    name: str, kind: str, programs: dict[str, Program]
) -> None:
    model, program = weighted(name, kind), programs[name].copy()
    weights = {key: value for key, value in model.state_dict().items() if key in program.tensors}
    assert len(weights) > 0.8 * len([key for key in model.state_dict() if not key.startswith("rtsm")])
    program.tensors.update(weights)
    for batch in (1, 2, 8):
        x = images(kind, batch, 24, 4, seed=batch)
        with torch.inference_mode():
            expected = model(x).numpy()
        assert relative_error(program.run(x)[0].numpy(), expected) <= TOLERANCE
        assert relative_error(programs[name].run(x)[0].numpy(), expected) > 0.01, "the weights matter"


@pytest.mark.parametrize("name", ON_RUNTIME)
def test_artifact_holds_nothing_hostile_when_the_runtime_has_loaded_it(
    name: str, programs: dict[str, Program], tmp_path: Path
) -> None:
    onnx_ir.save(onnx_from_program(programs[name], opset=OPSET), tmp_path / "main.onnx")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "main.onnx", options, providers=["CPUExecutionProvider"])
    graph = onnx.load(tmp_path / "loaded.onnx").graph
    counts = Counter(node.op_type for node in graph.node)
    assert not {"NonZero", "ScatterElements", "ScatterND", "GatherND", "Unique", "Compress"} & counts.keys()
    constants = {each.name for each in graph.initializer}
    tops = [node for node in graph.node if node.op_type == "TopK"]
    assert tops
    assert all(node.input[1] in constants for node in tops)
    slices = [node for node in graph.node if node.op_type == "Slice"]
    assert all(set(filter(None, node.input[1:])) <= constants for node in slices)
    for batch in (1, 8):
        x = images("concentrated", batch, 24, 4, seed=batch)
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        assert relative_error(found, programs[name].run(x)[0].numpy()) <= TOLERANCE


def test_training_only_weights_are_left_behind_when_self_slimmed_is_captured(programs: dict[str, Program]) -> None:
    model = SelfSlimmedViT(stages=(1, 1), **SMALL)
    trained = {name for name, _ in model.named_parameters()}
    recovery = {name for name in trained if name.startswith("rtsm.")}
    assert sum(p.numel() for n, p in model.named_parameters() if n in recovery) > 0
    stored = set(programs["self_slimmed"].tensors)
    assert not [name for name in stored if name.startswith("rtsm")]
    assert [name for name in stored if name.startswith("tsm")]
    logits, recovered = model.train()(images("diffuse", 2, 24, 4))
    assert logits.shape == (2, 5)
    assert [tuple(tokens.shape) for tokens in recovered] == [(2, 36, 16), (2, 36, 16)]


def test_mctf_is_a_package_without_scatter_when_the_target_is_core_ml(tmp_path: Path) -> None:
    with one_thread():
        program = captured(weighted("mctf", "concentrated"), images("concentrated", 1, 24, 4), dynamic=False)
    for name in PASSES:
        pass_class(name)().run(program)
    operators = packaged(program, tmp_path)
    assert operators["topk"] == 3
    assert operators["matmul"] == 11, "merges are products"


class Merging(nn.Module):
    """What each target finds hardest: a full order, its rest in order of place, and values that meet."""

    def forward(self, x: Tensor) -> Tensor:
        order = x.mean(-1).argsort(1, descending=True)
        rest, gone = order[:, 3:].sort(1).values, order[:, :3]
        wide = lambda index: index.unsqueeze(-1).expand(-1, -1, x.shape[-1])  # noqa: E731
        kept = x.gather(1, wide(rest))
        return kept.scatter_reduce(1, wide(gone % 9), x.gather(1, wide(gone)), "mean").softmax(-1)


def packaged(program: Program, folder: Path) -> Counter[str]:
    """What a package of the Program holds, and that it holds no scatter."""
    target, brief = CoreMLTarget(), Brief(CoreMLOptions(), precision="fp32")
    program = program.copy()
    for each in target.program_passes(brief):
        each.run(program)
    operators = Counter(read_package(folder / target.lower(program, folder, brief).path).histogram())
    assert not [name for name in operators if "scatter" in name or "sort" in name or "non_zero" in name]
    return operators


@pytest.fixture(scope="module")
def merging() -> Program:
    program = captured(Merging(), torch.randn(1, 12, 8, generator=torch.Generator().manual_seed(0)), dynamic=False)
    for name in PASSES:
        pass_class(name)().run(program)
    return program


def test_merging_is_a_package_when_the_target_is_core_ml(merging: Program, tmp_path: Path) -> None:
    assert packaged(merging, tmp_path)["topk"] == 2


def test_merging_is_an_engine_when_the_target_is_tensorrt(merging: Program, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    brief = Brief(TensorRTOptions(engine="on", compute_capabilities="8.9"), threads=1)
    TensorRTTarget().lower(merging, tmp_path, brief)
    assert (tmp_path / "main.engine").is_file()
