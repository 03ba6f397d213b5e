"""The raising zoo: what the passes make of attention, norms and activations in real models, in both spellings.

``python -m tests.zoo_raising --record FILE.json [--only NAME] [--again] [--docs FILE.md]`` gives each model a process
of its own and records its rows as it finishes; what the file holds for the same versions and code is not done again.
``--captured FOLDER`` keeps the captured models, which take most of the time, for a later run with other passes.
Exits with 1 when a row breaks the zoo's promise (see :func:`failures`) and is not one of :data:`KNOWN`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.record import write_rows
from tests.zoo_child import run_alone
from tests.zoo_targets import page

IDEAS = ("attention", "norm", "activation")
MAX_ERROR32, MAX_ERROR64 = 1e-4, 1e-9
"""Largest relative errors against the captured graph: rounding of float32 through a deep model, and of float64."""
CHEAP_MACS = 3_000_000_000
"""Up to so many MACs of the captured graph it is run in float64 as well."""
_FUSED = "aten.scaled_dot_product_attention.default"
_MASK = 3
"""Place of the mask among the operands of attention."""
TIMEOUT_S, MEMORY_BYTES = 600, 24 << 30
CAPTURING = ("vlexport.frontends", "tests.zoo_raising_models", "tests.zoo_target_models", "tests.zoo_models")
RAISING = ("vlexport.passes", "vlexport.ir", "vlexport.stages.account")
KNOWN: dict[tuple[str, str], str] = {}
"""Model, spelling → part of what :func:`failures` says: rows that break the promise, for a reason in the table."""


@dataclass(frozen=True)
class Row:
    """One model in one spelling of its attention.

    Attributes:
        spelling: ``fused`` or ``eager``.
        outcome: ``raised``, ``refused`` (at capture), ``crashed`` or ``died`` (the process).
        reason: Of any outcome but the first.
        batch: ``dynamic`` or ``fixed``.
        accounts: Expected modules against found operators, as in a bundle.
        digest: Of the raised graph's text, calls in the order in which outputs ask for them: equal is the same graph.
        unmasked: Of the same text without the masks of attention.
        differs: The first line at which it differs from that of the other spelling.
        calls: Before and after.
        macs: Of one run, before and after.
        opaque: Operators that the dialect does not know: nothing is matched across them, and their work is not counted.
        error32: Largest relative difference from the captured graph's outputs in float32.
        error64: The same in float64, of the passes applied to a float64 copy; None where it is too large for that.
        seconds: Pass → seconds with the runner's checks, without the numeric gate.
        versions: Of what took part.
        code: Digest of the code that made the row.
    """

    model: str
    spelling: str
    outcome: str
    reason: str = ""
    batch: str = ""
    accounts: tuple[dict[str, Any], ...] = ()
    digest: str = ""
    unmasked: str = ""
    differs: str = ""
    calls: tuple[int, int] = (0, 0)
    macs: tuple[int, int] = (0, 0)
    opaque: tuple[str, ...] = ()
    error32: float | None = None
    error64: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    versions: str = ""
    code: str = ""

    @property
    def key(self) -> tuple[str, str]:
        """What names it."""
        return self.model, self.spelling

    def account(self, idea: str) -> dict[str, Any] | None:
        """That of an idea."""
        return next((each for each in self.accounts if each["idea"] == idea), None)


def versions() -> str:
    """Of what rows depend on beside our own code."""
    import importlib.metadata

    return ", ".join(
        f"{name} {importlib.metadata.version(name).split('+')[0]}" for name in ("torch", "timm", "transformers")
    )


def code(names: Sequence[str] = (*CAPTURING, *RAISING)) -> str:
    """Digest of our own code that rows depend on."""
    import hashlib

    from vlexport.core.code_identity import code_digest

    return hashlib.sha256(" ".join(str(code_digest(each)) for each in names).encode()).hexdigest()[:12]


def examine(name: str, folder: Path) -> list[Row]:
    """Capture a model in both spellings, or open what ``folder`` holds of it, and run every pass of the catalogue.

    A model that calls no fused attention has one spelling, and its row counts for both.
    """
    from tests.zoo_raising_models import SPELLINGS
    from vlexport.core.errors import VlexportError

    rows: list[Row] = []
    texts: list[str] = []
    single = False
    for spelling in SPELLINGS:
        if single:
            rows.append(replace(rows[0], spelling=spelling))
            continue
        try:
            source = _captured(name, spelling, folder)
        except VlexportError as error:
            rows.append(Row(name, spelling, "refused", reason=f"{error.code}: {error.message} ({error.where})"))
            continue
        single = not source.calls(_FUSED)
        row, text = _examined(name, spelling, source)
        rows.append(row)
        texts.append(text)
    if len(texts) == len(SPELLINGS) and all(texts) and texts[0] != texts[1]:
        pairs = zip(*(text.splitlines() for text in texts), strict=False)
        first = next((f"{a.strip()} | {b.strip()}" for a, b in pairs if a != b), "one is longer")
        rows[1] = replace(rows[1], differs=first[:400])
    return rows


def _captured(name: str, spelling: Any, folder: Path) -> Any:
    """The captured model as a file gives it back."""
    from tests.zoo_raising_models import raising_model
    from vlexport.frontends.save import save
    from vlexport.frontends.source import open_archive

    file = folder / f"{name}-{spelling}-{code(CAPTURING)}.pt"
    if not file.is_file():
        made = raising_model(name, spelling)
        half = file.with_suffix(".part")
        save(made.module, half, inputs=made.example())
        half.replace(file)
    return open_archive(file).program


def _examined(name: str, spelling: str, source: Any) -> tuple[Row, str]:
    """The row of a captured model, and the raised graph's text."""
    import hashlib

    from vlexport.core.bundle_schema import plain_json
    from vlexport.ir.cost import cost
    from vlexport.ir.text import text
    from vlexport.passes import CATALOGUE, pass_class
    from vlexport.passes.pipeline import TimingHook, run_pipeline
    from vlexport.stages.account import Refusals, accounts

    passes = [pass_class(each)() for each in CATALOGUE]
    timing, refusals = TimingHook(), Refusals()
    try:
        raised, _ = run_pipeline(source, passes, gate=None, hooks=[timing], listener=refusals)
    except Exception as error:
        return Row(name, spelling, "crashed", reason=f"{type(error).__name__}: {error}"[:400]), ""
    before, after = cost(source), cost(raised)
    found = text(in_demanded_order(raised, source.tensors))
    row = Row(
        name,
        spelling,
        "raised",
        batch="dynamic" if "batch" in source.signature.dims else "fixed",
        accounts=tuple(plain_json(each) for each in accounts(source, raised, refusals)),
        digest=hashlib.sha256(found.encode()).hexdigest()[:16],
        unmasked=hashlib.sha256(text(in_demanded_order(raised, source.tensors, masks=False)).encode()).hexdigest()[:16],
        calls=(len(source.calls()), len(raised.calls())),
        macs=(before.macs, after.macs),
        opaque=before.opaque,
        error32=_error(source, raised),
        error64=_error64(source, passes) if before.macs <= CHEAP_MACS else None,
        seconds={each: round(spent, 2) for each, spent in timing.seconds.items()},
    )
    return row, found


