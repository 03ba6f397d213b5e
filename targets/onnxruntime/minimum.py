"""minimum: the oldest ONNX Runtime that opens what is written.

The exporter writes version 10 of ONNX's file format, which began to be read with 1.18, whatever the opset. That release
has the operators of com.microsoft that we write, so that an artifact of theirs asks for no newer one; a fusion may
write no other (tested).

Source: tried with 1.15.1 (refuses version 10), 1.18.0 (opens models of opset 18 to 21 with each of the operators, and
computes the same; MultiHeadAttention without a bias, as cvt_13 and nextvit_small have it) and 1.18.1 (linears as
DynamicQuantizeMatMul and MatMulIntegerToFloat, with all of its optimizations and with none, MultiHeadAttention with a
bias, and nineteen whole models in fp32: within 2e-6 of 1.32); ONNX Runtime's documentation, Compatibility. The
optimizer of 1.18.1 died on norms without a bias (:mod:`norm_biases`), and was seen to die on a float graph with a
sigmoid between two products, which holds none of these operators.
"""

from __future__ import annotations

RELEASES = {18: "1.18", 19: "1.18", 20: "1.18", 21: "1.18"}
"""Opset of the standard domain → the oldest release that opens our files of it."""

CONTRIBUTED = ("Attention", "MultiHeadAttention", "QAttention", "DynamicQuantizeMatMul", "MatMulIntegerToFloat")
"""Operators of com.microsoft that may be written, each as 1.18 has it."""


def oldest_release(opset: int) -> str:
    """The oldest release for artifacts of an opset; empty where we know none."""
    return RELEASES.get(opset, "")
