"""Debian's Chromium, driven by Playwright."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

WAIT_MS = 90_000  # for whatever a page is to show: a machine with two cores may be busy
CHROMIUM = shutil.which("chromium")
SCREENSHOTS = os.environ.get("AUTOTUNE_SCREENSHOTS")  # a folder; pictures are taken only where it is given

expect.set_options(timeout=WAIT_MS)


@contextmanager
def browser_page(width: int = 1280, height: int = 800, script: str = "") -> Iterator[Page]:
    """A page of this size; `script` runs before each document's own."""
    assert CHROMIUM, "Chromium is missing: `make browser` installs it"
    with sync_playwright() as playwright:
        # Chromium's sandbox refuses to run as root, which tests in a container do.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        context = browser.new_context(viewport={"width": width, "height": height})
        context.add_init_script(script)
        context.set_default_timeout(WAIT_MS)
        try:
            yield context.new_page()
        finally:
            browser.close()


def picture(page: Page, name: str) -> None:
    if SCREENSHOTS:
        page.screenshot(path=Path(SCREENSHOTS) / f"{name}.png")
