"""MkDocs hook: pages from outside of docs/, and links to files of the repository.

Pages in docs/ link to files as GitHub shows them, relative to their own place. The site holds some of these files under
other addresses, and most of them not at all:

- The files in `extra.pages` of mkdocs.yml become pages of the site.
- A link to any other file leads to `extra.source` of mkdocs.yml, the repository at the commit of the site; if that is
  not set, only its text stays.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping
from typing import Any

_LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")
_CODE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages from outside of docs/."""
    from mkdocs.structure.files import File

    folder = posixpath.dirname(config["config_file_path"])
    for path, page in config["extra"]["pages"].items():
        files.append(File.generated(config, page, abs_src_path=posixpath.join(folder, path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Rewrite the links of a page."""
    return rewrite_links(markdown, page.file.src_uri, config["extra"]["pages"], config["extra"]["source"])


def rewrite_links(markdown: str, page: str, pages: Mapping[str, str], source: str) -> str:
    """Rewrite the links that lead out of docs/, outside of code blocks.

    Args:
        markdown: the page's text.
        page: its place in the site.
        pages: path in the repository → place in the site, of the pages from outside of docs/.
        source: where other files of the repository are; without it, the text of a link to one stays alone.

    Returns:
        The text with links that are relative to the page's place in the site.
    """
    place = {site: path for path, site in pages.items()}.get(page, f"docs/{page}")

    def rewrite(match: re.Match[str]) -> str:
        text, link, anchor = match[1], match[2], match[3] or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(place), link))
        target = pages.get(path, path.removeprefix("docs/") if path.startswith("docs/") else None)
        if target is not None:
            return f"[{text}]({posixpath.relpath(target, posixpath.dirname(page) or '.')}{anchor})"
        return f"[{text}]({source}/{path}{anchor})" if source else text

    parts = _CODE.split(markdown)
    return "".join(part if part.startswith("```") else _LINK.sub(rewrite, part) for part in parts)
