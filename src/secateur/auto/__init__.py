"""``allocator="auto"``: rules compete on the user's model and data, and the best of them decides."""

from secateur.auto.auto import Auto
from secateur.auto.choose import choose
from secateur.auto.outcome import Choice

__all__ = ["Auto", "Choice", "choose"]
