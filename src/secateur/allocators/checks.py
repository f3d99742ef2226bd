"""Checks that several settings share."""

from __future__ import annotations

from numbers import Real

from secateur.errors import SettingError


def fraction(where: str, name: str, value: object, *, one: bool = False) -> float:
    """Return a setting as a float in [0, 1), or in [0, 1] if `one`.

    Args:
        where: Start of the error message, such as the allocator's name.
        name: The setting's name.
        value: The value to check.
        one: Whether 1 is allowed.

    Raises:
        SettingError: The value is no number in that range.
    """
    if not isinstance(value, bool) and isinstance(value, Real):
        number = float(value)
        if 0 <= number < 1 or (one and number == 1):
            return number
    interval = "[0, 1]" if one else "[0, 1)"
    raise SettingError(f"{where}: expected {name} in {interval}, got {value!r}. Give a number in that range.")
