"""``allocator="auto"``: try several allocators on the user's model and data, and take the best."""

from secateur.pipeline.auto.auto import Auto

__all__ = ["Auto"]
