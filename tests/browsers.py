"""A browser without a window, for tests that look at pages."""

import shutil
import subprocess

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def find_browser():
    """Returns the path of a browser; skips the test if there is none."""
    found = [path for name in BROWSERS if (path := shutil.which(name))]
    if not found:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is there")
    return found[0]


def browse(browser, page, width, height, *arguments):
    """Returns what a browser prints about a page in a window of some size."""
    folder = page.parent / f"profile{width}"
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
        "--no-first-run", "--disable-background-networking", "--hide-scrollbars",
        "--disable-component-update", "--disable-sync", f"--user-data-dir={folder}",
        f"--window-size={width},{height}", *arguments, page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        timeout=120,
        check=True,
    )
    return done.stdout.decode()
