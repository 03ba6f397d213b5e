"""collect: one run over the samples sees what is wanted, and says which sample and which node are at fault."""

from __future__ import annotations

import contextlib
import tracemalloc
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch.fx import Node

from tests.calibration.planted import dataset, images, program
from vlexport.calibration.collect import Want, collect
from vlexport.calibration.data_key import data_key
from vlexport.calibration.keys import model_key, value_keys
from vlexport.calibration.seen import Collected
from vlexport.core.errors import DataError
from vlexport.core.progress import Silent
from vlexport.ir import dialect
from vlexport.ir.exported import exported_from_program, program_from_exported
from vlexport.ir.program import Program
from vlexport.passes.canonicalize import Canonicalize
from vlexport.passes.pipeline import run_pass

PRODUCTS = ("aten.conv2d.default", "aten.linear.default")


@pytest.fixture(scope="module")
def net() -> Program:
    return program()


def products(node: Node) -> Want | None:
    return Want() if node.op == "placeholder" or dialect.op_name(node) in PRODUCTS else None


def everything(node: Node) -> Want:
    return Want()


def same(one: Collected, other: Collected) -> bool:
    return all(
        (a.key, a.observer.minimum, a.observer.maximum) == (b.key, b.observer.minimum, b.observer.maximum)
        and bool((a.observer.histogram.counts == b.observer.histogram.counts).all())
        for a, b in zip(one.values, other.values, strict=True)
    )


def test_values_are_those_of_one_run_over_all_when_samples_come_singly(net: Program) -> None:
    values = images(7)
    found = collect(net, dataset(values, net), products)
    whole: dict[str, torch.Tensor] = {}
    keys = value_keys(net)
    net.run(torch.from_numpy(values), observe=lambda node, value: whole.setdefault(keys[node], value))
    whole["input:image"] = torch.from_numpy(values)
    assert [each.op for each in found.values] == ["input", "conv2d", "linear", "linear"]
    assert [each.module for each in found.values] == ["", "stem", "head.0", "head.2"]
    for each in found.values:
        assert each.observer.elements == whole[each.key].numel()
        assert each.observer.minimum == pytest.approx(float(whole[each.key].min()), rel=1e-5)
        assert each.observer.maximum == pytest.approx(float(whole[each.key].max()), rel=1e-5)
    assert (found.samples, found.model) == (7, model_key(net))


def test_input_is_counted_alike_when_samples_run_together(net: Program) -> None:
    values = images(7)
    alone, together = (
        collect(net, dataset(values, net), lambda n: Want() if n.op == "placeholder" else None, batch=b) for b in (1, 3)
    )
    assert same(alone, together)
    assert (alone.data, alone.values[0].observer.runs, together.values[0].observer.runs) == (together.data, 7, 3)


def test_nothing_is_kept_when_nobody_wants_it(net: Program) -> None:
    assert collect(net, dataset(images(2), net), lambda node: None).values == ()


def test_channels_are_told_apart_when_asked_for(net: Program) -> None:
    found = collect(
        net, dataset(images(3), net),
        lambda n: Want(histogram=False, channel_axis=1) if dialect.op_name(n) == PRODUCTS[0] else None,
    )  # fmt: skip
    (conv,) = found.values
    assert conv.observer.channel_low.shape == conv.observer.channel_high.shape == (4,)
    assert conv.observer.minimum == conv.observer.channel_low.min()
    assert conv.observer.histogram.total == 0


@pytest.mark.parametrize("batch", [1, 4])
def test_sample_and_node_are_named_when_a_value_becomes_nan(net: Program, batch: int) -> None:
    values = images(9)
    values[6] = 0.5  # one colour all over: its spread is 0
    with pytest.raises(DataError) as error:
        collect(net, dataset(values, net), everything, batch=batch)
    assert (error.value.code, error.value.exit_code) == ("VLX0213", 1)
    assert "infinity on calibration sample #6" in error.value.message
    assert error.value.where.startswith("aten.div.Tensor")
    assert "planted.py" in error.value.where, "the line of the user's code"


