"""What all messages have in common."""

from __future__ import annotations

import pytest

from secateur.errors import SettingError


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("got none: Pass these.. Do this.", "got none: Pass these. Do this."),
        ("got none: Pass these..", "got none: Pass these."),
        ("load(../x): and so on... Do this.", "load(../x): and so on... Do this."),
    ],
)
def test_a_sentence_that_is_quoted_ends_with_one_full_stop(text: str, shown: str) -> None:
    assert str(SettingError(text)) == shown
