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
from typing import Any

from mkdocs.structure.files import File, Files

_LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")
_CODE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages from outside of docs/."""
    for path, page in config["extra"]["pages"].items():
        folder = posixpath.dirname(config["config_file_path"])
        files.append(File.generated(config, page, abs_src_path=posixpath.join(folder, path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Rewrite the links of a page that lead out of docs/, outside of code blocks."""
    pages = config["extra"]["pages"]
    place = {site: path for path, site in pages.items()}.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def rewrite(match: re.Match[str]) -> str:
        text, link, anchor = match[1], match[2], match[3] or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(place), link))
        target = pages.get(path, path.removeprefix("docs/") if path.startswith("docs/") else None)
        if target is not None:
            return f"[{text}]({posixpath.relpath(target, posixpath.dirname(page.file.src_uri))}{anchor})"
        source = config["extra"]["source"]
        return f"[{text}]({source}/{path}{anchor})" if source else text

    parts = _CODE.split(markdown)
    return "".join(part if part.startswith("```") else _LINK.sub(rewrite, part) for part in parts)