def test_sample_is_named_when_the_value_is_in_a_module(net: Program) -> None:
    values = images(3)
    values[1] = 0.5
    with pytest.raises(DataError) as error:
        collect(net, dataset(values, net), products)
    assert "NaN on calibration sample #1" in error.value.message
    assert "in stem" in error.value.where


def test_too_few_samples_are_refused_with_the_number_that_is_needed(net: Program) -> None:
    with pytest.raises(DataError) as error:
        collect(net, dataset(images(4), net), products, at_least=32)
    assert error.value.code == "VLX0214"
    assert "4 calibration samples are too few: 32 are needed" in error.value.message


@pytest.mark.parametrize(
    ("different", "said"),
    [
        (1, "16 calibration samples, all the same, are too few: 16 different ones are needed"),
        (15, "16 calibration samples, no more than 15 different ones, are too few: 16 different ones are needed"),
    ],
)
def test_copies_count_once_when_samples_are_counted(net: Program, different: int, said: str) -> None:
    values = images(16)
    values[different - 1 :] = values[different - 1]
    with pytest.raises(DataError) as error:
        collect(net, dataset(values, net), products, at_least=16)
    assert (error.value.code, error.value.message) == ("VLX0214", said)
    found = collect(net, dataset(values, net), products, at_least=different)
    assert found.samples == 16, "enough of them differ: copies are no error"


def test_progress_is_shown_when_samples_run(net: Program) -> None:
    class Counting(Silent):
        total = done = 0

        @contextlib.contextmanager
        def steps(self, name: str, total: int) -> Iterator[Callable[[], None]]:
            self.total = total

            def advance() -> None:
                self.done += 1

            yield advance

    shown = Counting()
    collect(net, dataset(images(5), net), products, batch=2, reporter=shown)
    assert (shown.total, shown.done) == (5, 5)


def test_keys_are_the_same_when_the_program_was_saved_and_loaded(net: Program) -> None:
    again = program_from_exported(exported_from_program(net), net.signature)
    assert list(value_keys(again).values()) == list(value_keys(net).values())
    assert model_key(again) == model_key(net)


def test_keys_tell_values_apart_when_passes_rewrote_the_graph(net: Program) -> None:
    after, _ = run_pass(Canonicalize(), net, gate=None)
    for each in (net, after):
        keys = value_keys(each)
        assert len(set(keys.values())) == len(keys)
    linears = [value_keys(p)[n] for p in (net, after) for n in p.calls("aten.linear.default")]
    assert linears[:2] == linears[2:], "a call that stays keeps its key"


def test_model_key_changes_when_a_weight_does(net: Program) -> None:
    other = net.copy()
    name = next(iter(other.used_tensors()))
    other.tensors[name] = other.tensors[name] + 1.0
    assert model_key(other) != model_key(net)


def test_data_key_ignores_order_and_nothing_else(net: Program) -> None:
    values = images(5)

    def digest(of: np.ndarray, in_order: bool = False) -> str:
        return data_key(dataset(of, net), in_order=in_order).digest()

    assert digest(values) == digest(values[::-1].copy())
    assert digest(values, in_order=True) != digest(values[::-1].copy(), in_order=True)
    assert digest(values[:4]) != digest(values)
    assert digest(np.concatenate([values, values[:1]])) != digest(values), "a sample that is there twice counts twice"
    found = collect(net, dataset(values, net), products)
    assert (found.data, found.order) == (digest(values), digest(values, in_order=True))


def test_memory_does_not_grow_when_samples_do(net: Program) -> None:
    def peak(count: int) -> int:
        values = images(8)
        many = dataset(np.broadcast_to(values[None], (count // 8, *values.shape)).reshape(-1, *values.shape[1:]), net)
        tracemalloc.start()
        tracemalloc.reset_peak()
        collect(net, many, everything)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(8)  # what torch makes once
    assert peak(256) <= 1.05 * peak(16)
