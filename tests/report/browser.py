"""A headless browser that says what is wrong with how a page looks."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
WIDTHS = (400, 1400)

LOOK = (Path(__file__).parent / "look.js").read_text(encoding="utf-8")


def browser() -> str:
    """The browser's path; the test that asks skips where there is none."""
    named = os.environ.get("CHROME") or next(filter(None, map(shutil.which, NAMES)), None)
    if named is None:
        pytest.skip(
            f"no browser to look with: none of {', '.join(NAMES)} is installed, and CHROME is not set"
        )
    return named


def look(page: str, folder: Path, *, dark: bool) -> tuple[list[dict[str, Any]], list[str]]:
    """Opens a page in frames of `WIDTHS`: what was seen in each, and what the console said."""
    frames = "".join(
        f'<iframe style="border:0;height:900px;width:{width}px" srcdoc="{html.escape(page)}"></iframe>'
        for width in WIDTHS
    )
    outer = folder / "outer.html"
    outer.write_text(
        f'<!DOCTYPE html><meta charset="utf-8"><style>:root {{ color-scheme: light dark }}</style>'
        f'<link rel="icon" href="data:,"><pre id="seen"></pre>{frames}<script>{LOOK}</script>',
        encoding="utf-8",
    )
    ran = subprocess.run(
        [
            browser(),
            "--headless",
            "--hide-scrollbars",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={folder / 'profile'}",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            "--enable-logging=stderr",
            "--dump-dom",
            outer.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    seen = re.search(r'<pre id="seen">(.*?)</pre>', ran.stdout, re.DOTALL)
    assert seen is not None, ran.stderr
    said = [line for line in ran.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(html.unescape(seen[1])), said
