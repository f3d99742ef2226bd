r"""Text of strangers that cannot act on a terminal, reverse its direction, or hide: shown as escapes.

Names come from files and models. A control character could move the cursor over what was written before, a
bidirectional one could show it in another order.
"""

from __future__ import annotations

import re

_ACTIVE = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u00ad\u034f\u0600-\u0605\u061c\u06dd\u070f\u115f\u1160\u180b-\u180f"
    "\u200b-\u200f\u2028-\u202e\u2060-\u206f\u3164\ud800-\udfff\ufeff\uffa0\ufff9-\ufffb"
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
"""Control, format and bidirectional characters, halves of pairs, and what is invisible; not the line feed."""


def inert(text: str) -> str:
    r"""Replace characters that act, or that nobody sees, by escapes as JSON has them. Line feeds stay.

    Example:
        >>> print(inert("a\x1b[31mb\u202ec"))
        a\u001b[31mb\u202ec
    """
    return _ACTIVE.sub(_escaped, text)


def inert_line(text: str) -> str:
    r"""The same for one line: line feeds are escaped too.

    Example:
        >>> print(inert_line("a\nb"))
        a\nb
    """
    return inert(text).replace("\n", "\\n")


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x10000:
        return f"\\u{code:04x}"
    high, low = divmod(code - 0x10000, 0x400)
    return f"\\u{0xD800 + high:04x}\\u{0xDC00 + low:04x}"
