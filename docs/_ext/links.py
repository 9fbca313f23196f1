"""Follows every link inside the built pages: one that leads nowhere is a warning of the build."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from sphinx.application import Sphinx
from sphinx.util import logging

WARN = logging.getLogger(__name__).warning


class Page(HTMLParser):
    """The anchors of a page, and its links."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Reads id, name, href and src."""
        for name, value in attrs:
            if name in ("id", "name"):
                self.anchors.add(value or "")
            elif name in ("href", "src"):
                self.links.add(value or "")


def follow(app: Sphinx, exception: Exception | None) -> None:
    """Warns of links to files and anchors that the built pages do not have."""
    if exception or app.builder.format != "html":
        return
    root = Path(app.outdir).resolve()
    paths = [path for path in root.rglob("*.html") if "_static" not in path.parts]
    pages = {path: Page(path) for path in paths}
    for path, page in pages.items():
        listing = "_modules" in path.parts  # its private names are documented nowhere
        for link in page.links:
            if re.match(r"[a-z]+:|//", link):
                continue
            parts = urlsplit(link)
            to, anchor = unquote(parts.path), unquote(parts.fragment)
            goal = (path.parent / to).resolve() if to else path
            lost = anchor and not listing and goal in pages and anchor not in pages[goal].anchors
            if lost or not goal.exists():
                WARN("%s links to %s, which is not there", path.relative_to(root), link)


def setup(app: Sphinx) -> dict[str, Any]:
    """Follows the links when the pages are written."""
    app.connect("build-finished", follow)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
