"""The zoo of token reduction: its page is that of the record, its promise is kept, and a breach of it is named."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path

import pytest
from onnx import TensorProto, helper

from tests.token_tables import MEASURED
from tests.zoo_tokens import HOSTS, LARGEST_K, TARGETS, Row, _counted, failures, hostile, table

PAGE = Path(__file__).resolve().parents[1] / "docs" / "tokens.md"
PLACE = re.compile(r"(<!-- zoo of tokens -->\n)(.*?)(\n<!-- end of zoo -->)", re.DOTALL)
RECORD = MEASURED / "zoo_tokens.json"


@pytest.mark.skipif(not RECORD.is_file(), reason="not recorded yet")
def test_page_and_promise_are_those_of_the_record_when_it_is_committed() -> None:
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    text = PAGE.read_text(encoding="utf-8")
    found = PLACE.search(text)
    assert found is not None
    if os.environ.get("UPDATE_GOLDEN"):
        PAGE.write_text(text[: found.start(2)] + table(record) + text[found.end(2) :], encoding="utf-8")
        return
    assert found.group(2) == table(record)
    assert failures([Row(**each) for each in record["rows"]]) == []


def graph_of(*, k: int, computed: bool = False) -> Counter[str]:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 9])
    number = helper.make_tensor("k", TensorProto.INT64, [1], [k])
    nodes = [helper.make_node("TopK", ["x", "n" if computed else "k"], ["v", "i"])]
    graph = helper.make_graph(nodes, "g", [value], [value], [] if computed else [number])
    return _counted(graph)


def test_operator_is_hostile_when_data_decide_its_size_or_it_reduces_or_searches() -> None:
    assert hostile(graph_of(k=3)) == ""
    assert hostile(graph_of(k=LARGEST_K + 1)) == "computed TopK 1"
    assert hostile(graph_of(k=3, computed=True)) == "computed TopK 1"
    assert hostile(Counter({"NonZero": 2, "Gather": 9, "scatter_nd": 1})) == "NonZero 2, scatter_nd 1"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (Row("m", "t", "coreml", "refused", reason="VLX0411: why"), "m/t/coreml: VLX0411: why"),
        (Row("m", "t", "coreml", "built", hostile="NonZero 1"), "m/t/coreml: NonZero 1"),
        (Row("m", "", "onnxruntime", "built", error=0.1), "m/onnxruntime: eight at once differ from one by one by 1"),
        (Row("m", "t", "tensorrt", "built"), "m/t/tensorrt: neither an engine nor a reason"),
    ],
)
def test_failure_is_named_when_a_row_breaks_the_promise(row: Row, said: str) -> None:
    (found,) = failures([row])
    assert found.startswith(said)
    good = Row("m", "t", "onnxruntime", "built", error=1e-6, selections=3, state="verified", engine="yes")
    assert failures([good]) == []


def test_table_has_a_line_for_each_method_and_model() -> None:
    rows = [
        Row(model, tokens, target, "built", selections=2, error=1e-6, state="verified", engine="yes").__dict__
        for model in HOSTS for tokens in HOSTS[model] for target in TARGETS
    ]  # fmt: skip
    machine = {"cpu": "p", "cores": 2}
    said = table({"rows": rows, "machine": machine, "date": "2026-01-01", "command": "c", "versions": "v"})
    assert "| clip_vision | `mctf:r=2` | 0 | 2 | verified, 1e-06 | yes | built |" in said
    assert said.count("\n| ") == 1 + sum(map(len, HOSTS.values()))
