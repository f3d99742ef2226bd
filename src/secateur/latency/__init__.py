"""Time on this machine: models against each other, and whether a pruned one is faster."""
