"""Measurements. Each `bench_*.py` prints a table and writes JSON into results; see CONTRIBUTING.md."""
