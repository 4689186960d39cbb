"""A hook of mkdocs: what pages show of links that lead out of ``docs/``.

A link to a file of the repository that is no page becomes its text; one to nothing is a warning.
A number and its error stay in one line.
"""

import logging
import re
from pathlib import Path
from typing import Any

LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)")
DOCS = Path(__file__).parent
LOG = logging.getLogger("mkdocs.hooks.outside")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Change links out of docs/ to GitHub's, as mkdocs reads a page."""
    source = DOCS / page.file.src_uri

    def inside(link: re.Match[str]) -> str:
        target = (source.parent / link[2]).resolve()
        if target.is_relative_to(DOCS):
            return link[0]
        if not target.exists():
            LOG.warning("%s: there is no %s", page.file.src_uri, link[2])
        return link[1]

    return LINK.sub(inside, markdown).replace(" ± ", "\u00a0±\u00a0")
