"""raise-attention: every spelling of attention becomes one call.

Before → after::

    %1 = mul(q, 0.125)
    %2 = permute(k, [0,1,3,2])
    %3 = matmul(%1, %2)
    %4 = add(%3, mask)              →    %1 = scaled_dot_product_attention(q, k, v, mask)
    %5 = softmax(%4, -1)
    %6 = matmul(%5, v)

Equation: ``softmax(s · q kᵀ + mask) v``.

The products may be matmul, mm, bmm, baddbmm or einsum, over axes in any order; the softmax's axis decides which
operand holds the keys. What is left is one form, also of a call that was there before:

- queries, keys and values of rank 4: batch, heads, tokens, depth. Heads that a reshape merged into the batch are kept
  apart; further leading axes are merged by a reshape. Keys and values that heads share are repeated by ``expand``.
- one scale, left out where it is 1/√depth: numbers that scale queries, keys or scores are multiplied into it. A tensor
  that scales the scores (a temperature per head) scales the queries, or the keys, instead.
- one mask: none where it is all zeros, ``is_causal`` where it is the lower triangle, boolean where it only hides, and
  else a float mask in its smallest shape.

Does not apply when: attention is over channels; a linear mixes the heads, or another call stands between product,
softmax and values (a gate, a soft cap, a sink); the attention map or the scores are read elsewhere (they would be
computed twice); the softmax is computed in another dtype; a mask hides all keys of a query, where softmax gives no
number and attention 0, or may do so, because it is computed and hides by −∞; scores are overwritten by a number that
may not hide. A mask that is an input is taken to leave each query a key.

Numerical effect: exact up to rounding; a hidden place is one to which −3e4 or less is added.
Source: Vaswani et al. 2017, arXiv 1706.03762, section 3.2; torch's documentation of ``scaled_dot_product_attention``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from torch.fx import Node

from vlexport.ir import dialect, provenance
from vlexport.ir.cost import node_macs, saving
from vlexport.ir.program import Program
from vlexport.passes.attention.arrangement import emit, is_same
from vlexport.passes.attention.axes import sizes_of
from vlexport.passes.attention.channels import is_over_channels
from vlexport.passes.attention.form import attention_tree
from vlexport.passes.attention.scores import SOFTMAXES, RefusedError
from vlexport.passes.attention.site import ATTENTION, Site, site_of_attention, site_of_softmax
from vlexport.passes.attention.stored_values import StoredValues
from vlexport.passes.base import Change, Effect, Match, NearMiss, Pass, Stage

_PATTERN = "softmax(q · k) · v"


class RaiseAttention(Pass[Program]):
    """Every spelling of attention becomes one call."""

    name: ClassVar[str] = "raise-attention"
    stage: ClassVar[Stage] = "raise"
    effect: ClassVar[Effect] = "exact"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})

    def find(self, ir: Program) -> Iterator[Match | NearMiss]:
        values = StoredValues(ir)
        for node in ir.calls(*SOFTMAXES, ATTENTION):
            try:
                site = _site(ir, node)
                if site is None:
                    continue
                tree = attention_tree(ir, values, site)
            except RefusedError as error:
                yield NearMiss(_PATTERN, error.node, error.reason)
                continue
            if not is_same(ir, tree, site.root):
                yield Match(site.root, site.nodes, node)

    def apply(self, ir: Program, match: Match) -> Change:
        site = _site(ir, match.data)
        assert site is not None
        root = site.root
        what = "attention brought to its one form" if match.data is root else "attention made one call"
        where = tuple(dict.fromkeys(provenance.module_path(n) for n in (match.data, root)))
        tree = attention_tree(ir, StoredValues(ir), site)
        stood = ir.calls()
        known, stored = set(stood), set(ir.tensors)
        new = emit(ir, tree, before=root, value_of=root, merges=[n for n in site.nodes if n is not root])
        made = [n for n in ir.calls() if n not in known]
        added = sum(
            ir.tensors[name].numel() for name in set(ir.tensors) - stored if ir.tensors[name].is_floating_point()
        )
        saved = saving(ir, root)
        ir.replace(root, new)
        _joined(ir, new)
        return Change(
            what=what, where=where, saved_nodes=len(stood) - len(ir.calls()), saved_parameters=saved.parameters - added,
            saved_macs=saved.macs - sum(node_macs(ir, n, {}) for n in made),
        )  # fmt: skip


def _site(ir: Program, node: Node) -> Site | None:
    if dialect.op_name(node) == ATTENTION:
        return site_of_attention(ir, node)
    site = site_of_softmax(ir, node)
    if site is not None and is_over_channels(ir, site):
        raise RefusedError(site.nodes[0], "it is attention over channels: the product sums over tokens")
    return site


def _joined(ir: Program, reshaped: Node) -> None:
    """Let reshapes of a reshape read what it reads; one back to the same shape goes."""
    if dialect.op_name(reshaped) != "aten.reshape.default":
        return
    inner: Node = reshaped.all_input_nodes[0]
    for reader in list(reshaped.users):
        if dialect.op_name(reader) != "aten.reshape.default":
            continue
        reader.replace_input_with(reshaped, inner)
        if sizes_of(reader) == sizes_of(inner):
            ir.replace(reader, inner)
    ir.erase_dead(reshaped)
