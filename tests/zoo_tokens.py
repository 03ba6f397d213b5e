"""The zoo of token reduction: every method on every kind of host, for every target, with hostile operators counted.

    python -m tests.zoo_tokens --record docs/measured/zoo_tokens.json [--only MODEL] [--again]

Hosts are plain ViTs that reduce-tokens reduces, the authors' models of ``tests/token_models.py``, which prune by
themselves, and the threshold ViT of ``samples/zoo``, which is frozen. For ONNX Runtime the operators are those of the
graph behind the runtime's own load-time optimisation, and the artifact runs: eight samples at once, and one by one. For
TensorRT they are those of the graph that its engine is compiled from, for Core ML those of the package. A model has a
process of its own, rows are written after each, and what the record holds for the same versions is not done again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.record import write_rows
from tests.zoo_child import run_alone
from tests.zoo_targets import versions

TARGETS = ("onnxruntime", "tensorrt", "coreml")
METHODS = (
    "evit:keep=0.7", "evit:keep=0.7,count=true", "evit:keep=0.7,squeeze=true", "tome:r=2", "mctf:r=2",
    "random:keep=0.7",
)  # fmt: skip
DENSE = ("evit:keep=0.7", "evit:keep=0.7,squeeze=true", "tome:r=2")
AUTHORS = ("evit", "dynamic_vit", "tome", "mctf", "self_slimmed")
HOSTS: dict[str, tuple[str, ...]] = {
    "deit_tiny_patch16_224": METHODS,
    "deit_tiny_distilled_patch16_224": ("evit:keep=0.7,squeeze=true", "tome:r=8"),
    "clip_vision": METHODS,
    "siglip": ("tome:r=2", "mctf:r=2"),
    "videomae": ("tome:r=2",),
    "dpt": DENSE,
    "threshold_vit": ("freeze:percentile=95,batch=8",),
    **{f"authors/{name}": ("",) for name in AUTHORS},
}
"""Model → what ``--tokens`` gets; empty for models that prune by themselves."""
HOSTILE_ONNX = frozenset(
    {"NonZero", "ScatterElements", "ScatterND", "Scatter", "GatherND", "Unique", "Compress", "Loop", "If"}
)
COMPUTED = "computed "
"""Before the name of a top-k or a slice whose size the data decide, or is too large."""
HOSTILE_MIL = ("scatter", "non_zero", "argsort", "while_loop", "cond")
LARGEST_K = 3840
MAX_ERROR = 1e-4
SAMPLES = 8
TIMEOUT_S = 1800


@dataclass(frozen=True)
class Row:
    """One method on one model for one target.

    Attributes:
        model: A key of :data:`HOSTS`; ``tokens`` is what ``--tokens`` got.
        target: Of :data:`TARGETS`.
        outcome: ``built``, or ``refused`` with its ``reason``.
        hostile: Operators that should not be there, with their number; empty is the promise.
        selections: How many top-k and gathers there are, so that an empty ``hostile`` is not one of an empty graph.
        error: Largest difference between eight samples run at once and one by one, relative; None where nothing runs.
        state: Of the bundle: ``verified`` where its outputs were those of the PyTorch Program.
        engine: ``yes``, or why there is none.
        versions: Of what took part.
    """

    model: str
    tokens: str
    target: str
    outcome: str
    reason: str = ""
    hostile: str = ""
    selections: int = 0
    error: float | None = None
    state: str = ""
    engine: str = ""
    versions: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        """What names it."""
        return self.model, self.tokens, self.target


def made_model(name: str) -> tuple[Any, dict[str, Any], bool]:
    """A module in eval mode, its example inputs, and whether it is saved with a dynamic batch."""
    import torch

    if name.startswith("authors/"):
        from tests.test_static_selections import weighted
        from tests.token_models import images

        return (
            weighted(name.removeprefix("authors/"), "concentrated"),
            {"image": images("concentrated", 1, 24, 4)},
            True,
        )
    if name == "threshold_vit":
        from samples.zoo.threshold_vit.model import load_model

        module = load_model()
        return module, {"image": torch.rand(1, 1, 28, 28, generator=torch.Generator().manual_seed(0))}, False
    from tests.zoo_target_models import zoo_model

    made = zoo_model(name)
    return made.module, made.example(), True


def few_digits() -> Iterator[dict[str, Any]]:
    """Calibration samples of the threshold ViT: the sixty digits that lie beside it."""
    from samples.zoo.threshold_vit.data import few, prepared

    for image in prepared(few()[0]):
        yield {"image": image}


def examine(name: str, targets: Sequence[str] = TARGETS) -> list[Row]:
    """Every method of a model's, for some targets."""
    from vlexport.frontends.save import save

    module, inputs, dynamic = made_model(name)
    with tempfile.TemporaryDirectory(prefix="vlexport-zoo-") as place:
        file = Path(place) / "model.pt"
        save(module, file, inputs=inputs, dynamic=dynamic)
        return [_built(name, file, tokens, target) for tokens in HOSTS[name] for target in targets]


