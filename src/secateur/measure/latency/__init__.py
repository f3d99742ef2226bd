"""Measure how long models take on this machine, and whether a pruned model is faster."""
