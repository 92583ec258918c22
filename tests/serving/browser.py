"""Headless Chromium for tests; MMPHI_CHROMIUM, or one that is found, is used."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from builders import unavailable

CHROMIUM = os.environ.get("MMPHI_CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)


@contextmanager
def launched(flags: Sequence[str] = ()) -> Iterator[Any]:
    """A browser that reaches nothing but this machine; the test is skipped where none is installed.

    Args:
        flags: Further ones of Chromium.
    """
    if not CHROMIUM:
        unavailable("Chromium is not installed, and MMPHI_CHROMIUM names none")
    from playwright.sync_api import sync_playwright

    local = "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", local, *flags])
        yield browser
        browser.close()