def _built(name: str, file: Path, tokens: str, target: str) -> Row:
    from vlexport.core.config import BuildConfig
    from vlexport.core.errors import VlexportError
    from vlexport.stages.build import build

    calib = "tests/zoo_tokens.py:few_digits" if tokens.startswith("freeze") else None
    config = BuildConfig(
        model=str(file), target=target, output=str(file.parent / "out"), profile=False, force=True, precision="fp32",
        tokens=tokens or None, calib=calib, threads=1,
    )  # fmt: skip
    try:
        result = build(config)
    except VlexportError as error:
        return Row(name, tokens, target, "refused", reason=f"{error.code}: {error.message}")
    main = result.bundle.main
    counts = _OPERATORS[target](result.output / "artifact" / main.artifact.path)
    facts = main.artifact.facts
    return Row(
        name, tokens, target, "built", hostile=hostile(counts), selections=counts["TopK"] + counts["topk"],
        error=_alone(result.output, counts) if target == "onnxruntime" else None, state=result.bundle.state,
        engine="" if "engine" not in facts else "yes" if facts["engine"] != "none" else facts["engine_reason"],
    )  # fmt: skip


def hostile(counts: Counter[str]) -> str:
    """Those of the operators that should not be there."""
    words = (*HOSTILE_MIL, COMPUTED)
    found = {name: n for name, n in counts.items() if name in HOSTILE_ONNX or any(word in name for word in words)}
    return ", ".join(f"{name} {number}" for name, number in sorted(found.items()))


