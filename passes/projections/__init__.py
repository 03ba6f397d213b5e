"""Projections: linears and their like, the channels they make, and what is multiplied into their weights."""
