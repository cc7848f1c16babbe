"""Draw the README's picture: parts of a report, side by side.

    python benchmarks/picture.py data/reports/RUN.html docs/report.png

The report is that of `make quickstart`. Needs Chromium.
"""

from __future__ import annotations

import argparse
import io
import shutil
from pathlib import Path
from typing import Any

from PIL import Image

_WIDTH = 1180  # of the page, in pixels
_LEFT, _RIGHT = [("header", "section#cell")], [("h2#wrong", "h2#unsure"), ("h2#places", "h2#copies")]


def main(report: Path, out: Path) -> None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": _WIDTH, "height": 1000})
        page.goto(report.resolve().as_uri())
        page.wait_for_timeout(1000)  # for the map
        whole = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
        columns = [stacked([cut(whole, page, *part) for part in parts]) for parts in (_LEFT, _RIGHT)]
        browser.close()
    side_by_side(columns).save(out, optimize=True)


def cut(whole: Image.Image, page: Any, first: str, after: str) -> Image.Image:
    top, bottom = (page.locator(name).first.bounding_box()["y"] for name in (first, after))
    return whole.crop((0, max(0, int(top) - 20), whole.width, int(bottom) - 20))


def stacked(parts: list[Image.Image]) -> Image.Image:
    found = Image.new("RGB", (_WIDTH, sum(part.height for part in parts)), "white")
    top = 0
    for part in parts:
        found.paste(part, (0, top))
        top += part.height
    return found


def side_by_side(columns: list[Image.Image]) -> Image.Image:
    height = max(column.height for column in columns)
    found = Image.new("RGB", (_WIDTH * len(columns), height), "white")
    for number, column in enumerate(columns):
        found.paste(column, (_WIDTH * number, 0))
    return found.resize((_WIDTH, height * _WIDTH // found.width), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    main(given.report, given.out)
