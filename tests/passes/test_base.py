"""What ``Pass.run`` promises: a fixed point, prefixes, and matches that do not overlap within a sweep."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.harness import captured, randomize
from tests.passes.broken import Rewriting, again, net_program
from vlexport.core.errors import InternalError, UsageError
from vlexport.ir.program import Program
from vlexport.ir.text import fingerprint
from vlexport.passes import CATALOGUE, ON_REQUEST, base, pass_class
from vlexport.passes.base import STAGES, Change, Match
from vlexport.passes.reparameterize import Reparameterize


def three_folds() -> Program:
    torch.manual_seed(0)
    pair = [nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)]
    more = [nn.ReLU(), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)]
    return captured(randomize(nn.Sequential(*pair, *more)), torch.randn(1, 3, 4, 4))


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 4])
def test_run_applies_a_prefix_when_limited(limit: int) -> None:
    program = three_folds()
    changes, _ = Reparameterize().run(program, limit=limit)
    left = len(program.calls("aten.batch_norm.default"))
    assert (len(changes), left) == (min(limit, 3), 3 - min(limit, 3))


def test_run_applies_overlapping_matches_in_later_sweeps_when_they_share_a_node() -> None:
    program = captured(nn.Sequential(nn.Hardsigmoid(), nn.Hardsigmoid(), nn.Hardsigmoid()), torch.randn(1, 3))
    once = Rewriting("aten.hardsigmoid.default", lambda ir, node: again(ir, node, *node.args))
    nodes = program.calls("aten.hardsigmoid.default")
    overlapping = [Match(node, (node, nodes[0])) for node in nodes[:2]]
    left = iter([overlapping, overlapping[1:], []])
    applied: list[object] = []
    once.find = lambda ir: iter(next(left))  # type: ignore[method-assign]
    once.apply = lambda ir, match: applied.append(match) or Change(what="")  # type: ignore[method-assign]
    changes, misses = once.run(program)
    assert applied == overlapping, "the second shares a node with the first, and waits a sweep"
    assert (len(changes), misses) == (2, [])


def test_run_fails_naming_the_pass_when_it_never_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "MAX_SWEEPS", 5)
    flip = Rewriting("aten.relu.default", lambda ir, node: again(ir, node, *node.args))
    monkeypatch.setattr(flip, "find", lambda ir: (Match(n, (n,)) for n in ir.calls("aten.relu.default")))
    with pytest.raises(InternalError) as error:
        flip.run(net_program())
    assert error.value.code == "VLX0404"
    assert "break-something still matches after 5 sweeps" in error.value.message


@pytest.mark.parametrize("name", [*CATALOGUE, *ON_REQUEST])
def test_catalogue_holds_the_contract_when_a_pass_is_listed(name: str) -> None:
    found = pass_class(name)
    assert found.name == name
    assert found.stage in STAGES
    assert found().options.model_dump() == found.Options().model_dump()


def test_find_changes_nothing_when_called() -> None:
    program = three_folds()
    before = fingerprint(program)
    list(Reparameterize().find(program))
    assert fingerprint(program) == before


def test_pass_class_names_the_nearest_when_misspelt() -> None:
    with pytest.raises(UsageError) as error:
        pass_class("re-parameterize")
    assert error.value.code == "VLX0703"
    assert "did you mean 'reparameterize'?" in error.value.message
