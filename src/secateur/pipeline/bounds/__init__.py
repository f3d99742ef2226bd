"""Bounds that are met by looking at pruned models: time, memory, and what pruning may damage."""