def _loaded(file: Path) -> Counter[str]:
    """Operators of the graph that ONNX Runtime runs; a top-k or a slice that data decide is counted by that name."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.optimized_model_filepath = str(file.with_name("loaded.onnx"))
    onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    found = _counted(onnx.load(file.with_name("loaded.onnx"), load_external_data=False).graph)
    file.with_name("loaded.onnx").unlink()
    return found


def _graph(file: Path) -> Counter[str]:
    """Operators of a graph as it was written."""
    import onnx

    return _counted(onnx.load(file, load_external_data=False).graph)


def _counted(graph: Any) -> Counter[str]:
    from onnx import numpy_helper

    constants = {each.name: each for each in graph.initializer}
    constants |= {node.output[0]: node.attribute[0].t for node in graph.node if node.op_type == "Constant"}
    found: Counter[str] = Counter()
    for node in graph.node:
        name = node.op_type
        given = [each for each in node.input[1:] if each]
        if name in ("TopK", "Slice") and not set(given) <= constants.keys():
            name = f"{COMPUTED}{name}"
        elif name == "TopK" and int(numpy_helper.to_array(constants[given[0]]).reshape(-1)[0]) > LARGEST_K:
            name = f"{COMPUTED}TopK"
        found[name] += 1
    return found


def _package(file: Path) -> Counter[str]:
    from vlexport.targets.coreml.mil import read_package

    return Counter(read_package(file).histogram())


_OPERATORS: dict[str, Callable[[Path], Counter[str]]] = {
    "onnxruntime": _loaded, "tensorrt": _graph, "coreml": _package,
}  # fmt: skip


def _alone(bundle: Path, counts: Counter[str]) -> float:
    """The largest relative difference between eight samples at once and each by itself."""
    import numpy as np

    import vlexport
    from vlexport.core.numerics import relative_error

    generator = np.random.default_rng(0)
    with vlexport.load(bundle, threads=1) as loaded:
        specs = loaded.bundle.main.artifact.inputs
        given = {spec.name: _drawn(generator, (SAMPLES, *spec.shape[1:]), spec.dtype) for spec in specs}
        together = loaded.run(given)
        worst = 0.0
        for place in range(SAMPLES):
            one = {key: np.repeat(value[place : place + 1], _least(specs), 0) for key, value in given.items()}
            for key, value in loaded.run(one).items():
                same = together[key][place : place + 1]
                if len(together[key].shape) > 1 and together[key].shape[1] != value.shape[1]:  # each image by each text
                    same, value = same[:, place : place + 1], value[:, :1]
                worst = max(worst, relative_error(value[:1], same))
    return worst


def _drawn(generator: Any, shape: tuple[int, ...], dtype: str) -> Any:
    """Values of an input: noise, or ids, of which the two lowest are in every vocabulary."""
    noise = generator.standard_normal(shape) if "float" in dtype else generator.integers(0, 2, shape)
    return noise.astype(dtype)


def _least(specs: Any) -> int:
    """How many samples a session takes at least: a frozen model may have a batch of its own."""
    first = specs[0].shape[0]
    return first if isinstance(first, int) else 1


def failures(rows: Sequence[Row]) -> list[str]:
    """What breaks the promise: a refusal, a hostile operator, another result one by one, no engine and no reason."""
    found = []
    for row in rows:
        name = "/".join(filter(None, row.key))
        if row.outcome != "built":
            found.append(f"{name}: {row.reason}")
        if row.hostile:
            found.append(f"{name}: {row.hostile}")
        if row.error is not None and row.error > MAX_ERROR:
            found.append(f"{name}: eight at once differ from one by one by {row.error:.1e}")
        if row.target == "tensorrt" and row.outcome == "built" and not row.engine:
            found.append(f"{name}: neither an engine nor a reason")
    return found


def table(record: dict[str, Any]) -> str:
    """One line a model and method."""
    rows = {(each["model"], each["tokens"], each["target"]): Row(**each) for each in record["rows"]}
    machine = record["machine"]
    lines = [
        f"{record['date']}, {machine['cpu']} ({machine['cores']} cores), by `{record['command']}`, with "
        f"{record['versions']}.", "",
        "| model | `--tokens` | hostile operators | top-k | onnxruntime, 8 at once | tensorrt engine | coreml |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for model, tokens in dict.fromkeys(key[:2] for key in rows):
        ort, trt, ml = (rows.get((model, tokens, target)) for target in TARGETS)
        told = [each.hostile for each in (ort, trt, ml) if each is not None and each.hostile]
        cells = [
            model, f"`{tokens}`" if tokens else "its own", "; ".join(told) or "0", str(ort.selections if ort else "-"),
            _said(ort, lambda row: f"{row.state}, {row.error:.0e}"), _said(trt, lambda row: row.engine),
            _said(ml, lambda _: "built"),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _said(row: Row | None, shown: Callable[[Row], str]) -> str:
    if row is None:
        return "not built yet"
    return shown(row) if row.outcome == "built" else row.reason.replace("|", "\\|")


def main() -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, help="JSON file for the rows")
    parser.add_argument("--only", choices=HOSTS, action="append", default=[], help="a model; repeatable")
    parser.add_argument("--again", action="store_true", help="do again what the record holds")
    parser.add_argument("--child", nargs=2, metavar=("MODEL", "FILE"), help="one model, in this process")
    given = parser.parse_args()
    if given.child:
        rows = [asdict(row) for row in examine(given.child[0])]
        Path(given.child[1]).write_text(json.dumps(rows), encoding="utf-8")
        return 0
    return _run(given)


def _run(given: argparse.Namespace) -> int:
    now = versions()
    kept: dict[tuple[str, str, str], Row] = {}
    if given.record is not None and given.record.is_file():
        stored = json.loads(given.record.read_text(encoding="utf-8"))["rows"]
        kept = {row.key: row for row in (Row(**each) for each in stored)}
    wanted = given.only or list(HOSTS)
    for number, name in enumerate(wanted, 1):
        keys = [(name, tokens, target) for tokens in HOSTS[name] for target in TARGETS]
        if given.again or not all(key in kept and kept[key].versions == now for key in keys):
            with tempfile.TemporaryDirectory(prefix="vlexport-zoo-") as place:
                out = Path(place) / "rows.json"
                words = ["-m", "tests.zoo_tokens", "--child", name, str(out)]
                why = run_alone(words, Path(place), timeout_s=TIMEOUT_S)
                read = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else []
            found = [Row(**{**each, "versions": now}) for each in read]
            found = found or [Row(*key, "refused", reason=why, versions=now) for key in keys]
            kept |= {row.key: row for row in found}
        print(f"{number} of {len(wanted)}: {name}", flush=True)
        order = [(model, tokens, target) for model in HOSTS for tokens in HOSTS[model] for target in TARGETS]
        rows = [kept[key] for key in order if key in kept]
        if given.record is not None:
            write_rows(given.record, "python -m tests.zoo_tokens --record docs/measured/zoo_tokens.json", now, rows)
    said = failures(list(kept.values()))
    print("\n".join(said))
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main())
