"""Linear layers of low rank: one layer replaced by two, with few directions in between."""
