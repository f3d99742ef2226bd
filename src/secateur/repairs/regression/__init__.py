"""Layers as linear regressions, which say what a unit is worth and repair what its removal damaged."""
