"""Tests mirror src/; zoo holds whole architectures."""
