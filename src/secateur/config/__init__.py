"""The settings of a run: one pydantic model, read from files and options. It needs no torch."""
