"""``allocator="auto"``: several rules are tried on the user's model and data, and the best decides."""

from secateur.auto.auto import Auto

__all__ = ["Auto"]
