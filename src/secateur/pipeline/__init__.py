"""Whole runs: prune, rounds, the selection among candidates, comparison."""
