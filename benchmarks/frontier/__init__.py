"""Accuracy against MACs: secateur's rules, Torch-Pruning and network-pruner, all with the same data."""
