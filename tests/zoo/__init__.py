"""Whole architectures, with random weights."""