def in_demanded_order(program: Any, known: Collection[str], *, masks: bool = True) -> Any:
    """A copy that shows nothing of how passes came to it.

    Args:
        program: After the passes.
        known: Names of stored tensors that are the model's own; the others are numbered in the order of their use.
        masks: Keep the masks of attention.

    Returns:
        A program whose calls stand in the order in which its outputs ask for them.
    """
    from torch.fx import Graph

    from vlexport.ir.program import Program

    program = program.copy()
    for node in program.calls(_FUSED):
        if not masks:
            node.args = tuple(None if i == _MASK else each for i, each in enumerate(node.args))
            node.kwargs = {key: each for key, each in node.kwargs.items() if key != "attn_mask"}
    graph, copied, names = Graph(), dict[Any, Any](), dict[str, str]()
    inputs, calls = program.placeholders, [n for n in program.graph.nodes if n.op == "call_function"]
    unread = [node for node in calls if masks and not node.users]  # checks at run time
    pending = [program.output, *reversed(unread), *reversed(program.results), *reversed(inputs)]
    while pending:
        node = pending[-1]
        waiting = [each for each in node.all_input_nodes if each not in copied]
        if waiting and node.op != "output":
            pending += reversed(waiting)
            continue
        pending.pop()
        if node not in copied:
            copied[node] = graph.node_copy(node, copied.__getitem__)
            if node.op == "get_attr" and node.target not in known:
                copied[node].target = names.setdefault(node.target, f"made_{len(names)}")
    tensors = {names.get(name, name): tensor for name, tensor in program.tensors.items()}
    kinds = {names.get(name, name): kind for name, kind in program.kinds.items()}
    return Program(graph, tensors, kinds, program.signature, program.ranges, program.example)


def _error(source: Any, raised: Any, *, doubled: bool = False) -> float:
    """Largest relative difference of any output, to two digits."""
    import torch

    from vlexport.core.numerics import relative_error
    from vlexport.ir.draw import draw

    values = draw(source, torch.Generator().manual_seed(7), dict.fromkeys(source.signature.dims, 2), masks=True)
    given = [each.double() if doubled and each.is_floating_point() else each for each in values]
    pairs = zip(raised.run(*given), source.run(*given), strict=True)
    return float(f"{max(relative_error(a.numpy(), b.numpy()) for a, b in pairs):.1e}")


