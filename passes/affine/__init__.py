"""Affine maps of a value: lazy convolutions and matrices with their shape, padding context and cost."""
