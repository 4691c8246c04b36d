"""A headless browser for tests of pages, without any download."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import need
import pytest


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A selenium driver. `browser.get(path.as_uri())`, then `browser.get_log("browser")` for what the page complained of,
    and `browser.get_log("performance")` for what it asked the network for."""
    paths = need.chromium()
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = paths.browser
    # no-sandbox: the sandbox refuses to run as root; dev-shm: containers have a small one.
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--window-size=1280,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=paths.driver))
    yield driver
    driver.quit()
