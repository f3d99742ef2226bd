"""Undo what pruning damaged: closed form, no labels, no training."""
