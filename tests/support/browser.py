"""The Chromium that drives the local pages in tests."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest
from playwright.sync_api import Browser, Playwright, expect, sync_playwright

from tests.support.review_server import PATIENCE


def browser_path(playwright: Playwright) -> str | None:
    """The Chromium that is there: one that is named, one on the PATH, or the one that playwright has installed."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    own = playwright.chromium.executable_path
    return found or (own if Path(own).is_file() else None)


def without_browser(reason: str) -> NoReturn:
    """Skip, or fail where a browser must be there."""
    if os.environ.get("BYG_REQUIRE_BROWSER"):
        pytest.fail(f"BYG_REQUIRE_BROWSER is set and there is {reason}")
    pytest.skip(f"the review page is not tested: {reason}")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        found = browser_path(playwright)
        if found is None:
            without_browser("no Chromium on the PATH, at CHROMIUM or from `playwright install chromium`")
        launched = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"], timeout=PATIENCE * 1000)
        expect.set_options(timeout=PATIENCE * 1000)
        yield launched
        launched.close()
