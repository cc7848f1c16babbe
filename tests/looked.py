"""Pages in a real browser: what they ask for and complain of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CHROMIUM = Path("/usr/bin/chromium")
PATIENCE_MS = 300_000.0  # a busy machine takes its time


class Looked:
    """A page in a browser, and whatever it asked for or complained of."""

    def __init__(self, browser: Any, address: str, **context: Any) -> None:
        self.context = browser.new_context(**context)
        self.context.set_default_timeout(PATIENCE_MS)
        self.page = self.context.new_page()
        self.request, self.said = list[str](), list[str]()
        self.page.on("request", lambda request: self.request.append(request.url))
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.goto(address)

    def violations(self) -> list[str]:
        """Return what axe-core finds that keeps somebody from reading the page."""
        from axe_playwright_python.sync_playwright import Axe

        found = Axe().run(self.page).response["violations"]
        return [f"{each['id']}: {each['nodes'][0]['html'][:200]}" for each in found]

    def check_quiet(self, *allowed: str) -> None:
        """Fail if something was complained of, or fetched from elsewhere than files and addresses that begin so."""
        assert self.said == []
        assert all(url.startswith(("file:", "data:", *allowed)) for url in self.request)
