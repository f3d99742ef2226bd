"""``allocator="auto"``: rules compete on the user's model and data, and the best of them decides."""

from secateur.auto.auto import Auto

__all__ = ["Auto"]