def _error64(source: Any, passes: Sequence[Any]) -> float:
    """:func:`_error` of the passes applied to a float64 copy: folded weights are rounded to float64 then."""
    from vlexport.passes.pipeline import run_pipeline

    twin = source.double()
    raised, _ = run_pipeline(twin, passes, gate=None)
    return _error(twin, raised, doubled=True)


def run_child(name: str, timeout_s: float, captured: Path | None = None) -> list[Row]:
    """:func:`examine` in a process of its own."""
    from tests.zoo_raising_models import SPELLINGS

    with tempfile.TemporaryDirectory(prefix="vlexport-zoo-") as place:
        out = Path(place) / "rows.json"
        words = ["-m", "tests.zoo_raising", "--child", name, str(captured or place), str(out)]
        why = run_alone(words, Path(place), timeout_s=timeout_s, memory_bytes=MEMORY_BYTES)
        if out.is_file():
            return rows_of({"rows": json.loads(out.read_text(encoding="utf-8"))})
    return [Row(name, spelling, "died", reason=why) for spelling in SPELLINGS]


def rows_of(record: dict[str, Any]) -> list[Row]:
    """Rows of a record."""
    tuples = ("accounts", "calls", "macs", "opaque")
    return [Row(**{k: tuple(v) if k in tuples else v for k, v in each.items()}) for each in record["rows"]]


def failures(rows: Sequence[Row]) -> list[str]:
    """What breaks the zoo's promise, one line each.

    Every model is captured and raised in both spellings, to the same values within rounding and with no more work; a
    module that was expected and not found has a reason.
    """
    return [said for row in rows for said in _failures(row) if KNOWN.get(row.key, "\0") not in said]


def _failures(row: Row) -> Iterator[str]:
    name = f"{row.model}/{row.spelling}"
    if row.outcome != "raised":
        yield f"{name}: {row.outcome}: {row.reason}"
        return
    for error, most in ((row.error32, MAX_ERROR32), (row.error64, MAX_ERROR64)):
        if error is not None and not error <= most:
            yield f"{name}: differs from the captured graph by {error}"
    if row.error32 is None:
        yield f"{name}: was not run"
    if row.macs[1] > row.macs[0]:
        yield f"{name}: {row.macs[1] - row.macs[0]} MACs more than captured"
    for account in row.accounts:
        told = sum(len(each["modules"]) for each in account["missing"] if each["reason"])
        if account["found"] + told != account["expected"]:
            yield f"{name}: {account['expected'] - account['found'] - told} {account['idea']} modules without a reason"


def unexplained(rows: Sequence[Row]) -> list[str]:
    """Modules that are missing though no pass said why, and operators that are not known: what to look at next."""
    return [f"{row.model}/{row.spelling}: {', '.join(row.opaque)} not known" for row in rows if row.opaque] + [
        f"{row.model}/{row.spelling}: {len(each['modules'])} {each['of']}: {each['reason']}"
        for row in rows
        for account in row.accounts
        for each in account["missing"]
        if each["reason"].startswith("spelled with")
    ]


