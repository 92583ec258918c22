"""Hooks of MkDocs: links from a page to files outside docs/ work in the site as they do in the repository.

Pages link to code, presets and reports by relative paths, as GitHub resolves them. The site gets a copy of each linked
file under ``repository/``, so that it needs no address of a repository. A report has its HTML page as the target, other
text files are copied with the ending ``.txt``, and a link to a folder becomes plain text.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

COPIES = "repository"
AS_THEY_ARE = (".html", ".png", ".svg", ".jpg", ".csv")  # Endings that a browser shows.
LINK = re.compile(r"(?<=\]\()(?P<target>\.\./[^)\s#]+)(?P<anchor>#[^)\s]*)?(?=\))")
TO_FOLDER = re.compile(r"(?<!!)\[(?P<text>[^\]]*)\]\((?P<target>\.\./[^)\s#]+)\)")
ROLE = re.compile(r":(?:func|class|meth|data|mod|attr|exc):(?P<code><code>)~?")


def outside(page: str, target: str) -> str | None:
    """Returns the path of a link's target from the repository's top folder; ``None`` if it lies in docs/.

    Args:
        page: Path of the page in docs/.
        target: Relative link in it.
    """
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), target))
    return None if path.startswith("docs/") else path


def copy_of(root: Path, path: str) -> tuple[str, Path]:
    """Returns the place in the site, and the file that is copied there, of a file of the repository."""
    page = (root / path).with_suffix(".html")
    if path.endswith(".md") and page.is_file():
        return f"{COPIES}/{Path(path).with_suffix('.html').as_posix()}", page
    return f"{COPIES}/{path}" if path.endswith(AS_THEY_ARE) else f"{COPIES}/{path}.txt", root / path


def linked(root: Path, page: str, markdown: str) -> Iterator[tuple[str, Path]]:
    """Yields place and file, as :func:`copy_of`, of all files outside docs/ that a page links to."""
    for match in LINK.finditer(markdown):
        path = outside(page, match["target"])
        if path is not None and (root / path).is_file():
            yield copy_of(root, path)


def on_files(files: Files, *, config: Any) -> Files:
    """Add a copy of every linked file to the site."""
    root = Path(config.config_file_path).parent
    for page in list(files.documentation_pages()):
        for place, path in linked(root, page.src_uri, page.content_string):
            if files.get_file_from_path(place) is None:
                files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Point links that leave docs/ to the copies."""
    root, name = Path(config.config_file_path).parent, page.file.src_uri

    def folder(match: re.Match[str]) -> str:
        path = outside(name, match["target"])
        return match["text"] if path is not None and (root / path).is_dir() else match[0]

    def file(match: re.Match[str]) -> str:
        path = outside(name, match["target"])
        if path is None or not (root / path).is_file():
            return match[0]
        return posixpath.relpath(copy_of(root, path)[0], posixpath.dirname(name) or ".")

    return LINK.sub(file, TO_FOLDER.sub(folder, markdown))


def on_page_content(html: str, **_: Any) -> str:
    """Remove the roles of reStructuredText that docstrings have before names."""
    return ROLE.sub(lambda match: match["code"], html)
