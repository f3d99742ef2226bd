"""Repairs: reduce the error that pruning caused, with closed-form updates. No labels, no training."""
