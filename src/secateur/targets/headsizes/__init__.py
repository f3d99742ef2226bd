"""Dimensions of attention heads: the sizes of queries with keys, and of values."""
