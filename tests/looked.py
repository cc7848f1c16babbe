"""A page in a real browser, with its requests and its console's messages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conftest import TIMEOUT_S

CHROMIUM = Path("/usr/bin/chromium")


class Looked:
    """A page in a browser, the addresses that it requested, and the messages and errors in its console."""

    def __init__(self, browser: Any, address: str, **context: Any) -> None:
        self.context = browser.new_context(**context)
        self.context.set_default_timeout(1000 * TIMEOUT_S)
        self.page = self.context.new_page()
        self.requests, self.console = list[str](), list[str]()
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.console.append(message.text))
        self.page.on("pageerror", lambda error: self.console.append(str(error)))
        self.page.goto(address)

    def violations(self) -> list[str]:
        """Return the violations of accessibility rules that axe-core finds, each with the element's HTML."""
        from axe_playwright_python.sync_playwright import Axe

        found = Axe().run(self.page).response["violations"]
        return [f"{each['id']}: {each['nodes'][0]['html'][:200]}" for each in found]

    def check_quiet(self, *allowed: str) -> None:
        """Fail on a console message, or on a request for anything but files and addresses with an allowed prefix."""
        assert self.console == []
        assert all(url.startswith(("file:", "data:", *allowed)) for url in self.requests)
