"""The hidden size of a transformer: its stream rotated, then narrowed."""