def table(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    by_model: dict[str, dict[str, Row]] = {}
    for row in rows_of(record):
        by_model.setdefault(row.model, {})[row.spelling] = row
    remarks: list[str] = []

    def remark(text: str) -> str:
        if text not in remarks:
            remarks.append(text)
        return f"[{remarks.index(text) + 1}]"

    lines = [
        "| model | attention | norms | activations | one graph | error, fp32 | float64 | GMACs | calls | passes, s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for model, rows in by_model.items():
        bad = [row for row in rows.values() if row.outcome != "raised"]
        if bad:
            said = f"{bad[0].outcome} {remark(bad[0].reason)}"
            lines.append(f"| {model} | {said} | - | - | - | - | - | - | - | - |")
            continue
        cells = [model, *(_found(rows, idea, remark) for idea in IDEAS)]
        fused, eager = rows["fused"], rows["eager"]
        alike = "but masks" if fused.unmasked == eager.unmasked else "no"
        cells.append("yes" if fused.digest == eager.digest else alike)
        cells.append(_worst([row.error32 for row in rows.values()]))
        cells.append(_worst([row.error64 for row in rows.values()]))
        cells.append(_work([f"{row.macs[0] / 1e9:.3f}" for row in rows.values()], f"{fused.macs[1] / 1e9:.3f}"))
        cells.append(_work([str(row.calls[0]) for row in rows.values()], str(fused.calls[1])))
        cells.append(f"{max(sum(row.seconds.values()) for row in rows.values()):.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    notes = [f"{i + 1}. {_safe(text)}" for i, text in enumerate(remarks)]
    return "\n".join([*lines, "", *notes]).rstrip() + "\n"


def _found(rows: dict[str, Row], idea: str, remark: Any) -> str:
    """``12 of 12``, of both spellings where they differ, with the reasons of what is missing."""
    shown: list[str] = []
    for row in rows.values():
        account = row.account(idea)
        if account is None or not account["expected"]:
            shown.append("-")
            continue
        reasons = dict.fromkeys(f"{each['of']}: {each['reason']}" for each in account["missing"])
        shown.append(" ".join([f"{account['found']} of {account['expected']}", *map(remark, reasons)]))
    return ", ".join(dict.fromkeys(shown))


def _worst(errors: Sequence[float | None]) -> str:
    known = [each for each in errors if each is not None]
    return f"{max(known):.0e}" if known else "-"


def _work(before: Sequence[str], after: str) -> str:
    return f"{' / '.join(dict.fromkeys(before))} → {after}" if set(before) != {after} else after


def _safe(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def summary(rows: Sequence[Row]) -> str:
    """One paragraph over all rows."""
    models = list(dict.fromkeys(row.model for row in rows))
    same = [m for m in models if len({row.digest for row in rows if row.model == m and row.outcome == "raised"}) == 1]
    said = []
    for idea in IDEAS:
        known = [account for row in rows if (account := row.account(idea)) is not None]
        total, expected = sum(each["found"] for each in known), sum(each["expected"] for each in known)
        said.append(f"{total} of {expected} {idea} modules")
    return (
        f"{len(models)} models in two spellings: {', '.join(said)} are one operator; one graph in {len(same)} models."
    )


def _page_table(record: dict[str, Any]) -> str:
    return f"{summary(rows_of(record))}\n\n{table(record)}"


def rendered(before: str, record: dict[str, Any]) -> str:
    """The page with the table of a record."""
    from tests.zoo_raising_models import MODELS

    return page(before, record, MODELS, _page_table)


def main() -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, help="JSON file with the rows")
    parser.add_argument("--docs", type=Path, help="page whose table is rendered from the record")
    parser.add_argument("--only", action="append", default=[], help="a model; repeatable")
    parser.add_argument("--again", action="store_true", help="do what the record holds already, too")
    parser.add_argument("--render", action="store_true", help="only render the page")
    parser.add_argument("--captured", type=Path, help="existing folder that keeps captured models")
    parser.add_argument("--timeout", type=float, default=TIMEOUT_S, help="seconds for one model")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        name, folder, out = given.child
        Path(out).write_text(json.dumps([asdict(row) for row in examine(name, Path(folder))]), encoding="utf-8")
        return 0
    kept: dict[tuple[str, str], Row] = {}
    if given.record is not None and given.record.is_file():
        kept = {row.key: row for row in rows_of(json.loads(given.record.read_text(encoding="utf-8")))}
    if not given.render:
        _run(given, kept)
    if given.docs is not None:
        record = json.loads(given.record.read_text(encoding="utf-8"))
        given.docs.write_text(rendered(given.docs.read_text(encoding="utf-8"), record), encoding="utf-8")
    rows = list(kept.values())
    bad = failures(rows)
    print(summary(rows), *unexplained(rows), *bad, sep="\n")
    return int(bool(bad))


def _run(given: argparse.Namespace, kept: dict[tuple[str, str], Row]) -> None:
    from tests.zoo_raising_models import MODELS, SPELLINGS

    now = (versions(), code())
    for model in MODELS:
        known = [kept.get((model, spelling)) for spelling in SPELLINGS]
        done = all(row is not None and (row.versions, row.code) == now for row in known)
        if (given.only and model not in given.only) or (done and not given.again):
            continue
        started = time.perf_counter()
        for row in run_child(model, given.timeout, given.captured):
            kept[row.key] = replace(row, versions=now[0], code=now[1])
            figures = [f"{a['found']}/{a['expected']} {a['idea']}" for a in row.accounts]
            print(f"{model:34} {row.spelling:6} {row.outcome:7} {', '.join(figures)} {row.reason}")
        print(f"{model:34} {time.perf_counter() - started:.0f} s", flush=True)
        if given.record is not None:
            _write(given.record, kept, MODELS, now[0])


def _write(file: Path, kept: dict[tuple[str, str], Row], models: Sequence[str], now: str) -> None:
    rows = sorted(kept.values(), key=lambda row: models.index(row.model))
    write_rows(file, "python -m tests.zoo_raising", now, rows)


if __name__ == "__main__":
    sys.exit(main())
